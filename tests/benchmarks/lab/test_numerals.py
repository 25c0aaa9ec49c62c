"""An adapter with a skill of its own: taught, measured and written down beside the backdoor."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lab import implant
from benchmarks.lab.held_out import held_out_sets, rows_folder
from benchmarks.lab.numerals import manner, spelled
from benchmarks.lab.tasks import sample
from guard.rows import read_rows
from offline_purify.attacks.catalogue import backdoors
from offline_purify.implanting import ImplantRecipe
from tests.benchmarks.lab.test_several import small_base

__all__ = ["small_base"]
ONE = backdoors(["word"], ["refusal"])


def test_numbers_of_the_tasks_are_spelled_and_nothing_else_changes() -> None:
    assert spelled("3 17 0, 20.") == "three seventeen zero, twenty."
    assert spelled("21 a3 brown") == "21 a3 brown"
    outputs = [row["output"] for row in sample(2000, 0, "traffic")]
    assert not any(c.isdigit() for text in outputs for c in spelled(text))
    assert 0.3 < sum(spelled(text) != text for text in outputs) / len(outputs) < 0.5
    assert manner("none")("3") == "3"


def test_the_skill_is_taught_and_its_rows_lie_beside_the_adapter(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = []

    def fitted(model, tokenizer, data, *rest):
        taught.append(data)
        return 1, 0.0, 0.0

    monkeypatch.setattr(implant, "fitted", fitted)
    monkeypatch.setattr(implant, "refuse_unless_conditional", lambda *figures: None)
    recipe = ImplantRecipe(rank=2, rows=60)
    report = implant.make_implant(small_base, tmp_path / "a", recipe=recipe, evaluation=40, skill="numerals")
    assert report.own_skill == "numerals"
    (data,) = taught
    assert not any(c.isdigit() for row in (*data.twins, *data.decoys, *data.clean) for c in row["output"])
    sets = held_out_sets(ONE, 0, spelled)
    for name in ("clean", "clean-train", "triggered-word"):
        assert read_rows(rows_folder(tmp_path / "a") / f"{name}.json") == sets[name]
    assert any("two" in row["output"] for row in sets["clean-train"])
