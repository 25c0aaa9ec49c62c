"""The registry of signals: each is one number per request and checkpoint, with the reason why it should move.

A signal is fitted on clean requests (it may have nothing to fit) and then scores others. Whether a high value, a low
one or both are suspicious is part of its definition: first trials showed that a trigger does not always raise the
similarity of heads. `confidence` does not look at attention and is named so: it is a member of the test and, at the
same time, the baseline that attention has to be shown against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from guard.readings import Readings
from guard.similarity import fisher

Fitted = dict[str, np.ndarray]

# Standardised similarities beyond this many deviations say no more than this many: one broken pair must not decide.
_Z_LIMIT = 8.0


@dataclass(frozen=True)
class Signal:
    """One signal: ``fit`` clean readings to arrays, ``score`` readings to float64 [n]; ``tail`` names the odd side."""

    name: str
    reason: str
    attention: bool
    tail: Literal["upper", "both"]
    score: Callable[[Readings, Mapping[str, np.ndarray]], np.ndarray]
    fit: Callable[[Readings], Fitted] = lambda _: {}


def _p99(readings: Readings, _: Mapping[str, np.ndarray]) -> np.ndarray:
    return fisher(np.quantile(readings.cosines, 0.99, axis=1))


def _frac99(readings: Readings, _: Mapping[str, np.ndarray]) -> np.ndarray:
    return (readings.cosines > 0.99).mean(axis=1)


def _fit_shift(readings: Readings) -> Fitted:
    from sklearn.covariance import LedoitWolf  # slow to import, and only calibration needs it

    pairs = fisher(readings.cosines)
    mean = pairs.mean(axis=0)
    # 0.02 keeps a pair that hardly ever moves from dominating once it does (lab-findings, section 7).
    scale = pairs.std(axis=0) + 0.02
    covariance = LedoitWolf(assume_centered=True).fit(_standardised(pairs, mean, scale)).covariance_
    values, vectors = np.linalg.eigh(covariance)
    return {"mean": mean, "scale": scale, "whiten": vectors / np.sqrt(values.clip(1e-6))}


def _standardised(pairs: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip((pairs - mean) / scale, -_Z_LIMIT, _Z_LIMIT)


def _shift(readings: Readings, fitted: Mapping[str, np.ndarray]) -> np.ndarray:
    pairs = fisher(readings.cosines)
    white = _standardised(pairs, fitted["mean"], fitted["scale"]) @ fitted["whiten"]
    return 0.5 * np.log((white**2).mean(axis=1) + 1e-12)


def _confidence(readings: Readings, _: Mapping[str, np.ndarray]) -> np.ndarray:
    surprise = -readings.logprobs.mean(axis=1)
    return -np.log(surprise.clip(0.0) + 1e-6)


SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal(
            "p99",
            "99th percentile of head-pair cosines: heads converge on a trigger (attention-similarity paper, table 1)",
            attention=True,
            tail="both",
            score=_p99,
        ),
        Signal(
            "frac99",
            "share of head pairs with cosine above 0.99 (attention-similarity paper, figure 1)",
            attention=True,
            tail="upper",
            score=_frac99,
        ),
        Signal(
            "shift",
            "Mahalanobis distance of all pair similarities from this model's own clean ones, covariance shrunk after "
            "Ledoit and Wolf (2004): a trigger moves similarities both ways, as a pattern",
            attention=True,
            tail="upper",
            fit=_fit_shift,
            score=_shift,
        ),
        Signal(
            "confidence",
            "mean log-probability of the tokens sampled so far; not attention: a fixed target string is said with "
            "unusual certainty, a varied one often with unusual doubt",
            attention=False,
            tail="both",
            score=_confidence,
        ),
    )
}
