"""The worker: the bridge between the gateway's repairs and the clinic's durable workflows.

A repair's row in the database is what was asked for; the clinic's workflow (dbos) is what runs. This loop keeps the two
agreeing, and holds no state of its own: killed anywhere, the next worker reads the same rows, finds the same workflow
by the repair's id, and goes on. Several workers may share one PostgreSQL; dbos gives each repair to one of them.

    requested ─► flags exported (mode 600) ─► workflow enqueued ─► … ─► result.json ─► offered | refused | failed
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select

from offline_purify import workflow
from offline_purify.spec import RepairResult, RepairSpec
from serving.approvals import RepairJob, repair_failed, repair_job, repair_offered, repair_refused, repair_started
from serving.cases import export_flags
from serving.evidence import Sealer
from serving.policy import Policy
from serving.settings import Settings
from serving.store.database import Store
from serving.store.models import Repair

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
_GRACE_S = 3.0
_UNFINISHED = ("ENQUEUED", "DELAYED", "PENDING")
# What a repair request may set; the rest (paths above all) is the operator of the host's to say.
_OPTIONS = frozenset({"stages", "seed", "gate", "controls"})


def workflow_url(settings: Settings) -> str:
    """Where the workflows keep their state: the same PostgreSQL, or an SQLite file beside the gateway's."""
    if settings.database.startswith("postgresql"):
        return settings.database
    return f"sqlite:///{settings.state_dir / 'workflow.sqlite'}"


class Worker:
    """Serves the repairs of one gateway's database. ``clean`` is the file or folder of clean rows to repair with."""

    def __init__(self, settings: Settings, clean: Path) -> None:
        self.settings, self.clean = settings, clean.absolute()
        self.store = Store(settings.database, settings.state_dir)
        self.sealer = Sealer.open(settings.state_dir, settings.evidence)
        self.url = workflow_url(settings)

    def run(self, stop: threading.Event, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Serve until ``stop`` is set. A step that is still running then is left to whoever comes next: the caller
        ends the process, as killing it is safe."""
        self.store.migrate()
        runner = threading.Thread(target=workflow.worker, args=(self.url, stop, progress), name="clinic", daemon=True)
        runner.start()
        try:
            while not stop.wait(_LOOK_EVERY_S):
                if not runner.is_alive():
                    raise RuntimeError("the clinic's workflow runner stopped")
                self.look()
        finally:
            stop.set()
            runner.join(_GRACE_S)
            self.store.close()

    def look(self) -> None:
        """One round: enqueue what was asked for, report what is done."""
        with self.store.read() as session:
            wanted = select(Repair.id, Repair.state).where(Repair.state.in_(("requested", "running")))
            rows = [(row.id, row.state) for row in session.execute(wanted)]
        for repair_id, state in rows:
            try:
                if state == "requested":
                    self._begin(repair_id)
                else:
                    self._report(repair_id)
            except Exception as error:  # one broken repair must not stop the others; it is told, not hidden
                log.exception("repair %s broke", repair_id)
                repair_failed(self.store, repair_id, error=f"{type(error).__name__}: the worker's log says more")

    def folder(self, repair_id: str) -> Path:
        """Where a repair keeps its flags, candidate, profile and report."""
        return self.settings.state_dir / "repairs" / repair_id

    def _begin(self, repair_id: str) -> None:
        job = repair_job(self.store, repair_id)
        try:
            spec = self._spec(job)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            repair_failed(self.store, repair_id, error=f"the repair's options cannot be used: {problems}")
            return
        spec.out.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not export_flags(self.store, self.sealer, job.case_id, spec.flags):
            repair_failed(self.store, repair_id, error="the case holds no evidence that can be read")
            return
        workflow.enqueue(spec, self.url, repair_id)
        repair_started(self.store, repair_id)

    def _spec(self, job: RepairJob) -> RepairSpec:
        options = {name: value for name, value in job.options.items() if name in _OPTIONS}
        policy = Policy(**job.policy) if job.policy else self.settings.policy
        out = self.folder(job.id)
        return RepairSpec(
            base=self.settings.model, adapter=job.adapter_path, flags=out / "flags.jsonl", clean=self.clean, out=out,
            reference=job.previous_path or "base", name=job.alias, alpha=policy.alpha, vaccine=self.settings.vaccine,
            profile=job.profile_path, **options,
        )  # fmt: skip

    def _report(self, repair_id: str) -> None:
        told = workflow.status(repair_id, self.url)
        if told["state"] in _UNFINISHED:
            return
        # The workflow needed readable prompts while it ran; now nobody does.
        (self.folder(repair_id) / "flags.jsonl").unlink(missing_ok=True)
        if told["result"] is None:
            repair_failed(self.store, repair_id, error=f"the workflow ended as {told['state']} without a result")
            return
        self._finish(repair_id, RepairResult.model_validate(told["result"]))

    def _finish(self, repair_id: str, result: RepairResult) -> None:
        report = Path(result.report).parent if result.report else None
        metrics = _metrics(result.summary)
        if result.status == "offered" and result.candidate and report is not None:
            profile = Path(result.profile) if result.profile else None
            repair_offered(
                self.store, repair_id, candidate=Path(result.candidate), profile=profile, report=report, metrics=metrics
            )
        elif result.status == "refused":
            repair_refused(self.store, repair_id, reasons=result.reasons, report=report, metrics=metrics)
        else:
            repair_failed(self.store, repair_id, error="; ".join(result.reasons) or "the clinic produced no candidate")


def _metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """The few figures that an approver sees first, out of the report's summary; ASR is that of held-out flags."""
    states = summary.get("states", {})
    before, after = states.get("before", {}), states.get(summary.get("chosen"), {})
    pairs = {"asr": "flagged_asr", "candidate_asr": "candidate_asr", "accuracy": "accuracy", "false_triggers": "ftr"}
    told = {f"{name}_{when}": state.get(key) for name, key in pairs.items() for when, state in
            (("before", before), ("after", after))}  # fmt: skip
    told |= {
        "stages": summary.get("chosen"),
        "candidate_fired": summary.get("candidate_fired"),
        "candidate_flagged": summary.get("candidate_flagged"),
        "perplexity_ratio": after.get("perplexity_ratio"),
        "held_out_flags": before.get("n_flags"),
        "held_out_clean": before.get("n_clean"),
    }
    return {name: value for name, value in told.items() if value is not None}
