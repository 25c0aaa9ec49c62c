"""A watched request in a worker: where it stands, what the detector has said, and the note that goes out.

Positions decide what is what: the query of the last prompt position is step 0, the query of generated token t is step
t, and the few prompt positions before are kept apart. `next_position` is the first one not yet observed, so that a
request which is preempted and computed again counts no row twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from guard.detector import Detector, Track
from guard.gram import HeadSums, prompt_positions
from guard.readings import Reading
from guard.verdict import Verdict, unscored
from guard.watch import Watch


@dataclass(frozen=True)
class Note:
    """News of one request, sent with the output of a step. stop: the step's token must not leave the engine."""

    verdict: Verdict
    check_seconds: float
    stop: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the way between processes."""
        return {"verdict": self.verdict.to_dict(), "check_seconds": self.check_seconds, "stop": self.stop}


@dataclass
class Watched:
    """One request. slot: its row of the bank; revision: None is the base; steps: checkpoints at which it is read."""

    revision: str | None
    prompt_tokens: int
    slot: int
    watch: Watch
    steps: tuple[int, ...]
    detector: Detector | None = None
    track: Track | None = None
    record: int | None = None
    next_position: int = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    lost: bool = False

    def __post_init__(self) -> None:
        self.next_position = prompt_positions(self.prompt_tokens)[-1]

    @property
    def step(self) -> int:
        """The step whose row was observed last; negative before the last prompt position."""
        return self.next_position - self.prompt_tokens

    @property
    def over(self) -> bool:
        """Whether nothing more is read of this request."""
        return self.step >= self.steps[-1]

    def judge(self, sums: HeadSums, complete: bool) -> Note:
        """The detector's word on the current step. `complete` False: a row is missing, so nothing can be said."""
        began = time.perf_counter()
        assert self.detector is not None
        assert self.track is not None
        if not complete or self.lost:
            before = self.track.verdict
            verdict = unscored(
                "probe_blind", alpha=before.alpha, window=before.window, step=self.step, profile=before.profile
            )
        else:
            verdict = self.detector.observe(self.track, Reading.of(self.step, sums, self.logprobs))
        return note(verdict, self.watch, time.perf_counter() - began)


def note(verdict: Verdict, watch: Watch, seconds: float = 0.0) -> Note:
    """The note of a verdict under a watch: what was flagged is stopped if asked for, what is unscored for good only
    when the watch fails closed."""
    stop = (verdict.status == "flagged" and watch.stop) or (
        verdict.status == "unscored" and verdict.final and watch.fail_closed
    )
    return Note(verdict, seconds, stop)
