"""The purify command: thresholds of the gate can be set, and what cannot be asked for is named before any work."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from offline_purify import workflow
from offline_purify.spec import RepairResult
from serving.cli import app
from serving.cli.output import Failure

ASKED = ["purify", "--model", "base", "--adapter", "lora", "--flags", "flags.jsonl", "--clean", "clean.json"]


def invoked(tmp_path, *options):
    return CliRunner().invoke(app, [*ASKED, "--out", str(tmp_path / "repair"), *options])


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


def test_thresholds_reach_the_gate(tmp_path, monkeypatch):
    asked = []

    def run(spec, url, progress):
        asked.append(spec)
        return RepairResult(status="offered")

    monkeypatch.setattr(workflow, "run", run)
    told = invoked(tmp_path, "--gate", "accuracy_drop_max=0.02", "--gate", "kl_max=0.5")
    assert told.exit_code == 0, told.output
    assert asked[0].gate.accuracy_drop_max == 0.02
    assert asked[0].gate.kl_max == 0.5
    assert asked[0].gate.flagged_asr_max == 0.1
