"""Fitting a profile on clean requests.

The requests are cut in two at random. One third fits the signals and their tails (each fold's requests are scored by
what the other folds fitted, so that the tails are those of requests the fit has not seen); the others are only scored,
and their maxima are what the conformal test ranks new requests among.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from guard.errors import CalibrationError
from guard.focus import fit_focus
from guard.profile import Checkpoint, Profile, ProfileKey
from guard.readings import Measurement, Readings
from guard.sequential import bucket_edges
from guard.signals import LEARNT, SIGNALS, Signal
from guard.similarity import fisher
from guard.tail import Tail
from guard.vaccine import Vaccine

MIN_REQUESTS = 40  # to fit, and to hold out: below it neither a covariance nor a tail means anything
HELD_OUT = 2 / 3
"""Share of the clean requests that is only ranked among. At alpha = 0.01 the false-alarm rate of a calibration is that
of its few oddest requests, and more of them bring it nearer to alpha; the fit loses less by it (docs/vaccine.md)."""
MIN_BUCKET = 299
"""Held-out requests that a length bucket needs of its own: at alpha = 0.01 its threshold is the third oddest, and not
the luck of one."""
_FOLDS = 4
_WHOLE = 100


def fit_profile(
    measurement: Measurement,
    key: ProfileKey,
    *,
    seed: int = 0,
    signals: tuple[str, ...] = tuple(SIGNALS),
    vaccine: Vaccine | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Profile:
    """Fit what is normal from n measured clean requests; ``vaccine`` (checked by the caller) adds what it learnt.

    Raises CalibrationError when there are fewer than twice MIN_REQUESTS usable requests, or none reached step 0.
    """
    usable = _finite(measurement)
    signals = tuple(name for name in signals if name not in LEARNT or vaccine is not None)
    if len(usable) < 2 * MIN_REQUESTS:
        raise CalibrationError(
            f"{len(usable)} usable clean requests of {len(measurement)}: at least {2 * MIN_REQUESTS} are needed "
            f"({MIN_REQUESTS} to fit, the others held out for the p-values), and {1 / HELD_OUT:g}/alpha for a "
            "false-alarm rate of alpha."
        )
    order = np.random.default_rng(seed).permutation(usable)
    fit, held_out = (np.sort(part) for part in np.split(order, [len(order) - n_held_out(len(order))]))
    checkpoints: list[Checkpoint] = []
    odd = []
    for step in sorted(measurement.at) if 0 in measurement.at else ():
        readings = measurement.reached(step)
        mine = np.flatnonzero(np.isin(readings.index, fit))
        if len(mine) < MIN_REQUESTS:
            continue  # too few clean answers are this long: nothing can be said here
        opening = checkpoints[0] if checkpoints else None
        point = fit_checkpoint(readings.take(mine), signals, vaccine, seed, opening)
        checkpoints.append(point)
        odd.append(oddness_at(point, readings, held_out, signals))
    if not checkpoints or checkpoints[0].step != 0:
        raise CalibrationError("no clean request was measured at the last prompt position (step 0).")
    begun = measurement.at[0]
    layers, heads = begun.gram.shape[1:3]
    prompt_len = measurement.prompt_len[held_out]
    return Profile(
        key=key,
        layers=int(layers),
        heads=int(heads),
        signals=signals,
        checkpoints=tuple(checkpoints),
        prompt_len=prompt_len.astype(np.int64),
        odd=np.stack(odd, axis=1),
        edges=tuple(bucket_edges(prompt_len, MIN_BUCKET)),
        focus=fit_focus([begun.focus[i] for i in np.flatnonzero(np.isin(begun.index, fit))]),
        weights=dict(vaccine.weights) if vaccine is not None else {},
        facts={
            **(facts or {}),
            "n_requests": len(measurement),
            "n_fit": len(fit),
            "n_held_out": len(held_out),
            "n_unusable": len(measurement) - len(usable),
            "seed": seed,
        },
    )


def n_held_out(n: int) -> int:
    """How many of n usable clean requests are held out: MIN_REQUESTS at least are fitted on, and from 99 on it is one
    less than a multiple of a hundred, so that the rank that decides at alpha = 0.01 is a whole one."""
    held_out = max(0, min(int(n * HELD_OUT), n - MIN_REQUESTS))
    return held_out if held_out < _WHOLE - 1 else (held_out + 1) // _WHOLE * _WHOLE - 1


def score(point: Checkpoint, readings: Readings, signals: tuple[str, ...]) -> np.ndarray:
    """Oddness of n requests at a checkpoint: float64 [n, K]; NaN where a signal is not finite, 0 where it has nothing
    to say at this checkpoint."""
    odd = np.zeros((len(readings.index), len(signals)))
    for column, name in enumerate(signals):
        if name in point.fitted:
            odd[:, column] = point.tails[name].oddness(SIGNALS[name].score(readings, point.fitted[name]))
    return odd


def oddness_at(point: Checkpoint, readings: Readings, wanted: np.ndarray, signals: tuple[str, ...]) -> np.ndarray:
    """Oddness float64 [m, K] at a checkpoint of the requests ``wanted`` (int [m], ascending); NaN for those that are
    not in ``readings``, which had ended before."""
    odd = np.full((len(wanted), len(signals)), np.nan)
    mine = np.flatnonzero(np.isin(readings.index, wanted))
    odd[np.searchsorted(wanted, readings.index[mine])] = score(point, readings.take(mine), signals)
    return odd


def _finite(measurement: Measurement) -> np.ndarray:
    """Requests whose measurements are finite at each checkpoint they reached."""
    bad: set[int] = set()
    for readings in measurement.at.values():
        sums = [readings.gram, readings.norms]
        if readings.earlier is not None:
            sums += [readings.earlier.gram, readings.earlier.norms]
        fine = np.isfinite(readings.logprobs).all(axis=1)
        for told in sums:
            fine &= told.flatten(1).isfinite().all(dim=1).numpy()
        bad.update(readings.index[~fine].tolist())
    return np.asarray([i for i in range(len(measurement)) if i not in bad], dtype=np.int64)


def fit_checkpoint(
    readings: Readings, signals: tuple[str, ...], vaccine: Vaccine | None, seed: int, opening: Checkpoint | None = None
) -> Checkpoint:
    """What is normal at the step of clean ``readings`` (n requests), for the named signals; ``opening`` is the
    checkpoint of step 0 (None: this is it), whose fit the signals of the opening keep."""
    pairs = fisher(readings.cosines)
    fitted: dict[str, Mapping[str, np.ndarray]] = {}
    tails: dict[str, Tail] = {}
    for name in signals:
        if opening is not None and SIGNALS[name].opening:
            fitted[name], tails[name] = opening.fitted[name], opening.tails[name]
        elif (arrays := SIGNALS[name].fit(readings, vaccine)) is not None:
            fitted[name] = arrays
            tails[name] = Tail(np.sort(_cross_fitted(SIGNALS[name], readings, vaccine, seed)), SIGNALS[name].tail)
    return Checkpoint(
        step=readings.step,
        fitted=fitted,
        tails=tails,
        pairs={"mean": pairs.mean(axis=0), "scale": pairs.std(axis=0) + 0.02},
    )


def _cross_fitted(signal: Signal, readings: Readings, vaccine: Vaccine | None, seed: int) -> np.ndarray:
    """Scores [n] of the fitting requests, each by a fit that did not see it."""
    n = len(readings.index)
    fold = np.random.default_rng(seed).permutation(n) % _FOLDS
    scores = np.empty(n)
    for number in range(_FOLDS):
        inside, outside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        scores[inside] = signal.score(readings.take(inside), signal.fit(readings.take(outside), vaccine) or {})
    return scores
