"""The features of one request at one checkpoint that multivariate signals are made of.

Three families, all from the head Gram and the sink, none of which needs the attention rows themselves: how alike heads
look (arctanh cosine of each pair within a layer), how sharply each looks (log norm of its mean row: 0 for a single
token, -log sqrt(T) for all alike), and how much it rests (log share on prompt token 0). On the lab's implants the last
two raise the true-positive rate at 1 % more than pairs across layers do, which would need rows of all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from guard.similarity import fisher

_FLOOR = 1e-4  # shares and norms below it are one: a head that never looks at the prompt
_Z_LIMIT = 6.0  # a feature this many deviations out says no more than that: one broken head must not decide
_SPREAD = 0.02  # keeps a feature that hardly ever moves from dominating once it does (lab-findings, section 7)


def head_features(cosines: np.ndarray, gram: torch.Tensor, sink: torch.Tensor, rows: int) -> np.ndarray:
    """Features float64 [n, P + 2 L H] from cosines [n, P], gram [n, L, H, H] and sink [n, L, H] summed over rows."""
    norms = gram.diagonal(dim1=-2, dim2=-1).flatten(1).double().cpu().numpy().clip(0.0)
    shares = sink.flatten(1).double().cpu().numpy() / rows
    return np.concatenate(
        (fisher(cosines), np.log(np.sqrt(norms) / rows + _FLOOR), np.log(shares.clip(0.0) + _FLOOR)), axis=1
    )


@dataclass(frozen=True)
class Scale:
    """Mean and deviation [F] of clean features: what a revision's own features are measured against."""

    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> Scale:
        """From clean features [n, F]."""
        return cls(features.mean(axis=0), features.std(axis=0) + _SPREAD)

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Scale:
        """From arrays named ``mean`` and ``spread``."""
        return cls(arrays["mean"], arrays["spread"])

    def arrays(self) -> dict[str, np.ndarray]:
        """The two arrays by name."""
        return {"mean": self.mean, "spread": self.spread}

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """Features [n, F] in clean deviations, clipped."""
        return np.clip((features - self.mean) / self.spread, -_Z_LIMIT, _Z_LIMIT)
