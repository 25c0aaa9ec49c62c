"""One HTTP request to a guarded vLLM: the sequences it sets off, and what is to be said of them.

A request is mostly one sequence; several prompts or n > 1 make more, and what is said is then the worst verdict of all.
The middleware opens an exchange, `tap` fills it, and comments go out as soon as the response is a stream.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from guard.detector import Detector
from guard.verdict import Verdict
from guard.watch import Watch
from serving.engines.annotations import comment
from serving.engines.vllm.generation import Generation, together


@dataclass(frozen=True)
class Hold:
    """A hold on a revision (None: the base): whoever has it must release it once. detector: the revision's, if any."""

    revision: str | None
    detector: Detector | None
    alpha: float
    release: Callable[[], None]


@dataclass
class Exchange:
    """watch: how the request is to be guarded; hold: on the revision it names, until a call to the engine takes it."""

    watch: Watch
    hold: Hold | None = None
    generations: list[Generation] = field(default_factory=list)
    say: Callable[[bytes], Awaitable[None]] | None = None
    _unsaid: list[bytes] = field(default_factory=list)
    _said: Verdict | None = None

    def take_hold(self, revision: str | None) -> Hold | None:
        """The hold on this revision, if the request has one that no call to the engine has taken yet."""
        hold = self.hold
        if hold is None or hold.revision != revision:
            return None
        self.hold = None
        return hold

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on all that was generated so far."""
        return together(self.generations) if self.generations else None

    def note(self, check_s: float | None = None) -> None:
        """There is news: a comment is made of it, unless it says what was said already."""
        verdict = self.verdict
        if verdict is not None and verdict != self._said:
            self._said = verdict
            self._unsaid.append(comment(verdict, check_s))

    def comments(self) -> bytes:
        """What is still to be said; it counts as said from now on."""
        unsaid, self._unsaid = b"".join(self._unsaid), []
        return unsaid

    async def flush(self) -> None:
        """Says it now, if the response is a stream that has begun."""
        if self.say is not None and self._unsaid:
            await self.say(self.comments())

    def close(self) -> None:
        """The HTTP request is over."""
        if self.hold is not None:
            self.hold.release()
            self.hold = None


# The exchange of the HTTP request that is being handled; None in tasks that belong to none.
EXCHANGE: ContextVar[Exchange | None] = ContextVar("headguard_exchange", default=None)
