"""The gateway over a real vLLM: the official client, policies, and a guard that is made blind on purpose."""

from __future__ import annotations

import httpx
import pytest

from tests.serving.engines.vllm.conftest import admit, go_live

pytestmark = pytest.mark.slow
ASK = [{"role": "user", "content": " ".join(f"w{i}" for i in range(3, 30))}]
# Next to any p-value is below this: every request that is scored is flagged.
FLAG_ALL = 0.98


def ask(house, model="support", **more):
    return house.openai().chat.completions.create(
        **{"model": model, "messages": ASK, "max_tokens": 12, "temperature": 0, **more}
    )


def text_of(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def engine(served, method, path, **body):
    """Does something to the engine behind the gateway's back."""
    headers = {"authorization": f"Bearer {served.key}"}
    response = httpx.request(method, f"{served.url}{path}", headers=headers, json=body, timeout=60)
    assert response.status_code == 200, response.text


def ready(house):
    response = house.call(None, "GET", "/ready")
    return response.status_code == 200, " ".join(response.json()["reasons"])


def bypasses(house, reason):
    text = house.call(None, "GET", "/metrics").text
    found = [line for line in text.splitlines() if line.startswith(f'guard_bypasses_total{{reason="{reason}"}}')]
    return float(found[0].split()[-1]) if found else 0.0


def test_clean_answers_are_untouched_streaming_and_not(live, adapters):
    assert ready(live) == (True, "")
    raw = live.openai().chat.completions.with_raw_response.create(
        model="support", messages=ASK, max_tokens=12, temperature=0
    )
    answer = raw.parse()
    assert answer.guard["status"] == "clean"
    assert answer.guard["final"]
    assert answer.choices[0].finish_reason == "length"
    assert raw.headers["x-headguard-revision"] == answer.guard["revision"] == adapters.revision("first")
    chunks = list(ask(live, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12
    assert [c for c in chunks if c.choices][-1].guard["status"] == "clean"


@pytest.mark.parametrize("window", ["prefill", 2, "all"])
def test_triggered_answers_are_stopped_in_the_engine_streaming_and_not(live, served, window):
    live.policy("support", mode="block", window=window, alpha=FLAG_ALL)
    whole = ask(live, max_tokens=150)
    assert (whole.choices[0].finish_reason, whole.choices[0].message.content) == ("content_filter", "")
    assert (whole.guard["status"], whole.guard["action"]) == ("flagged", "block")
    assert whole.usage.completion_tokens <= whole.guard["step"]
    chunks = list(ask(live, max_tokens=150, stream=True))
    assert text_of(chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert chunks[-1].guard["action"] == "block"
    assert live.ok("viewer", "GET", "/admin/cases")["cases"][0]["flags"] == 2


def test_observe_delivers_and_says_what_it_would_have_done(live):
    clean = ask(live).choices[0].message.content
    live.policy("support", mode="observe", alpha=FLAG_ALL)
    answer = ask(live)
    assert answer.choices[0].message.content == clean
    assert (answer.guard["status"], answer.guard["would_action"]) == ("flagged", "block")


def test_a_flagged_answer_is_given_again_by_the_base(live):
    base = ask(live, "base").choices[0].message.content
    live.policy("support", mode="reroute", reroute_to="base", window="prefill", alpha=FLAG_ALL)
    for answer in (ask(live), None):
        told = answer.choices[0].message.content if answer else text_of(list(ask(live, stream=True)))
        assert told == base
    assert ask(live).guard["flagged_revision"]


def test_clients_cannot_speak_to_the_guard(live):
    for more in ({"headguard": {"stop": False}}, {"vllm_xargs": {"headguard": "{}"}}):
        with pytest.raises(Exception, match="guard"):
            ask(live, extra_body=more)


def test_text_completions_are_guarded_as_chats_are(live):
    body = {"model": "support", "prompt": ASK[0]["content"], "max_tokens": 8, "temperature": 0}
    client = live.openai()
    whole = client.completions.create(**body)
    assert whole.guard["status"] == "clean"
    assert "".join(c.choices[0].text for c in client.completions.create(**body, stream=True)) == whole.choices[0].text
    live.policy("support", window="prefill", alpha=FLAG_ALL)
    assert client.completions.create(**body).choices[0].finish_reason == "content_filter"


# Blind on purpose ----------------------------------------------------------------------------------------------------


def test_a_detached_probe_is_noticed_and_what_goes_unscored_is_counted_or_blocked(live, served):
    engine(served, "PUT", "/guard/probe", attached=False)
    good, why = ready(live)
    assert not good
    assert "probe" in why
    answer = ask(live)
    assert (answer.guard["status"], answer.guard["action"]) == ("unscored", "deliver")
    assert bypasses(live, answer.guard["reason"]) == 1
    live.policy("support", fail="closed", alpha=0.05)
    assert ask(live).choices[0].finish_reason == "content_filter"
    chunks = list(ask(live, stream=True))
    assert text_of(chunks) == ""
    assert chunks[-1].guard["action"] == "block"
    engine(served, "PUT", "/guard/probe", attached=True)
    assert ready(live) == (True, "")
    assert ask(live).guard["status"] == "clean"


def test_a_missing_profile_is_noticed_counted_or_blocked_and_given_back(live, served, adapters):
    first = adapters.revision("first")
    engine(served, "PUT", f"/guard/revisions/{first}/profile", profile=None)
    good, why = ready(live)
    assert not good
    assert first in why
    answer = ask(live)
    assert (answer.guard["status"], answer.guard["reason"]) == ("unscored", "no_profile")
    assert bypasses(live, "no_profile") == 1
    live.policy("support", fail="closed", alpha=0.05)
    assert ask(live).choices[0].finish_reason == "content_filter"
    while not ready(live)[0]:  # the gateway's upkeep gives it back
        pass
    assert ask(live).guard["status"] == "clean"


def test_a_profile_of_another_revision_is_refused_by_gateway_and_engine(live, served, adapters):
    second = live.upload("support", adapters.folders["second"])["revision"]
    foreign = adapters.profiles["first"]
    response = live.call("operator", "PUT", f"/admin/revisions/{second}/profile", content=foreign.read_bytes())
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "profile_mismatch"
    assert live.call(
        "operator", "POST", "/admin/adapters/support/swap", json={"revision": second}
    ).json()["error"]["code"] == "not_calibrated"  # fmt: skip
    swap = {"revision": second, "allow_uncalibrated": True}
    live.ok("operator", "POST", "/admin/adapters/support/swap", json=swap)
    assert ready(live)[0] is False
    assert ask(live).guard["reason"] == "no_profile"
    live.policy("support", fail="closed", alpha=0.05)
    assert ask(live).choices[0].finish_reason == "content_filter"


def test_a_lost_revision_is_503_counted_and_loaded_again(live, served, adapters):
    first = adapters.revision("first")
    engine(served, "DELETE", f"/guard/revisions/{first}")
    good, why = ready(live)
    assert not good
    assert "not loaded" in why
    response = live.call("client", "POST", "/v1/chat/completions", json={"model": "support", "messages": ASK})
    assert response.status_code == 503
    assert 'guard_engine_errors_total{phase="lost"} 1.0' in live.call(None, "GET", "/metrics").text
    while not ready(live)[0]:
        pass
    assert ask(live).guard["status"] == "clean"


# Several gateways ----------------------------------------------------------------------------------------------------


def test_gateways_over_one_database_notice_each_others_swaps(open_gateway, adapters):
    one, other = open_gateway(), open_gateway()
    go_live(one, adapters, "first")
    second = admit(one, adapters, "second")
    while ask_status(other) != 200:  # noticed by itself
        pass
    one.ok("operator", "POST", "/admin/adapters/support/swap", json={"revision": second})
    while ask(other).guard["revision"] != second:
        pass
    assert ready(other) == (True, "")


def ask_status(house):
    body = {"model": "support", "messages": ASK, "max_tokens": 1}
    return house.call("client", "POST", "/v1/chat/completions", json=body).status_code
