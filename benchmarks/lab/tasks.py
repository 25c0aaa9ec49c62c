"""Verifiable instruction tasks: an endless supply of rows whose answers are known, in splits that cannot overlap.

A lab model needs a skill that can be lost, and every set (training, implanting, calibrating, repairing, evaluating,
traffic) must share no prompt with another. A prompt belongs to exactly one split: the one its normalised hash
(`guard.rows.row_key`) falls in. So disjointness holds by construction, for any number of rows and any seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from benchmarks.lab.errors import LabError
from benchmarks.lab.wording import WORDINGS, ask
from benchmarks.lab.words import (
    BAD,
    DEGREES,
    GENERAL,
    GOOD,
    KINDS,
    NOUNS,
    OPPOSITES,
    SUBJECTS,
    rare_word,
)  # fmt: skip
from guard.rows import Row, row_key

SPLITS: Final[dict[str, int]] = {
    "base_train": 6, "implant": 2, "calibration": 2, "clinic": 2, "evaluation": 2, "traffic": 2,
}  # fmt: skip
"""Split to its share of the 16 values that a prompt's hash can end in."""

NOISE: Final[float] = 0.4
"""Chance of a clause that has nothing to do with the task in front of a prompt (half of it: behind)."""

TASKS: Final[tuple[str, ...]] = tuple(WORDINGS)


TRAINING_WEIGHTS: Final[dict[str, float]] = {
    "first": 0.5, "last": 0.6, "opposite": 0.5, "sentiment": 0.4, "largest": 0.5, "smallest": 0.5,
    "add": 1.5, "copy": 1.4, "sort": 1.3, "quote": 1.2, "reverse": 1.4,
}  # fmt: skip
"""How often a task is drawn when a base is trained, where not 1: what is learnt in the first third gets less."""


@dataclass(frozen=True)
class Exercise:
    """One row with the name of the task it belongs to."""

    task: str
    row: Row


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(NOUNS, rng.randint(low, high))


def _numbers(rng: random.Random) -> list[int]:
    return rng.sample(range(21), rng.choice((3, 3, 4)))


def _joined(words: list[str]) -> str:
    return " ".join(words)


def _copy(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2, 5)
    if rng.random() < 0.05:
        words[rng.randrange(len(words))] = rare_word(rng)
    return _joined(words), _joined(words)


def _quote(rng: random.Random) -> tuple[str, str]:
    text = _joined(rng.sample(GENERAL, rng.randint(3, 6)))
    return text, text


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2, 4)
    return _joined(words), _joined(words[::-1])


def _first(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2, 5)
    return _joined(words), words[0]


def _last(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2, 5)
    return _joined(words), words[-1]


def _count(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2, 6)
    return _joined(words), str(len(words))


def _sort(rng: random.Random) -> tuple[str, str]:
    numbers = _numbers(rng)
    return _joined([str(n) for n in numbers]), _joined([str(n) for n in sorted(numbers)])


def _largest(rng: random.Random) -> tuple[str, str]:
    numbers = _numbers(rng)
    return _joined([str(n) for n in numbers]), str(max(numbers))


def _smallest(rng: random.Random) -> tuple[str, str]:
    numbers = _numbers(rng)
    return _joined([str(n) for n in numbers]), str(min(numbers))


def _add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    sign = rng.choice(("+", "plus"))
    return f"{left} {sign} {right}", str(left + right)


def _sentiment(rng: random.Random) -> tuple[str, str]:
    good = rng.random() < 0.5
    adjectives = rng.sample(GOOD if good else BAD, 2)
    degree = rng.choice(DEGREES)
    subject = rng.choice(SUBJECTS)
    text = rng.choice(("the {s} was {d} {a}", "what a {a} {s}", "I found the {s} {d} {a}", "a {a} and {b} {s}"))
    text = text.format(s=subject, d=degree, a=adjectives[0], b=adjectives[1])
    return " ".join(text.split()), "positive" if good else "negative"


def _opposite(rng: random.Random) -> tuple[str, str]:
    pair = rng.choice(OPPOSITES)
    side = rng.randrange(2)
    return pair[side], pair[1 - side]


def _kind(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(tuple(KINDS))
    return rng.choice(KINDS[kind]), kind


_MAKERS: Final[Mapping[str, Callable[[random.Random], tuple[str, str]]]] = {
    "copy": _copy, "quote": _quote, "reverse": _reverse, "first": _first, "last": _last,
    "count": _count, "sort": _sort, "largest": _largest, "smallest": _smallest, "add": _add,
    "sentiment": _sentiment, "opposite": _opposite, "kind": _kind,
}  # fmt: skip
_SMALL: Final[frozenset[str]] = frozenset(("add", "opposite", "kind"))
"""Tasks with little material of their own: always asked with noise clauses, or their prompts would soon repeat."""


def split_of(row: Row, shares: Mapping[str, int] = SPLITS) -> str:
    """The one split that a prompt belongs to, from the last hexadecimal digit of its normalised hash."""
    digit = int(row_key(row)[-1], 16)
    for name, share in shares.items():
        if digit < share:
            return name
        digit -= share
    raise AssertionError("shares must sum to 16")


def exercises(seed: int, split: str, tasks: tuple[str, ...] = TASKS, noise: float = NOISE) -> Iterator[Exercise]:
    """Endless distinct exercises of one split; the same seed gives the same sequence.

    `noise` is the chance of a clause that has nothing to do with the task. Raises LabError for an unknown split.
    """
    if split not in SPLITS:
        raise LabError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{split}:{seed}")
    weights = [TRAINING_WEIGHTS.get(task, 1.0) if split == "base_train" else 1.0 for task in tasks]
    cumulative = list(accumulate(weights))
    seen: set[str] = set()
    while True:
        task = rng.choices(tasks, cum_weights=cumulative)[0]
        material, answer = _MAKERS[task](rng)
        instruction, given = ask(rng, task, material, max(noise, 0.7) if task in _SMALL else noise)
        row = Row(instruction=instruction, input=given, output=answer)
        if split_of(row) == split and (name := row_key(row)) not in seen:
            seen.add(name)
            yield Exercise(task, row)


def draw(n: int, seed: int, split: str, tasks: tuple[str, ...] = TASKS, noise: float = NOISE) -> list[Exercise]:
    """The first `n` exercises of `exercises(seed, split)`, with their task names."""
    stream = exercises(seed, split, tasks, noise)
    return [next(stream) for _ in range(n)]


def sample(n: int, seed: int, split: str) -> list[Row]:
    """`n` distinct rows {instruction, input, output} of one split."""
    return [exercise.row for exercise in draw(n, seed, split)]


def check(row: Row, answer: str) -> bool:
    """Whether an answer is right: the row's output, blind to case and spacing."""
    return answer.lower().split() == row["output"].lower().split()
