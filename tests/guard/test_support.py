"""What a calibration supports: the numbers against simulation, the sentence against the numbers."""

import numpy as np
import pytest

from guard.calibration import MIN_REQUESTS, n_held_out
from guard.sequential import Bucket
from guard.support import statement, support


def bucket(held_out, seed=0, low=4, high=80):
    return Bucket(low, high, np.sort(np.random.default_rng(seed).normal(size=held_out)))


def test_the_threshold_is_where_flagging_begins():
    mine = bucket(499)
    said = support(mine, 0.01)
    assert said.flaggable == 5
    assert mine.p_value(said.threshold) > 0.01
    assert mine.p_value(np.nextafter(said.threshold, np.inf)) <= 0.01


def test_calibrations_realise_rates_within_the_range_that_was_announced():
    rng = np.random.default_rng(1)
    held_out, alpha, repeats = 199, 0.05, 2000
    low, high = support(bucket(held_out), alpha).realised
    # The true rate beyond a threshold, were scores uniform: 1 - threshold.
    rates = [1 - support(Bucket(1, 9, np.sort(rng.uniform(size=held_out))), alpha).threshold for _ in range(repeats)]
    inside = np.mean([low <= rate <= high for rate in rates])
    assert abs(inside - 0.99) < 3 * np.sqrt(0.01 * 0.99 / repeats)
    assert np.mean(rates) == pytest.approx(alpha, abs=0.002)


@pytest.mark.parametrize(
    ("requests", "held_out"),
    [(0, 0), (MIN_REQUESTS, 0), (80, 40), (120, 80), (148, 98), (149, 99), (655, 399), (4000, 2599)],
)
def test_two_thirds_are_held_out_in_whole_hundreds_of_ranks(requests, held_out):
    assert n_held_out(requests) == held_out


@pytest.mark.parametrize("requests", [149, 200, 449, 655, 1000])
def test_no_rank_is_lost_at_one_in_a_hundred(requests):
    said = support(bucket(n_held_out(requests)), 0.01)
    assert said.flaggable / (said.held_out + 1) == pytest.approx(0.01)


def test_an_alpha_that_every_bucket_supports_is_said_to_be_supported():
    said = statement([support(bucket(999), 0.01), support(bucket(99, low=81, high=300), 0.01)], 0.01)
    assert said.startswith("Supported: at alpha = 0.01")
    assert "prompts of 4 to 300 tokens" in said
    assert "any alpha from 0.01 on" in said


def test_an_alpha_that_is_too_fine_is_refused_with_the_number_of_prompts_that_are_missing():
    said = statement([support(bucket(999), 0.01), support(bucket(60, low=81, high=300), 0.01)], 0.01)
    assert said.startswith("NOT supported: alpha = 0.01 needs 99 held-out")
    assert "59 more of 81 to 300 tokens" in said
    assert "alpha >= 0.01639" in said
    assert support(bucket(60), 0.01).realised is None
