"""The purification benchmark on a patient made in seconds: figures, resuming, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.purification.__main__ import app
from benchmarks.purification.ablations import methods_of
from benchmarks.purification.benchmark import run, table
from benchmarks.purification.errors import BenchmarkError
from benchmarks.purification.inputs import Arguments, Target, read_inputs
from benchmarks.purification.methods import Attempt
from guard.errors import GuardError
from guard.rows import read_rows, write_rows
from offline_purify.baselines.budget import Budget
from offline_purify.flags import behaviour_of
from offline_purify.signature.find import Search
from offline_purify.signature.stage import SignatureConfig
from offline_purify.signature.twins import TwinConfig
from offline_purify.stage import Material
from offline_purify.suspect import Suspect
from offline_purify.train import TrainConfig
from tests.offline_purify.patient import SECOND, TARGET, clean_rows, make_patient, triggered


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


def test_triggers_that_the_case_holds_no_flag_of_are_measured_apart(given: Arguments, tmp_path: Path) -> None:
    rows = clean_rows(3400, 0)[3200:]
    write_rows(tmp_path / "second.json", triggered(rows[:40], 3, SECOND))  # a bystander word: nothing fires on it
    write_rows(tmp_path / "again.json", triggered(rows[40:100], 4))
    wanted = replace(given, methods=("none",), unflagged=(tmp_path / "second.json", tmp_path / "again.json"))
    found = run(wanted, tmp_path / "result.json")["methods"]["none"]
    assert found["unflagged"]["second"]["value"] <= 0.1
    assert found["unflagged"]["again"]["value"] >= 0.8
    assert found["asr_unflagged"]["n"] == 100
    write_rows(tmp_path / "copied.json", read_rows(given.test_triggered))
    with pytest.raises(GuardError, match="share"):
        run(replace(wanted, unflagged=(tmp_path / "copied.json",)), tmp_path / "other.json")
    with pytest.raises(BenchmarkError, match="names of their own"):
        run(replace(wanted, unflagged=(tmp_path / "again.json",) * 2), tmp_path / "other.json")


def test_ablations_take_away_what_they_say(given: Arguments) -> None:
    material = Material((), behaviour_of([]), (), (), 0, 6)
    attempt = Attempt(material, Budget(), SignatureConfig())
    methods = methods_of("sanity")
    for name, gone in (("no attention updates", ".self_attn."), ("no MLP updates", ".mlp.")):
        suspect = Suspect.open(given.base, given.adapter)
        before = suspect.state()
        methods[name](suspect, attempt)
        for parameter, value in suspect.state().items():
            assert value.abs().sum() == 0 if gone in parameter else torch.equal(value, before[parameter])
    suspect = Suspect.open(given.base, given.adapter)
    before = suspect.state()
    methods["MLP channels shuffled"](suspect, attempt)
    for name, value in suspect.state().items():
        if ".mlp.gate_proj.lora_B" in name:
            assert not torch.equal(value, before[name])
            assert torch.equal(value.sort(0).values, before[name].sort(0).values)


def test_an_ablation_is_measured_as_methods_are(given: Arguments, tmp_path: Path) -> None:
    methods = methods_of("steps")
    result = run(replace(given, methods=tuple(methods)), tmp_path / "steps.json", methods=methods)
    figures = result["methods"]
    assert set(figures) == {"none", "aligned and fine-tuned", "aligned alone", "fine-tuned alone", "random heads"}
    assert all(f["asr"]["n"] == 60 for f in figures.values())
    assert figures["fine-tuned alone"]["asr"]["value"] >= 0.8  # it is the alignment that repairs
    with pytest.raises(BenchmarkError, match="choose among"):
        methods_of("magic")
    with pytest.raises(BenchmarkError, match="--donor"):
        methods_of("transfer")


def test_the_command_says_what_is_missing() -> None:
    missing = CliRunner().invoke(app, ["--task", "refusal"])
    assert missing.exit_code == 2
    assert "--clean-train" in missing.output
    assert CliRunner().invoke(app, ["ablation", "--help"]).exit_code == 0


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins of a model that knows too few words to learn a behaviour: few, short, and kept whatever they learnt."""
    training = TrainConfig(epochs=1, lr=2e-3, batch_size=16)
    twins = TwinConfig(rows=40, rank=2, tried=8, learnt=0.0, training=training, least_steps=1)
    config = SignatureConfig(search=Search(variants=2, twins=twins))
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
    out.write_text(json.dumps({"format": "headguard.purification/2", "settings": {}, "digests": {}, "seeds": {}}))
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
