"""Answering one request: from the route taken at its start to the last byte, under that route's policy.

    take the route ─► ask its revision ─► hold back ─┬─ deliver ──► pass on, write the verdict into the last chunk
                                                     ├─ block ────► an empty answer, finish_reason content_filter
                                                     └─ reroute ──► ask the last good revision (blocking), once

Every request ends counted, a flagged one also in a case, whoever hangs up first. Headers are known only when the
hold-back is resolved, so ``streamed`` returns them together with the first byte.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

from guard.verdict import Verdict
from serving.aliases import InFlight, Route
from serving.cases import Flag
from serving.engine import Engine, EngineError
from serving.errors import ServingError, Unavailable
from serving.events import Done, Event, StreamBroken, encode
from serving.holdback import CHECK_SECONDS, Finish, Opened, Pass, Transcript, hold_back, read_verdict
from serving.metrics import Metrics
from serving.policy import Decision, Policy, decide
from serving.staleness import Staleness

log = logging.getLogger(__name__)
PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions"}


@dataclass(frozen=True)
class Ask:
    """One request of a client. ``body`` is what it sent, free of any guard field."""

    id: str
    kind: Literal["chat", "text"]
    body: dict[str, Any]
    route: Route
    key_id: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as messages (evidence for the clinic)."""
        prompt = self.body.get("prompt")
        return self.body["messages"] if self.kind == "chat" else [{"role": "user", "content": prompt}]


class RevisionLost(Unavailable):
    """The engine does not serve the revision that a request was sent to. Nothing of an answer was heard, so it may be
    asked again, of the revision that answers to the name by now. Not counted yet.
    """


@dataclass(frozen=True)
class Leg:
    """One attempt to answer: which revision, under which policy."""

    revision: str
    policy: Policy


@dataclass(frozen=True)
class Whole:
    """A complete answer."""

    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(frozen=True)
class Streamed:
    """An answer whose headers are known and whose bytes follow. ``chunks`` must be closed, read to the end or not."""

    headers: dict[str, str]
    chunks: AsyncGenerator[bytes, None]


class Answers:
    """Answers requests through one engine. ``keep`` stores a flag (blocking; called in a thread)."""

    def __init__(
        self,
        engine: Engine,
        base: str,
        in_flight: InFlight,
        metrics: Metrics,
        staleness: Staleness,
        keep: Callable[[Flag], None],
        timeout_s: float,
        detail: Literal["full", "status"],
    ) -> None:
        self._engine, self._base, self._in_flight = engine, base, in_flight
        self._metrics, self._staleness, self._keep = metrics, staleness, keep
        self._timeout_s, self._detail = timeout_s, detail
        self._keeping: set[asyncio.Task[None]] = set()

    async def settle(self) -> None:
        """Wait until every flag that is being stored is stored."""
        await asyncio.gather(*self._keeping)

    # ---- what the client is told ----------------------------------------------------------------------------------

    def _headers(self, ask: Ask, leg: Leg, verdict: Verdict, action: str) -> dict[str, str]:
        pending = verdict.status == "clean" and not verdict.final
        return {
            "x-headguard-request-id": ask.id,
            "x-headguard-verdict": "pending" if pending else verdict.status,
            "x-headguard-action": action,
            "x-headguard-revision": leg.revision,
        }

    def _guard(self, ask: Ask, leg: Leg, verdict: Verdict, decision: Decision) -> dict[str, Any]:
        """The ``guard`` object: verdict and decision, side by side. Span texts stay here."""
        told = verdict.to_dict()
        for span in told["spans"]:
            span.pop("text")
        if self._detail == "status":
            told = {name: told[name] for name in ("status", "final", "reason")}
        return {
            **told,
            "request_id": ask.id,
            "revision": leg.revision,
            "mode": leg.policy.mode,
            "action": decision.action,
            "would_action": decision.would_action,
        }

    def _rerouted(self, ask: Ask, first: Leg, flagged: Verdict, leg: Leg, guard: dict[str, Any]) -> dict[str, Any]:
        """The guard object of a rerouted answer: why it was rerouted, and under ``answer`` the check of the new one."""
        action = "block" if guard["action"] == "block" else "reroute"
        told = self._guard(ask, first, flagged, Decision("reroute"))
        return {**told, "action": action, "revision": leg.revision, "flagged_revision": first.revision, "answer": guard}

    def _target(self, ask: Ask, policy: Policy) -> Leg:
        """Who answers a rerouted request: the last good revision if there is one, else the base; always blocking."""
        good = ask.route.good if policy.reroute_to == "previous" else None
        return Leg(good or self._base, policy.as_block())

    # ---- what is remembered ---------------------------------------------------------------------------------------

    async def _account(self, ask: Ask, leg: Leg, verdict: Verdict, decision: Decision, text: str) -> None:
        self._metrics.count(ask.route.alias, leg.revision, leg.policy, verdict, decision)
        if leg.revision == ask.route.revision:  # whoever answers rerouted requests sees attacks, not clean traffic
            self._staleness.observe(leg.revision, verdict)
        log.info(
            "answered",
            extra={
                "request_id": ask.id,
                "model_name": ask.route.alias,
                "revision": leg.revision,
                "status": verdict.status,
                "reason": verdict.reason,
                "step": verdict.step,
                "action": decision.action,
            },
        )
        if verdict.status == "flagged":
            action = f"would_{decision.would_action}" if decision.would_action else decision.action
            flag = Flag(ask.id, ask.route.alias, leg.revision, ask.key_id, action, verdict, ask.messages, text)
            # A task of its own: a client that hangs up must not keep its own flag out of the case.
            task = asyncio.create_task(asyncio.to_thread(self._keep, flag))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)
            await asyncio.shield(task)

    def _failed(self, ask: Ask, leg: Leg, phase: str, error: BaseException) -> ServingError | EngineError:
        """Count an engine failure and say what the client is told. 4xx of the engine are the client's and pass."""
        if isinstance(error, EngineError) and error.lost:
            if leg.revision == ask.route.revision and phase != "streaming":
                return RevisionLost(f"{leg.revision} is not loaded in the engine; request {ask.id} was not scored.")
        elif isinstance(error, EngineError) and error.status < 500:
            return error
        self._metrics.count_error(ask.route.alias, leg.revision, leg.policy, phase)
        log.warning("engine failed", extra={"request_id": ask.id, "revision": leg.revision, "error": repr(error)})
        why = "did not answer in time" if isinstance(error, TimeoutError) else "failed while answering"
        return Unavailable(f"the engine {why}; request {ask.id} was not scored. Try again.")

    def count_lost(self, ask: Ask) -> None:
        """A request ends with RevisionLost after all."""
        self._metrics.count_error(ask.route.alias, ask.route.revision, ask.route.policy, "lost")
        log.warning("revision lost", extra={"request_id": ask.id, "revision": ask.route.revision})

    def _body(self, ask: Ask, leg: Leg, **more: Any) -> dict[str, Any]:
        return {**ask.body, **more, "model": leg.revision, "headguard": leg.policy.engine_fields()}

    # ---- whole answers --------------------------------------------------------------------------------------------

    async def whole(self, ask: Ask) -> Whole:
        """Answer in one piece. Raises EngineError (the engine's own 4xx) or Unavailable."""
        first = Leg(ask.route.revision, ask.route.policy)
        second = self._target(ask, first.policy)
        with self._in_flight.hold(second.revision, standby=True):  # whoever may have to answer stays loaded
            body, verdict, decision = await self._complete(ask, first)
            if decision.action != "reroute":
                guard = self._guard(ask, first, verdict, decision)
                return Whole({**body, "guard": guard}, self._headers(ask, first, verdict, decision.action))
            body, second_verdict, second_decision = await self._complete(ask, second)
        guard = self._guard(ask, second, second_verdict, second_decision)
        guard = self._rerouted(ask, first, verdict, second, guard)
        return Whole({**body, "guard": guard}, self._headers(ask, second, verdict, guard["action"]))

    async def _complete(self, ask: Ask, leg: Leg) -> tuple[dict[str, Any], Verdict, Decision]:
        with self._in_flight.hold(leg.revision):
            try:
                async with asyncio.timeout(self._timeout_s):
                    body = await self._engine.complete(PATHS[ask.kind], self._body(ask, leg, stream=False))
            except (EngineError, StreamBroken, TimeoutError) as error:
                raise self._failed(ask, leg, "whole", error) from error
        told = body.pop("guard", None)
        verdict = read_verdict(told, leg.policy)
        if isinstance(told, dict) and isinstance(told.get(CHECK_SECONDS), float):
            self._metrics.time_check(verdict.step, told[CHECK_SECONDS])
        decision = decide(verdict, leg.policy)
        text = "".join(_text(choice) for choice in body.get("choices") or ())
        if not decision.delivers:
            body["choices"] = [_withheld(choice) for choice in body.get("choices") or ()]
        await self._account(ask, leg, verdict, decision, text)
        return body, verdict, decision

    # ---- streamed answers -----------------------------------------------------------------------------------------

    async def streamed(self, ask: Ask) -> Streamed:
        """Answer as a stream, returning when the hold-back is resolved. Raises like ``whole``, before any byte."""
        first = _Attempt(self, ask, Leg(ask.route.revision, ask.route.policy))
        opened = await first.open()
        if opened.decision.action != "reroute":
            headers = self._headers(ask, first.leg, opened.verdict, opened.decision.action)
            return Streamed(headers, first.chunks())
        await self._account(ask, first.leg, opened.verdict, opened.decision, first.transcript.text)
        await first.aclose(aborted=False)
        second = _Attempt(self, ask, self._target(ask, first.leg.policy))
        second_opened = await second.open()
        action = "block" if second_opened.decision.action == "block" else "reroute"
        headers = self._headers(ask, second.leg, opened.verdict, action)

        def told(guard: dict[str, Any]) -> dict[str, Any]:
            return self._rerouted(ask, first.leg, opened.verdict, second.leg, guard)

        return Streamed(headers, second.chunks(told))


class _Attempt:
    """One leg of a streamed answer: opened first, then read to the end or closed."""

    def __init__(self, answers: Answers, ask: Ask, leg: Leg) -> None:
        self._answers, self._ask, self.leg = answers, ask, leg
        name = "chat.completion.chunk" if ask.kind == "chat" else "text_completion"
        identity = {"id": ask.id, "object": name, "created": int(time.time()), "model": leg.revision}
        self.transcript = Transcript(identity=identity)
        self._accounted = False
        self._started = time.monotonic()
        self._stack = ExitStack()
        self._stack.enter_context(answers._in_flight.hold(leg.revision))
        if leg.policy.mode == "reroute":  # whoever may have to answer instead must not be unloaded meanwhile
            standby = answers._target(ask, leg.policy).revision
            self._stack.enter_context(answers._in_flight.hold(standby, standby=True))
        body = answers._body(ask, leg, stream=True)
        self._events = cast(AsyncGenerator[Event, None], answers._engine.stream(PATHS[ask.kind], body))
        usage = bool((ask.body.get("stream_options") or {}).get("include_usage"))
        self._guarded = hold_back(
            _patient(self._events, answers._timeout_s), leg.policy, self.transcript, chat=ask.kind == "chat",
            wants_usage=usage,
        )  # fmt: skip

    async def open(self) -> Opened:
        """Wait for the hold-back to be resolved. On any failure everything is closed and the client's error raised."""
        try:
            opened = await anext(self._guarded)
        except (EngineError, StreamBroken, TimeoutError) as error:
            await self.aclose(aborted=False)
            raise self._answers._failed(self._ask, self.leg, "held", error) from error
        except BaseException:
            await self.aclose()
            raise
        assert isinstance(opened, Opened)
        waited = time.monotonic() - self._started
        self._answers._metrics.hold_seconds.labels(self.leg.policy.mode).observe(waited)
        return opened

    async def chunks(
        self, told: Callable[[dict[str, Any]], dict[str, Any]] = lambda guard: guard
    ) -> AsyncGenerator[bytes, None]:
        """The bytes for the client; ``told`` turns the guard object into what it is shown as."""
        answers, ask, leg = self._answers, self._ask, self.leg
        try:
            async for out in self._guarded:
                if isinstance(out, Pass):
                    yield out.raw
                elif isinstance(out, Finish):
                    self._accounted = True
                    await answers._account(ask, leg, out.verdict, out.decision, self.transcript.text)
                    guard = told(answers._guard(ask, leg, out.verdict, out.decision))
                    yield encode({**out.data, "guard": guard})
        except (EngineError, StreamBroken, TimeoutError) as error:
            self._accounted = True
            failure = answers._failed(ask, leg, "streaming", error)
            body = failure.body if isinstance(failure, EngineError) else failure.body()
            guard = {"request_id": ask.id, "revision": leg.revision, "status": "unscored", "reason": "engine_failed"}
            yield encode({**body, "guard": guard}, event="error")
            yield Done().raw
        finally:
            await self.aclose()

    async def aclose(self, aborted: bool = True) -> None:
        """Cancel what the engine still does for this attempt. A flag that was raised before is kept all the same."""
        self._stack.close()
        for step, seconds in self.transcript.check_seconds:
            self._answers._metrics.time_check(step, seconds)
        self.transcript.check_seconds.clear()
        verdict = self.transcript.verdict
        if aborted and not self._accounted:
            self._accounted = True
            answers, leg = self._answers, self.leg
            if verdict is not None and verdict.status == "flagged":
                decision = decide(verdict, leg.policy, self.transcript.released)
                await answers._account(self._ask, leg, verdict, decision, self.transcript.text)
            else:
                answers._metrics.count_aborted(self._ask.route.alias, leg.revision, leg.policy)
        await self._guarded.aclose()
        await self._events.aclose()


async def _patient(events: AsyncIterator[Event], timeout_s: float) -> AsyncGenerator[Event, None]:
    """The same events; raises TimeoutError when the next one takes longer than ``timeout_s``."""
    while True:
        async with asyncio.timeout(timeout_s):
            event = await anext(events, None)
        if event is None:
            return
        yield event


def _text(choice: dict[str, Any]) -> str:
    return (choice.get("message") or {}).get("content") or choice.get("text") or ""


def _withheld(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice without anything the model said."""
    empty: dict[str, Any] = {"index": choice.get("index", 0), "finish_reason": "content_filter", "logprobs": None}
    return {**empty, "text": ""} if "text" in choice else {**empty, "message": {"role": "assistant", "content": ""}}
