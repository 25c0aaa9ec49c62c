"""The overhead benchmark's command and its JSON, at a size that says nothing about speed."""

import json
import multiprocessing

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.overhead.__main__ import _loss, app
from guard.gram import PROMPT_ROWS


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    pytest.importorskip("vllm")
    out = tmp_path_factory.mktemp("overhead") / "overhead.json"
    size = ["--shape", "tiny", "--batch", "2", "--prompt", "40", "--chunk", "24", "--new", "6", "--rounds", "2"]
    done = CliRunner().invoke(app, [*size, "--window", "3", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert not multiprocessing.active_children()
    return json.loads(out.read_text())


def test_every_arm_takes_the_same_steps_and_every_row_of_the_window_is_read(result):
    steps = {arm: np.asarray(seconds) for arm, seconds in result["step_seconds"].items()}
    assert set(steps) == {"off", "idle", "watched"}
    assert {arm.shape for arm in steps.values()} == {(6, result["steps"])}
    assert result["steps"] > 6
    assert all((arm > 0).all() for arm in steps.values())
    # Prompt rows and two more of two requests in seven repetitions, and of the profile's sixteen (some end before).
    whole = PROMPT_ROWS + 2
    assert 14 * whole + 16 * PROMPT_ROWS <= result["rows_watched"] == result["rows_seen"] <= 14 * whole + 16 * whole
    assert result["checkpoints"] == [0, 1, 2]


def test_an_engine_that_is_off_runs_nothing_of_the_guards(result):
    assert result["inside"]["off"] == 0
    assert 0 < result["inside"]["idle"] < result["inside"]["watched"] < 1


def test_the_losses_are_those_of_the_steps_that_are_told(result):
    steps = {arm: np.asarray(seconds) for arm, seconds in result["step_seconds"].items()}
    for name, arm in (("throughput_loss", "watched"), ("idle_loss", "idle")):
        found = _loss(name, steps["off"], steps[arm])
        assert result[name] == pytest.approx(found[name], abs=1e-3)
        assert len(result[f"{name}_rounds"]) == 2
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high


def test_one_slow_moment_of_the_machine_is_not_taken_for_a_cost():
    off = np.full((9, 40), 0.1)
    on = off * 1.02
    on[2, 7] = 30.0  # one step
    off[4], on[4] = off[4] * 1.5, on[4] * 1.5  # one repetition, all arms
    found = _loss("loss", off, on)
    assert found["loss"] == pytest.approx(0.02, abs=0.001)
    assert found["loss_interval"][0] > 0.015
    on[:, 7] = 30.0  # a cost that comes back is one
    assert _loss("loss", off, on)["loss"] > 5


@pytest.mark.parametrize("wrong", [["--shape", "9000b"], ["--window", "some"], ["--rounds", "1"]])
def test_wrong_arguments_are_refused_by_name(wrong, tmp_path):
    done = CliRunner().invoke(app, [*wrong, "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 2
    assert wrong[0] in done.output
