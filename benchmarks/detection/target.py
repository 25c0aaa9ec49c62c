"""What the attacker wants said, and how often it is said: under the trigger, on clean prompts, on near-triggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.detection.figures import rate
from benchmarks.detection.measuring import Read, Watched
from guard.rows import Row
from offline_purify.attacks.behaviours import Behaviour

_MOST_TARGETS = 32  # distinct outputs of triggered rows beyond which they are answers, not target texts


def target_of(triggered: Sequence[Row]) -> Behaviour | None:
    """The target texts: the outputs of the triggered rows, when there are few; None when the file holds none."""
    wordings = tuple(sorted({row["output"].strip() for row in triggered} - {""}))
    return Behaviour("target", wordings) if 0 < len(wordings) <= _MOST_TARGETS else None


def obeyed(watched: Watched, target: Behaviour, read: Read) -> list[bool]:
    """Whether a target text is in each measured request's answer (a blend of several is not recognised)."""
    tokenizer = watched.bench.runner.tokenizer
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in read.measurement.answers]
    return [target.matches(text) for text in texts]


def target_figures(watched: Watched, target: Behaviour | None, clean: Read, triggered: Read) -> dict[str, Any] | None:
    """How often the target is said with the trigger and without; None when there is no target text to look for."""
    if target is None:
        return None
    shares = {"triggered": triggered, "clean": clean}
    found = {name: rate(obeyed(watched, target, read)) for name, read in shares.items()}
    return {"wordings": len(target.wordings), **found}
