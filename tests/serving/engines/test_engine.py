"""The engine as its app uses it: batching, verdicts, stopping, cancelling, revisions, failures."""

import asyncio

import pytest
import torch

from guard.errors import AdapterRejected
from guard.gram import HeadGrams
from guard.probes.transformers.measure import generate
from guard.probes.transformers.runner import Runner
from serving.engines.embedded.engine import EmbeddedEngine
from serving.engines.embedded.requests import Failed, Finished, GenerateRequest, GuardUpdate, Token, Watch
from serving.engines.embedded.sampling import Sampling
from serving.errors import BadRequest, Conflict, NotFound, Unavailable
from tests.guard.probes.transformers.models import prompts_of
from tests.serving.engines.conftest import settled

GREEDY = Sampling(temperature=0.0)


def ask(prompt, revision=None, max_tokens=8, **options):
    return GenerateRequest(tuple(prompt), revision, max_tokens, options.pop("sampling", GREEDY), **options)


async def events_of(engine, request):
    return [event async for event in engine.submit(request)]


def tokens_of(events):
    return [event.id for event in events if isinstance(event, Token)]


def verdicts_of(events):
    return [event.verdict for event in events if isinstance(event, GuardUpdate)]


async def test_twenty_concurrent_requests_over_three_models_each_answer_as_if_alone(engine, files):
    prompts = prompts_of([5 + i % 17 for i in range(20)])
    names = [(None, files.a, files.b)[i % 3] for i in range(20)]
    answers = await asyncio.gather(*(events_of(engine, ask(p, n, 10)) for p, n in zip(prompts, names, strict=True)))
    runner = Runner.load(files.base, max_slots=1)
    for revision, folder in files.adapters.items():
        runner.add_adapter(revision, folder)
    for prompt, name, events in zip(prompts, names, answers, strict=True):
        assert tokens_of(events) == generate(runner, [prompt], 10, name)[0]
        assert isinstance(events[-1], Finished)
    assert engine.status()["running"] == 0
    assert all(entry["in_flight"] == 0 for entry in engine.status()["revisions"])
    assert len({tuple(tokens_of(events)) for events in answers}) > 15


async def test_a_verdict_precedes_the_first_token_and_stands_between_tokens_at_every_checkpoint(engine):
    request = ask(prompts_of([12])[0], max_tokens=12, watch=Watch("all", 0.02))
    events = await events_of(engine, request)
    tokens, seen = 0, []
    for event in events:
        if isinstance(event, GuardUpdate):
            seen.append((tokens, event.verdict.step, event.verdict.final))
        tokens += isinstance(event, Token)
    assert tokens == 12
    assert [step for _, step, _ in seen[:-1]] == [0, 1, 2, 4, 8]
    assert all(after == step for after, step, _ in seen[:-1])
    assert [final for *_, final in seen] == [False, False, False, False, True, True]
    assert all(v.status == "clean" and v.p_value > 0.02 for v in verdicts_of(events))
    assert isinstance(events[-2], GuardUpdate)


async def test_the_end_token_ends_the_answer_and_is_not_part_of_it(engine):
    prompt = prompts_of([9])[0]
    tokens = tokens_of(await events_of(engine, ask(prompt)))
    engine.runner.eos_ids = frozenset([tokens[3]])
    events = await events_of(engine, ask(prompt))
    assert tokens_of(events) == tokens[: tokens.index(tokens[3])]
    assert events[-1].reason == "stop"
    assert events[-1].completion_tokens == tokens.index(tokens[3])


async def test_a_flagged_request_is_stopped_at_that_very_step_without_its_token(engine):
    watch = Watch("prefill", 0.98, stop=True)
    events = await events_of(engine, ask(prompts_of([12])[0], watch=watch))
    verdict, end = events
    assert verdict.verdict.status == "flagged"
    assert (verdict.verdict.step, verdict.verdict.final) == (0, True)
    assert verdict.verdict.heads
    assert end == Finished("content_filter", "", 12, 0)


async def test_an_answer_flagged_later_keeps_the_tokens_before_the_verdict(engine, files):
    engine.books.set_profile(None, files.late)
    # At a false-alarm rate this high some request is flagged after its first tokens, as its running maximum grows.
    prompts = prompts_of([12 + i % 8 for i in range(40)], seed=5)
    answers = await asyncio.gather(
        *(events_of(engine, ask(p, watch=Watch(8, 0.5, stop=True), max_tokens=12)) for p in prompts)
    )
    late = [e for e in answers if e[-1].reason == "content_filter" and verdicts_of(e)[-1].step > 0]
    assert late
    for events in late:
        verdict = verdicts_of(events)[-1]
        assert verdict.status == "flagged"
        assert len(tokens_of(events)) == verdict.step == events[-1].completion_tokens


async def test_a_flagged_request_that_is_only_observed_goes_on_and_stays_flagged(engine):
    events = await events_of(engine, ask(prompts_of([12])[0], watch=Watch("all", 0.98)))
    assert len(tokens_of(events)) == 8
    assert {v.status for v in verdicts_of(events)} == {"flagged"}


async def test_without_a_profile_a_request_is_unscored_and_fails_open_or_closed(engine, files):
    prompt = prompts_of([9])[0]
    events = await events_of(engine, ask(prompt, files.a))
    assert [(v.status, v.reason, v.final) for v in verdicts_of(events)] == [("unscored", "no_profile", True)] * 2
    assert len(tokens_of(events)) == 8
    closed = await events_of(engine, ask(prompt, files.a, watch=Watch(fail_closed=True)))
    assert [type(e) for e in closed] == [GuardUpdate, Finished]
    assert closed[-1].reason == "content_filter"


async def test_a_prompt_length_outside_the_calibration_is_unscored(engine):
    events = await events_of(engine, ask(prompts_of([60])[0]))
    assert {v.reason for v in verdicts_of(events)} == {"prompt_length"}


async def test_a_blind_probe_is_noticed_and_its_request_unscored(engine, monkeypatch):
    add = HeadGrams.add
    monkeypatch.setattr(HeadGrams, "add", lambda self, layer, *a: None if layer == 1 else add(self, layer, *a))
    events = await events_of(engine, ask(prompts_of([12])[0]))
    assert {v.reason for v in verdicts_of(events)} == {"probe_blind"}
    await settled(engine, lambda: engine.status()["probe"]["blind"] == 1)


async def test_an_engine_whose_probe_is_off_never_calls_a_request_clean(files):
    engine = EmbeddedEngine(files.base, "tiny", files.profile, max_slots=2, probe=False).start()
    try:
        assert not engine.status()["probe"]["attached"]
        events = await events_of(engine, ask(prompts_of([12])[0]))
        assert {v.reason for v in verdicts_of(events)} == {"probe_blind"}
    finally:
        engine.close()


async def test_leaving_an_answer_frees_its_slot_while_others_go_on(files):
    engine = EmbeddedEngine(files.base, "tiny", max_slots=1).start()
    try:
        endless = engine.submit(ask(prompts_of([5])[0], max_tokens=90))
        while not isinstance(await anext(endless), Token):
            pass
        second = engine.submit(ask(prompts_of([6])[0], max_tokens=2))
        assert engine.status()["running"] == 1
        endless.cancel()
        events = [event async for event in second]
        assert isinstance(events[-1], Finished)
        await settled(engine, lambda: engine.status()["revisions"][0]["in_flight"] == 0)
        assert engine.runner.length(0) == 0
    finally:
        engine.close()


async def test_a_cancelled_consumer_frees_its_slot(engine):
    async def consume():
        async for _ in engine.submit(ask(prompts_of([5])[0], max_tokens=90)):
            started.set()

    started = asyncio.Event()
    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    await settled(engine, lambda: engine.status()["running"] == 0)


async def test_a_full_queue_refuses_and_takes_nothing(files):
    engine = EmbeddedEngine(files.base, "tiny", max_slots=1, max_queue=1).start()
    try:
        first = engine.submit(ask(prompts_of([5])[0], max_tokens=90))
        await anext(first)
        waiting = engine.submit(ask(prompts_of([5])[0]))
        with pytest.raises(Unavailable, match="overloaded") as refused:
            engine.submit(ask(prompts_of([5])[0]))
        assert refused.value.code == "engine_overloaded"
        assert engine.status()["revisions"][0]["in_flight"] == 2
        waiting.cancel()
        first.cancel()
        await settled(engine, lambda: engine.status()["revisions"][0]["in_flight"] == 0)
    finally:
        engine.close()


async def test_a_revision_in_flight_cannot_be_unloaded_and_drains_when_asked(engine, files):
    answer = engine.submit(ask(prompts_of([5])[0], files.a, max_tokens=90))
    await anext(answer)
    with pytest.raises(Conflict, match="1 request"):
        engine.unload(files.a)
    assert files.a in engine.books
    draining = asyncio.create_task(asyncio.to_thread(engine.unload, files.a, 60.0))
    await settled(engine, lambda: files.a not in engine.books.names())
    with pytest.raises(NotFound):
        engine.submit(ask(prompts_of([5])[0], files.a))
    events = [event async for event in answer]
    assert isinstance(events[-1], Finished)
    await draining
    assert files.a not in engine.runner.adapters
    with pytest.raises(NotFound):
        engine.unload(files.a)


async def test_revisions_come_and_go_while_requests_flow_and_none_is_mixed(engine, files, tmp_path):
    prompt = prompts_of([9])[0]
    expected = tokens_of(await events_of(engine, ask(prompt, files.b, 20)))
    running = [asyncio.create_task(events_of(engine, ask(prompt, files.b, 20))) for _ in range(6)]
    for _ in range(3):
        await asyncio.to_thread(engine.unload, files.a)
        await asyncio.to_thread(engine.load, files.a, files.adapters[files.a])
    assert [tokens_of(events) for events in await asyncio.gather(*running)] == [expected] * 6


async def test_a_flagged_verdict_says_the_words_of_its_spans(engine):
    request = ask(prompts_of([20])[0], watch=Watch("prefill", 0.98))
    verdict = verdicts_of(await events_of(engine, request))[0]
    for span in verdict.spans:
        words = engine.tokenizer.decode(list(request.prompt[span.start : span.end]), skip_special_tokens=True)
        assert span.text == words


def test_a_folder_that_is_not_the_named_revision_is_refused(engine, files):
    with pytest.raises(AdapterRejected, match="is not revision"):
        engine.load("gamma@sha256-000000000000", files.adapters[files.a])
    with pytest.raises(AdapterRejected, match="not a revision"):
        engine.load("../../etc", files.adapters[files.a])


async def test_what_cannot_run_is_refused_when_it_is_submitted(engine):
    for request, error, code in (
        (ask([]), BadRequest, "invalid_request_error"),
        (ask([1] * 97), BadRequest, "context_length_exceeded"),
        (ask([1] * 96, max_tokens=None), BadRequest, "context_length_exceeded"),
        (ask([1] * 90, max_tokens=7), BadRequest, "context_length_exceeded"),
        (ask([999]), BadRequest, "invalid_request_error"),
        (ask([1], "nobody@sha256-000000000000"), NotFound, "model_not_found"),
        (ask([1], watch=Watch("all", 1e-6)), BadRequest, "alpha_too_fine"),
    ):
        with pytest.raises(error) as refused:
            engine.submit(request)
        assert refused.value.code == code
    assert all(entry["in_flight"] == 0 for entry in engine.status()["revisions"])


async def test_a_step_that_raises_fails_its_requests_and_the_next_are_served(engine, monkeypatch, caplog):
    prompt = prompts_of([7])[0]
    decode = engine.runner.decode

    def broken(slots, tokens, *rest):
        monkeypatch.setattr(engine.runner, "decode", decode)
        raise RuntimeError(f"the prompt was {prompt}")

    monkeypatch.setattr(engine.runner, "decode", broken)
    events = await events_of(engine, ask(prompt))
    assert isinstance(events[-1], Failed)
    assert events[-1].error.status == 500
    assert str(prompt) not in caplog.text
    assert "RuntimeError" in caplog.text
    assert isinstance((await events_of(engine, ask(prompt)))[-1], Finished)
    assert len(engine._free) == 8


async def test_one_bad_prompt_of_a_prefill_does_not_take_the_others_with_it(files, monkeypatch):
    engine = EmbeddedEngine(files.base, "tiny", max_slots=4)
    prefill = engine.runner.prefill
    bad = prompts_of([7])[0]

    def picky(slots, prompts, *rest):
        if tuple(bad) in prompts:
            raise RuntimeError("cannot")
        return prefill(slots, prompts, *rest)

    monkeypatch.setattr(engine.runner, "prefill", picky)
    engine.start()
    try:
        prompts = [bad, *prompts_of([5, 6], seed=3)]
        ends = await asyncio.gather(*(events_of(engine, ask(p)) for p in prompts))
        assert [type(events[-1]) for events in ends] == [Failed, Finished, Finished]
    finally:
        engine.close()


async def test_output_that_is_not_a_number_fails_the_request_instead_of_being_served(engine, monkeypatch):
    decode = engine.runner.decode
    monkeypatch.setattr(engine.runner, "decode", lambda *a: torch.full_like(decode(*a), float("nan")))
    events = await events_of(engine, ask(prompts_of([7])[0]))
    assert isinstance(events[-1], Failed)
    assert events[-1].error.code == "non_finite_output"


async def test_seeded_sampling_repeats_itself_and_other_seeds_differ(engine):
    prompt = prompts_of([9])[0]

    async def drawn(seed):
        sampling = Sampling(temperature=1.5, top_p=0.95, seed=seed)
        return tokens_of(await events_of(engine, ask(prompt, max_tokens=20, sampling=sampling)))

    one, again, other = await asyncio.gather(drawn(1), drawn(1), drawn(2))
    assert one == again != other


async def test_a_stop_string_ends_the_answer_before_itself(engine):
    prompt = prompts_of([9])[0]
    plain = await events_of(engine, ask(prompt))
    text = "".join(e.text for e in plain if isinstance(e, Token)) + plain[-1].text
    middle = text[len(text) // 2 : len(text) // 2 + 4]
    events = await events_of(engine, ask(prompt, stop=("never", middle)))
    stopped = "".join(e.text for e in events if isinstance(e, Token)) + events[-1].text
    assert stopped == text[: text.index(middle)]
    assert events[-1].reason == "stop"


async def test_closing_the_engine_tells_those_who_wait(files):
    engine = EmbeddedEngine(files.base, "tiny", max_slots=1).start()
    running, waiting = (engine.submit(ask(prompts_of([5])[0], max_tokens=90)) for _ in range(2))
    await anext(running)
    await asyncio.to_thread(engine.close)
    for answer in (running, waiting):
        last = [event async for event in answer][-1]
        assert isinstance(last, Failed)
        assert last.error.status == 503
    with pytest.raises(Unavailable):
        engine.submit(ask([1]))


async def test_a_profile_of_something_else_leaves_the_base_unscored_with_that_reason(files, engine):
    from guard.errors import ProfileMismatch

    with pytest.raises(ProfileMismatch):
        engine.books.set_profile(files.a, files.profile)
    other = EmbeddedEngine(files.base, "tiny", files.base / "config.json", max_slots=1)
    assert other.status()["revisions"][0]["reason"] == "profile_mismatch"
