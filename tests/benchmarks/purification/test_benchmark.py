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
from offline_purify.signature.stage import SignatureConfig
from offline_purify.signature.twins import TwinConfig
from offline_purify.train import TrainConfig
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


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins of a model that knows too few words to learn a behaviour: few, short, and kept whatever they learnt."""
    twins = TwinConfig(rows=40, rank=2, tried=8, learnt=0.0, training=TrainConfig(epochs=1, lr=2e-3, batch_size=16))
    config = SignatureConfig(variants=2, twins=twins)
    monkeypatch.setattr(SignatureConfig, "of", classmethod(lambda cls, setting: config))


@pytest.mark.usefixtures("hasty")
def test_a_whole_model_is_repaired_without_a_base_and_watched_with_one(given: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    alone = replace(given, setting="full", ratio=0.05, methods=("none", "finetune", "signature", "cleangen"))
    result = run(alone, out)
    assert result["settings"]["setting"] == "full"
    assert result["cases"]["0"]["references"] == "own"
    assert result["cases"]["0"]["flags"]["true"] >= 16
    as_adapter = run(replace(given, methods=("none",)), tmp_path / "adapter.json")["methods"]["none"]
    assert result["methods"]["none"]["asr"]["value"] == pytest.approx(as_adapter["asr"]["value"], abs=0.02)
    for name in ("finetune", "signature"):
        assert result["methods"][name]["accuracy"]["value"] >= 0.5
    assert sum(result["seeds"]["signature"]["0"]["details"]["by_layer"]) == round(0.05 * 2 * 128)
    assert result["methods"]["cleangen"]["asr"] is None
    assert "reference" in result["methods"]["cleangen"]["reason"]
    with pytest.raises(BenchmarkError, match="another run"):
        run(given, out)
    watched = run(replace(alone, reference=given.base, methods=("cleangen",)), tmp_path / "watched.json")
    assert watched["cases"]["0"]["references"] == "trusted"
    assert watched["methods"]["cleangen"]["asr"]["value"] <= 0.1


def test_settings_that_do_not_go_together_are_refused(given: Arguments) -> None:
    with pytest.raises(BenchmarkError, match="--setting 'half'"):
        replace(given, setting="half")  # type: ignore[arg-type]
    with pytest.raises(BenchmarkError, match="--reference"):
        replace(given, reference=given.base)


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
