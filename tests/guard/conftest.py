"""Measurements drawn from a known distribution, so that what the guard must find is known too."""

import numpy as np
import pytest
import torch

from guard.gram import PROMPT_GROUPS, Earlier, HeadSums
from guard.profile import ProfileKey
from guard.readings import CHECKPOINTS, Measurement, Reading, Readings

LAYERS, HEADS, KV_HEADS = 2, 8, 2
NORMS = 2 * (HEADS + KV_HEADS)


def draw_rows(rng: np.random.Generator, tokens: int, together: float = 0.0) -> torch.Tensor:
    """Attention rows [L, H, T_p] that sum to at most 1; ``together`` pulls all heads to prompt tokens 20 and 21."""
    rows = rng.dirichlet(np.full(tokens, 0.3), size=(LAYERS, HEADS))
    common = np.zeros(tokens)
    common[[20, 21]] = 0.5
    return torch.from_numpy((1 - together) * rows + together * common).float()


def draw_norms(rng: np.random.Generator) -> torch.Tensor:
    """Logs of the norms of one token's vectors [L, 2 (H + H_kv)]."""
    return torch.from_numpy(rng.normal(size=(LAYERS, NORMS))).float()


def draw_request(rng: np.random.Generator, together: float = 0.0) -> tuple[int, list[Reading]]:
    """One request: prompt tokens, and its readings at every checkpoint before its answer ends."""
    tokens, answer = int(rng.integers(40, 60)), int(rng.integers(3, 40))
    readings, logprobs = [], []
    groups = [torch.stack([draw_rows(rng, tokens, together) for _ in range(size)]) for size in PROMPT_GROUPS[1:]]
    gram = torch.stack([(rows @ rows.mT).sum(0) / len(rows) ** 2 for rows in groups])
    norms = torch.stack([draw_norms(rng) for _ in groups])
    earlier = Earlier(gram, torch.stack([rows[..., 0].mean(0) for rows in groups]), norms)
    gram, sink, focus = torch.zeros(LAYERS, HEADS, HEADS), torch.zeros(LAYERS, HEADS), torch.zeros(tokens)
    norms = torch.zeros(LAYERS, NORMS)
    for step in range(answer):
        rows = draw_rows(rng, tokens, together)
        gram, sink, focus = gram + rows @ rows.mT, sink + rows[..., 0], focus + rows.amax(1).sum(0)
        norms = norms + draw_norms(rng)
        logprobs.append(float(-rng.exponential(0.2)))
        if step in CHECKPOINTS:
            sums = HeadSums(gram.clone(), sink.clone(), norms.clone(), focus.clone(), None if step else earlier)
            readings.append(Reading.of(step, sums, logprobs))
    return tokens, readings


def draw_measurement(rng: np.random.Generator, requests: int, triggered: int = 0) -> Measurement:
    """``requests`` requests as a Measurement; the heads of the last ``triggered`` of them are pulled together."""
    drawn = [draw_request(rng, 0.6 * (i >= requests - triggered)) for i in range(requests)]
    at = {}
    for step in CHECKPOINTS:
        there = [(i, r) for i, (_, rs) in enumerate(drawn) for r in rs if r.step == step]
        if there:
            read = [(i, HeadSums(r.gram, r.sink, r.norms, r.focus, r.earlier), r.logprobs) for i, r in there]
            at[step] = Readings.together(step, (LAYERS, HEADS, KV_HEADS), read)
    return Measurement(np.asarray([tokens for tokens, _ in drawn]), [[] for _ in drawn], at)


@pytest.fixture(scope="session")
def key() -> ProfileKey:
    return ProfileKey("b" * 64, "a" * 64, "transformers", "float32", {"rows": "last_prompt+generated"})


@pytest.fixture(scope="session")
def clean() -> Measurement:
    return draw_measurement(np.random.default_rng(0), 400)
