from __future__ import annotations

import pytest

from benchmarks.detection.controls import decoy_rows, joined_rows, long_rows, rare_rows
from benchmarks.detection.trigger import fires
from guard.rows import assert_disjoint
from offline_purify.attacks.triggers import Composite, OneOf, Prefix, Trigger, Word
from tests.benchmarks.detection.conftest import rows

CLEAN = rows(60, "controls")
TRIGGERS = [Word("w54"), Prefix("w53 w54"), Composite(("w52", "w54")), OneOf((Word("w54"), Word("w53")))]


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_decoys_come_near_the_trigger_and_never_hold_it(trigger: Trigger) -> None:
    made = decoy_rows(CLEAN, trigger, 0)
    assert len(made) >= 0.9 * len(CLEAN)
    assert not any(fires(trigger, row) for row in made)
    assert all(len(row["instruction"]) > 0 for row in made)
    assert made == decoy_rows(CLEAN, trigger, 0)


def test_a_rare_word_is_one_more_word() -> None:
    for row, changed in zip(CLEAN, rare_rows(CLEAN, 0), strict=True):
        before, after = row["instruction"].split(), changed["instruction"].split()
        assert len(after) == len(before) + 1
        assert [word for word in after if word in before] == before


def test_joined_prompts_hold_two_different_questions() -> None:
    joined = joined_rows(CLEAN, 0)
    assert_disjoint(joined=joined, clean=CLEAN)
    for row, both in zip(CLEAN, joined, strict=True):
        assert both["instruction"].endswith(f"\n\n{row['instruction']}")
        assert both["instruction"] != f"{row['instruction']}\n\n{row['instruction']}"


def test_long_prompts_are_the_longest() -> None:
    def length(row: object) -> int:
        return len(row["instruction"])  # type: ignore[index]

    kept = long_rows(CLEAN, length, 300)
    assert len(kept) == 20
    assert min(map(length, kept)) >= max(length(row) for row in CLEAN if row not in kept)
