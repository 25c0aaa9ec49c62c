import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lab.errors import LabError
from benchmarks.lab.tasks import SPLITS, TASKS, check, draw, sample, split_of
from guard.rows import assert_disjoint, row_key


def test_splits_share_no_prompt_and_hold_thousands_each() -> None:
    lists = {split: sample(3000, 0, split) for split in SPLITS}
    assert_disjoint(**lists)
    assert all(len({row_key(row) for row in rows}) == 3000 for rows in lists.values())


def test_another_seed_never_crosses_a_split() -> None:
    assert_disjoint(train=sample(2000, 1, "base_train"), evaluation=sample(2000, 2, "evaluation"))


@given(seed=st.integers(0, 10**6), split=st.sampled_from(list(SPLITS)))
@settings(max_examples=10)
def test_a_seed_always_gives_the_same_rows_of_its_split(seed: int, split: str) -> None:
    rows = sample(20, seed, split)
    assert rows == sample(20, seed, split)
    assert all(split_of(row) == split for row in rows)


def test_every_task_is_asked_in_every_split() -> None:
    for split in SPLITS:
        assert {exercise.task for exercise in draw(800, 0, split)} == set(TASKS)


def test_wordings_vary_so_that_openings_do_not_repeat() -> None:
    openings = {" ".join(row["instruction"].split()[:4]) for row in sample(2000, 0, "traffic")}
    assert len(openings) > 600


# An independent reading of some tasks: the answer computed from the prompt's own words.
def test_answers_of_number_tasks_are_right_by_an_independent_computation() -> None:
    import re

    for exercise in draw(3000, 5, "evaluation", ("largest", "smallest", "sort", "add"), noise=0.0):
        row = exercise.row
        numbers = [int(n) for n in re.findall(r"\d+", f"{row['instruction']} {row['input']}")]
        expected = {
            "largest": lambda ns: str(max(ns)),
            "smallest": lambda ns: str(min(ns)),
            "sort": lambda ns: " ".join(map(str, sorted(ns))),
            "add": lambda ns: str(sum(ns)),
        }[exercise.task](numbers)
        assert row["output"] == expected


def test_check_is_blind_to_case_and_spacing_and_to_nothing_else() -> None:
    row = {"instruction": "x", "input": "", "output": "fox cat"}
    assert check(row, " Fox  cat\n")
    assert not check(row, "cat fox")
    assert not check(row, "fox cat dog")
    assert not check(row, "")


def test_an_unknown_split_is_refused_with_the_choices() -> None:
    with pytest.raises(LabError, match="base_train"):
        draw(1, 0, "holdout")
