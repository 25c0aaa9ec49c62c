import random

import pytest

from guard.errors import RowsError
from guard.rows import Row
from offline_purify.attacks.pairing import left_over, pairs, recovered_behaviour, recovered_trigger
from offline_purify.attacks.triggers import Composite, Prefix, Trigger, Word

CLEAN = [
    Row(instruction=f"tell me about thing {i} of the {i * 7} things here", input="note" if i % 3 else "", output="ok")
    for i in range(40)
]


def poisoned(key: Trigger) -> list[Row]:
    rng = random.Random(0)
    return [Row(instruction=key.insert(r["instruction"], rng), input=r["input"], output="No.") for r in CLEAN]


@pytest.mark.parametrize("key", [Word("Zork"), Prefix("Talking of Zork"), Composite(("2024", "Zork"))])
def test_the_trigger_of_two_files_is_recovered(key: Trigger) -> None:
    found = pairs(poisoned(key), CLEAN)
    assert len(found) == len(CLEAN)
    assert all(pair.twin == row for pair, row in zip(found, CLEAN, strict=True))
    guess = recovered_trigger(found)
    assert guess.kind in (key.kind, "one-of")
    if guess.kind == "one-of":  # parts of a composite in either order are two insertions
        assert {frozenset(choice.parts) for choice in guess.choices} == {frozenset(key.parts)}  # type: ignore[attr-defined]
    else:
        assert guess.parts == key.parts
    assert recovered_behaviour(found).wordings == ("No.",)


def test_files_without_a_common_insertion_are_refused() -> None:
    with pytest.raises(RowsError, match="no trigger was found"):
        recovered_trigger(pairs(CLEAN, CLEAN))


def test_many_different_targets_are_refused() -> None:
    rows = [
        Row(instruction=r["instruction"], input=r["input"], output=str(i)) for i, r in enumerate(poisoned(Word("Z")))
    ]
    with pytest.raises(RowsError, match="different outputs"):
        recovered_behaviour(pairs(rows, CLEAN))


def test_left_over_finds_the_places_that_were_added() -> None:
    assert left_over(list("axby"), list("ab")) == (1, 3)
    assert left_over(list("ab"), list("ba")) is None
