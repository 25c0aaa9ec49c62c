"""Which false-alarm rate a calibration supports, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from guard.calibration import HELD_OUT
from guard.profile import Profile
from guard.sequential import Bucket
from guard.verdict import Window


@dataclass(frozen=True)
class Support:
    """What one length bucket (prompts of ``low`` to ``high`` tokens) supports at an alpha.

    ``flaggable`` is k, how many of ``held_out`` + 1 ranks are flagged; ``threshold`` the oddness beyond which a request
    is, and ``realised`` the range in which the false-alarm rate of this very calibration lies with 99 % probability.
    The last two are None where alpha is not supported (k = 0).
    """

    low: int
    high: int
    held_out: int
    smallest_alpha: float
    flaggable: int
    threshold: float | None
    realised: tuple[float, float] | None


def support(bucket: Bucket, alpha: float) -> Support:
    """What a length bucket supports at ``alpha``.

    Alpha is kept on average over calibrations. A single one with n held-out requests realises a rate distributed as
    Beta(k, n + 1 - k) (Vovk, 2012, "Conditional validity of inductive conformal predictors", proposition 2a).
    """
    n = len(bucket.maxima)
    k = int(np.count_nonzero(np.arange(1, n + 2) / (n + 1) <= alpha))
    if k == 0:
        return Support(bucket.low, bucket.high, n, bucket.smallest_p, 0, None, None)
    low, high = beta.ppf([0.005, 0.995], k, n + 1 - k)
    return Support(bucket.low, bucket.high, n, bucket.smallest_p, k, float(bucket.maxima[n - k]), (low, high))


def supports(profile: Profile, alpha: float, window: Window = "all") -> list[Support]:
    """``support`` of each of a profile's length buckets under a window."""
    return [support(bucket, alpha) for bucket in profile.buckets(window)]


def statement(rows: Sequence[Support], alpha: float) -> str:
    """The sentence that says whether ``alpha`` is supported, and what to do when it is not."""
    smallest = max(row.smallest_alpha for row in rows)
    lengths = f"prompts of {rows[0].low} to {rows[-1].high} tokens"
    ranges = [row.realised for row in rows if row.realised is not None]
    if smallest <= alpha:
        where = " in each length bucket" if len(rows) > 1 else ""
        return (
            f"Supported: at alpha = {alpha:g}, a clean request is flagged with probability at most {alpha:g}, for "
            f"traffic like the calibrated prompts and {lengths}; so is any alpha from {smallest:.4g} on. This one "
            f"calibration realises between {min(r[0] for r in ranges):.2%} and {max(r[1] for r in ranges):.2%} with "
            f"99 % probability{where}."
        )
    wanted = int(np.ceil(1.0 / alpha - 1e-9)) - 1
    short = [
        f"{int(np.ceil((wanted - row.held_out) / HELD_OUT))} more of {row.low} to {row.high} tokens"
        for row in rows
        if row.smallest_alpha > alpha
    ]
    return (
        f"NOT supported: alpha = {alpha:g} needs {wanted} held-out clean requests in every length bucket. The finest "
        f"that is supported is {smallest:.4g}, for {lengths}. Calibrate with more clean prompts ({'; '.join(short)}: "
        f"{HELD_OUT:.0%} of them are held out), or ask for alpha >= {smallest:.4g}."
    )
