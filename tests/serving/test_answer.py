"""Answers over the real server, from a peer that does on demand what engines do rarely: break, hang, say nothing."""

from __future__ import annotations

import threading

import httpx
import openai
import pytest

from tests.serving.house import House
from tests.serving.scripted import (
    DIE,
    DONE,
    GOOD,
    HANG,
    LIVE,
    ROLE,
    USAGE,
    comment,
    finish,
    tokens,
    verdict,
    whole,
)

CLEAN = [comment(verdict()), ROLE, *tokens(1, 4), comment(verdict(step=4, final=True)), *tokens(5, 6), finish(), DONE]
FLAGGED = [comment(verdict("flagged", final=True)), ROLE, *tokens(1, 6), finish(), DONE]
ASK = [{"role": "user", "content": "a secret prompt"}]


@pytest.fixture
def house(scripted: House) -> House:
    return scripted


def stream(house: House, **body) -> tuple[httpx.Headers, bytes]:
    """Headers and bytes of a streamed answer."""
    request = {"model": "support", "messages": ASK, "stream": True, **body}
    with house.http() as client, client.stream("POST", "/v1/chat/completions", json=request) as response:
        return response.headers, response.read()


def metric(house: House, line: str) -> float:
    """The value of one metric line, 0 when it is not there."""
    text = house.call("client", "GET", "/metrics").text
    return next((float(found.rsplit(" ", 1)[1]) for found in text.splitlines() if found.startswith(line)), 0.0)


def checks(result: str, mode: str = "block", phase: str = "decode", adapter: str = LIVE) -> str:
    labels = f'adapter="{adapter}",engine="scripted",mode="{mode}",model_name="support",phase="{phase}"'
    return f'guard_checks_total{{{labels},result="{result}"}}'


def test_chunks_are_the_engines_bytes_and_the_last_one_carries_the_verdict(house, peer):
    peer.streams[LIVE] = [*CLEAN[:-1], USAGE, DONE]
    house.policy("support", window=4)
    headers, body = stream(house)
    assert body.startswith(ROLE + b"".join(tokens(1, 6)))
    assert body.endswith(USAGE + DONE)
    assert b": guard" not in body
    assert headers["x-headguard-verdict"] == "clean"
    assert headers["x-headguard-action"] == "deliver"
    assert b'"guard":{"status":"clean"' in body
    assert metric(house, checks("clean")) == 1


def test_the_header_says_pending_while_the_verdict_may_still_change(house, peer):
    peer.streams[LIVE] = CLEAN
    house.policy("support", window=4, hold_back=0)
    assert stream(house)[0]["x-headguard-verdict"] == "pending"


def test_the_internal_field_carries_the_policy_and_only_the_gateway_writes_it(house, peer):
    peer.streams[LIVE] = CLEAN
    house.policy("support", window=4, alpha=0.03, fail="closed")
    stream(house, temperature=0.5)
    told = {"window": 4, "alpha": 0.03, "stop": True, "fail": "closed"}
    assert peer.seen[-1]["headguard"] == told
    assert peer.seen[-1]["temperature"] == 0.5
    assert peer.seen[-1]["model"] == LIVE


def test_a_flagged_stream_is_blocked_kept_in_a_case_and_sealed(house, peer):
    peer.streams[LIVE] = FLAGGED
    house.policy("support", window="prefill")
    headers, body = stream(house)
    assert headers["x-headguard-verdict"] == "flagged"
    assert headers["x-headguard-action"] == "block"
    assert b"w1" not in body
    assert metric(house, checks("blocked", phase="prefill")) == 1
    assert house.ok("viewer", "GET", "/admin/cases")["cases"][0]["revision"] == LIVE


def test_a_flagged_request_is_answered_by_the_last_good_revision_under_its_own_guard(house, peer):
    peer.streams.update({LIVE: FLAGGED, GOOD: CLEAN})
    house.policy("support", mode="reroute", window=4)
    headers, body = stream(house)
    assert headers["x-headguard-verdict"] == "flagged"
    assert headers["x-headguard-action"] == "reroute"
    assert headers["x-headguard-revision"] == GOOD
    assert b"w6" in body
    assert peer.seen[-1]["headguard"]["stop"] is True
    assert metric(house, checks("rerouted", "reroute", "prefill")) == 1
    assert metric(house, checks("clean", "block", adapter=GOOD)) == 1


def test_a_request_that_is_flagged_there_too_is_blocked_and_not_rerouted_again(house, peer):
    peer.streams.update({LIVE: FLAGGED, GOOD: FLAGGED})
    house.policy("support", mode="reroute", window=4)
    headers, body = stream(house)
    assert headers["x-headguard-action"] == "block"
    assert b"w1" not in body
    assert len(peer.seen) == 2


@pytest.mark.parametrize("said", [None, {"status": "clean"}])
def test_a_whole_answer_without_a_readable_verdict_is_unscored(house, peer, said):
    peer.answers[LIVE] = whole("hello", said)
    house.policy("support", fail="closed")
    response = house.call("client", "POST", "/v1/chat/completions", json={"model": "support", "messages": ASK})
    assert response.headers["x-headguard-verdict"] == "unscored"
    assert response.json()["choices"][0]["finish_reason"] == "content_filter"
    assert "hello" not in response.text


def test_failing_open_delivers_an_unscored_answer_and_counts_the_bypass(house, peer):
    peer.answers[LIVE] = whole("hello", None)
    house.policy("support", fail="open")
    body = house.ok("client", "POST", "/v1/chat/completions", json={"model": "support", "messages": ASK})
    assert body["choices"][0]["message"]["content"] == "hello"
    assert body["guard"]["status"] == "unscored"
    assert metric(house, 'guard_bypasses_total{reason="no_annotation"}') == 1


def test_an_engine_that_dies_before_the_release_is_an_error_not_an_answer(house, peer):
    peer.streams[LIVE] = [comment(verdict()), ROLE, *tokens(1, 2), DIE]
    house.policy("support", window=4)
    response = house.call(
        "client", "POST", "/v1/chat/completions", json={"model": "support", "messages": ASK, "stream": True}
    )
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert "w1" not in response.text


def test_an_engine_that_dies_in_mid_stream_ends_in_an_error_event_and_is_counted(house, peer):
    peer.streams[LIVE] = [*CLEAN[:-3], DIE]
    house.policy("support", window=4)
    _, body = stream(house)
    assert b"event: error" in body
    assert b'"status":"unscored"' in body
    assert metric(house, checks("error")) == 1
    with pytest.raises(openai.APIError):
        list(house.openai().chat.completions.create(model="support", messages=ASK, stream=True))


@pytest.mark.parametrize("window", ["prefill", 4])
def test_a_client_that_hangs_up_stops_the_engine_before_and_after_the_release(house, peer, window):
    peer.streams[LIVE] = [comment(verdict(final=window == "prefill")), ROLE, *tokens(1, 2), HANG]
    house.policy("support", window=window)

    def ask() -> None:
        with (
            house.http() as client,
            client.stream(
                "POST", "/v1/chat/completions", json={"model": "support", "messages": ASK, "stream": True}, timeout=1
            ) as response,
        ):
            next(response.iter_bytes())

    try:
        ask()
    except httpx.ReadTimeout:
        assert window == 4  # held back: there was nothing to read yet
    noticed = threading.Event()
    while not peer.left:
        noticed.wait(0.01)
    assert house.gateway.in_flight.count(LIVE) == 0


def test_a_flag_is_kept_even_when_its_client_hangs_up(house, peer):
    peer.streams[LIVE] = [comment(verdict("flagged")), ROLE, *tokens(1, 2), HANG]
    house.policy("support", mode="observe")
    with (
        house.http() as client,
        client.stream(
            "POST", "/v1/chat/completions", json={"model": "support", "messages": ASK, "stream": True}
        ) as response,
    ):
        next(response.iter_bytes())
    while not (cases := house.ok("viewer", "GET", "/admin/cases")["cases"]):
        pass
    assert cases[0]["flags"] == 1


def test_ready_says_why_it_is_not(house, peer):
    assert house.call(None, "GET", "/ready").status_code == 200
    peer.attached = False
    peer.revisions[LIVE] = None
    response = house.call(None, "GET", "/ready")
    assert response.status_code == 503
    reasons = " ".join(response.json()["reasons"])
    assert "probe is not attached" in reasons
    assert "support" in reasons
