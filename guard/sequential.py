"""The promise: over the whole request, all signals and checkpoints together, a clean one is flagged with probability
at most alpha.

A request's statistic is the running maximum, over the checkpoints it has reached, of its largest oddness. Its p-value
is conformal (Vovk, Gammerman and Shafer, 2005): the rank of that maximum among the *final* maxima of held-out clean
requests of like prompt length, p = (1 + #{M_i >= M}) / (n + 1). The running maximum never exceeds the final one, so
the event "p <= alpha at some checkpoint" is the event "p <= alpha at the end", whose probability is at most alpha
whenever the request and the held-out ones are exchangeable: drawn from the same traffic, in any order. It says nothing
about traffic of another kind, which is why prompts of a length that calibration never saw are not scored at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guard.errors import AlphaTooFine

_LENGTH_MARGIN = 1.25  # a prompt may be this much longer or shorter than any calibrated one and still be compared


@dataclass(frozen=True)
class Bucket:
    """Held-out clean requests with prompts of ``low`` to ``high`` tokens, both included: final maxima, sorted [n]."""

    low: int
    high: int
    maxima: np.ndarray

    @property
    def smallest_p(self) -> float:
        """No p-value of this bucket is below it: 1 / (n + 1)."""
        return 1.0 / (len(self.maxima) + 1)

    def p_value(self, maximum: float) -> float:
        """Conformal p-value of a running maximum."""
        at_least = len(self.maxima) - np.searchsorted(self.maxima, maximum, side="left")
        return float((1 + at_least) / (len(self.maxima) + 1))


def bucket_edges(prompt_len: np.ndarray, smallest: int) -> list[int]:
    """Upper prompt lengths (tokens, inclusive) of buckets that hold at least ``smallest`` requests each.

    Natural edges are 64 and 256 tokens; a bucket that would be too small is merged with the next one.
    """
    edges: list[int] = []
    counted = 0
    longest = int(prompt_len.max())
    for edge in [e for e in (64, 256) if e < longest] + [longest]:
        inside = int((prompt_len <= edge).sum()) - counted
        if inside >= smallest or (edge == longest and not edges):
            edges.append(edge)
            counted += inside
        elif edge == longest:
            edges[-1] = longest
    return edges


def make_buckets(prompt_len: np.ndarray, maxima: np.ndarray, edges: list[int]) -> tuple[Bucket, ...]:
    """Buckets from the held-out requests: prompt_len int [n], maxima float64 [n], edges as of ``bucket_edges``."""
    buckets = []
    low = int(np.floor(prompt_len.min() / _LENGTH_MARGIN))
    for number, edge in enumerate(edges):
        inside = (prompt_len <= edge) & (prompt_len >= low)
        high = int(np.ceil(edge * _LENGTH_MARGIN)) if number == len(edges) - 1 else edge
        buckets.append(Bucket(low, high, np.sort(maxima[inside])))
        low = edge + 1
    return tuple(buckets)


def find_bucket(buckets: tuple[Bucket, ...], prompt_tokens: int) -> Bucket | None:
    """The bucket of a prompt length, or None when calibration saw nothing like it."""
    return next((b for b in buckets if b.low <= prompt_tokens <= b.high), None)


def check_alpha(buckets: tuple[Bucket, ...], alpha: float) -> None:
    """Raise AlphaTooFine unless every bucket can give a p-value of at most ``alpha``; ValueError outside (0, 1)."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha:g}.")
    worst = max(buckets, key=lambda bucket: bucket.smallest_p)
    if worst.smallest_p > alpha:
        raise AlphaTooFine(alpha, worst.smallest_p, len(worst.maxima))
