from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.detection.__main__ import app
from tests.benchmarks.detection.conftest import Small


def arguments(small: Small, out: Path) -> list[str]:
    given = small.arguments
    named = {
        "base": given.base,
        "adapter": given.adapter,
        "calibration": given.calibration,
        "clean": given.clean,
        "triggered": given.triggered,
        "vaccine": given.vaccine,
        "alpha": given.alpha,
        "control-rows": 20,
        "out": out,
    }
    return [text for name, value in named.items() for text in (f"--{name}", str(value))]


@pytest.mark.parametrize("command", [[], ["report"], ["zoo"]])
def test_help_has_an_example(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    assert "python -m benchmarks.detection" in shown.output


def test_a_run_writes_its_result_and_a_report_follows(small: Small, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, arguments(small, tmp_path / "small.json"))
    assert done.exit_code == 0, done.output
    assert "fused_attention_only" in done.output
    assert json.loads((tmp_path / "small.json").read_text())["name"] == "small"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "small.json"), "--out", str(tmp_path / "d.md")])
    assert done.exit_code == 0, done.output
    assert "| `small` |" in (tmp_path / "d.md").read_text()


def test_missing_options_are_named(small: Small, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, arguments(small, tmp_path / "x.json")[:-2])
    assert done.exit_code == 2
    assert "--out" in done.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--window", "soon"], "expected prefill, all"),
        (["--clean", "missing.json"], "no such file"),
        (["--alpha", "0.0001"], "finer than this calibration supports"),
    ],
)
def test_refusals_are_one_line_and_exit_code_1(small: Small, tmp_path: Path, change: list[str], said: str) -> None:
    done = CliRunner().invoke(app, [*arguments(small, tmp_path / "x.json"), *change])
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("change", [["--zoo", "huge"], ["--only", "refusal-word-loud"]])
def test_a_zoo_that_is_not_there_is_refused(tmp_path: Path, change: list[str]) -> None:
    done = CliRunner().invoke(app, ["zoo", "--root", str(tmp_path), "--out", str(tmp_path / "o"), *change])
    assert done.exit_code == 1
    assert change[1] in done.output
    assert list(tmp_path.iterdir()) == []
