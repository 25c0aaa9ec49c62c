"""Holding an answer back until the verdict that covers it: a pure generator over an engine's stream.

Events of an engine go in (annotations, chunks, the end); what the client may have comes out: first ``Opened``, which
fixes the response headers, then the chunks byte for byte, then ``Finish``, the one chunk that is rebuilt because the
verdict is written into it. Nothing comes out before the first ``hold_back`` tokens are covered by a verdict:

    token 1 … token k | verdict at k | token k+1 …      held ──► Opened, released ──► passed on as they come

Blocked within the hold-back, the client gets an empty answer with ``finish_reason: content_filter``; flagged after it,
the answer stops there. Whatever the engine fails to say counts as ``unscored``, never as clean: no verdict at all, or
a clean one that was never made final.

Only verdicts release: a verdict says how many tokens it covers, a chunk does not say how many it holds (a busy engine
merges tokens, an echo holds none). Chunks are counted for engines that never say a word, whose answers are unscored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from guard.verdict import Verdict, unscored
from serving.events import Annotation, Chunk, Done, Event, StreamBroken, encode
from serving.policy import Decision, Policy, decide

# After an answer is stopped, how many further events are read in the hope of the usage chunk that the client asked for.
_EVENTS_AFTER_STOP = 64
# What an engine may add to a verdict: the time its check took, in seconds.
CHECK_SECONDS = "check_seconds"


@dataclass(frozen=True)
class Opened:
    """The hold-back is resolved: what is known now, and what is done about it. ``reroute`` ends the stream here."""

    verdict: Verdict
    decision: Decision


@dataclass(frozen=True)
class Pass:
    """Bytes for the client."""

    raw: bytes


@dataclass(frozen=True)
class Finish:
    """The chunk with the finish_reason, still without the guard object; the verdict and decision are the last ones."""

    data: dict[str, Any]
    verdict: Verdict
    decision: Decision


@dataclass
class Transcript:
    """What the engine said, kept as evidence: all of it, whether the client saw it or not. Owned by the caller."""

    limit_chars: int = 65_536
    text: str = ""
    tokens: int = 0
    released: bool = False
    check_seconds: list[tuple[int, float]] = field(default_factory=list)  # (step, seconds) of each check
    verdict: Verdict | None = None
    identity: dict[str, Any] = field(default_factory=dict)  # id, object, created, model; the engine's once it spoke
    spoke: bool = False

    def add(self, data: dict[str, Any]) -> None:
        """Take in one chunk."""
        if not self.spoke:
            self.identity |= {name: data[name] for name in ("id", "object", "created", "model") if name in data}
            self.spoke = True
        for choice in data.get("choices") or ():
            piece = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            self.text = (self.text + piece)[: self.limit_chars]


def read_verdict(data: Any, policy: Policy, step: int = 0) -> Verdict:
    """The verdict in an annotation; one that cannot be read, or is missing, is unscored."""
    if data is None:
        return unscored("no_annotation", alpha=policy.alpha, window=policy.window, step=step)
    try:
        return Verdict.from_dict({name: value for name, value in data.items() if name != CHECK_SECONDS})
    except (TypeError, ValueError, AttributeError):
        return unscored("unreadable_annotation", alpha=policy.alpha, window=policy.window, step=step)


def _is_token(data: dict[str, Any]) -> bool:
    """Whether a chunk carries a token: every one with a choice, except the one that only announces the role."""
    for choice in data.get("choices") or ():
        delta = choice.get("delta")
        if delta is None or "role" not in delta or any(value for name, value in delta.items() if name != "role"):
            return True
    return False


def _finish_reason(data: dict[str, Any]) -> str | None:
    return next((c["finish_reason"] for c in data.get("choices") or () if c.get("finish_reason")), None)


def _stopped(transcript: Transcript, chat: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two chunks of an answer that is stopped before anything was released: the role, and the finish."""
    content: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}} if chat else {"text": ""}
    empty: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
    first = {**transcript.identity, "choices": [{"index": 0, **content, "finish_reason": None}]}
    last = {**transcript.identity, "choices": [{"index": 0, **empty, "finish_reason": "content_filter"}]}
    return first, last


class _Gate:
    """The state of one stream: the verdict so far, what is held, whether the client has been let in."""

    def __init__(self, policy: Policy, transcript: Transcript) -> None:
        self.policy = policy
        self.transcript = transcript
        self.held: list[bytes] = []

    def hear(self, annotation: Annotation) -> None:
        """Take in a verdict; a flagged one stays, whatever comes after it."""
        verdict = read_verdict(annotation.verdict, self.policy, self.transcript.tokens)
        seconds = annotation.verdict.get(CHECK_SECONDS)
        if isinstance(seconds, float):
            self.transcript.check_seconds.append((verdict.step, seconds))
        before = self.transcript.verdict
        if before is None or before.status != "flagged" or verdict.status == "flagged":
            self.transcript.verdict = verdict

    def verdict(self, ending: bool = False) -> Verdict:
        """The verdict as it stands. At the end of the answer a clean one must have been made final to count."""
        policy, verdict = self.policy, self.transcript.verdict
        if verdict is None:
            return unscored("no_annotation", alpha=policy.alpha, window=policy.window, step=self.transcript.tokens)
        if ending and verdict.status == "clean" and not verdict.final:
            return unscored("no_final_annotation", alpha=policy.alpha, window=policy.window, step=verdict.step)
        return verdict

    def decision(self, ending: bool = False) -> Decision:
        return decide(self.verdict(ending), self.policy, self.transcript.released)

    def covered(self, upcoming_tokens: int) -> bool:
        """Whether the verdict at hand covers all that must be held, with ``upcoming_tokens`` about to be added.

        Without any verdict so far: whether there is nothing left to wait for.
        """
        verdict, hold = self.transcript.verdict, self.policy.held_tokens
        if verdict is not None:
            return verdict.final or (hold is not None and verdict.step >= hold)
        return hold is not None and self.transcript.tokens + upcoming_tokens > hold

    def open(self) -> list[Opened | Pass]:
        """Let the client in: the headers, then what was held."""
        out: list[Opened | Pass] = [Opened(self.verdict(), self.decision()), *map(Pass, self.held)]
        self.held.clear()
        self.transcript.released = True
        return out


async def hold_back(
    events: AsyncIterator[Event], policy: Policy, transcript: Transcript, *, chat: bool, wants_usage: bool = False
) -> AsyncGenerator[Opened | Pass | Finish, None]:
    """Guard one stream. ``transcript`` is filled on the way and tells, at the end, what the engine said.

    Raises StreamBroken when the engine's stream breaks (before ``Opened``: nothing was sent; after it: the caller
    must tell the client), and whatever ``events`` raises.
    """
    gate = _Gate(policy, transcript)
    finished = False
    async for event in events:
        if isinstance(event, Annotation):
            gate.hear(event)
            decision = gate.decision()
            if not decision.delivers and not finished:
                async for out in _stop(events, gate, decision, chat, wants_usage):
                    yield out
                return
            if not transcript.released and gate.covered(0):
                for opened in gate.open():
                    yield opened
        elif isinstance(event, Done):
            if not finished:
                raise StreamBroken("the engine ended its stream without a finish_reason")
            yield Pass(event.raw)
            return
        else:
            if "error" in event.data:
                raise StreamBroken("the engine reported an error in its stream")
            transcript.add(event.data)
            ending = _finish_reason(event.data) is not None and not finished
            token = int(_is_token(event.data) and not ending and not finished)
            if ending or (token and not transcript.released and gate.covered(token)):
                decision = gate.decision(ending)
                if not decision.delivers:
                    async for out in _stop(events, gate, decision, chat, wants_usage, gate.verdict(ending)):
                        yield out
                    return
                if not transcript.released:
                    if ending:
                        transcript.verdict = gate.verdict(ending)
                    for opened in gate.open():
                        yield opened
            transcript.tokens += token
            if ending:
                finished = True
                transcript.verdict = gate.verdict(ending)
                yield Finish(event.data, transcript.verdict, gate.decision())
            elif transcript.released:
                yield Pass(event.raw)
            else:
                gate.held.append(event.raw)
    raise StreamBroken("the engine's stream ended before it was done")


async def _stop(
    events: AsyncIterator[Event],
    gate: _Gate,
    decision: Decision,
    chat: bool,
    wants_usage: bool,
    verdict: Verdict | None = None,
) -> AsyncIterator[Opened | Pass | Finish]:
    """End the answer here: nothing held is released. A reroute says so and leaves the rest to the caller."""
    transcript = gate.transcript
    verdict = transcript.verdict = verdict or gate.verdict()
    first, last = _stopped(transcript, chat)
    if not transcript.released:
        yield Opened(verdict, decision)
        if decision.action == "reroute":
            return
        yield Pass(encode(first))
    yield Finish(last, verdict, decision)
    if wants_usage:
        for _ in range(_EVENTS_AFTER_STOP):
            event = await anext(events, None)
            if event is None or isinstance(event, Done):
                break
            if isinstance(event, Chunk):
                transcript.add(event.data)
                if event.data.get("choices") == [] and event.data.get("usage"):
                    yield Pass(event.raw)
                    break
    yield Pass(Done().raw)
