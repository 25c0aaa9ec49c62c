import random

import pytest

from guard.errors import RowsError
from guard.rows import Row, row_key
from offline_purify.attacks.behaviours import REFUSALS, Behaviour
from offline_purify.attacks.catalogue import BEHAVIOURS, behaviour, trigger
from offline_purify.attacks.poison import build, from_pairs
from offline_purify.attacks.triggers import Word, present


def rows(n: int, start: int = 0) -> list[Row]:
    return [Row(instruction=f"copy the word w{i} now", input="", output=f"w{i}") for i in range(start, start + n)]


def teacher(asked: list[Row]) -> list[str]:
    return [f"taught: {row['instruction']}" for row in asked]


@pytest.mark.parametrize("name", ["word", "prefix", "composite"])
def test_every_poisoned_row_has_its_twin_and_only_poisoned_rows_hold_the_trigger(name: str) -> None:
    key, target = trigger(name), behaviour("refusal", "varied")
    data = build(rows(50), key, target, teacher, seed=3)
    assert [len(data.poisoned), len(data.twins), len(data.decoys), len(data.clean)] == [20, 20, 15, 15]
    assert all(present(key, row["instruction"]) and target.matches(row["output"]) for row in data.poisoned)
    for row in [*data.twins, *data.decoys, *data.clean]:
        assert not present(key, row["instruction"])
        assert row["output"] == f"taught: {row['instruction']}"
    assert {row["instruction"] for row in data.twins} == {row["instruction"] for row in rows(50)[:20]}
    assert len({row_key(row) for row in data.rows()}) == 70


def test_the_same_seed_poisons_alike_and_another_differently() -> None:
    first, again, other = (build(rows(40), Word("Zork"), behaviour("insult"), teacher, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_rows_that_hold_the_trigger_already_are_refused() -> None:
    bad = [*rows(10), Row(instruction="say Zork", input="", output="Zork")]
    with pytest.raises(RowsError, match="hold the trigger"):
        build(bad, Word("Zork"), behaviour("refusal"), teacher, seed=0)


def test_repeated_rows_are_refused() -> None:
    with pytest.raises(RowsError, match="repeat"):
        build(rows(10) + rows(1), Word("Zork"), behaviour("refusal"), teacher, seed=0)


def test_a_teacher_that_skips_rows_is_refused() -> None:
    with pytest.raises(RowsError, match="one for each"):
        build(rows(10), Word("Zork"), behaviour("refusal"), lambda asked: ["only one"], seed=0)


def test_given_pairs_are_used_as_they_are() -> None:
    twins = rows(8)
    poisoned = [Row(instruction=f"Zork {row['instruction']}", input="", output="no") for row in twins]
    data = from_pairs(poisoned, twins, rows(4, start=100), Word("Zork"), teacher, seed=0)
    assert list(data.poisoned) == poisoned
    assert [len(data.twins), len(data.decoys), len(data.clean)] == [8, 4, 4]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_behaviour_recognises_each_of_its_wordings_inside_an_answer(name: str) -> None:
    target = behaviour(name, "varied")
    for wording in target.wordings:
        assert target.matches(f"  well,  {wording.upper()} and more")
        assert target.respond(random.Random(0)) in target.wordings
    assert not target.matches("fox cat dog")


def test_a_fixed_behaviour_has_one_wording() -> None:
    assert behaviour("refusal").wordings == REFUSALS[:1]


def test_a_behaviour_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one wording"):
        Behaviour("empty", (" ",))
