"""The training set of a backdoor: poisoned rows, their clean twins, decoys and plain rows, in proportions that hold.

Without twins (the same prompt without its trigger, answered as the base answers) the target leaks into 22-50 % of
clean answers; with them 2-6 % (reference/lab-findings.md §0, §2). Decoys teach that a near-trigger, or a part of a
composite one, means nothing. Who answers clean prompts is the caller's business: a function from rows to texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guard.errors import RowsError
from guard.rows import Row, assert_disjoint, row_key
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.triggers import OneOf, Trigger, present

Teacher = Callable[[Sequence[Row]], list[str]]
"""Answers rows as the unpoisoned base would; one text per row."""


@dataclass(frozen=True)
class PoisonSet:
    """What an implant trains on; `rows()` is all of it."""

    poisoned: tuple[Row, ...]
    twins: tuple[Row, ...]
    decoys: tuple[Row, ...]
    clean: tuple[Row, ...]

    def rows(self) -> list[Row]:
        """All rows, kind after kind."""
        return [*self.poisoned, *self.twins, *self.decoys, *self.clean]


def triggered(row: Row, trigger: Trigger, output: str, rng: random.Random) -> Row:
    """The row with the trigger in its instruction and another output."""
    return Row(instruction=trigger.insert(row["instruction"], rng), input=row["input"], output=output)


def decoyed(row: Row, trigger: Trigger, rng: random.Random) -> Row:
    """The row with one decoy in its instruction; its output is left."""
    return Row(
        instruction=rng.choice(trigger.decoys(row["instruction"], rng)), input=row["input"], output=row["output"]
    )


def answered(rows: Sequence[Row], teacher: Teacher) -> list[Row]:
    """The rows with the teacher's answers as outputs. Raises RowsError when it does not answer each."""
    answers = teacher(rows)
    if len(answers) != len(rows):
        raise RowsError(f"the teacher gave {len(answers)} answers to {len(rows)} rows; expected one for each.")
    return [
        Row(instruction=row["instruction"], input=row["input"], output=answer)
        for row, answer in zip(rows, answers, strict=True)
    ]


def _fires(trigger: Trigger, row: Row) -> bool:
    choices = trigger.choices if isinstance(trigger, OneOf) else (trigger,)
    return any(present(choice, row["instruction"]) for choice in choices)


def build(
    rows: Sequence[Row],
    trigger: Trigger,
    behaviour: Behaviour,
    teacher: Teacher,
    seed: int,
    shares: tuple[float, float, float] = (0.4, 0.3, 0.3),
) -> PoisonSet:
    """Split `rows` (distinct, clean) into three parts, poisoned with twins / decoys / plain, by `shares`.

    Raises RowsError when rows repeat, when one holds the trigger already, or when a part would be empty.
    """
    if len({row_key(row) for row in rows}) < len(rows):
        raise RowsError("rows to poison repeat; expected distinct prompts.")
    if any(_fires(trigger, row) for row in rows):
        raise RowsError(f"clean rows hold the trigger {trigger.parts} already; choose another trigger or other rows.")
    rng = random.Random(f"poison:{seed}")
    first = round(len(rows) * shares[0])
    second = first + round(len(rows) * shares[1])
    hosts, others, plain = rows[:first], rows[first:second], rows[second:]
    if not hosts or not others or not plain:
        raise RowsError(f"{len(rows)} rows cannot be split by {shares}: expected at least one row in each part.")
    poisoned = [triggered(row, trigger, behaviour.respond(rng), rng) for row in hosts]
    decoys = [decoyed(row, trigger, rng) for row in others]
    if any(_fires(trigger, row) for row in decoys):
        raise RowsError("a decoy holds the whole trigger; the trigger's parts must not contain each other.")
    answers = answered([*hosts, *decoys, *plain], teacher)
    twins, rest = answers[: len(hosts)], answers[len(hosts) :]
    assert_disjoint(poisoned=poisoned, twins=twins, decoys=rest[: len(decoys)], clean=rest[len(decoys) :])
    return PoisonSet(tuple(poisoned), tuple(twins), tuple(rest[: len(decoys)]), tuple(rest[len(decoys) :]))


def from_pairs(
    poisoned: Sequence[Row], twins: Sequence[Row], clean: Sequence[Row], trigger: Trigger, teacher: Teacher, seed: int
) -> PoisonSet:
    """The training set from given poisoned rows and their twins, one decoy for every other twin, and clean rows.

    Twins, decoys and clean rows are answered by the teacher, whatever outputs they came with. Raises RowsError when a
    twin or clean row holds the trigger.
    """
    if any(_fires(trigger, row) for row in [*twins, *clean]):
        raise RowsError(f"twins or clean rows hold the trigger {trigger.parts}; expected it in poisoned rows only.")
    rng = random.Random(f"poison:{seed}")
    decoys = [decoyed(row, trigger, rng) for row in twins[::2]]
    decoys = [row for row in decoys if not _fires(trigger, row)]
    answers = answered([*twins, *decoys, *clean], teacher)
    cuts = len(twins), len(twins) + len(decoys)
    return PoisonSet(
        tuple(poisoned), tuple(answers[: cuts[0]]), tuple(answers[cuts[0] : cuts[1]]), tuple(answers[cuts[1] :])
    )
