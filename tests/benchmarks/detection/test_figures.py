"""Figures against independent computations: scikit-learn's AUROC and ROC, scipy's laws, counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.figures import auroc, flagged, localisation, power, rate, roc, timing, uniformity
from guard.verdict import Span, Verdict, unscored


def p_values(seed: int, n: int, sharp: float = 1.0) -> np.ndarray:
    """p-values on a grid of a hundred, so that there are ties."""
    return np.ceil(np.random.default_rng(seed).random(n) ** sharp * 100) / 100


@pytest.mark.parametrize("sharp", [0.5, 1.0, 3.0])
def test_auroc_is_that_of_scikit_learn_ties_and_all(sharp: float) -> None:
    clean, triggered = p_values(0, 300), p_values(1, 80, sharp)
    label, score = np.r_[np.zeros(300), np.ones(80)], -np.r_[clean, triggered]
    found = auroc(clean, triggered)
    assert found["value"] == pytest.approx(roc_auc_score(label, score))
    assert found["low"] <= found["value"] <= found["high"]
    assert found["n"] == 380


def test_the_bootstrap_interval_of_auroc_is_as_wide_as_repeated_samples_say() -> None:
    drawn = [auroc_value(seed) for seed in range(2, 202)]
    found = auroc(p_values(0, 200), p_values(1, 60, 2.0))
    spread = np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025)
    assert found["high"] - found["low"] == pytest.approx(spread, rel=0.35)


def auroc_value(seed: int) -> float:
    clean, triggered = p_values(2 * seed, 200), p_values(2 * seed + 1, 60, 2.0)
    return float(roc_auc_score(np.r_[np.zeros(200), np.ones(60)], -np.r_[clean, triggered]))


def test_curves_run_through_the_points_of_scikit_learn() -> None:
    clean, triggered = p_values(0, 300), p_values(1, 80, 2.0)
    fpr, tpr, _ = roc_curve(
        np.r_[np.zeros(300), np.ones(80)], -np.r_[clean, triggered], drop_intermediate=False
    )  # fmt: skip
    found = roc(clean, triggered)
    points = set(zip(np.round(found["fpr"], 9), np.round(found["tpr"], 9), strict=True))
    assert set(zip(np.round(fpr, 9), np.round(tpr, 9), strict=True)) <= points


def test_an_unscored_request_is_counted_and_not_flagged() -> None:
    found = flagged(np.asarray([0.001, np.nan, 0.01, 0.5]), 0.01)
    assert (found["value"], found["n"], found["n_unscored"]) == (0.5, 4, 1)
    powers = power(np.asarray([0.5, np.nan]), np.asarray([np.nan, 0.001]), 0.01)
    assert powers["tpr"]["value"] == 0.5
    assert powers["auroc"]["value"] == 0.625


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="no requests"):
        rate([])


def test_uniform_p_values_keep_the_promise_and_shrunken_ones_do_not() -> None:
    grid = np.arange(1, 1001) / 1001
    rng = np.random.default_rng(0)
    good = uniformity(rng.choice(grid, 2000), grid, 0.01)
    assert good["inside"]
    assert good["inside_held_out"]
    assert good["ks"]["p_value"] > 0.01
    assert good["interval"] == [binom.ppf(q, 2000, 0.01) / 2000 for q in (0.005, 0.995)]
    low, high = good["interval_held_out"]
    assert low < good["interval"][0] < good["interval"][1] < high
    assert sum(good["deciles"]) == 2000
    bad = uniformity(rng.choice(grid, 2000) ** 2, grid, 0.01)
    assert not bad["inside_held_out"]
    assert bad["ks_held_out"]["p_value"] < 1e-6


def test_one_calibration_in_twenty_fails_the_fair_test_and_more_fail_the_plain_one() -> None:
    """Scores and held-out scores of one law: the two-sample test is right, the one-sample test rejects too often."""
    rng = np.random.default_rng(1)
    fair, plain = 0, 0
    for _ in range(200):
        held_out, fresh = np.sort(rng.random(300)), rng.random(300)
        p = (1 + 300 - np.searchsorted(held_out, fresh)) / 301
        found = uniformity(p, np.arange(1, 301) / 301, 0.05)
        fair += found["ks_held_out"]["p_value"] < 0.05
        plain += found["ks"]["p_value"] < 0.05
    assert fair <= 18
    assert plain > 20


def verdict(status: str, step: int, *spans: tuple[int, int]) -> Verdict:
    if status == "unscored":
        return unscored("prompt_length", alpha=0.01, window=2)
    return Verdict(status, 0.01, step, 2, spans=tuple(Span(a, b, 0.1) for a, b in spans))  # type: ignore[arg-type]


def test_timing_counts_the_flagged_alone() -> None:
    verdicts = [verdict("flagged", 0), verdict("flagged", 2), verdict("clean", 2), verdict("unscored", 0)]
    found = timing(verdicts)
    assert found["median_step"] == 1.0
    assert found["before_first_token"]["value"] == 0.5
    assert timing([verdict("clean", 0)]) == {"median_step": None, "before_first_token": None}


def test_localisation_asks_for_any_part_for_every_part_and_only_of_the_top_three() -> None:
    verdicts = [
        verdict("flagged", 0, (2, 4), (9, 10)),
        verdict("flagged", 0, (0, 1)),
        verdict("flagged", 0, (10, 11), (12, 13), (14, 15), (3, 4)),
        verdict("clean", 0, (3, 4)),
    ]
    places = {number: [(3, 5), (9, 10)] for number in range(4)}
    found = localisation(verdicts, places, [20] * 4)
    assert found is not None
    assert found["value"] == pytest.approx(1 / 3)
    assert found["whole"]["value"] == pytest.approx(1 / 3)
    assert found["n"] == 3
    assert found["covered"] == pytest.approx((3 + 1 + 3) / 60)
    assert localisation(verdicts, {}, [20] * 4) is None
