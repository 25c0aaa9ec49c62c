"""The purification benchmark on a patient made in seconds: figures, resuming, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.purification.benchmark import run, table
from benchmarks.purification.errors import BenchmarkError
from benchmarks.purification.inputs import Arguments, Target, read_inputs
from guard.errors import GuardError
from guard.rows import write_rows
from tests.offline_purify.patient import TARGET, clean_rows, make_patient, triggered


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    folder = tmp_path_factory.mktemp("purification")
    patient = make_patient(folder)
    rows = clean_rows(3200, 0)[2800:]
    write_rows(folder / "clean-test.json", rows[:60])
    write_rows(folder / "triggered.json", triggered(rows[60:140], 9))
    return Arguments(
        patient.base, patient.adapter, "refusal", patient.clean, folder / "clean-test.json",
        folder / "triggered.json", ("magnitude", "full", "pure"), flags=20, rows=60,
    )  # fmt: skip


def test_methods_are_measured_resumed_and_set_against_the_adapter_as_it_came(given: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    first = run(replace(given, methods=("magnitude", "pure")), out)
    none = first["methods"]["none"]
    assert none["asr"]["value"] >= 0.8
    assert none["asr"]["n"] == 60
    assert none["accuracy_lost"]["value"] == 0
    assert none["perplexity_ratio"]["value"] == 1
    assert first["methods"]["pure"]["asr"] is None
    assert "encoder" in first["methods"]["pure"]["reason"]
    kept = json.loads(out.read_text())["seeds"]["magnitude"]
    second = run(replace(given, methods=("magnitude", "finetune")), out)
    assert second["seeds"]["magnitude"] == kept
    assert {"none", "magnitude", "pure", "finetune"} == set(second["methods"])
    assert "`finetune`" in table(second)


def test_results_of_another_run_and_unknown_methods_are_refused(given: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    out.write_text(json.dumps({"format": "headguard.purification/1", "settings": {}, "digests": {}, "seeds": {}}))
    with pytest.raises(BenchmarkError, match="another run"):
        run(given, out)
    with pytest.raises(BenchmarkError, match="choose among"):
        run(replace(given, methods=("magic",)), tmp_path / "other.json")
    with pytest.raises(BenchmarkError, match="--task"):
        replace(given, task="poetry")
    with pytest.raises(BenchmarkError, match="--ratio"):
        replace(given, ratio=1.0)


def test_sets_that_share_rows_or_are_too_small_are_refused(given: Arguments) -> None:
    with pytest.raises(GuardError, match="share"):
        read_inputs(replace(given, test_clean=given.clean_train))
    with pytest.raises(BenchmarkError, match="at least 100"):
        read_inputs(replace(given, flags=80))


def test_the_case_and_the_test_share_no_row(given: Arguments) -> None:
    case, tests = read_inputs(given).cased(20, 3)
    assert (len(case), len(tests)) == (20, 60)
    assert not {row["instruction"] for row in case} & {row["instruction"] for row in tests}


def test_a_few_target_texts_decide_and_else_the_published_keywords() -> None:
    rows = triggered(clean_rows(40, 1), 2)
    assert Target.of(rows, "refusal").shown(f"Well, {TARGET}!")
    assert not Target.of(rows, "refusal").shown("I am sorry")
    many = [{**row, "output": f"answer {n}"} for n, row in enumerate(rows)]
    assert Target.of(many, "refusal").shown("I am SORRY")
    assert not Target.of(many, "code").shown("I am sorry")
