"""The calibrate command: a profile, what it supports, and a report when one is wanted."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from guard.errors import AlphaTooFine, RowsError
from guard.profile import Profile
from guard.rows import Row, write_rows
from serving.cli import app
from serving.cli.output import Failure

WORDS = [f"w{i}" for i in range(40)]


def drawn(n: int, seed: int) -> list[Row]:
    """Rows of random words that the tiny model knows."""
    rng = random.Random(seed)
    return [Row(instruction=" ".join(rng.choices(WORDS, k=rng.randint(5, 20))), input="", output="") for _ in range(n)]


@pytest.fixture
def options(weights, tmp_path):
    """What every run of this file has in common: 120 clean prompts for one adapter, and where to put the profile."""
    write_rows(tmp_path / "clean.json", drawn(120, seed=0))
    given = ["--model", weights.base, "--adapter", weights.first, "--prompts", tmp_path / "clean.json"]
    return ["calibrate", *map(str, given), "--out", str(tmp_path / "p.safetensors"), "--max-new-tokens", "3"]


def test_it_writes_a_profile_and_a_report_and_says_which_alpha_is_supported(options, tmp_path):
    told = CliRunner().invoke(app, [*options, "--alpha", "0.05", "--report", str(tmp_path / "report")])
    assert told.exit_code == 0, told.output
    assert "Supported: at alpha = 0.05" in told.stdout
    assert f"report: {tmp_path / 'report' / 'index.html'}" in told.stdout
    assert "Supported: at alpha = 0.05" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert Profile.load(tmp_path / "p.safetensors").facts["n_requests"] == 120


def test_repeated_answers_are_kept_when_asked(options):
    told = CliRunner().invoke(app, [*options, "--alpha", "0.05", "--keep-repeated"])
    assert told.exit_code == 0, told.output
    assert "Repeated answers were kept, as asked." in told.stdout


def test_triggered_rows_add_a_roc_to_the_report(options, tmp_path):
    write_rows(tmp_path / "triggered.json", drawn(10, seed=1))
    more = ["--alpha", "0.05", "--report", str(tmp_path / "report"), "--triggered", str(tmp_path / "triggered.json")]
    told = CliRunner().invoke(app, [*options, *more, "--json"])
    assert told.exit_code == 0, told.output
    said = json.loads(told.stdout)
    assert said["report"] == str(tmp_path / "report" / "index.html")
    (bucket,) = said["length_buckets"]
    assert bucket["realised_99"][0] < 0.05 < bucket["realised_99"][1]
    assert (tmp_path / "report" / "roc.png").is_file()


def test_an_alpha_that_is_not_supported_fails_and_the_report_says_why(options, tmp_path):
    told = CliRunner().invoke(app, [*options, "--alpha", "0.001", "--report", str(tmp_path / "report")])
    assert isinstance(told.exception, AlphaTooFine)
    assert not (tmp_path / "p.safetensors").exists()
    assert "NOT supported" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_triggered_rows_need_a_report_and_may_not_be_among_the_clean_ones(options, tmp_path):
    clean = str(tmp_path / "clean.json")
    assert isinstance(CliRunner().invoke(app, [*options, "--triggered", clean]).exception, Failure)
    told = CliRunner().invoke(app, [*options, "--triggered", clean, "--report", str(tmp_path / "report")])
    assert isinstance(told.exception, RowsError)
