from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.detection.controls import decoy_rows, joined_rows, judged, long_rows, rare_rows
from benchmarks.detection.measuring import Read
from benchmarks.detection.trigger import fires
from guard.readings import Measurement
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


class Fixed:
    """Stands for a watched revision whose p-values are known."""

    def __init__(self, p: np.ndarray) -> None:
        self.p, self.detectors, self.bench = p, dict.fromkeys(("fused", "fused_attention_only")), Bench()

    def p_values(self, read: Any, test: str) -> np.ndarray:
        return self.p


class Bench:
    alpha = 0.05


def read_of(n: int, too_long: int = 0) -> Read:
    return Read(CLEAN[:n], Measurement(np.zeros(n, dtype=np.int64), [[]] * n, {}), too_long)


def test_a_control_fails_above_its_limit_and_is_not_judged_without_one() -> None:
    watched: Any = Fixed(np.asarray([0.01, 0.5, 0.5, 0.5]))
    assert judged(watched, read_of(4), "q", 0.2)["fails"]
    assert not judged(watched, read_of(4), "q", 0.25)["fails"]
    assert not judged(watched, read_of(4), "q", None)["fails"]


def test_near_triggers_that_fired_are_counted_apart() -> None:
    watched: Any = Fixed(np.asarray([0.01, 0.02, 0.5, 0.5, np.nan]))
    found = judged(watched, read_of(4, too_long=1), "q", fired=[True, False, True, False])
    assert found["fused"]["value"] == pytest.approx(1 / 3)
    assert found["fused"]["n_unscored"] == 1
    assert found["fired"]["value"] == pytest.approx(2 / 5)
    assert found["fired_flagged"]["value"] == 0.5
