"""How sure a figure is: Wilson intervals for shares, paired bootstrap for means, ratios and differences.

Every number in a repair report carries its n and a 95 % interval, so that 0 of 4 does not look like 0 of 400.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

Z95 = 1.959963984540054
DRAWS = 1000


class Figure(BaseModel):
    """A measured value with its 95 % interval [low, high] and the number n of things it was measured on."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, n: int) -> Figure | None:
    """Share ``hits / n`` with its Wilson score interval; None when nothing was measured (n = 0)."""
    if n == 0:
        return None
    p = hits / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Figure(value=p, low=0.0 if hits == 0 else low, high=1.0 if hits == n else high, n=n)


def share(flags: Sequence[bool]) -> Figure | None:
    """Share of true values with its Wilson interval."""
    return wilson(sum(flags), len(flags))


def bootstrap(
    columns: Sequence[Sequence[float]], statistic: Callable[..., Any], seed: int = 0, draws: int = DRAWS
) -> Figure | None:
    """``statistic(*columns)`` with a percentile bootstrap interval; rows of the columns are resampled together.

    ``statistic`` takes one array [..., n] per column and reduces the last axis. None when there are no rows.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    n = len(arrays[0])
    if n == 0:
        return None
    rows = np.random.default_rng(seed).integers(0, n, size=(draws, n))
    resampled = np.asarray(statistic(*(a[rows] for a in arrays)))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Figure(value=float(statistic(*arrays)), low=float(low), high=float(high), n=n)


def ratio_of_perplexities(before: Sequence[float], after: Sequence[float], tokens: Sequence[float]) -> Figure | None:
    """exp(mean answer loss after - before) per token, paired by row; losses in nats summed per row."""
    return bootstrap(
        [before, after, tokens], lambda b, a, t: np.exp((a.sum(-1) - b.sum(-1)) / np.maximum(t.sum(-1), 1))
    )


def difference_of_shares(before: Sequence[bool], after: Sequence[bool]) -> Figure | None:
    """Share before minus share after, paired by row (positive: something was lost)."""
    return bootstrap([[float(b) for b in before], [float(a) for a in after]], lambda b, a: b.mean(-1) - a.mean(-1))
