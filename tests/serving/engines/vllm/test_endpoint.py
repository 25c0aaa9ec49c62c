"""The guarded vLLM over HTTP, as a gateway sees it: the same shapes and refusals as the embedded engine's."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import aclosing

import httpx
import pytest

from guard.verdict import Verdict
from serving.engines.client import EngineError
from serving.events import Annotation, Chunk, Done

pytestmark = pytest.mark.slow
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
WORDS = "w3 w14 w15 w9 w26 w5 w35 w8"
OTHERS = [" ".join(f"w{(7 * i + j * j) % 54}" for j in range(12)) for i in range(16)]
# An answer that is still being written when its client has looked at the engine and changed its mind.
LONG = {"max_tokens": 900, "ignore_eos": True}
# Next to any p-value is below this, so that every scored request is flagged.
FLAG_ALL = 0.98


def chat(text=WORDS, **changes):
    body = {"model": "base", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}
    return {**body, **changes}


async def collect(client, path, body):
    return [event async for event in client.stream(path, {**body, "stream": True})]


def verdicts_of(events):
    told = [{k: v for k, v in e.verdict.items() if k != "check_seconds"} for e in events if isinstance(e, Annotation)]
    return [Verdict.from_dict(verdict) for verdict in told]


def chunks_of(events):
    return [e for e in events if isinstance(e, Chunk) and e.data["choices"]]


def text_of(events):
    return "".join(e.data["choices"][0]["delta"].get("content") or "" for e in chunks_of(events))


async def p_values(client, text):
    """Of the first checkpoint and of the last one."""
    told = verdicts_of(await collect(client, CHAT, chat(text, headguard={"window": "all", "alpha": 0.02})))
    return told[0].p_value, told[-1].p_value


async def settled(client, condition):
    """The status, as soon as `condition` holds for it."""
    for _ in range(2000):
        status = await client.status()
        if condition(status):
            return status
        await asyncio.sleep(0.01)
    raise AssertionError(f"never came true: {status}")


async def test_status_tells_what_is_served_and_that_every_worker_is_watched(client):
    status = await client.status()
    assert status["engine"] == "vllm"
    assert status["dtype"] == "float32"
    assert status["probe"]["attached"] is True
    assert len(status["probe"]["workers"]) == 1
    assert status["lora"] == {"slots": 7, "loaded": 0}
    assert status["revisions"] == [{"revision": "base", "profile": None, "reason": "no_profile", "in_flight": 0}]


async def test_a_stream_says_each_verdict_before_the_chunk_that_it_covers(client, adapters):
    await client.set_profile("base", str(adapters.profiles["base"]))
    events = await collect(client, CHAT, chat(headguard={"window": "all", "alpha": 0.02}))
    assert isinstance(events[0], Annotation)
    assert isinstance(events[-1], Done)
    tokens, seen = 0, {}
    for event in events:
        if isinstance(event, Annotation):
            seen.setdefault(event.verdict["step"], tokens)
        elif isinstance(event, Chunk) and event.data["choices"][0]["delta"].get("content"):
            tokens += 1
    assert set(seen) == set(range(9)) & {0, 1, 2, 4, 8}
    assert all(tokens_before <= step for step, tokens_before in seen.items())
    assert verdicts_of(events)[-1].final
    whole = await client.complete(CHAT, chat(headguard={"window": "all", "alpha": 0.02}))
    assert whole["choices"][0]["message"]["content"] == text_of(events)
    assert Verdict.from_dict(whole["guard"]) == verdicts_of(events)[-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_flagged_request_ends_in_the_engine_without_the_token_of_that_step(client, adapters, stream):
    # Flagged not before its first tokens: the running maximum grows with every checkpoint that is read.
    await client.set_profile("base", str(adapters.profiles["late"]))
    values = [await p_values(client, text) for text in OTHERS]
    odd, alpha = next((t, (a + b) / 2) for t, (a, b) in zip(OTHERS, values, strict=True) if b + 0.02 < a)
    body = chat(odd, headguard={"window": "all", "alpha": alpha, "stop": True}, max_tokens=100)
    if stream:
        events = await collect(client, CHAT, body)
        verdict, text = verdicts_of(events)[-1], text_of(events)
        reason = chunks_of(events)[-1].data["choices"][0]["finish_reason"]
    else:
        answer = await client.complete(CHAT, body)
        verdict, text = Verdict.from_dict(answer["guard"]), answer["choices"][0]["message"]["content"]
        reason = answer["choices"][0]["finish_reason"]
        assert answer["usage"]["completion_tokens"] == verdict.step
        assert not answer["kv_transfer_params"]
    assert (verdict.status, verdict.final, reason) == ("flagged", True, "content_filter")
    assert verdict.heads
    assert all(span.text in odd.replace(" ", "") for span in verdict.spans)  # as this tokenizer decodes
    assert text.count("w") == verdict.step > 0
    assert (await client.status())["running"] == 0


async def test_what_a_sender_writes_under_our_names_reaches_no_worker(client, adapters):
    await client.set_profile("base", str(adapters.profiles["base"]))
    told = json.dumps({"window": "prefill", "alpha": 1e-9, "stop": False})
    body = chat(headguard={"window": "prefill", "alpha": FLAG_ALL, "stop": True})
    answer = await client.complete(CHAT, {**body, "vllm_xargs": {"headguard": told, "headguard_call": "x", "mine": 1}})
    assert (answer["guard"]["alpha"], answer["guard"]["status"]) == (FLAG_ALL, "flagged")
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    del body["headguard"]
    answer = await client.complete(CHAT, {**body, "vllm_xargs": {"headguard": told}})
    assert (answer["guard"]["window"], answer["guard"]["alpha"]) == ("all", 0.05)


async def test_several_answers_to_one_request_are_judged_as_the_worst_of_them(client, adapters):
    await client.set_profile("base", str(adapters.profiles["base"]))
    body = {"model": "base", "max_tokens": 4, "temperature": 0}
    asked = [{**body, "prompt": text, "headguard": {"window": "prefill", "alpha": FLAG_ALL}} for text in OTHERS]
    values = [(await client.complete(PLAIN, one))["guard"]["p_value"] for one in asked]
    best, worst = OTHERS[values.index(max(values))], OTHERS[values.index(min(values))]
    guard = {"window": "prefill", "alpha": (min(values) + max(values)) / 2, "stop": True}
    answer = await client.complete(PLAIN, {**body, "prompt": [best, worst], "headguard": guard})
    assert (answer["guard"]["status"], answer["guard"]["p_value"]) == ("flagged", min(values))
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "content_filter"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/responses", {"input": WORDS, "max_output_tokens": 6}),
        ("/v1/messages", {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 6}),
        ("/v1/completions", {"prompt": WORDS, "max_tokens": 6, "n": 2, "temperature": 1.0}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": WORDS}]], "max_tokens": 6}),
    ],
)
async def test_every_entry_point_is_watched_and_stopped(client, adapters, path, asked):
    await client.set_profile("base", str(adapters.profiles["base"]))
    guard = {"window": "prefill", "alpha": FLAG_ALL, "stop": True}
    answer = await client.complete(path, {"model": "base", **asked, "headguard": guard})
    assert (answer["guard"]["status"], answer["guard"]["final"]) == ("flagged", True)
    del answer["guard"]
    assert not re.search(r"w\d+w\d+", json.dumps(answer))
    assert (await client.complete(path, {"model": "base", **asked}))["guard"]["window"] == "all"


async def test_a_client_that_hangs_up_ends_its_request_in_the_engine(client):
    began = (await client.status())["steps"]
    async with aclosing(client.stream(CHAT, chat(stream=True, **LONG))) as events:
        [await anext(events) for _ in range(4)]
        assert (await client.status())["running"] == 1
    await settled(client, lambda s: s["running"] == 0 and not s["revisions"][0]["in_flight"])
    whole = asyncio.create_task(client.complete(CHAT, chat(**LONG)))
    await settled(client, lambda s: s["running"] == 1)
    whole.cancel()
    ended = await settled(client, lambda s: s["running"] == 0 and not s["revisions"][0]["in_flight"])
    assert 0 < ended["steps"] - began < LONG["max_tokens"]


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"headguard": {"window": -3}}, 400, "invalid_request", "headguard"),
        ({"headguard": "off"}, 400, "invalid_request", "headguard"),
        ({"headguard": {"alpha": 1e-9}}, 400, "alpha_too_fine", "alpha"),
        ({"use_beam_search": True, "n": 2}, 400, "unsupported_parameter", "use_beam_search"),
    ],
)
async def test_bad_requests_get_the_houses_error_with_the_parameter_named(
    client, adapters, changes, status, code, param
):
    await client.set_profile("base", str(adapters.profiles["base"]))
    with pytest.raises(EngineError) as refused:
        await client.complete(CHAT, chat(**changes))
    error = refused.value.body["error"]
    assert (refused.value.status, error["code"], error["param"]) == (status, code, param)
    assert (await client.status())["revisions"][0]["in_flight"] == 0


async def test_bodies_that_are_no_json_are_vllms_to_refuse(client):
    for raw in (b"{", b"[]", b"\xff"):
        response = await client._http.post(CHAT, content=raw, headers={"content-type": "application/json"})
        assert response.status_code == 400
    assert (await client.status())["revisions"][0]["in_flight"] == 0


async def test_adapters_come_and_go_by_the_guards_routes_alone(client, adapters):
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/x"):
        body = {"lora_name": "x", "lora_path": str(adapters.folders["first"])}
        response = await client._http.post(path, json=body)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"


async def test_nobody_without_the_key_reaches_the_guards_routes(served):
    async with httpx.AsyncClient(base_url=served.url) as stranger:
        assert (await stranger.get("/guard/status")).status_code == 401
        assert (await stranger.put("/guard/probe", json={"attached": False})).status_code == 401
        assert (await stranger.post(CHAT, json=chat())).status_code == 401


async def test_revisions_are_loaded_served_and_unloaded(client, adapters):
    first = adapters.revision("first")
    loaded = await client.load(first, str(adapters.folders["first"]), str(adapters.profiles["first"]))
    assert loaded["profile"]
    assert loaded == await client.load(first, str(adapters.folders["first"]))
    answer = await client.complete(CHAT, chat(model=first))
    assert answer["model"] == first
    assert answer["guard"]["profile"] == loaded["profile"][:12]
    assert answer["choices"][0]["message"] != (await client.complete(CHAT, chat()))["choices"][0]["message"]
    assert first in [model["id"] for model in (await client.models())["data"]]
    await client.unload(first)
    with pytest.raises(EngineError) as refused:
        await client.complete(CHAT, chat(model=first))
    assert refused.value.lost
    assert (await client.status())["lora"]["loaded"] == 0


async def test_bad_administration_is_refused_and_changes_nothing(client, adapters, tmp_path):
    first, second = adapters.revision("first"), adapters.revision("second")
    await client.load(first, str(adapters.folders["first"]))
    before = (await client.status())["revisions"]
    folder, profiles = str(adapters.folders["first"]), {k: str(v) for k, v in adapters.profiles.items()}
    cases = [
        (client.load("gone@sha256-000000000000", str(tmp_path / "none")), 400, "adapter_rejected"),
        (client.load("../up", folder), 400, "adapter_rejected"),
        (client.load(second, folder), 400, "adapter_rejected"),
        (client.load(second, str(adapters.folders["second"]), profiles["first"]), 409, "profile_mismatch"),
        (client.unload("nobody@sha256-000000000000"), 404, "model_not_found"),
        (client.unload("base"), 400, "invalid_request"),
        (client.set_profile(first, profiles["second"]), 409, "profile_mismatch"),
        (client.set_profile("base", str(tmp_path / "none")), 409, "profile_mismatch"),
    ]
    for call, status, code in cases:
        with pytest.raises(EngineError) as refused:
            await call
        assert (refused.value.status, refused.value.body["error"]["code"]) == (status, code)
    assert (await client.status())["revisions"] == before


async def test_an_unload_while_a_stream_runs_is_a_conflict_and_the_stream_goes_on(client, adapters):
    first = adapters.revision("first")
    await client.load(first, str(adapters.folders["first"]))
    events = client.stream(CHAT, chat(model=first, stream=True, **LONG))
    await anext(events)
    with pytest.raises(EngineError) as refused:
        await client.unload(first)
    assert refused.value.status == 409
    drained = asyncio.create_task(client.unload(first, drain_s=60))
    rest = [event async for event in events]
    assert isinstance(rest[-1], Done)
    # Its whole length, in however many chunks: those that nobody has read yet are joined.
    assert chunks_of(rest)[-1].data["choices"][0]["finish_reason"] == "length"
    await drained


async def test_a_cpu_keeps_its_last_slot_free_so_that_the_base_is_never_given_an_adapters_weights(
    client, adapters, tmp_path
):
    from guard.identity import adapter_digest, revision_name
    from tests.serving.engines.vllm.weights import save_adapter

    alone = (await client.complete(CHAT, chat()))["choices"][0]["message"]["content"]
    folders = [save_adapter(tmp_path / f"a{seed}", seed) for seed in range(10, 18)]
    names = [revision_name("many", adapter_digest(folder)) for folder in folders]
    for name, folder in zip(names[:7], folders[:7], strict=True):
        await client.load(name, str(folder))
    with pytest.raises(EngineError) as refused:
        await client.load(names[7], str(folders[7]))
    assert (refused.value.status, refused.value.body["error"]["code"]) == (409, "no_lora_slot")
    mixed = await asyncio.gather(*(client.complete(CHAT, chat(model=m)) for m in [*names[:7], "base", *names[:7]]))
    assert mixed[7]["choices"][0]["message"]["content"] == alone
    await client.unload(names[0])
    await client.load(names[7], str(folders[7]))
    assert (await client.complete(CHAT, chat()))["choices"][0]["message"]["content"] == alone
