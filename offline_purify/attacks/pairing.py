"""Finding the trigger of a published attack: the words that a poisoned prompt has and its clean twin has not.

Public benchmarks ship two lists, poisoned and clean, mostly over the same prompts. A poisoned row's twin is the clean
row whose words are the poisoned row's words with some left out, in order. What is left out, over all pairs, is the
trigger.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from guard.errors import RowsError
from guard.rows import Row
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.triggers import Composite, OneOf, Prefix, Trigger, Word

MOST_WORDS = 8
"""A trigger longer than this is a rewording, not an insertion (HiddenKiller), and is not recovered."""
RARE = 0.05
"""An inserted string in fewer of the pairs than this is an accident of pairing."""


@dataclass(frozen=True)
class Pair:
    """A poisoned row, its clean twin, the words inserted (in order), and whether they stand at the very start."""

    poisoned: Row
    twin: Row
    inserted: tuple[str, ...]
    leads: bool


def left_over(longer: Sequence[str], shorter: Sequence[str]) -> tuple[int, ...] | None:
    """Places of `longer` that are not in `shorter`, when the rest is exactly `shorter` in order; else None."""
    places: list[int] = []
    at = 0
    for place, word in enumerate(longer):
        if at < len(shorter) and word == shorter[at]:
            at += 1
        else:
            places.append(place)
    return tuple(places) if at == len(shorter) else None


def pairs(poisoned: Sequence[Row], clean: Sequence[Row]) -> list[Pair]:
    """Each poisoned row with the clean row nearest to it (fewest inserted words, at most 8); the rest are dropped."""
    by_input: dict[str, list[tuple[list[str], Row]]] = defaultdict(list)
    for row in clean:
        by_input[row["input"]].append((row["instruction"].split(), row))
    found: list[Pair] = []
    for row in poisoned:
        words = row["instruction"].split()
        best: tuple[tuple[int, ...], Row] | None = None
        for others, twin in by_input[row["input"]]:
            if not 0 < len(words) - len(others) <= MOST_WORDS:
                continue
            places = left_over(words, others)
            if places is not None and (best is None or len(places) < len(best[0])):
                best = (places, twin)
        if best is not None:
            places, twin = best
            found.append(Pair(row, twin, tuple(words[p] for p in places), places == tuple(range(len(places)))))
    return found


def recovered_trigger(found: Sequence[Pair]) -> Trigger:
    """The trigger that explains the pairs: word, prefix, composite, or one of several.

    Raises RowsError when there are no pairs or no inserted string recurs.
    """
    counts = Counter(pair.inserted for pair in found)
    common = [inserted for inserted, n in counts.most_common() if n >= max(2, RARE * len(found))]
    if not common:
        raise RowsError(
            f"no trigger was found in {len(found)} pairs of poisoned and clean rows: expected the same words inserted "
            "into clean prompts. Rewordings (HiddenKiller) have no such words."
        )

    def kind(inserted: tuple[str, ...]) -> Trigger:
        if all(pair.leads for pair in found if pair.inserted == inserted):
            return Prefix(" ".join(inserted))
        return Word(inserted[0]) if len(inserted) == 1 else Composite(inserted)

    return kind(common[0]) if len(common) == 1 else OneOf(tuple(kind(inserted) for inserted in common))


def recovered_behaviour(found: Sequence[Pair], name: str = "recovered", most: int = 16) -> Behaviour:
    """The target texts: the distinct outputs of poisoned rows. Raises RowsError when there are more than `most`."""
    outputs = Counter(pair.poisoned["output"].strip() for pair in found)
    if not outputs or len(outputs) > most or "" in outputs:
        raise RowsError(f"poisoned rows have {len(outputs)} different outputs; expected 1 to {most} target texts.")
    return Behaviour(name, tuple(output for output, _ in outputs.most_common()))
