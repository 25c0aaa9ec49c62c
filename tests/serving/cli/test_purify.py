"""The purify command: thresholds of the gate can be set, and what cannot be asked for is named before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from offline_purify import workflow
from offline_purify.spec import RepairResult
from serving.cli import app
from serving.cli.output import Failure

WHOLE = ["purify", "--model", "base", "--flags", "flags.jsonl", "--clean", "clean.json"]
ASKED = [*WHOLE, "--adapter", "lora"]


def invoked(tmp_path, *options, asked=ASKED):
    return CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "repair"), *options])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gate", "kl_max"], "expected NAME=VALUE"),
        (["--gate", "kl=0.5"], "gate.kl: Extra inputs"),
        (["--gate", "accuracy_drop_max=much"], "gate.accuracy_drop_max"),
        (["--alpha", "2"], "alpha: Input should be less than 1"),
        (["--stages", "signature,prayer"], "prayer"),
    ],
)
def test_what_cannot_be_asked_for_is_named_before_any_work(tmp_path, options, said):
    told = invoked(tmp_path, *options)
    assert isinstance(told.exception, Failure)
    assert said in str(told.exception)
    assert not (tmp_path / "repair").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--reference", "base"], "no base that could answer"), (["--vaccine", "v"], "vaccinate the repaired model")],
)
def test_what_only_an_adapter_can_have_is_named_for_a_whole_model(tmp_path, options, said):
    told = invoked(tmp_path, *options, asked=WHOLE)
    assert isinstance(told.exception, Failure)
    assert said in str(told.exception)
    assert not (tmp_path / "repair").exists()


@pytest.fixture
def asked(monkeypatch):
    """The repairs that reach the workflow."""
    specs = []

    def run(spec, url, progress):
        specs.append(spec)
        return RepairResult(status="offered")

    monkeypatch.setattr(workflow, "run", run)
    return specs


def test_without_an_adapter_the_model_itself_is_repaired(tmp_path, asked):
    for options in ([], ["--reference", "trusted"], ["--adapter", "lora", "--name", "support"]):
        told = invoked(tmp_path, *options, asked=WHOLE)
        assert told.exit_code == 0, told.output
    alone, trusting, adapter = asked
    assert (alone.adapter, alone.reference, alone.name) == (None, None, "model")
    assert (trusting.adapter, trusting.reference) == (None, Path("trusted").absolute())
    assert (adapter.adapter, adapter.reference, adapter.name) == (Path("lora").absolute(), "base", "support")


def test_thresholds_reach_the_gate(tmp_path, asked):
    told = invoked(tmp_path, "--gate", "accuracy_drop_max=0.02", "--gate", "kl_max=0.5")
    assert told.exit_code == 0, told.output
    assert asked[0].gate.accuracy_drop_max == 0.02
    assert asked[0].gate.kl_max == 0.5
    assert asked[0].gate.flagged_asr_max == 0.1
