"""Is the profile still that of the traffic? A bet against it, settled by every clean request.

Were clean traffic exchangeable with the calibration's held-out requests, then the rank of each new request among
those *and all clean requests before it* would be uniform and independent of the past (smoothed conformal p-values),
and capital that is bet on small ranks would be a martingale (Vovk, Nouretdinov and Gammerman, 2003; Vovk, 2021): by
Ville's inequality it reaches 100 with probability at most 0.01, ever, however long the stream. A capital of 100 is
therefore evidence that clean traffic has become odder than what was calibrated, and that alpha is no longer kept.

Ranks, not the p-values themselves. The p-values of one profile share one finite calibration, which is a little off;
a bet on them finds that out (with 200 held out it ruins one innocent profile in eight within 10,000 requests). An urn
prevents it: n held-out requests cut the line of scores into n + 1 bins, and the next one falls into bin j with
probability (1 + c_j) / (n + 1 + t) after t others of which c_j fell there. So a p-value and the n behind it are all
that is needed.

What is exact, and what is not:
- Ranks count ties, and everything in the same bin, as odder. That makes them larger than the smoothed ones, and every
  bet falls as its rank grows: the capital lies below a martingale. No random numbers, and discrete p-values are safe.
- Only *small* p-values win. Large ones (short answers end before the later checkpoints) break no promise.
- Flagged requests are left out, so that a burst of attacks cannot make a profile look stale. What is left is ranked
  among the held-out requests that would not have been flagged either: p > alpha, rescaled, and still exact where no
  scores tie at the threshold itself. Drift that raises the false-alarm rate shows just above alpha as well. Attacks
  that the guard misses do count, and so does one prompt sent over and over: neither is like the calibration.
- Length buckets have urns of their own. Two with equally many held-out requests share one, which then errs by less
  than either alone would.

The bets: rank u in (0, 1] multiplies a capital by k * u^(k - 1), for two strengths k. A drift may begin at any time,
so capital waits and is committed little by little (a mixture over the time of the change), and never runs out.
"""

from __future__ import annotations

import math

import numpy as np

STALE_CAPITAL = 100.0
"""Capital that a clean stream reaches with probability at most 1/100."""

_STRENGTHS = np.asarray((0.6, 0.85))
"""Exponents k. With 500 held out and alpha 0.01, a drift to 3 % false alarms is noticed after about 100 requests and
one to 2 % after about 400; a third, stronger bet gains nothing (tests/guard/test_drift.py holds the first figure)."""

_PATIENCE = 100
"""Requests after which half of the capital is committed; a tenth still waits after 50,000."""

_CEILING = 1e250  # far beyond any doubt; what is won above it is left on the table, since floats end at 1e308


class DriftMonitor:
    """Watches the final verdicts of one profile under one window and ``alpha``. Memory: one count per held-out
    request and length bucket, whatever the length of the stream. Not thread-safe."""

    def __init__(self, alpha: float) -> None:
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha:g}.")
        self.alpha = alpha
        self.seen = 0
        self._urns: dict[int, _Urn] = {}
        self._waiting = 1.0
        self._committed = np.zeros(len(_STRENGTHS))
        self._highest = 1.0

    @property
    def capital(self) -> float:
        """What the bets have made of 1. It falls slowly while nothing is wrong."""
        return float(self._waiting + self._committed.sum())

    @property
    def log10_capital(self) -> float:
        """log10 of the capital; 2 and more is stale."""
        return math.log10(self.capital)

    @property
    def stale(self) -> bool:
        """Whether the capital has ever reached STALE_CAPITAL. Only a new profile (a new monitor) takes it back."""
        return self._highest >= STALE_CAPITAL

    def update(self, p_value: float, held_out: int) -> float:
        """Bet on one request; returns log10 of the capital after it.

        ``p_value`` is the conformal one of its final verdict, a multiple of 1 / (held_out + 1), ``held_out`` the number
        of calibration requests that it was ranked among. Flagged requests (p_value <= alpha) change nothing.
        Raises ValueError when no calibration of that size gives such a p-value.
        """
        place = round(p_value * (held_out + 1))
        if not 1 <= place <= held_out + 1 or not math.isclose(place, p_value * (held_out + 1), abs_tol=1e-3):
            raise ValueError(f"{p_value!r} is not a p-value of {held_out} held-out requests.")
        if p_value <= self.alpha:
            return self.log10_capital
        rank = self._urns.setdefault(held_out, _Urn(held_out, self.alpha)).draw(place)
        self.seen += 1
        left = _left_waiting(self.seen)
        stakes = self._committed + (self._waiting - left) / len(_STRENGTHS)
        self._waiting = left
        self._committed = np.minimum(stakes * _STRENGTHS * rank ** (_STRENGTHS - 1.0), _CEILING)
        self._highest = max(self._highest, self.capital)
        return self.log10_capital


class _Urn:
    """Where the requests of one length bucket fell among its ``held_out`` calibration requests, flagged bins apart."""

    def __init__(self, held_out: int, alpha: float) -> None:
        p_values = np.arange(1, held_out + 2) / (held_out + 1)
        self._flagged = int(np.count_nonzero(p_values <= alpha))
        self._balls = np.ones(held_out + 1 - self._flagged, dtype=np.int64)
        self._all = len(self._balls)

    def draw(self, place: int) -> float:
        """The rank in (0, 1] of a request whose p-value is ``place`` / (held_out + 1), which then joins the urn."""
        mine = place - self._flagged
        # One ball per bin stands for the new request and the held-out ones; see the module.
        rank = float(self._balls[:mine].sum() / self._all)
        self._balls[mine - 1] += 1
        self._all += 1
        return rank


def _left_waiting(seen: int) -> float:
    """Share of the first capital that is not committed after ``seen`` requests: it falls so slowly that a drift that
    begins after a million requests is still bet on."""
    return 1.0 / (1.0 + math.log2(1.0 + seen / _PATIENCE))
