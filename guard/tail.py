"""One scale for all signals: minus log10 of how often a clean request is at least this odd.

Inside the range of the clean scores that is their rank. Beyond the 90th percentile the rank is continued by an
exponential tail (the mean excess of the clean scores above it), because a request twice as far out as any clean one
must score higher than one that is barely out, and ranks alone cannot say so. The scale need not be exact: the promise
of the test comes from the conformal step (`sequential`), which holds for any fixed score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

_ANCHOR = 0.90
CEILING = 30.0  # a score of 30 is odds of 1 in 10^30: nothing is gained by telling such requests apart


@dataclass(frozen=True)
class Tail:
    """The clean scores of one signal at one checkpoint, sorted float64 [n], and which side is odd."""

    clean: np.ndarray
    side: Literal["upper", "both"]

    @cached_property
    def _sides(self) -> tuple[_Side, ...]:
        upper = _Side.of(self.clean)
        return (upper,) if self.side == "upper" else (upper, _Side.of(-self.clean[::-1]))

    def oddness(self, score: np.ndarray) -> np.ndarray:
        """-log10 tail probability, float64 [m] in [0, CEILING]; a score that is not finite gives NaN."""
        log10p = self._sides[0].survival(score)
        if len(self._sides) == 2:
            log10p = np.minimum(np.minimum(log10p, self._sides[1].survival(-score)) + np.log10(2.0), 0.0)
        odd = np.clip(-log10p, 0.0, CEILING)
        return np.where(np.isfinite(score), odd, np.nan)


@dataclass(frozen=True)
class _Side:
    """One side of the clean scores, sorted [n]: where the exponential tail begins and its mean excess."""

    clean: np.ndarray
    anchor: float
    excess: float

    @classmethod
    def of(cls, clean: np.ndarray) -> _Side:
        anchor = float(np.quantile(clean, _ANCHOR))
        above = clean[clean > anchor]
        return cls(clean, anchor, float((above - anchor).mean()) if len(above) else 0.0)

    def survival(self, score: np.ndarray) -> np.ndarray:
        """log10 P(clean >= score), ranks up to the anchor and an exponential tail beyond it."""
        n = len(self.clean)
        at_least = n - np.searchsorted(self.clean, score, side="left")
        rank = np.log10((at_least + 1) / (n + 1))
        if self.excess <= 1e-9 * max(1.0, abs(self.anchor)):
            return rank  # a signal that hardly varies on clean requests: its extremes cannot be told apart
        beyond = np.log10(1.0 - _ANCHOR) - (score - self.anchor) / self.excess / np.log(10.0)
        return np.where(score > self.anchor, beyond, rank)
