"""The scan command: what it takes, what it leaves behind, and that bad input is an error made for people."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from guard.errors import GuardError
from guard.rows import write_rows
from serving.cli import app
from serving.cli.output import Failure
from tests.offline_purify.patient import clean_rows


def test_help_shows_an_example_and_says_that_nothing_found_is_not_harmless():
    shown = CliRunner().invoke(app, ["scan", "--help"])
    assert shown.exit_code == 0
    assert "Example: headguard scan" in shown.output
    assert "does not mean harmless" in " ".join(shown.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "clean.json"], "nowhere"),
        (["--prompts", "missing.json"], "no such file"),
        (["--prompts", "clean.json", "--words", "missing.txt"], "missing.txt"),
        (["--prompts", "clean.json", "--vaccine", "clean.json"], "not a readable vaccine"),
        (["--prompts", "clean.json", "--alpha", "0.0001"], "Calibrate with more"),
    ],
)
def test_bad_input_is_an_error_made_for_people(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "clean.json", clean_rows(260, seed=0))
    told = CliRunner().invoke(app, ["scan", "nowhere", "--model", "base", "--alpha", "0.05", *arguments])
    assert isinstance(told.exception, GuardError | Failure)  # `serving.cli.main` prints these as one line, exit code 1
    assert said in str(told.exception)


def test_wrong_usage_is_exit_code_2():
    assert CliRunner().invoke(app, ["scan", "nowhere"]).exit_code == 2


def test_a_scan_writes_its_report_and_prints_the_same_json(patient, tmp_path):
    out = tmp_path / "reports" / "scan.json"
    options = ["--model", patient.base, "--prompts", patient.clean, "--alpha", 0.05, "--stimuli", 6, "--out", out]
    told = CliRunner().invoke(app, ["scan", str(patient.adapter), *map(str, options), "--json"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert report == json.loads(out.read_text(encoding="utf-8"))
    assert (report["verdict"], report["alpha"]) == ("suspicious", 0.05)
