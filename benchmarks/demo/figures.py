"""Figures of the demo: how well the guard told triggered from clean, and what the model did to each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import betabinom
from sklearn.metrics import roc_auc_score

from benchmarks.demo.traffic import Outcome
from guard.detector import Detector
from guard.errors import GuardError
from guard.profile import Profile
from guard.readings import Measurement
from guard.signals import SIGNALS
from guard.verdict import Window
from offline_purify.intervals import share


def rate(flags: Sequence[bool]) -> dict[str, Any]:
    """A share with its Wilson interval and n, as JSON."""
    figure = share(flags)
    if figure is None:
        raise GuardError("a share of nothing was asked for.")
    return figure.model_dump()


def detection(clean: Sequence[Outcome], triggered: Sequence[Outcome], alpha: float, held_out: int) -> dict[str, Any]:
    """The verdicts that the server gave: fpr and tpr at ``alpha`` with intervals, auroc of the p-values.

    Unscored requests are counted apart and count as not flagged. ``fpr_limit`` is the most that a kept promise shows:
    alpha and its error, with n clean requests and a calibration of ``held_out`` (the 99 % quantile, beta-binomial).
    """
    rank = max(1, int(alpha * (held_out + 1) + 1e-9))
    flags = [[o.guard.get("status") == "flagged" for o in group] for group in (clean, triggered)]
    odd = [[-float(o.guard.get("p_value") or 1.0) for o in group] for group in (clean, triggered)]
    fpr, tpr = (rate(group) for group in flags)
    return {
        "n_clean": len(clean),
        "n_triggered": len(triggered),
        "n_unscored": sum(o.guard.get("status") == "unscored" for o in (*clean, *triggered)),
        "alpha": alpha,
        "fpr": fpr["value"],
        "fpr_interval": [fpr["low"], fpr["high"]],
        "fpr_limit": float(betabinom(len(clean), rank, held_out + 1 - rank).ppf(0.99) / len(clean)),
        "tpr": tpr["value"],
        "tpr_interval": [tpr["low"], tpr["high"]],
        "auroc": float(roc_auc_score([0] * len(clean) + [1] * len(triggered), [*odd[0], *odd[1]])),
    }


def by_signal(
    profile: Profile, clean: Measurement, triggered: Measurement, alpha: float, window: Window
) -> dict[str, dict[str, float]]:
    """Each signal alone, and all attention signals together, under the same test: fpr, tpr at ``alpha``, auroc."""
    sets: dict[str, tuple[str, ...]] = {name: (name,) for name in profile.signals}
    sets["attention_only"] = tuple(name for name in profile.fused if SIGNALS[name].attention)
    found = {}
    for name, signals in sets.items():
        detector = Detector(profile, window, alpha, signals)
        p = [np.nan_to_num(detector.p_values(measurement), nan=1.0) for measurement in (clean, triggered)]
        found[name] = {
            "fpr": float((p[0] <= alpha).mean()),
            "tpr": float((p[1] <= alpha).mean()),
            "auroc": float(roc_auc_score([0] * len(p[0]) + [1] * len(p[1]), -np.concatenate(p))),
        }
    return found
