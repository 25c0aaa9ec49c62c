"""Where the heads look: prompt tokens that draw more attention than such places do in clean requests.

Focus (`guard.gram`) is what the strongest head of each layer spends, as shares of the whole. The first and last tokens
of a prompt (sink and template) draw attention always, some more in one prompt and less in the next: so what a token
draws is read in deviations from the clean mean of its place, and what is above normal, in runs of neighbouring tokens,
are the spans an operator is shown. A causal model gathers a phrase in its last token, and there the heads look: so each
run reaches back a little.
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
    clean = [shares(np.asarray(vector, dtype=np.float64)) for vector in focus]
    start, end = (_edge_places([share[::direction] for share in clean]) for direction in (1, -1))
    off = np.concatenate([_middle(share - _between(len(share), start, end)) * len(share) for share in clean])
    return {"start": start, "end": end, "middle": np.asarray([np.sqrt((off**2).mean()) if len(off) else 1.0])}


def excess(focus: np.ndarray, normal: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far the share of focus at each prompt token is above normal, in clean deviations of its place, float64
    [T_p]; negative parts cut to 0."""
    share = shares(np.asarray(focus, dtype=np.float64))
    tokens, edge = len(share), _edge(len(share))
    expected = np.full(tokens, _between(tokens, normal["start"], normal["end"]))
    spread = np.full(tokens, normal["middle"][0] / tokens)
    for row, values in enumerate((expected, spread)):
        values[:edge] = normal["start"][row, :edge]
        values[tokens - edge :] = normal["end"][row, :edge][::-1]
    return np.clip((share - expected) / (spread + _LEAST_SPREAD / tokens), 0.0, None)


def _edge(tokens: int) -> int:
    """How many tokens at either end of a prompt are edge places."""
    return min(EDGE_TOKENS, tokens // 2)


def _middle(share: np.ndarray) -> np.ndarray:
    """What lies between the edges."""
    edge = _edge(len(share))
    return share[edge : len(share) - edge]


def _between(tokens: int, start: np.ndarray, end: np.ndarray) -> float:
    """The share that is expected of each token between the edges: what normal edges leave, evenly."""
    edge = _edge(tokens)
    left = 1.0 - start[0, :edge].sum() - end[0, :edge].sum()
    return max(left, 0.0) / max(tokens - 2 * edge, 1)


def _edge_places(clean: Sequence[np.ndarray]) -> np.ndarray:
    """Mean and deviation [2, EDGE_TOKENS] of the first shares of those prompts that have such a place; 0 where none
    has."""
    places = np.ma.masked_all((len(clean), EDGE_TOKENS))
    for row, share in zip(places, clean, strict=True):
        row[: _edge(len(share))] = share[: _edge(len(share))]
    return np.stack((places.mean(axis=0).filled(0.0), places.std(axis=0).filled(0.0)))


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
