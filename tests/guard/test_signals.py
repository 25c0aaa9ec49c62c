"""What single signals read, and how they come together."""

import numpy as np
import pytest
import torch

from guard.gram import HeadSums
from guard.readings import Readings
from guard.signals import RESPONSE, SIGNALS, VACCINATED, foremost, fused

LAYERS, HEADS, TOKENS = 2, 4, 30


def readings(*logprobs):
    """Requests that differ in the log-probabilities of their tokens alone."""
    sums = HeadSums(
        torch.ones(LAYERS, HEADS, HEADS), torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, 4 * HEADS), torch.ones(TOKENS)
    )
    read = [(i, sums, own) for i, own in enumerate(logprobs)]
    return Readings.together(len(logprobs[0]) - 1, (LAYERS, HEADS, HEADS), read)


def test_certainty_is_that_of_the_least_certain_token_so_far():
    fixed, forced, clean = SIGNALS["certainty"].score(
        readings([-0.01, -0.02, -0.01], [-1.5, -0.001, -0.001], [-1.5, -2.0, -0.7]), {}
    )
    # A text that nothing called for was begun in doubt, however sure the model is of how it goes on.
    assert fixed > forced > clean
    assert SIGNALS["certainty"].tail == "upper"
    # Of one token `confidence` says it already.
    assert SIGNALS["certainty"].fit(readings([-0.01]), None) is None
    assert SIGNALS["certainty"].fit(readings([-0.01, -0.02]), None) is not None


def test_a_signal_that_counts_for_nothing_changes_no_sum_and_is_a_test_of_its_own():
    odd = np.asarray([1.0, 7.0, 0.5])
    names = ("shift", "certainty", VACCINATED)
    assert SIGNALS["certainty"].weight == 0
    assert fused(odd, names, 0, {}) == pytest.approx(fused(odd[[0, 2]], ("shift", VACCINATED), 0, {}))
    assert fused(odd[[1]], ("certainty",), 0, {}) == pytest.approx(7.0)
    assert fused(odd, names, 0, {"certainty": 1.0}) == pytest.approx(1 + 7 + 0.5 * SIGNALS[VACCINATED].weight)


def test_the_foremost_signal_is_the_one_that_adds_most_to_the_sum():
    odd = np.asarray([3.0, 7.0, 2.0])
    names = ("shift", "certainty", VACCINATED)
    assert foremost(odd, names, 0, {}) == VACCINATED
    assert foremost(odd, names, 0, {"shift": 2.0, VACCINATED: 1.0}) == "shift"
    assert foremost(odd, names, 0, {"certainty": 1.0}) == "certainty"


def test_beyond_the_prompt_what_looks_like_a_trigger_counts_only_as_far_as_the_answer_is_odd():
    names = ("shift", VACCINATED, RESPONSE)
    calm, odd = np.asarray([1.0, 8.0, 0.0]), np.asarray([1.0, 8.0, 9.0])
    weights = {VACCINATED: 1.0, "margin": 0.0}
    assert fused(calm, names, 0, weights) == fused(odd, names, 0, weights) == 9  # there is no answer yet
    assert fused(calm, names, 2, weights) == 1
    assert fused(np.asarray([1.0, 8.0, 0.5]), names, 2, weights) == 2
    assert fused(odd, names, 2, weights) == 9  # the answer bounds, and adds nothing of its own
    assert fused(np.stack([calm, calm]), names, [0, 1], weights).tolist() == [9, 1]
    assert (foremost(calm, names, 0, weights), foremost(calm, names, 1, weights)) == (VACCINATED, "shift")
    assert fused(calm[:2], names[:2], 1, weights) == 9  # a test without it is not bounded
