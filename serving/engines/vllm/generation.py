"""One generated sequence, as the API server follows it: the guard's word on it so far, and its last word.

The scheduler's notes carry verdicts up to the last checkpoint that was reached. Here the request's end is known, so
here the verdict is made final; and here silence is noticed: a checkpoint that must have been judged and was not makes
the sequence unscored, never clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from guard.detector import Detector
from guard.verdict import Verdict, unscored
from guard.watch import DEFAULT_ALPHA, Watch

_RANK = {"clean": 0, "unscored": 1, "flagged": 2}


@dataclass
class Generation:
    """detector: what the sequence is judged by, if anything; tokens: generated so far; stopped: ended by the guard."""

    watch: Watch
    alpha: float = DEFAULT_ALPHA
    detector: Detector | None = None
    verdict: Verdict | None = None
    tokens: int = 0
    stopped: bool = False
    over: bool = False

    def hear(self, told: Any) -> None:
        """Takes in a note's verdict. A flagged one stays, whatever comes after it."""
        try:
            verdict = Verdict.from_dict(dict(told))
        except (TypeError, ValueError):
            verdict = self._unscored("unreadable_annotation")
        if self.verdict is None or self.verdict.status != "flagged" or verdict.status == "flagged":
            self.verdict = verdict

    def close(self) -> None:
        """The sequence has ended: its verdict is final."""
        if self.over:
            return
        self.over = True
        verdict = self.verdict
        if verdict is None:
            self.verdict = self._unscored("probe_detached")
        elif verdict.status == "clean" and not verdict.final and verdict.step < self._due():
            self.verdict = self._unscored("probe_silent", verdict.step)
        else:
            self.verdict = verdict.closed()

    def _due(self) -> int:
        """The last checkpoint that must have been judged: that of token index c once c + 1 tokens were generated."""
        checkpoints = self.detector.checkpoints if self.detector is not None else ()
        return max((step for step in checkpoints if step < self.tokens), default=0)

    def _unscored(self, reason: str, step: int = 0) -> Verdict:
        return unscored(reason, alpha=self.alpha, window=self.watch.window, step=step)


def together(generations: Sequence[Generation]) -> Verdict | None:
    """The verdict on several sequences: the worst of them, final when all are. None while there is nothing to say: a
    sequence that was not judged yet may still be the worst.
    """
    verdicts = [generation.verdict for generation in generations]
    known = [verdict for verdict in verdicts if verdict is not None]
    worst = max(known, key=lambda verdict: (_RANK[verdict.status], -verdict.step), default=None)
    if worst is None or (len(known) < len(verdicts) and worst.status != "flagged"):
        return None
    return replace(worst, final=worst.status == "flagged" or all(verdict.final for verdict in known))
