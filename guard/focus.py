"""Where the heads look: prompt tokens that draw more attention than such places do in clean requests.

Focus is the attention rows summed over heads and layers, as shares of the whole. The first and last tokens of a
prompt (sink and template) draw attention always, so the clean mean at each of these places is taken off before the
rest is read; what remains above normal, in runs of neighbouring tokens, are the spans an operator is shown. A causal
model gathers a phrase in its last token, and there the heads look: so each run reaches back a little.
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


def shares(focus: np.ndarray) -> np.ndarray:
    """Focus [T_p] as shares that sum to 1."""
    total = float(focus.sum())
    return focus / total if total > 0 else np.zeros_like(focus)


def fit_focus(focus: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Clean mean share at each edge place: start [EDGE_TOKENS] from the front, end [EDGE_TOKENS] from the back."""
    start, end = np.zeros((2, EDGE_TOKENS))
    counts = np.zeros((2, EDGE_TOKENS))
    for vector in focus:
        share = shares(vector)
        edge = min(EDGE_TOKENS, len(share) // 2)
        start[:edge] += share[:edge]
        end[:edge] += share[::-1][:edge]
        counts[:, :edge] += 1
    return {"start": start / counts[0].clip(1), "end": end / counts[1].clip(1)}


def excess(focus: np.ndarray, normal: Mapping[str, np.ndarray]) -> np.ndarray:
    """Share of focus beyond normal at each prompt token, float64 [T_p], negative parts cut to 0."""
    share = shares(np.asarray(focus, dtype=np.float64))
    tokens = len(share)
    edge = min(EDGE_TOKENS, tokens // 2)
    expected = np.zeros(tokens)
    expected[:edge] = normal["start"][:edge]
    expected[tokens - edge :] = normal["end"][:edge][::-1]
    middle = tokens - 2 * edge
    if middle:
        expected[edge : tokens - edge] = max(0.0, 1.0 - expected.sum()) / middle
    return np.clip(share - expected, 0.0, None)


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
