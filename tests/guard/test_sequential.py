"""The promise of the test, by properties and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import AlphaTooFine
from guard.sequential import bucket_edges, check_alpha, find_bucket, make_buckets
from guard.tail import Tail

lengths = st.lists(st.integers(1, 900), min_size=1, max_size=400).map(np.asarray)


@given(lengths, st.integers(1, 120))
def test_length_buckets_cover_every_calibrated_length_and_are_large_enough(prompt_len, smallest):
    edges = bucket_edges(prompt_len, smallest)
    buckets = make_buckets(prompt_len, np.zeros(len(prompt_len)), edges)
    assert sum(len(bucket.maxima) for bucket in buckets) == len(prompt_len)
    assert len(buckets) == 1 or all(len(bucket.maxima) >= smallest for bucket in buckets)
    assert all(find_bucket(buckets, int(length)) is not None for length in prompt_len)


@given(st.lists(st.floats(0, 30), min_size=1, max_size=200), st.floats(0, 40), st.floats(0, 40))
def test_p_values_fall_as_the_maximum_grows_and_never_reach_zero(maxima, one, other):
    (bucket,) = make_buckets(np.full(len(maxima), 10), np.asarray(maxima), [10])
    low, high = sorted((one, other))
    assert bucket.p_value(low) >= bucket.p_value(high) >= bucket.smallest_p > 0
    assert bucket.p_value(-1.0) == 1.0


def test_alpha_finer_than_the_held_out_requests_is_refused_with_the_smallest_one():
    buckets = make_buckets(np.full(49, 10), np.zeros(49), [10])
    check_alpha(buckets, 0.02)
    with pytest.raises(AlphaTooFine, match=r"0\.02") as refused:
        check_alpha(buckets, 0.01)
    assert refused.value.smallest == pytest.approx(1 / 50)


def test_a_prompt_of_unknown_length_has_no_bucket():
    buckets = make_buckets(np.full(49, 100), np.zeros(49), [100])
    assert find_bucket(buckets, 125) is not None
    assert find_bucket(buckets, 126) is None
    assert find_bucket(buckets, 79) is None


def test_realised_false_alarms_over_many_calibrations_match_alpha():
    rng = np.random.default_rng(0)
    alpha, n, repeats = 0.05, 199, 3000
    alarms = 0
    for _ in range(repeats):
        # Running maxima over five checkpoints of dependent scores: the shape of the sequential statistic.
        walks = rng.normal(size=(n + 1, 5)).cumsum(axis=1).max(axis=1)
        (bucket,) = make_buckets(np.full(n, 10), np.sort(walks[1:]), [10])
        alarms += bucket.p_value(walks[0]) <= alpha
    assert abs(alarms / repeats - alpha) < 3 * np.sqrt(alpha * (1 - alpha) / repeats)


@given(st.lists(st.floats(-50, 50), min_size=20, max_size=200), st.floats(-100, 100), st.floats(-100, 100))
def test_oddness_of_an_upper_tail_is_monotone(clean, one, other):
    tail = Tail(np.sort(np.asarray(clean)), "upper")
    low, high = sorted((one, other))
    odd = tail.oddness(np.asarray([low, high]))
    assert odd[0] <= odd[1] + 1e-9


def test_oddness_tells_extremes_apart_and_sees_both_sides_when_asked():
    clean = np.sort(np.random.default_rng(1).normal(size=500))
    upper, both = Tail(clean, "upper"), Tail(clean, "both")
    beyond = upper.oddness(np.asarray([4.0, 5.0, 6.0]))
    assert (np.diff(beyond) > 0.3).all()
    assert upper.oddness(np.asarray([-6.0]))[0] == pytest.approx(0.0, abs=1e-3)
    assert both.oddness(np.asarray([-6.0]))[0] > 2
    assert np.isnan(upper.oddness(np.asarray([np.nan])))[0]
