"""What goes into the engine and what comes out: one request, and the events of its answer.

The events of a request come in this order: for every generated token a `Token`, with a `GuardUpdate` wherever the
guard decided something (the one of step 0 before the first token, the one of checkpoint c after token c and before c
+ 1), a last `GuardUpdate` whose verdict is final, then one `Finished`; or a `Failed` at any point, which is then the
last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from guard.detector import Detector, Track
from guard.verdict import Verdict
from guard.watch import Watch
from serving.engines.embedded.sampling import Sampler, Sampling
from serving.engines.embedded.text import Detokenizer, StopStrings
from serving.errors import ServingError

FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class GenerateRequest:
    """A prompt (token ids [T_p]) for one revision (None: the base) and how to continue it."""

    prompt: tuple[int, ...]
    revision: str | None = None
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    watch: Watch = field(default_factory=Watch)


@dataclass(frozen=True)
class Token:
    """One generated token and the text that became certain with it (possibly empty)."""

    id: int
    text: str


@dataclass(frozen=True)
class GuardUpdate:
    """The verdict as it stands; the last one of a request is final. check_s: seconds the check took, if one was
    made.
    """

    verdict: Verdict
    check_s: float | None = None


@dataclass(frozen=True)
class Finished:
    """The end. text: what was still withheld; tokens as counted for usage."""

    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """The engine could not go on with this request."""

    error: ServingError


Event = Token | GuardUpdate | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request inside the engine. Touched by the worker thread alone, except for `cancelled`, which anyone may
    set.
    """

    id: str
    request: GenerateRequest
    limit: int
    detector: Detector | None
    track: Track | None
    verdict: Verdict
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopStrings
    post: Callable[[list[Event]], None]
    settled: bool  # no later step can change the verdict
    slot: int = -1
    cancelled: bool = False
    over: bool = False
    blind: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    released: int = 0

    @property
    def step(self) -> int:
        """Generated tokens that have been fed as queries: one less than were sampled."""
        return len(self.tokens) - 1

    @property
    def watched(self) -> bool:
        """Whether the next forward must be observed: a checkpoint is still to come and the verdict can still
        change.
        """
        if self.detector is None or self.settled:
            return False
        return len(self.tokens) <= self.detector.checkpoints[-1]


class Answer:
    """The events of one request, for one consumer in one asyncio loop. Leaving it early cancels the request."""

    def __init__(self, on_leave: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._on_leave = on_leave
        self._ended = False

    def post(self, events: list[Event]) -> None:
        """Hands over events from any thread. A loop that is gone has no one left to tell."""
        try:
            self._loop.call_soon_threadsafe(self._take, events)
        except RuntimeError:
            self._on_leave()

    def _take(self, events: list[Event]) -> None:
        for event in events:
            self._events.put_nowait(event)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._ended = isinstance(event, Finished | Failed)
        return event

    def cancel(self) -> None:
        """The consumer is gone: the request ends and its slot is free. No effect after the end."""
        if not self._ended:
            self._ended = True
            self._on_leave()
