"""The benchmark of encoders on a tiny BERT: disjoint splits, a backdoor that is there, figures, resuming, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.purification.classifier_inputs import Arguments, read_split
from benchmarks.purification.classifiers import FLOOR, METHODS, run, table
from benchmarks.purification.encoder import app
from benchmarks.purification.errors import BenchmarkError
from guard.errors import GuardError
from offline_purify.encoder.poison import TARGET
from tests.offline_purify.encoder.body import write_data, write_encoder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    folder = tmp_path_factory.mktemp("encoder")
    return Arguments(
        write_encoder(folder / "weights"), write_data(folder / "data"), "word", (),
        rows=500, clean=80, flags=12, tests=70, epochs=8, lr=2e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(given: Arguments, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("result") / "word.json"
    return run(replace(given, methods=("none", "finetune")), out), out


def test_the_backdoor_fires_the_skill_is_there_and_a_model_never_poisoned_is_the_floor(measured) -> None:
    methods = measured[0]["methods"]
    assert methods["none"]["asr"]["value"] >= 0.8
    assert methods["none"]["accuracy"]["value"] >= 0.85
    assert methods[FLOOR]["asr"]["value"] <= 0.2
    for figures in methods.values():
        assert (figures["accuracy"]["n"], figures["asr"]["n"] >= 50) == (70, True)
        assert figures["asr"]["low"] <= figures["asr"]["value"] <= figures["asr"]["high"]


def test_every_method_is_measured_from_the_same_implant_and_what_was_measured_is_kept(given, measured) -> None:
    first, out = measured
    implants = sorted(out.parent.joinpath("encoder-implants").iterdir())
    assert len(implants) == 2
    stamps = [(path / "model.safetensors").stat().st_mtime_ns for path in implants]
    second = run(replace(given, methods=tuple(METHODS)), out)
    assert second["seeds"]["finetune"] == json.loads(json.dumps(first["seeds"]["finetune"]))
    assert [(path / "model.safetensors").stat().st_mtime_ns for path in implants] == stamps
    assert set(second["methods"]) == {FLOOR, *METHODS}
    assert all(f"`{name}`" in table(second) for name in METHODS)
    heads = second["seeds"]["heads"]["0"]
    if heads["reason"] is not None:  # put back: nothing may differ from the suspicious classifier
        assert heads["reading"] == second["seeds"]["none"]["0"]["reading"]
    parts = [
        second["seeds"][name]["0"]["details"]["partition"] for name in ("heads-kept", "align-only", "random-heads")
    ]
    assert parts[0] == parts[1]
    assert len(parts[0]["suspicious"]) == len(parts[2]["suspicious"])


def test_both_triggers_come_to_the_same_texts_and_all_tests_are_of_another_class(given) -> None:
    word, syntactic = (read_split(replace(given, trigger=trigger), 0) for trigger in ("word", "syntactic"))
    assert word.implant.unpoisoned() == syntactic.implant.unpoisoned()
    assert len(word.implant.poisoned) == round(0.2 * given.rows)
    for split in (word, syntactic):
        assert all(text.label == TARGET and "good" not in text.text for text in split.triggered)
        assert all(text.label != TARGET for text in split.implant.hosts)


def test_results_of_another_run_unknown_methods_and_triggers_are_refused(given, measured, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="another run"):
        run(replace(given, clean=60), measured[1])
    with pytest.raises(BenchmarkError, match="choose among"):
        run(replace(given, methods=("magic",)), tmp_path / "other.json")
    with pytest.raises(BenchmarkError, match="--trigger"):
        replace(given, trigger="smell")
    with pytest.raises(BenchmarkError, match=r"clean/train\.tsv"):
        run(replace(given, data=tmp_path), tmp_path / "other.json")
    with pytest.raises(GuardError, match="ask for fewer"):
        run(replace(given, rows=900), tmp_path / "other.json")


def test_the_command_shows_examples_and_says_what_is_wrong_without_a_stack_trace(given, tmp_path: Path) -> None:
    runner = CliRunner()
    assert "benchmarks.purification.encoder --weights" in " ".join(runner.invoke(app, ["--help"]).output.split())
    options = ["--data", str(given.data), "--trigger", "word", "--out", str(tmp_path / "out.json")]
    result = runner.invoke(app, ["--weights", "no-such-weights", *options])
    assert result.exit_code == 1
    assert "neither a folder nor an installed package" in result.output
