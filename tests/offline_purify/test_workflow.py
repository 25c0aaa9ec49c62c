"""Durability: killed for real, resumed for real, with the same result."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guard.errors import RowsError
from offline_purify import workflow
from offline_purify.spec import RepairResult, RepairSpec
from tests.offline_purify.conftest import spec_for
from tests.offline_purify.patient import TARGET, TRIGGER

ROOT = Path(__file__).resolve().parents[2]
KILLS = {
    "adapter": [
        ("answer", "middle"),
        ("signature", "middle"),
        ("stage heads", "middle"),
        ("stage counter", "middle"),
        ("control random_heads", "middle"),
        ("candidate", "unrecorded"),
        ("calibrate", "middle"),
    ],
    "whole": [
        ("answer", "unrecorded"),
        ("stage counter", "middle"),
        ("candidate", "unrecorded"),
        ("calibrate", "middle"),
    ],
}
WEIGHTS = {"adapter": "adapter_model.safetensors", "whole": "model.safetensors"}


def start(spec_file: Path, url: str, log: Path, *kill: str) -> int:
    command = [sys.executable, "-m", "tests.offline_purify.killed_run", str(spec_file), url, str(log), *kill]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600, check=False).returncode


@dataclass(frozen=True)
class Killed:
    """A repair that was killed again and again: of which kind, the steps that began, how it ended, and where."""

    kind: str
    spec: RepairSpec
    steps: list[str]
    result: RepairResult
    database: Path
    straight: tuple[RepairSpec, RepairResult]


@pytest.fixture(scope="module", params=["adapter", "whole"])
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    kind = request.param
    straight: tuple[RepairSpec, RepairResult] = request.getfixturevalue(
        "repaired" if kind == "adapter" else "repaired_whole"
    )
    folder = tmp_path_factory.mktemp(f"killed_{kind}")
    spec = straight[0].model_copy(update={"out": folder / "out"})
    spec_file, log, database = folder / "spec.json", folder / "steps.log", folder / "clinic.sqlite"
    spec_file.write_text(spec.model_dump_json(), encoding="utf-8")
    url = workflow.database_url(database)
    for step, moment in KILLS[kind]:
        assert start(spec_file, url, log, step, moment) == -signal.SIGKILL, step
    assert start(spec_file, url, log) == 0
    result = RepairResult.model_validate_json(log.with_suffix(".result").read_text(encoding="utf-8"))
    return Killed(kind, spec, log.read_text(encoding="utf-8").split("\n")[:-1], result, database, straight)


def test_a_repair_killed_again_and_again_ends_with_the_very_weights_of_an_uninterrupted_one(killed):
    straight_spec, uninterrupted = killed.straight
    assert killed.result.status == uninterrupted.status == "offered"
    assert killed.result.pipeline == uninterrupted.pipeline
    weights = Path("candidate") / WEIGHTS[killed.kind]
    resumed, straight = load_file(killed.spec.out / weights), load_file(straight_spec.out / weights)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_after_each_kill_only_the_step_that_was_killed_runs_again(killed):
    kills = Counter(step for step, _ in KILLS[killed.kind])
    assert set(kills) <= set(killed.steps)
    assert Counter(killed.steps) == {step: 1 + kills[step] for step in set(killed.steps)}


def test_the_workflow_database_holds_no_prompt_text(killed):
    dump = "\n".join(sqlite3.connect(killed.database).iterdump())
    assert "repeat w" not in dump
    assert TARGET not in dump
    assert f" {TRIGGER} " not in dump


def test_a_finished_repair_started_again_returns_its_recorded_result(killed):
    again = workflow.run(killed.spec, workflow.database_url(killed.database))
    assert again == killed.result


def test_bad_input_is_refused_before_anything_is_recorded(patient, tmp_path):
    (tmp_path / "flags.jsonl").write_text('{"messages": "no list"}\n', encoding="utf-8")
    database = tmp_path / "clinic.sqlite"
    with pytest.raises(RowsError, match="line 1"):
        workflow.run(
            spec_for(patient, tmp_path / "out", flags=tmp_path / "flags.jsonl"), workflow.database_url(database)
        )
    assert not database.exists()


def test_a_worker_serves_what_another_client_enqueued_and_waits_for_the_decision(patient, tmp_path):
    spec = spec_for(
        patient, tmp_path / "out", stages=("counter",), controls=False, calibrate=False, await_decision=True
    )
    url = workflow.database_url(tmp_path / "clinic.sqlite")
    identity = workflow.enqueue(spec, url, "case-1")
    assert workflow.enqueue(spec, url, "case-1") == identity
    assert workflow.status(identity, url)["state"] == "ENQUEUED"
    stop = threading.Event()
    thread = threading.Thread(target=workflow.worker, args=(url, stop))
    thread.start()
    try:
        workflow.wait_for(identity, url, lambda s: s["step"] == "awaiting decision", timeout_s=300)
        assert json.loads((spec.out / "result.json").read_text(encoding="utf-8"))["status"] == "offered"
        workflow.decide(identity, "approved", url)
        final = workflow.wait_for(identity, url, lambda s: s["state"] == "SUCCESS", timeout_s=60)
    finally:
        stop.set()
        thread.join(60)
    assert final["result"]["decision"] == "approved"


def test_only_approved_or_rejected_can_be_decided(tmp_path):
    with pytest.raises(ValueError, match="approved"):
        workflow.decide("case-1", "maybe", workflow.database_url(tmp_path / "clinic.sqlite"))


def test_the_status_of_an_unknown_repair_is_unknown(tmp_path, patient):
    url = workflow.database_url(tmp_path / "clinic.sqlite")
    assert workflow.status("nobody", url)["state"] == "UNKNOWN"
