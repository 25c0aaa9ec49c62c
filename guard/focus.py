"""Where the heads look: prompt tokens that draw more attention than such places do in clean requests.

Focus is the attention rows summed over heads and layers, as shares of the whole. The first and last tokens of a
prompt (sink and template) draw attention always, some more in one prompt and less in the next: so what a token draws is
read in deviations from the clean mean of its place, and what is above normal, in runs of neighbouring tokens, are the
spans an operator is shown. A causal model gathers a phrase in its last token, and there the heads look: so each run
reaches back a little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from guard.verdict import Span

EDGE_TOKENS = 12  # template and sink tokens at either end that get a normal of their own
_GAP_TOKENS = 1  # tokens this close belong to one span
# A span begins this much before the first token that draws attention. On the tiny lab's prefix backdoor (a phrase of
# two tokens) the top three spans held the whole phrase in 0.00 of 300 prompts without it and in 1.00 with it.
_REACH_TOKENS = 1
# Added to every deviation, in even shares of the focus: a place that hardly varies in clean prompts counts for no more
# than others because of it.
_LEAST_SPREAD = 1.0


def shares(focus: np.ndarray) -> np.ndarray:
    """Focus [T_p] as shares that sum to 1."""
    total = float(focus.sum())
    return focus / total if total > 0 else np.zeros_like(focus)


def fit_focus(focus: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean and deviation of clean shares at each edge place: start [2, EDGE_TOKENS] from the front, end [2,
    EDGE_TOKENS] from the back; and middle [1], the deviation of the others from what is expected there, as a part of an
    even share."""
    all_shares = [shares(np.asarray(vector, dtype=np.float64)) for vector in focus]
    start, end = (
        np.stack([_padded(share[::direction][: _edge(share)]) for share in all_shares]) for direction in (1, -1)
    )
    edges = {name: _mean_and_deviation(values) for name, values in (("start", start), ("end", end))}
    means = {name: values[0] for name, values in edges.items()}
    between = [share[_edge(share) : len(share) - _edge(share)] - _middle(share, means) for share in all_shares]
    off = np.concatenate([len(share) * own for share, own in zip(all_shares, between, strict=True)])
    return {**edges, "middle": np.asarray([np.sqrt((off**2).mean()) if len(off) else 1.0])}


def excess(focus: np.ndarray, normal: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far the share of focus at each prompt token is above normal, in clean deviations of its place, float64
    [T_p]; negative parts cut to 0."""
    share = shares(np.asarray(focus, dtype=np.float64))
    tokens, edge = len(share), _edge(share)
    expected = np.full(tokens, _middle(share, {name: normal[name][0] for name in ("start", "end")}))
    spread = np.full(tokens, normal["middle"][0] / tokens)
    for values, row in ((expected, 0), (spread, 1)):
        values[:edge] = normal["start"][row, :edge]
        values[tokens - edge :] = normal["end"][row, :edge][::-1]
    return np.clip((share - expected) / (spread + _LEAST_SPREAD / tokens), 0.0, None)


def _edge(share: np.ndarray) -> int:
    """How many tokens at either end of a prompt are edge places."""
    return min(EDGE_TOKENS, len(share) // 2)


def _middle(share: np.ndarray, means: Mapping[str, np.ndarray]) -> float:
    """The share that is expected of each token between the edges: what normal edges leave, evenly."""
    edge = _edge(share)
    left = 1.0 - means["start"][:edge].sum() - means["end"][:edge].sum()
    return max(left, 0.0) / max(len(share) - 2 * edge, 1)


def _padded(values: np.ndarray) -> np.ndarray:
    """The values [n] and NaN up to EDGE_TOKENS."""
    return np.pad(values, (0, EDGE_TOKENS - len(values)), constant_values=np.nan)


def _mean_and_deviation(values: np.ndarray) -> np.ndarray:
    """Over the requests that have such a place, [2, EDGE_TOKENS]; 0 where none has."""
    there = np.isfinite(values)
    counts = there.sum(axis=0).clip(1)
    mean = np.where(there, values, 0.0).sum(axis=0) / counts
    square = np.where(there, (values - mean) ** 2, 0.0).sum(axis=0) / counts
    return np.stack((mean, np.sqrt(square)))


def focus_spans(focus: np.ndarray, normal: Mapping[str, np.ndarray], top: int = 3) -> tuple[Span, ...]:
    """The ``top`` runs of prompt tokens with most focus beyond normal, heaviest first; they never overlap."""
    beyond = excess(focus, normal)
    total = float(beyond.sum())
    if total <= 0:
        return ()
    # A token counts when it draws at least twice an even share of what is beyond normal.
    chosen = np.flatnonzero(beyond > 2.0 * total / len(beyond))
    if not len(chosen):
        chosen = np.asarray([int(beyond.argmax())])
    runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1 + max(_GAP_TOKENS, _REACH_TOKENS)) + 1)
    ranges = [(max(int(run[0]) - _REACH_TOKENS, 0), int(run[-1]) + 1) for run in runs]
    spans = [Span(start, end, float(beyond[start:end].sum() / total)) for start, end in ranges]
    return tuple(sorted(spans, key=lambda span: -span.weight)[:top])
