"""A live profile that no longer fits its traffic shows in the metrics; attacks and rerouted answers leave no trace."""

from __future__ import annotations

import pytest

from guard.verdict import Verdict, Window
from serving.staleness import Drift, Staleness
from tests.serving.house import House
from tests.serving.scripted import GOOD, LIVE, PROFILE, verdict, whole

NEXT = "d" * 64
HELD_OUT = 499


def ranked(
    place: int, status: str = "clean", window: Window = "all", profile: str = PROFILE, held_out: int = HELD_OUT
) -> Verdict:
    """A final verdict with the p-value of the ``place``-th oddest of the held-out requests and itself."""
    return Verdict(
        status,  # type: ignore[arg-type]
        0.01, 0, window, final=True, p_value=place / (HELD_OUT + 1), profile=profile[:12], held_out=held_out,
    )  # fmt: skip


def drifted(requests: int = 150, **more) -> Staleness:
    """What has seen clean requests that are all among the oddest tenth."""
    staleness = Staleness()
    for number in range(requests):
        staleness.observe(LIVE, ranked(6 + number % 45, **more))
    return staleness


def test_clean_requests_that_are_all_odd_make_their_revision_stale_and_no_other():
    staleness = drifted()
    assert staleness.of(LIVE, PROFILE).stale
    assert staleness.of(LIVE, PROFILE).log10_capital > 2
    assert staleness.of(GOOD, PROFILE) == Drift()


def test_another_profile_starts_anew_as_soon_as_it_is_in_force():
    staleness = drifted()
    assert staleness.of(LIVE, NEXT) == Drift()
    staleness.observe(LIVE, ranked(300, profile=NEXT))
    assert not staleness.of(LIVE, NEXT).stale


def test_another_window_starts_anew():
    staleness = drifted()
    staleness.observe(LIVE, ranked(300, window="prefill"))
    assert not staleness.of(LIVE, PROFILE).stale


@pytest.mark.parametrize("ignored", [ranked(1, "flagged"), Verdict("clean", 0.01, 0, "all", final=True)])
def test_flagged_requests_and_verdicts_without_a_rank_change_nothing(ignored):
    staleness = Staleness()
    for _ in range(500):
        staleness.observe(LIVE, ignored)
    assert staleness.of(LIVE, PROFILE) == Drift()


def test_a_p_value_that_cannot_be_is_logged_and_ends_nothing(caplog):
    staleness = Staleness()
    staleness.observe(LIVE, ranked(10, held_out=7))
    assert "cannot be" in caplog.text
    assert not staleness.of(LIVE, PROFILE).stale


@pytest.fixture
def house(scripted: House) -> House:
    return scripted


def ask(house: House) -> None:
    """One request for a whole answer."""
    body = {"model": "support", "messages": [{"role": "user", "content": "a prompt"}]}
    assert house.call("client", "POST", "/v1/chat/completions", json=body).status_code == 200


def gauge(house: House, name: str) -> dict[str, float]:
    """The values of a gauge of ``support`` by revision."""
    lines = [line for line in house.call("client", "GET", "/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return {line.split('adapter="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def told(place: int, status: str = "clean") -> dict:
    """The annotation of a final verdict that was ranked."""
    more = {"p_value": place / (HELD_OUT + 1), "held_out": HELD_OUT, "profile": PROFILE[:12], "alpha": 0.01}
    return verdict(status, final=True, **more)


def test_the_metrics_say_when_the_live_profile_is_stale(house, peer):
    assert gauge(house, "guard_profile_stale") == {LIVE: 0}
    for number in range(60):
        peer.answers[LIVE] = whole("hello", told(6 + number % 20))
        ask(house)
    assert gauge(house, "guard_profile_stale") == {LIVE: 1}
    assert gauge(house, "guard_profile_drift_log10_capital")[LIVE] > 2


def test_rerouted_answers_do_not_count_for_the_revision_that_gives_them(house, peer):
    house.policy("support", mode="reroute")
    peer.answers.update({LIVE: whole("hello", told(1, "flagged")), GOOD: whole("hello", told(6))})
    ask(house)
    assert house.gateway.staleness.of(GOOD, PROFILE) == Drift()
    assert house.gateway.staleness.of(LIVE, PROFILE) == Drift()
