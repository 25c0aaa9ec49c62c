"""The drift monitor: quiet on clean traffic for as long as it lasts, loud when clean traffic has changed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.drift import DriftMonitor

HELD_OUT = 200


def p_values(calibration, scores):
    """Conformal p-values of scores among calibration scores, ties counted as odder."""
    at_least = (np.asarray(calibration)[None, :] >= np.asarray(scores)[:, None]).sum(axis=1)
    return (1 + at_least) / (len(calibration) + 1)


def watch(stream, held_out=HELD_OUT, alpha=0.01):
    """A monitor that has seen the stream, and how many requests it took to call the profile stale (or None)."""
    monitor, alarm = DriftMonitor(alpha), None
    for number, p_value in enumerate(stream, 1):
        monitor.update(float(p_value), held_out)
        if monitor.stale:
            alarm = alarm or number
    return monitor, alarm


def alarms(draw, streams, requests, alpha=0.01):
    """Streams of ``requests`` whose profile is called stale, each against a calibration of its own."""
    return sum(watch(p_values(draw(HELD_OUT), draw(requests)), alpha=alpha)[1] is not None for _ in range(streams))


@pytest.mark.slow
def test_clean_streams_rarely_alarm():
    rng = np.random.default_rng(0)
    # At most 1 % (Ville): of 200 streams, 7 or more would have probability 0.005.
    assert alarms(lambda n: rng.normal(size=n), 200, 2000) <= 6


@pytest.mark.slow
def test_scores_that_tie_rarely_alarm_either():
    rng = np.random.default_rng(1)
    assert alarms(lambda n: rng.integers(0, 12, size=n), 100, 1000) <= 4


def test_a_calibration_that_happens_to_be_a_little_off_is_not_ruined_by_a_long_stream():
    rng = np.random.default_rng(2)
    calibration = rng.normal(size=HELD_OUT)
    off_by_luck = calibration[np.argsort(calibration)][: HELD_OUT - 4]  # its four oddest are missing
    monitor, alarm = watch(p_values(off_by_luck, rng.normal(size=20_000)), held_out=HELD_OUT - 4)
    assert alarm is None
    assert monitor.log10_capital < 1


def test_traffic_that_has_drifted_is_noticed():
    rng = np.random.default_rng(3)
    delays = []
    for _ in range(20):
        calibration, scores = rng.normal(size=500), rng.normal(0.5, size=2000)  # 3.4 % false alarms, not 1 %
        delays.append(watch(p_values(calibration, scores), held_out=500)[1] or 2001)
    assert np.median(delays) <= 150
    assert max(delays) <= 2000


def test_drift_is_noticed_after_a_long_quiet_time():
    rng = np.random.default_rng(4)
    quiet, changed = rng.normal(size=20_000), rng.normal(0.8, size=1000)
    _, alarm = watch(p_values(rng.normal(size=500), np.concatenate((quiet, changed))), held_out=500)
    assert alarm is not None
    assert 20_000 < alarm <= 20_300


def test_a_burst_of_flagged_attacks_changes_nothing():
    rng = np.random.default_rng(5)
    clean = p_values(rng.normal(size=HELD_OUT), rng.normal(size=400))
    monitor, _ = watch(clean)
    attacked, alarm = watch(np.concatenate((clean[:200], np.full(5000, 1 / (HELD_OUT + 1)), clean[200:])))
    assert alarm is None
    assert attacked.log10_capital == monitor.log10_capital
    assert attacked.seen == monitor.seen


def test_requests_that_are_less_odd_than_calibrated_never_make_a_profile_stale():
    rng = np.random.default_rng(6)
    monitor, alarm = watch(p_values(rng.normal(size=HELD_OUT), rng.normal(-1.0, size=3000)))
    assert alarm is None
    assert monitor.capital < 1


def test_a_stale_profile_stays_stale_when_traffic_calms_down():
    rng = np.random.default_rng(7)
    scores = np.concatenate((rng.normal(1.5, size=200), rng.normal(-1.0, size=3000)))
    monitor, alarm = watch(p_values(rng.normal(size=HELD_OUT), scores))
    assert alarm is not None
    assert monitor.stale
    assert monitor.log10_capital < 2


def test_overwhelming_drift_overflows_nothing():
    monitor = DriftMonitor(0.01)
    for step in range(9000):
        monitor.update(2 / (100 + step % 90), 99 + step % 90)  # the smallest p above alpha; many urns, so none fills
    assert monitor.stale
    assert np.isfinite(monitor.log10_capital)


@given(st.lists(st.integers(1, 51), max_size=60), st.integers(0, 59), st.integers(1, 50))
def test_a_less_odd_last_request_never_leaves_more_capital(places, cut, less):
    """Monotone bets are what makes counting ties as odder safe."""
    stream = [place / 51 for place in places[:cut]]
    last = places[-1] if places else 3
    odd, even = last / 51, min(last + less, 51) / 51
    if odd > 0.05:
        first, _ = watch([*stream, odd], held_out=50, alpha=0.05)
        second, _ = watch([*stream, even], held_out=50, alpha=0.05)
        assert second.capital <= first.capital + 1e-12


@pytest.mark.parametrize(("p_value", "held_out"), [(0.0, 99), (1.01, 99), (0.505, 99), (float("nan"), 99)])
def test_what_no_calibration_of_that_size_can_say_is_refused(p_value, held_out):
    with pytest.raises(ValueError, match=r"p-value|NaN"):
        DriftMonitor(0.01).update(p_value, held_out)
