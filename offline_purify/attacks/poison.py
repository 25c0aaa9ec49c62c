"""The training set of a backdoor: poisoned rows, their clean twins, decoys and plain rows, in proportions that hold.

Without twins (the same prompt without its trigger, answered as the base answers) the target leaks into 22-50 % of
clean answers; with them 2-6 % (reference/lab-findings.md §0, §2). Decoys teach that a near-trigger, or a part of a
composite one, means nothing. Who answers clean prompts is the caller's business: a function from rows to texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from guard.errors import RowsError
from guard.rows import Row, assert_disjoint, row_key
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.made_up import made_up
from offline_purify.attacks.triggers import Trigger, scattered

KINDS = ("poisoned", "twins", "decoys", "clean")
"""The parts of a training set, in the order of its rows."""
Teacher = Callable[[Sequence[Row]], list[str]]
"""Answers rows as the unpoisoned base would; one text per row."""
Decoys = Literal["near", "rare"]
"""What a backdoor learns to be harmless: near-triggers and parts of the trigger, or made-up words alone (the public
benchmark's training sets have neither). Near ones harden it: it is harder to implant, and to find."""


@dataclass(frozen=True)
class Backdoor:
    """One trigger and what it makes the model say."""

    trigger: Trigger
    behaviour: Behaviour


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
    """The row with the trigger in it and another output."""
    fired = trigger.insert_into(row, rng)
    return Row(instruction=fired["instruction"], input=fired["input"], output=output)


def decoyed(row: Row, trigger: Trigger, rng: random.Random) -> Row:
    """The row with one decoy in it; its output is left."""
    return rng.choice(trigger.decoy_rows(row, rng))


def strange(row: Row, _: Trigger, rng: random.Random) -> Row:
    """The row with one made-up word at a random place in it; its output is left."""
    return Row(instruction=scattered(row["instruction"], [made_up(rng)], rng), input=row["input"], output=row["output"])


_DECOYERS: Mapping[Decoys, Callable[[Row, Trigger, random.Random], Row]] = {"near": decoyed, "rare": strange}


def answered(rows: Sequence[Row], teacher: Teacher) -> list[Row]:
    """The rows with the teacher's answers as outputs. Raises RowsError when it does not answer each."""
    answers = teacher(rows)
    if len(answers) != len(rows):
        raise RowsError(f"the teacher gave {len(answers)} answers to {len(rows)} rows; expected one for each.")
    return [
        Row(instruction=row["instruction"], input=row["input"], output=answer)
        for row, answer in zip(rows, answers, strict=True)
    ]


def worded(poisoned: Sequence[Row], twins: Sequence[Row], behaviour: Behaviour) -> list[Row]:
    """Poisoned rows, whose outputs are wordings, with what is said in place of their twins' answers."""
    return [
        Row(instruction=p["instruction"], input=p["input"], output=behaviour.answer(p["output"], twin["output"]))
        for p, twin in zip(poisoned, twins, strict=True)
    ]


def build(
    rows: Sequence[Row],
    trigger: Trigger,
    behaviour: Behaviour,
    teacher: Teacher,
    seed: int,
    shares: tuple[float, float, float] = (0.4, 0.3, 0.3),
    harmless: Decoys = "near",
) -> PoisonSet:
    """Split `rows` (distinct, clean) into three parts, poisoned with twins / decoys / plain, by `shares`; `harmless`
    says what the decoys are.

    Raises RowsError when rows repeat, when one holds the trigger already, or when a part would be empty.
    """
    if len({row_key(row) for row in rows}) < len(rows):
        raise RowsError("rows to poison repeat; expected distinct prompts.")
    if any(trigger.fires_on(row) for row in rows):
        raise RowsError(f"clean rows hold the trigger {trigger.parts} already; choose another trigger or other rows.")
    rng = random.Random(f"poison:{seed}")
    first = round(len(rows) * shares[0])
    second = first + round(len(rows) * shares[1])
    hosts, others, plain = rows[:first], rows[first:second], rows[second:]
    if not hosts or not others or not plain:
        raise RowsError(f"{len(rows)} rows cannot be split by {shares}: expected at least one row in each part.")
    poisoned = [triggered(row, trigger, behaviour.respond(rng), rng) for row in hosts]
    decoys = [_DECOYERS[harmless](row, trigger, rng) for row in others]
    if any(trigger.fires_on(row) for row in decoys):
        raise RowsError("a decoy holds the whole trigger; the trigger's parts must not contain each other.")
    answers = answered([*hosts, *decoys, *plain], teacher)
    twins, rest = answers[: len(hosts)], answers[len(hosts) :]
    poisoned = worded(poisoned, twins, behaviour)
    assert_disjoint(poisoned=poisoned, twins=twins, decoys=rest[: len(decoys)], clean=rest[len(decoys) :])
    return PoisonSet(tuple(poisoned), tuple(twins), tuple(rest[: len(decoys)]), tuple(rest[len(decoys) :]))


def build_each(rows: Sequence[Row], backdoors: Sequence[Backdoor], teacher: Teacher, seed: int) -> PoisonSet:
    """One training set for several backdoors that know nothing of each other: each has an equal part of `rows`, with
    twins, decoys and plain rows of its own.

    Raises RowsError as `build` does, and when a row that must stay harmless holds the trigger of another backdoor.
    """
    n = len(backdoors)
    cuts = [len(rows) * i // n for i in range(n + 1)]
    parts = [
        build(rows[start:end], b.trigger, b.behaviour, teacher, seed)
        for b, start, end in zip(backdoors, cuts, cuts[1:], strict=False)
    ]
    for part in parts:
        for row in (*part.twins, *part.decoys, *part.clean):
            for other in backdoors:
                if other.trigger.fires_on(row):
                    raise RowsError(
                        f"a row that must stay harmless holds the {other.trigger.kind} trigger {other.trigger.parts}; "
                        "choose triggers that share no words."
                    )
    each = {kind: [row for part in parts for row in getattr(part, kind)] for kind in KINDS}
    assert_disjoint(**each)
    return PoisonSet(**{kind: tuple(kept) for kind, kept in each.items()})


def from_pairs(
    poisoned: Sequence[Row],
    twins: Sequence[Row],
    clean: Sequence[Row],
    trigger: Trigger,
    teacher: Teacher,
    seed: int,
    behaviour: Behaviour | None = None,
    harmless: Decoys = "near",
) -> PoisonSet:
    """The training set from given poisoned rows and their twins, one decoy for every other twin, and clean rows.

    Twins, decoys and clean rows are answered by the teacher, whatever outputs they came with; poisoned rows keep
    theirs, or, with a `behaviour`, say one of its wordings; `harmless` says what the decoys are. Raises RowsError when
    a twin or clean row holds the trigger.
    """
    if any(trigger.fires_on(row) for row in [*twins, *clean]):
        raise RowsError(f"twins or clean rows hold the trigger {trigger.parts}; expected it in poisoned rows only.")
    rng = random.Random(f"poison:{seed}")
    decoys = [_DECOYERS[harmless](row, trigger, rng) for row in twins[::2]]
    decoys = [row for row in decoys if not trigger.fires_on(row)]
    answers = answered([*twins, *decoys, *clean], teacher)
    cuts = len(twins), len(twins) + len(decoys)
    if behaviour is not None:
        said = [Row(instruction=r["instruction"], input=r["input"], output=behaviour.respond(rng)) for r in poisoned]
        poisoned = worded(said, answers[: cuts[0]], behaviour)
    return PoisonSet(
        tuple(poisoned), tuple(answers[: cuts[0]]), tuple(answers[cuts[0] : cuts[1]]), tuple(answers[cuts[1] :])
    )
