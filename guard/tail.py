"""One scale for all signals: minus log10 of how often a clean request is at least this odd.

Inside the range of the clean scores that is their rank. Beyond the 90th percentile the rank is continued by an
exponential tail (the mean excess of the clean scores above it), because a request twice as far out as any clean one
must score higher than one that is barely out, and ranks alone cannot say so. The scale need not be exact: the promise
of the test comes from the conformal step (`sequential`), which holds for any fixed score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

_ANCHOR = 0.90
CEILING = 30.0  # a score of 30 is odds of 1 in 10^30: nothing is gained by telling such requests apart


@dataclass(frozen=True)
class Tail:
    """The clean scores of one signal at one checkpoint, sorted float64 [n], and which side is odd."""

    clean: np.ndarray
    side: Literal["upper", "both"]

    def oddness(self, score: np.ndarray) -> np.ndarray:
        """-log10 tail probability, float64 [m] in [0, CEILING]; a score that is not finite gives NaN."""
        upper = _survival(self.clean, score)
        if self.side == "upper":
            log10p = upper
        else:
            lower = _survival(-self.clean[::-1], -score)
            log10p = np.minimum(np.minimum(upper, lower) + np.log10(2.0), 0.0)
        odd = np.clip(-log10p, 0.0, CEILING)
        return np.where(np.isfinite(score), odd, np.nan)


def _survival(clean: np.ndarray, score: np.ndarray) -> np.ndarray:
    """log10 P(clean >= score), ranks up to the anchor and an exponential tail beyond it."""
    n = len(clean)
    at_least = n - np.searchsorted(clean, score, side="left")
    rank = np.log10((at_least + 1) / (n + 1))
    anchor = np.quantile(clean, _ANCHOR)
    excess = float((clean[clean > anchor] - anchor).mean()) if (clean > anchor).any() else 0.0
    if excess <= 1e-9 * max(1.0, abs(float(anchor))):
        return rank  # a signal that hardly varies on clean requests: its extremes cannot be told apart
    beyond = np.log10(1.0 - _ANCHOR) - (score - anchor) / excess / np.log(10.0)
    return np.where(score > anchor, beyond, rank)
