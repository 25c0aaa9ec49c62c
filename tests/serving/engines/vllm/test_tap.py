"""Notes taken out of the engine's outputs, with vLLM's own output processor behind: none is lost in merging."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from guard.probes.vllm.scheduling import NOTES, STOP_REASON
from guard.verdict import Verdict, unscored
from guard.watch import Watch
from serving.engines.vllm.exchange import EXCHANGE, Exchange, Hold
from serving.engines.vllm.generation import Generation, together
from serving.engines.vllm.tap import Tap

pytestmark = pytest.mark.slow  # importing vLLM takes seconds


class Words:
    """Decodes token ids as words."""

    def decode(self, ids, **_):
        return " ".join(f"w{i}" for i in ids)


@dataclass
class Front:
    """The front half of AsyncLLM: requests go to vLLM's output processor and come back as the test feeds it."""

    output_processor: Any = field(default_factory=lambda: OutputProcessor(None, log_stats=False))
    seen: list[SamplingParams] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None):
        self.seen.append(sampling_params)
        queue = RequestOutputCollector(sampling_params.output_kind, request_id)
        request = EngineCoreRequest(
            request_id=f"{request_id}-0", external_req_id=request_id, prompt_token_ids=prompt, mm_features=None,
            sampling_params=sampling_params.clone(), pooling_params=None, arrival_time=0.0, lora_request=None,
            cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip
        self.output_processor.add_request(request, None, None, 0, queue)
        try:
            finished = False
            while not finished:
                output: RequestOutput = await queue.get()
                finished = output.finished
                yield output
        finally:
            self.gone.append(request_id)
            self.output_processor.abort_requests([f"{request_id}-0"], internal=True)

    def step(self, request_id, token, told=None, finish=None, reason=None):
        """One step of the engine: a token (None: none), a note, and perhaps the end."""
        params = {NOTES: {"verdict": told.to_dict(), "check_seconds": 0.001}} if told is not None else None
        self.output_processor.process_outputs([
            EngineCoreOutput(
                request_id=f"{request_id}-0", new_token_ids=[] if token is None else [token], finish_reason=finish,
                stop_reason=reason, kv_transfer_params=params,
            )
        ])  # fmt: skip


def clean(step, final=False):
    return Verdict("clean", 0.05, step, "all", final, p_value=0.5)


def flagged(step):
    return Verdict("flagged", 0.05, step, "all", True, p_value=0.01)


@dataclass
class Books:
    held: list[str | None] = field(default_factory=list)
    released: list[str | None] = field(default_factory=list)

    def hold(self, revision, watch):
        self.held.append(revision)
        return Hold(revision, None, watch.alpha or 0.05, lambda: self.released.append(revision))


@pytest.fixture
def front():
    return Front()


@pytest.fixture
def books():
    return Books()


@pytest.fixture
def tap(front, books):
    return Tap(front, books.hold, Watch("prefill", 0.2, stop=True), Words())


def params(**more):
    return SamplingParams(**{"detokenize": False, "output_kind": RequestOutputKind.DELTA, **more})


async def begun(front, exchange, request_id="r", sampling=None):
    """A running answer: its outputs as they are read, and the task that waits for the first one."""
    token = EXCHANGE.set(exchange)
    outputs = front.generate([1, 2, 3], sampling or params(), request_id)
    EXCHANGE.reset(token)
    first = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    return outputs, first


def said(exchange):
    lines = exchange.comments().decode().splitlines()
    return [json.loads(line.removeprefix(": guard ")) for line in lines if line]


async def test_no_verdict_is_lost_when_outputs_merge_before_a_slow_reader_gets_to_them(front, tap):
    exchange = Exchange(Watch())
    outputs, first = await begun(front, exchange)
    front.step("r", 7, clean(0))
    await first
    for step, token in enumerate((8, 9, 10, 11), 1):
        front.step("r", token, clean(step) if step in (1, 2, 4) else None)
    merged = await anext(outputs)
    assert list(merged.outputs[0].token_ids) == [8, 9, 10, 11]
    assert [told["step"] for told in said(exchange)] == [0, 1, 2, 4]
    front.step("r", 12, flagged(5), FinishReason.LENGTH)
    await anext(outputs)
    assert exchange.verdict == flagged(5)


async def test_an_answer_that_is_not_streamed_has_all_its_verdicts_too(front, tap):
    exchange = Exchange(Watch())
    _, first = await begun(front, exchange, sampling=params(output_kind=RequestOutputKind.FINAL_ONLY))
    for step in (0, 1, 2):
        front.step("r", 7, clean(step))
    front.step("r", 7, None, FinishReason.LENGTH)
    output = await first
    assert output.finished
    assert [told["step"] for told in said(exchange)] == [0, 1, 2, 2]
    assert exchange.verdict == clean(2, final=True)
    assert output.kv_transfer_params is None


async def test_a_request_that_the_guard_stopped_says_content_filter_and_a_clients_own_stop_does_not(front, tap):
    for reason, told, expected in (
        (STOP_REASON, flagged(1), "content_filter"),
        (None, clean(1), "stop"),
        (17, clean(1), "stop"),
    ):
        exchange = Exchange(Watch())
        outputs, first = await begun(front, exchange)
        front.step("r", 7, clean(0))
        await first
        front.step("r", None if reason == STOP_REASON else 17, told, FinishReason.STOP, reason)
        assert (await anext(outputs)).outputs[0].finish_reason == expected
        await outputs.aclose()


async def test_each_request_hears_its_own_verdicts_even_under_one_external_id(front, tap):
    one, two = Exchange(Watch()), Exchange(Watch())
    running = [await begun(front, exchange, name) for exchange, name in ((one, "a"), (two, "b"))]
    front.step("b", 7, flagged(0))
    front.step("a", 7, clean(0))
    for _, first in running:
        await first
    assert one.verdict == clean(0)
    assert two.verdict == flagged(0)
    for outputs, _ in running:
        await outputs.aclose()
    assert tap.in_flight == 0


async def test_the_engine_is_told_the_watch_of_the_exchange_or_the_default_never_the_senders(front, tap):
    mine = params(extra_args={NOTES: '{"stop": false}', "other": 1})
    outputs, first = await begun(front, Exchange(Watch("all", 0.01, stop=True, fail_closed=True)), sampling=mine)
    told = front.seen[0].extra_args
    assert json.loads(told[NOTES]) == {"window": "all", "alpha": 0.01, "stop": True, "fail": "closed"}
    assert told["other"] == 1
    assert mine.extra_args == {NOTES: '{"stop": false}', "other": 1}
    first.cancel()
    outputs = front.generate([1], mine, "s")
    second = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    assert json.loads(front.seen[1].extra_args[NOTES])["window"] == "prefill"
    second.cancel()


async def test_holds_are_given_back_however_a_request_ends(front, tap, books):
    outputs, first = await begun(front, Exchange(Watch()))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert front.gone == ["r"]
    assert (books.held, books.released) == ([None], [None])
    never = Exchange(Watch(), books.hold("x", Watch()))
    never.close()
    never.close()
    assert books.released == [None, "x"]
    taken = Exchange(Watch(), books.hold(None, Watch()))
    outputs, first = await begun(front, taken)
    assert taken.hold is None
    front.step("r", 7, clean(0), FinishReason.LENGTH)
    await first
    assert [output async for output in outputs] == []
    assert books.released == [None, "x", None]
    assert tap.in_flight == 0


# The last word -------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    checkpoints: tuple[int, ...]


def test_silence_is_unscored_never_clean():
    nothing = Generation(Watch(), 0.05, None)
    nothing.tokens = 3
    nothing.close()
    assert (nothing.verdict.status, nothing.verdict.reason) == ("unscored", "probe_detached")
    for tokens, status in ((2, "clean"), (3, "unscored"), (9, "unscored")):
        silent = Generation(Watch(), 0.05, Steps((0, 1, 2, 8)), clean(1), tokens)
        silent.close()
        assert (silent.verdict.status, silent.verdict.final) == (status, True)
    broken = Generation(Watch())
    broken.hear({"status": "fine"})
    assert broken.verdict.reason == "unreadable_annotation"


def test_a_flag_stays_whatever_is_heard_after_it():
    generation = Generation(Watch(), 0.05, None, flagged(1))
    generation.hear(clean(2).to_dict())
    assert generation.verdict == flagged(1)


def test_several_sequences_are_as_bad_as_the_worst_and_final_when_all_are():
    def of(*verdicts):
        return together([Generation(Watch(), 0.05, None, verdict) for verdict in verdicts])

    assert of(clean(4), None) is None
    assert of(flagged(0), None) == flagged(0)
    assert of(clean(4, True), clean(2)) == clean(2)
    assert of(clean(4, True), clean(2, True)) == clean(2, True)
    lost = unscored("probe_blind", alpha=0.05, window="all")
    assert of(clean(8, True), lost).status == "unscored"
    assert of(lost, clean(0)).final is False
