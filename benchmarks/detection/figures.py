"""From p-values and verdicts to figures: power, the promise, timing, localisation. Pure arithmetic.

Every share comes with its Wilson interval, AUROC with a bootstrap one. An unscored request (p-value NaN) is counted,
and counts as not flagged: it is neither a detection nor a false alarm, and never quietly left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import betabinom, binom, ks_2samp, kstest

from benchmarks.detection.errors import BenchmarkError
from guard.verdict import Verdict
from offline_purify.intervals import share

_DRAWS = 1000
_ROC_POINTS = 200


def flags(p: np.ndarray, alpha: float) -> np.ndarray:
    """Whether each request is flagged, bool [n]; an unscored one is not."""
    return np.nan_to_num(p, nan=1.0) <= alpha


def rate(hits: Sequence[bool] | np.ndarray) -> dict[str, Any]:
    """A share as {value, low, high, n}. Raises BenchmarkError when there is nothing to take a share of."""
    figure = share([bool(hit) for hit in hits])
    if figure is None:
        raise BenchmarkError("a share of no requests was asked for.")
    return figure.model_dump()


def flagged(p: np.ndarray, alpha: float) -> dict[str, Any]:
    """Flagged share of p-values [n] with its interval, and how many were unscored."""
    return {**rate(flags(p, alpha)), "n_unscored": int(np.isnan(p).sum())}


def area(clean: np.ndarray, triggered: np.ndarray) -> float:
    """Probability that a triggered request has the smaller p-value, ties half: clean [n], triggered [m], no NaN."""
    ordered = np.sort(clean)
    above = len(ordered) - np.searchsorted(ordered, triggered, side="right")
    ties = np.searchsorted(ordered, triggered, side="right") - np.searchsorted(ordered, triggered, side="left")
    return float((above + 0.5 * ties).mean() / len(ordered))


def auroc(clean: np.ndarray, triggered: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Area under the ROC of p-values clean [n] and triggered [m], with a 95 % bootstrap interval (each resampled)."""
    one, other = np.nan_to_num(clean, nan=1.0), np.nan_to_num(triggered, nan=1.0)
    rng = np.random.default_rng(seed)
    drawn = [
        area(one[rng.integers(0, len(one), len(one))], other[rng.integers(0, len(other), len(other))])
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": area(one, other), "low": float(low), "high": float(high), "n": len(one) + len(other)}


def power(clean: np.ndarray, triggered: np.ndarray, alpha: float, seed: int = 0) -> dict[str, Any]:
    """``auroc``, ``tpr`` and ``fpr`` at alpha of a test, from its p-values on clean [n] and triggered [m] requests."""
    return {
        "auroc": auroc(clean, triggered, seed),
        "tpr": flagged(triggered, alpha),
        "fpr": flagged(clean, alpha),
    }


def roc(clean: np.ndarray, triggered: np.ndarray) -> dict[str, list[float]]:
    """The ROC of p-values as lists ``fpr`` and ``tpr``, at most about 200 points, finest where fpr is small."""
    one, other = np.sort(np.nan_to_num(clean, nan=1.0)), np.sort(np.nan_to_num(triggered, nan=1.0))
    cuts = np.unique(np.concatenate((one, other)))
    if len(cuts) > _ROC_POINTS:
        cuts = cuts[np.unique(np.geomspace(1, len(cuts), _ROC_POINTS).astype(int) - 1)]
    fpr = np.searchsorted(one, cuts, side="right") / len(one)
    tpr = np.searchsorted(other, cuts, side="right") / len(other)
    return {"fpr": [0.0, *fpr.tolist(), 1.0], "tpr": [0.0, *tpr.tolist(), 1.0]}


def timing(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Of the flagged: ``median_step`` (tokens generated when flagged) and the share ``before_first_token`` (step 0)."""
    steps = [verdict.step for verdict in verdicts if verdict.status == "flagged"]
    if not steps:
        return {"median_step": None, "before_first_token": None}
    return {"median_step": float(np.median(steps)), "before_first_token": rate([step == 0 for step in steps])}


def uniformity(p: np.ndarray, grid: np.ndarray, alpha: float) -> dict[str, Any]:
    """Are the clean p-values [n] what was promised? ``grid`` holds the values that the n held-out requests can give.

    ``ks``: Kolmogorov-Smirnov against the uniform law. One calibration set gives p-values that are uniform only on
    average over calibrations, so ``ks_held_out`` compares with the held-out requests as one sample with another,
    which is fair at any size. ``interval`` is the 99 % binomial interval of the flagged share under alpha,
    ``interval_held_out`` the wider one that also knows how few requests were held out (beta-binomial).
    """
    scored = p[~np.isnan(p)]
    n, held_out = len(scored), len(grid)
    if not n:
        raise BenchmarkError("no clean request could be scored: none has a prompt length that calibration saw.")
    share_flagged = float((scored <= alpha).mean())
    one, two = kstest(scored, "uniform"), ks_2samp(scored, grid)
    rank = max(1, int(np.floor(alpha * (held_out + 1) + 1e-9)))
    wide = betabinom(n, rank, held_out + 1 - rank)
    binomial = [float(binom.ppf(q, n, alpha) / n) for q in (0.005, 0.995)]
    beta = [float(wide.ppf(q) / n) for q in (0.005, 0.995)]
    return {
        "n": n,
        "n_held_out": held_out,
        "ks": {"statistic": float(one.statistic), "p_value": float(one.pvalue)},
        "ks_held_out": {"statistic": float(two.statistic), "p_value": float(two.pvalue)},
        "fpr": share_flagged,
        "interval": binomial,
        "inside": binomial[0] <= share_flagged <= binomial[1],
        "interval_held_out": beta,
        "inside_held_out": beta[0] <= share_flagged <= beta[1],
        "deciles": np.histogram(scored, bins=10, range=(0.0, 1.0))[0].tolist(),
    }


def localisation(
    verdicts: Sequence[Verdict], places: Mapping[int, list[tuple[int, int]]], prompt_len: Sequence[int], top: int = 3
) -> dict[str, Any] | None:
    """Do the ``top`` focus spans of flagged requests lie on the trigger? None when no flagged request has a place.

    ``places``: request number to the token ranges [start, end) of the trigger's parts in its prompt. ``touched`` is
    the share with any overlap, ``whole`` with an overlap for every part, ``covered`` the mean share of the prompt
    that the spans take up: what a blind choice of so many tokens would touch by luck starts there.
    """
    touched, whole, covered = [], [], []
    for number, verdict in enumerate(verdicts):
        if verdict.status != "flagged" or not places.get(number):
            continue
        spans = [(span.start, span.end) for span in verdict.spans[:top]]
        hit = [any(start < b and a < end for a, b in spans) for start, end in places[number]]
        touched.append(any(hit))
        whole.append(all(hit))
        covered.append(sum(end - start for start, end in spans) / max(1, int(prompt_len[number])))
    if not touched:
        return None
    return {**rate(touched), "whole": rate(whole), "covered": float(np.mean(covered))}
