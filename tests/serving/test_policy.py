"""The policy is a pure function; what it must never do is checked over all of its inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from guard.verdict import Verdict
from serving.policy import Policy, decide

policies = st.builds(
    Policy,
    mode=st.sampled_from(["observe", "block", "reroute"]),
    window=st.sampled_from(["prefill", "all", 4]),
    fail=st.sampled_from(["open", "closed"]),
)


def said(status: str) -> Verdict:
    reason = "no_profile" if status == "unscored" else None
    return Verdict(status, 0.01, 0, "all", reason=reason)  # type: ignore[arg-type]


statuses = st.sampled_from(["clean", "flagged", "unscored"])


@given(policies, st.booleans())
def test_a_clean_answer_is_always_delivered(policy, released):
    assert decide(said("clean"), policy, released).delivers


@given(policies, statuses, st.booleans())
def test_observe_never_touches_an_answer_but_says_what_it_would_have_done(policy, status, released):
    observed = decide(said(status), policy.model_copy(update={"mode": "observe"}), released)
    enforced = decide(said(status), policy.model_copy(update={"mode": "block"}), released)
    assert observed.delivers
    assert observed.would_action == (None if enforced.delivers else "block")


@given(policies, st.booleans())
def test_an_enforcing_policy_never_delivers_a_flagged_answer(policy, released):
    decision = decide(said("flagged"), policy, released)
    assert decision.delivers == (policy.mode == "observe")
    assert decision.action != "reroute" or (policy.mode == "reroute" and not released)


@given(policies, st.booleans())
def test_an_unscored_answer_is_delivered_only_where_the_operator_chose_to_fail_open(policy, released):
    delivered = decide(said("unscored"), policy, released).delivers
    assert delivered == (policy.fail == "open" or policy.mode == "observe")


@given(policies, statuses)
def test_the_answer_to_a_rerouted_request_is_never_rerouted_again(policy, status):
    assert decide(said(status), policy.as_block()).action != "reroute"


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 4, "hold_back": 5},
        {"window": "prefill", "hold_back": 1},
        {"window": 0},
        {"alpha": 0},
        {"alpha": 1},
        {"mode": "off"},
        {"extra": 1},
    ],
)
def test_an_unsound_policy_is_refused(wrong):
    with pytest.raises(ValidationError):
        Policy(**wrong)


def test_the_hold_back_is_the_window_unless_the_operator_says_less():
    assert Policy(window="prefill").held_tokens == 0
    assert Policy(window=8).held_tokens == 8
    assert Policy(window=8, hold_back=2).held_tokens == 2
    assert Policy(window="all").held_tokens is None
    assert Policy(mode="observe", window=8).held_tokens == 0
