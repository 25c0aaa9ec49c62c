"""From an uploaded adapter to a guarded answer, with the official client, over the real engine."""

from __future__ import annotations

# Any p-value is below this, so that every scored request is flagged.
FLAG_ALL = 0.999
ASK = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog and then some more words"}]


def test_an_uploaded_calibrated_and_swapped_adapter_answers_with_a_verdict(live):
    raw = live.openai().chat.completions.with_raw_response.create(model="support", messages=ASK, max_tokens=8)
    answer = raw.parse()
    assert answer.guard["status"] in ("clean", "flagged")
    assert raw.headers["x-headguard-verdict"] == answer.guard["status"]
    assert raw.headers["x-headguard-revision"] == answer.guard["revision"] == answer.model
    assert raw.headers["x-headguard-request-id"] == answer.guard["request_id"]


def test_a_flagged_answer_is_blocked_streaming_and_not(live):
    live.policy("support", mode="block", window="prefill", alpha=FLAG_ALL)
    client = live.openai()
    whole = client.chat.completions.create(model="support", messages=ASK, max_tokens=8)
    assert whole.choices[0].finish_reason == "content_filter"
    assert whole.choices[0].message.content == ""
    assert whole.guard["status"] == "flagged"
    assert whole.guard["action"] == "block"
    chunks = list(client.chat.completions.create(model="support", messages=ASK, max_tokens=8, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert chunks[-1].guard["action"] == "block"
    case = live.ok("viewer", "GET", "/admin/cases")["cases"][0]
    assert case["flags"] == case["kept"] == 2
