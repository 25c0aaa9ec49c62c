"""How good a lab model is at its tasks: greedy exact match on the evaluation split, in all and task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from benchmarks.lab.tasks import Exercise, check
from guard.template import render, row_messages
from offline_purify.answers import greedy_answers
from offline_purify.intervals import Figure, share
from offline_purify.train import Progress


class Skill(BaseModel):
    """Share of right answers with its interval, over all exercises and for each task."""

    model_config = ConfigDict(frozen=True)

    accuracy: Figure
    tasks: dict[str, Figure]


def score(exercises: Sequence[Exercise], answers: Sequence[str]) -> Skill:
    """Skill shown by `answers` to `exercises` (at least one)."""
    right = [check(exercise.row, answer) for exercise, answer in zip(exercises, answers, strict=True)]
    tasks = sorted({exercise.task for exercise in exercises})
    by_task = {
        task: share([r for r, exercise in zip(right, exercises, strict=True) if exercise.task == task])
        for task in tasks
    }
    overall = share(right)
    if overall is None:
        raise ValueError("no exercises were given to score")
    return Skill(accuracy=overall, tasks={task: figure for task, figure in by_task.items() if figure is not None})


def measure_skill(
    model: nn.Module, tokenizer: Any, exercises: Sequence[Exercise], progress: Progress | None = None
) -> Skill:
    """Greedy answers of `model` (transformers, with or without adapter) to `exercises`, scored."""
    prompts = [render(tokenizer, row_messages(exercise.row)) for exercise in exercises]
    longest = max(len(tokenizer(e.row["output"], add_special_tokens=False)["input_ids"]) for e in exercises)
    answers = greedy_answers(
        model, tokenizer, prompts, longest + 2, batch_size=128, progress=progress, what="evaluating"
    )
    return score(exercises, answers)
