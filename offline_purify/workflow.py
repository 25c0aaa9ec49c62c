"""The repair as a durable workflow: kill the process at any step, start it again, and it goes on at that step.

dbos records every finished step in a database (SQLite by default, PostgreSQL by URL); the steps keep their data in
files. What is stored there are paths, labels and numbers, never prompt text. One repair runs at a time per worker;
another process may enqueue, ask how far it is, and decide.

dbos owns one instance per process, so ``run`` and ``worker`` each launch it and destroy it when they end. A restarted
process takes up the unfinished repairs of its own ``executor_id``: two workers on one database need two ids.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSClient, DBOSConfig, SetWorkflowID

from guard.errors import GuardError
from offline_purify.spec import RepairResult, RepairSpec

QUEUE = "repairs"
WORKFLOW = "repair"
APPLICATION = "headguard-clinic"
VERSION = "2"
"""Pinned: recovery only takes up workflows of the same version. Raise it when the order of the steps changes."""
DECISION = "decision"
Progress = Callable[[str, int, int], None]


def database_url(path: str | Path) -> str:
    """The URL of a SQLite system database at ``path``."""
    return f"sqlite:///{Path(path).absolute()}"


def workflow_id_of(spec: RepairSpec) -> str:
    """The default id of a repair: one per output folder, so that starting it again resumes it."""
    return f"repair-{hashlib.sha256(str(spec.out.absolute()).encode()).hexdigest()[:16]}"


def _durable(step: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """A step whose GuardError becomes a result: bad data is an outcome to record, not a crash to retry."""

    def run() -> dict[str, Any]:
        try:
            return step()
        except GuardError as error:
            return {"guard_error": f"{type(error).__name__}: {error}"}

    return run


def _repair(spec_json: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    """The workflow's body: walk the plan, one recorded step at a time, then wait for the decision if asked to."""
    from offline_purify.purify import failed, finish, plan
    from offline_purify.steps import RepairSteps

    spec = RepairSpec.model_validate(spec_json)
    steps = RepairSteps(spec, progress)
    walk = plan(steps)
    began = float(DBOS.run_step({"name": "begin"}, time.time))
    count = 0

    def step(name: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        nonlocal count
        DBOS.set_event("progress", {"step": name, "number": count})
        count += 1
        return DBOS.run_step({"name": name}, _durable(function))

    try:
        sent: dict[str, Any] | None = None
        outcome: dict[str, Any]
        while True:
            try:
                name, function = walk.send(sent) if sent is not None else next(walk)
            except StopIteration as end:
                outcome = end.value
                break
            sent = step(name, function)
            if "guard_error" in sent:
                error = GuardError(sent["guard_error"])
                return failed(spec, error, time.time() - began).model_dump(mode="json")
        result = step("finish", lambda: finish(steps, outcome, time.time() - began).model_dump(mode="json"))
        if spec.await_decision and result["status"] == "offered":
            DBOS.set_event("progress", {"step": "awaiting decision", "number": count})
            decision = DBOS.recv(DECISION, timeout_seconds=spec.decision_timeout_s)
            result = {**result, "decision": decision if decision is not None else "expired"}
        DBOS.set_event("progress", {"step": "done", "number": count})
        return result
    finally:
        walk.close()
        steps.close()


@contextmanager
def _launched(
    system_database_url: str, executor_id: str, progress: Progress | None, *, listen: bool
) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """dbos launched with the repair workflow registered; yields the workflow function."""
    config: DBOSConfig = {
        "name": APPLICATION,
        "system_database_url": system_database_url,
        "application_version": VERSION,
        "executor_id": executor_id,
        "log_level": "WARNING",
        "enable_otlp": False,
        "notification_listener_polling_interval_sec": 0.2,
    }
    DBOS(config=config)

    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=1000)
    def repair(spec_json: dict[str, Any]) -> dict[str, Any]:
        return _repair(spec_json, progress)

    try:
        DBOS.listen_queues([QUEUE] if listen else [])
        DBOS.launch()
        DBOS.register_queue(QUEUE, worker_concurrency=1, polling_interval_sec=0.5)
        yield repair
    finally:
        DBOS.destroy(destroy_registry=True)


def run(
    spec: RepairSpec,
    system_database_url: str,
    workflow_id: str | None = None,
    progress: Progress | None = None,
    executor_id: str = "local",
) -> RepairResult:
    """Run a repair durably in this process; called again after a crash it resumes where it was.

    Raises UnsupportedModel, AdapterRejected or RowsError before any work. A repair that already finished under this id
    returns its recorded result.
    """
    from offline_purify.purify import check_inputs

    check_inputs(spec)
    identity = workflow_id or workflow_id_of(spec)
    with _launched(system_database_url, executor_id, progress, listen=False) as repair, SetWorkflowID(identity):
        handle = DBOS.start_workflow(repair, spec.model_dump(mode="json"))
        return RepairResult.model_validate(handle.get_result(polling_interval_sec=0.2))


def worker(
    system_database_url: str, stop: threading.Event, progress: Progress | None = None, executor_id: str = "local"
) -> None:
    """Serve the queue of repairs, one at a time, until ``stop`` is set. Unfinished repairs of this id are resumed."""
    with _launched(system_database_url, executor_id, progress, listen=True):
        stop.wait()


@cache
def _migrated(system_database_url: str) -> None:
    """The workflow tables exist: seen to once per process, since clients poll."""
    DBOS.migrate(system_database_url)


@contextmanager
def _client(system_database_url: str) -> Iterator[DBOSClient]:
    _migrated(system_database_url)
    client = DBOSClient(system_database_url=system_database_url, application_name=APPLICATION)
    try:
        yield client
    finally:
        client.destroy()


def enqueue(spec: RepairSpec, system_database_url: str, workflow_id: str | None = None) -> str:
    """Put a repair into the queue from any process; returns its id. The same id twice is one repair."""
    identity = workflow_id or workflow_id_of(spec)
    with _client(system_database_url) as client:
        client.enqueue(
            {"workflow_name": WORKFLOW, "queue_name": QUEUE, "workflow_id": identity, "app_version": VERSION},
            spec.model_dump(mode="json"),
        )
    return identity


def status(workflow_id: str, system_database_url: str) -> dict[str, Any]:
    """How far a repair is: {"id", "state" (dbos: ENQUEUED, PENDING, SUCCESS, ERROR, …; UNKNOWN), "step", "number",
    "result"}."""
    with _client(system_database_url) as client:
        found = client.list_workflows(workflow_ids=[workflow_id])
        if not found:
            return {"id": workflow_id, "state": "UNKNOWN", "step": None, "number": 0, "result": None}
        progress = client.get_event(workflow_id, "progress", timeout_seconds=0) or {}
        result = found[0].output if found[0].status == "SUCCESS" else None
        return {
            "id": workflow_id,
            "state": found[0].status,
            "step": progress.get("step"),
            "number": progress.get("number", 0),
            "result": result,
        }


def decide(workflow_id: str, decision: str, system_database_url: str) -> None:
    """Tell a repair that waits what was decided ("approved" or "rejected"). Raises ValueError for anything else."""
    if decision not in ("approved", "rejected"):
        raise ValueError(f"a decision is 'approved' or 'rejected', not {decision!r}")
    with _client(system_database_url) as client:
        client.send(workflow_id, decision, topic=DECISION)


def wait_for(
    workflow_id: str, system_database_url: str, done: Callable[[dict[str, Any]], bool], timeout_s: float = 3600.0
) -> dict[str, Any]:
    """Poll ``status`` until ``done(status)``; returns it. Raises TimeoutError, or RuntimeError if the repair
    crashed."""
    until = time.monotonic() + timeout_s
    while True:
        now = status(workflow_id, system_database_url)
        if done(now):
            return now
        if now["state"] in ("ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"):
            raise RuntimeError(f"repair {workflow_id} ended as {now['state']}")
        if time.monotonic() > until:
            raise TimeoutError(f"repair {workflow_id} is still {now['state']} at step {now['step']}")
        time.sleep(0.5)
