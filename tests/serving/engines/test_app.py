"""The engine over HTTP, through the in-process transport: OpenAI's shapes, annotations, errors, administration."""

import asyncio
import json
import re

import httpx
import pytest

from guard.verdict import Verdict
from serving.engines.client import EngineClient, EngineError
from serving.engines.embedded.app import create_engine_app
from serving.engines.transport import InProcessTransport
from serving.events import Annotation, Chunk, Done
from tests.serving.engines.conftest import settled

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
WORDS = "w3 w14 w15 w9 w26 w5 w35 w8"


def chat(text=WORDS, **changes):
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 6,
        "temperature": 0,
        **changes,
    }


async def collect(client, path, body):
    return [event async for event in client.stream(path, body)]


def text_of(events):
    return "".join(e.data["choices"][0]["delta"].get("content") or "" for e in chunks_of(events))


def chunks_of(events):
    return [e for e in events if isinstance(e, Chunk) and e.data["choices"]]


async def test_a_whole_answer_has_openais_shape_and_a_verdict(client):
    answer = await client.complete(CHAT, chat())
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 6, "total_tokens": 17}
    verdict = Verdict.from_dict(answer["guard"])
    assert verdict.final
    assert verdict.status in ("clean", "flagged")


async def test_a_stream_says_the_same_as_the_whole_answer_token_by_token(client):
    whole = await client.complete(CHAT, chat(stop=["w99"]))
    events = await collect(client, CHAT, chat(stream=True, stream_options={"include_usage": True}))
    assert text_of(events) == whole["choices"][0]["message"]["content"]
    assert isinstance(events[0], Annotation)
    assert events[0].verdict["step"] == 0
    assert isinstance(events[-1], Done)
    assert events[-2].data["usage"] == whole["usage"]
    assert events[-2].data["choices"] == []
    role, *tokens, last = chunks_of(events)
    assert role.data["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(tokens) == 6
    assert last.data["choices"][0]["finish_reason"] == "length"
    final = next(e for e in reversed(events) if isinstance(e, Annotation))
    assert final.verdict == whole["guard"]
    assert events.index(final) == events.index(last) - 1


async def test_annotations_stand_between_the_tokens_they_are_about(client):
    events = await collect(client, CHAT, chat(stream=True, max_tokens=10, headguard={"alpha": 0.02}))
    tokens = -1  # the role chunk is none
    seen = []
    for event in events[:-2]:
        if isinstance(event, Annotation):
            seen.append((event.verdict["step"], max(tokens, 0)))
        tokens += isinstance(event, Chunk)
    assert seen[:5] == [(0, 0), (1, 1), (2, 2), (4, 4), (8, 8)]


async def test_annotations_of_a_check_say_how_long_it_took_and_repeated_ones_do_not(client):
    events = await collect(client, CHAT, chat(stream=True))
    first, *_, last = [event.verdict for event in events if isinstance(event, Annotation)]
    assert first["check_seconds"] > 0
    assert "check_seconds" not in last


async def test_a_request_to_be_stopped_gets_content_filter_and_not_one_token(client):
    guard = {"window": "prefill", "alpha": 0.98, "stop": True}
    events = await collect(client, CHAT, chat(stream=True, headguard=guard))
    assert events[0].verdict["status"] == "flagged"
    assert text_of(events) == ""
    assert chunks_of(events)[-1].data["choices"][0]["finish_reason"] == "content_filter"
    whole = await client.complete(CHAT, chat(headguard=guard))
    assert whole["choices"][0]["finish_reason"] == "content_filter"
    assert whole["choices"][0]["message"]["content"] == ""
    assert whole["guard"]["spans"] == events[0].verdict["spans"]
    for span in whole["guard"]["spans"]:
        words = re.findall(r"w\d+", span["text"])
        assert "".join(words) == "".join(span["text"].split())
        assert set(words) <= set(WORDS.split())


async def test_plain_completions_take_text_one_text_or_token_ids(client):
    answers = [
        await client.complete(PLAIN, {"model": "tiny", "prompt": prompt, "max_tokens": 5, "temperature": 0})
        for prompt in (WORDS, [WORDS], [1, 9, 20, 21, 15, 32, 11, 41, 14], [[1, 9, 20, 21, 15, 32, 11, 41, 14]])
    ]
    assert len({a["choices"][0]["text"] for a in answers}) == 1
    assert answers[0]["object"] == "text_completion"
    assert answers[0]["usage"]["prompt_tokens"] == 9


async def test_the_content_of_a_message_may_come_in_parts(client):
    parts = [{"type": "text", "text": "w3 w14 w15 w9 "}, {"type": "text", "text": "w26 w5 w35 w8"}]
    whole, split = await client.complete(CHAT, chat()), await client.complete(CHAT, chat(parts))
    assert whole["choices"] == split["choices"]


async def test_a_stream_is_handed_on_while_it_is_generated(client, engine):
    events = client.stream(CHAT, chat(stream=True, max_tokens=80))
    first = [await anext(events) for _ in range(4)]
    assert isinstance(first[2], Chunk)
    assert engine.status()["running"] == 1
    await events.aclose()
    await settled(engine, lambda: engine.status()["running"] == 0)
    assert engine.status()["revisions"][0]["in_flight"] == 0


async def test_hanging_up_on_a_whole_answer_frees_its_slot(client, engine):
    request = asyncio.create_task(client.complete(CHAT, chat(max_tokens=80)))
    await settled(engine, lambda: engine.status()["running"] == 1)
    request.cancel()
    await settled(engine, lambda: engine.status()["running"] == 0)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (chat(n=2), "unsupported_parameter", "n"),
        (chat(logprobs=True), "unsupported_parameter", "logprobs"),
        (chat(tools=[{"type": "function"}]), "unsupported_parameter", "tools"),
        (chat(response_format={"type": "json_object"}), "unsupported_parameter", "response_format"),
        (chat(temperature=-1), "invalid_request", "temperature"),
        (chat(temperature=float("nan")), "invalid_request", "temperature"),
        (chat(top_p=0), "invalid_request", "top_p"),
        (chat(max_tokens=0), "invalid_request", "max_tokens"),
        (chat(max_tokens=10_000), "context_length_exceeded", "max_tokens"),
        (chat(" ".join(["w1"] * 200)), "context_length_exceeded", "messages"),
        (chat(messages=[]), "invalid_request", "messages"),
        (chat(stop=["x"] * 17), "invalid_request", "stop"),
        (chat(messages="hello"), "invalid_request", "messages"),
        (chat(messages=[{"role": "wizard", "content": "x"}]), "invalid_request", "messages"),
        (chat([{"type": "image_url", "image_url": {"url": "x"}}]), "invalid_request", "messages"),
        (chat("\ud800"), "invalid_request", None),
        (chat(headguard={"alpha": 1e-9}), "alpha_too_fine", "alpha"),
        (chat(headguard={"window": -3}), "invalid_request", "headguard"),
        ({"messages": [{"role": "user", "content": "x"}]}, "invalid_request", "model"),
        (chat(model="tiny2"), "model_not_found", "model"),
    ],
)
async def test_bad_requests_get_openais_error_with_the_parameter_named(client, body, code, param):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await client._http.post(CHAT, content=raw)
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("prompt", [[], " ".join(["w1"] * 200), ["a", "b"], [[1], [2]], [1, 999], [-1], None, {"a": 1}])
async def test_prompts_that_are_none_or_too_many_or_not_in_the_vocabulary_are_refused(client, prompt):
    response = await client._http.post(PLAIN, json={"model": "tiny", "prompt": prompt, "max_tokens": 2})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


async def test_a_conversation_that_the_chat_template_refuses_is_the_clients_error(client, engine):
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(EngineError) as refused:
        await client.complete(CHAT, chat())
    assert (refused.value.status, refused.value.body["error"]["param"]) == (400, "messages")


async def test_neutral_values_of_unsupported_parameters_and_unknown_fields_are_accepted(client):
    extra = {"n": 1, "logprobs": False, "tools": [], "presence_penalty": 0.0, "user": "u", "whatever": {"x": 1}}
    assert (await client.complete(CHAT, chat(**extra)))["choices"]


async def test_models_health_and_status_tell_what_is_served(client, engine, files):
    assert [m["id"] for m in (await client.models())["data"]] == ["tiny", files.a, files.b]
    status = await client.status()
    assert status["engine"] == "transformers"
    assert status["probe"]["attached"] is True
    assert status["max_model_len"] == 96
    base, a, _ = status["revisions"]
    assert base["revision"] == "tiny"
    assert base["profile"]
    assert base["reason"] is None
    assert (a["profile"], a["reason"], a["in_flight"]) == (None, "no_profile", 0)
    assert (await client._http.get("/health")).status_code == 200
    engine.close()
    assert (await client._http.get("/health")).status_code == 503
    with pytest.raises(EngineError) as refused:
        await client.complete(CHAT, chat())
    assert refused.value.status == 503


async def test_revisions_are_loaded_served_and_unloaded_over_http(client, files):
    await client.unload(files.a)
    with pytest.raises(EngineError) as refused:
        await client.complete(CHAT, chat(model=files.a))
    assert (refused.value.status, refused.value.body["error"]["code"]) == (404, "model_not_found")
    loaded = await client.load(files.a, files.adapters[files.a])
    assert loaded == await client.load(files.a, files.adapters[files.a])
    answer = await client.complete(CHAT, chat(model=files.a))
    assert answer["model"] == files.a
    assert answer["guard"]["reason"] == "no_profile"
    base = await client.complete(CHAT, chat())
    assert base["choices"] != answer["choices"]


async def test_bad_administration_is_refused_and_changes_nothing(client, files, tmp_path):
    before = await client.status()
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    cases = [
        (client.load("gone@sha256-000000000000", tmp_path / "none"), 400, "adapter_rejected"),
        (client.load("gone@sha256-000000000000", tmp_path), 400, "adapter_rejected"),
        (client.load("../up", files.adapters[files.a]), 400, "adapter_rejected"),
        (client.unload("nobody@sha256-000000000000"), 404, "model_not_found"),
        (client.unload("tiny"), 400, "invalid_request"),
        (client.set_profile(files.a, files.profile), 409, "profile_mismatch"),
        (client.set_profile("tiny", tmp_path / "none"), 409, "profile_mismatch"),
    ]
    for call, status, code in cases:
        with pytest.raises(EngineError) as refused:
            await call
        assert (refused.value.status, refused.value.body["error"]["code"]) == (status, code)
    assert await client.status() == before


async def test_a_profile_can_be_taken_away_and_given_back_while_serving(client, files):
    assert (await client.set_profile("tiny", None))["reason"] == "no_profile"
    assert (await client.complete(CHAT, chat()))["guard"]["status"] == "unscored"
    assert (await client.set_profile("tiny", files.profile))["reason"] is None
    assert (await client.complete(CHAT, chat()))["guard"]["status"] != "unscored"


async def test_an_unload_while_a_stream_runs_is_a_conflict_and_the_stream_goes_on(client, files):
    events = client.stream(CHAT, chat(model=files.a, stream=True, max_tokens=60))
    await anext(events)
    with pytest.raises(EngineError) as refused:
        await client.unload(files.a)
    assert refused.value.status == 409
    rest = [event async for event in events]
    assert isinstance(rest[-1], Done)
    assert len(chunks_of(rest)) == 62
    await client.unload(files.a)


async def test_the_openai_package_reads_answers_and_streams_unchanged(engine):
    openai = pytest.importorskip("openai")
    http = httpx.AsyncClient(transport=InProcessTransport(create_engine_app(engine)))
    sdk = openai.AsyncOpenAI(base_url="http://engine/v1", api_key="none", http_client=http)
    body = {"model": "tiny", "messages": [{"role": "user", "content": WORDS}], "max_tokens": 6, "temperature": 0}
    whole = await sdk.chat.completions.create(**body)
    assert whole.model_extra["guard"]["final"]
    pieces = [piece async for piece in await sdk.chat.completions.create(**body, stream=True)]
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(**{**body, "model": "nobody"})
    await sdk.close()


async def test_the_same_client_reaches_the_engine_over_a_socket(engine):
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(create_engine_app(engine), port=0, log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = EngineClient(f"http://127.0.0.1:{port}")
    try:
        whole = await client.complete(CHAT, chat())
        events = await collect(client, CHAT, chat(stream=True))
        assert text_of(events) == whole["choices"][0]["message"]["content"]
        stream = client.stream(CHAT, chat(stream=True, max_tokens=80))
        await anext(stream)
        await stream.aclose()
        await settled(engine, lambda: engine.status()["running"] == 0)
    finally:
        await client.aclose()
        server.should_exit = True
        await serving
