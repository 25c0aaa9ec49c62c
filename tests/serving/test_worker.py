"""The worker between the gateway's rows and the clinic's workflow, as a real process that is really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from guard.adapters import inspect_adapter
from guard.verdict import Verdict
from serving.adapters import Registry
from serving.approvals import get_repair, request_repair
from serving.auth import Caller, issue
from serving.cases import Cases, Flag
from serving.evidence import Sealer
from serving.metrics import Metrics
from serving.settings import load_settings
from serving.store.database import Store
from serving.store.models import Case
from serving.worker import Worker
from tests.offline_purify.patient import make_patient


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    return make_patient(tmp_path_factory.mktemp("patient"))


@pytest.fixture
def settings(patient, tmp_path):
    return load_settings(None, model=patient.base, state_dir=tmp_path / "state", policy={"alpha": 0.05})


@pytest.fixture
def store(settings):
    store = Store(settings.database, settings.state_dir)
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def repair(patient, settings, store):
    """A repair that an operator has asked for, of a case that holds the patient's flags."""
    registry = Registry(store, settings.state_dir, settings.model, settings.served_name, settings.policy)
    revision, _ = registry.admit("sick", patient.adapter, "test")
    cases = Cases(store, Sealer.open(settings.state_dir), settings, Metrics())
    for line in patient.flags.read_text().splitlines():
        flag = json.loads(line)
        verdict = Verdict("flagged", 0.05, 0, "all", final=True, p_value=0.01, signal="shift")
        told = (flag["messages"], flag["response"])
        cases.keep(Flag(flag["request_id"], "sick", revision.revision, "key", "deliver", verdict, *told))
    with store.write() as session:
        key, _ = issue(session, "operator", "operator")
        case = session.query(Case).one()
        return request_repair(session, case.id, Caller(key.id, "operator", "operator"), {}, 4).id


def state(store, repair):
    with store.read() as session:
        return get_repair(session, repair).state


def start(settings, patient):
    command = [sys.executable, "-m", "serving", "worker", str(settings.model), "--clean", str(patient.clean)]
    environment = {**os.environ, "HEADGUARD_POLICY__ALPHA": "0.05", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--state-dir", str(settings.state_dir)], env=environment)


def wait(reached, process, at_most_s=240):
    for _ in range(at_most_s * 5):
        if reached():
            return
        assert process.poll() is None, "the worker stopped"
        time.sleep(0.2)
    raise AssertionError("the worker did not get there")


def test_a_worker_killed_in_the_middle_of_a_repair_goes_on_and_offers_it(patient, settings, store, repair):
    folder = settings.state_dir / "repairs" / repair
    first = start(settings, patient)
    wait(lambda: (folder / "work" / "references.json").is_file(), first)
    assert (folder / "flags.jsonl").stat().st_mode & 0o077 == 0
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert state(store, repair) == "running"
    second = start(settings, patient)
    try:
        wait(lambda: state(store, repair) != "running", second)
    finally:
        second.terminate()
        second.wait(30)
    with store.read() as session:
        done = get_repair(session, repair)
        assert (done.state, done.reasons) == ("offered", [])
    assert inspect_adapter(folder / "candidate", patient.base).digest == done.candidate_digest
    assert (done.metrics["asr_before"], done.metrics["asr_after"]) == (1.0, 0.0)
    assert not (folder / "flags.jsonl").exists()


def test_options_that_cannot_be_used_fail_the_repair_in_words_and_reopen_the_case(patient, settings, store, repair):
    with store.write() as session:
        get_repair(session, repair).options = {"stages": ["prayer"], "base": "/etc"}
    worker = Worker(settings, patient.clean)
    worker.look()
    with store.read() as session:
        done = get_repair(session, repair)
        assert done.state == "failed"
        assert "stages" in done.reasons[0]
        assert session.query(Case).one().state == "open"
