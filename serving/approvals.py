"""Repairs and who decides about them: asked for by one person, made by the clinic, approved by another.

    requested ─► running ─► offered ─► approved | rejected
                    └─────► refused (the gate said no: nobody can approve it) | failed

Functions named ``repair_…`` are the worker's side; it reports here and never touches an alias. A candidate becomes a
revision only by approval, and its files must still be the ones that were evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from guard.identity import adapter_digest, file_digest
from serving.adapters import BASE, get_adapter, get_revision
from serving.audit import append
from serving.auth import Caller, related
from serving.cases import OPEN_STATES, get_case, is_suspect
from serving.errors import Conflict, Forbidden, NotFound
from serving.store.database import Store, new_id, now
from serving.store.models import FlaggedRequest, Repair

WORKER = "worker"
ACTIVE = ("requested", "running", "offered")


@dataclass(frozen=True)
class RepairJob:
    """What the worker needs to know. ``previous_path`` is the last good revision's folder, or None for the base;
    ``profile_path`` the suspicious revision's own profile."""

    id: str
    case_id: str
    alias: str
    revision: str
    adapter_path: Path
    previous_path: Path | None
    policy: dict[str, Any] | None
    options: dict[str, Any]
    profile_path: Path | None = None


def get_repair(session: Session, repair_id: str, lock: bool = False) -> Repair:
    """A repair by id, or NotFound."""
    repair = session.get(Repair, repair_id, with_for_update=lock or None)
    if repair is None:
        raise NotFound(f"there is no repair {repair_id!r}.")
    return repair


def request_repair(session: Session, case_id: str, caller: Caller, options: dict[str, Any], most: int) -> Repair:
    """Ask for a repair of a case. Raises Conflict when one is under way, when there is nothing to learn from, or when
    ``most`` repairs are requested or running already."""
    case = get_case(session, case_id)
    get_adapter(session, case.alias, lock=True)
    if case.state not in OPEN_STATES:
        raise Conflict(f"case {case_id} is {case.state}.")
    if get_revision(session, case.revision).source == BASE:
        raise Conflict("the base model itself cannot be repaired yet: only adapters can.", code="base_not_repairable")
    active = session.scalars(select(Repair).where(Repair.case_id == case_id, Repair.state.in_(ACTIVE))).first()
    if active is not None:
        raise Conflict(f"repair {active.id} of this case is {active.state}.", code="repair_in_progress")
    running = select(func.count()).select_from(Repair).where(Repair.state.in_(("requested", "running")))
    if (session.scalar(running) or 0) >= most:
        raise Conflict(f"{most} repairs are requested or running already; wait for one.", code="too_many_repairs")
    usable = select(func.count()).select_from(FlaggedRequest).where(
        FlaggedRequest.case_id == case_id, FlaggedRequest.evidence.is_not(None), FlaggedRequest.excluded.is_(False)
    )  # fmt: skip
    if not session.scalar(usable):
        raise Conflict(f"case {case_id} holds no evidence to repair from (evidence mode none, erased, or excluded).")
    repair = Repair(
        id=new_id("repair"), case_id=case_id, alias=case.alias, revision=case.revision, state="requested",
        requested_by=caller.key_id, requested_at=now(), options=options, metrics={}, reasons=[],
    )  # fmt: skip
    case.state = "repairing"
    session.add(repair)
    append(session, caller.key_id, "repair.requested", repair.id, {"case": case_id, "revision": case.revision})
    return repair


# ---- the worker's side ----


def repair_job(store: Store, repair_id: str) -> RepairJob:
    """The facts of a repair."""
    with store.read() as session:
        repair = get_repair(session, repair_id)
        row, adapter = get_revision(session, repair.revision), get_adapter(session, repair.alias)
        before = adapter.previous_revision if adapter.live_revision == row.revision else row.parent
        good = get_revision(session, before) if before and not is_suspect(session, before) else None
        assert row.path is not None
        return RepairJob(
            repair.id, repair.case_id, repair.alias, repair.revision, Path(row.path),
            Path(good.path) if good and good.path else None, adapter.policy, repair.options,
            Path(row.profile_path) if row.profile_path else None,
        )  # fmt: skip


def repair_started(store: Store, repair_id: str) -> None:
    """The worker begins (or begins again after a crash)."""
    with store.write() as session:
        repair = get_repair(session, repair_id, lock=True)
        if repair.state == "requested":
            repair.state, repair.started_at = "running", now()
            append(session, WORKER, "repair.started", repair_id)
        elif repair.state != "running":
            raise Conflict(f"repair {repair_id} is {repair.state}, it cannot start.")


def repair_offered(
    store: Store, repair_id: str, *, candidate: Path, profile: Path | None, report: Path, metrics: dict[str, Any]
) -> None:
    """A candidate passed the gate and waits for a person. Its digests are taken now: only these files can be approved.

    ``metrics`` may hold asr_before, asr_after, accuracy_before, accuracy_after (ratios); they feed the gauges.
    """
    with store.write() as session:
        repair = _finish(session, repair_id, "offered", metrics, report)
        if repair is None:
            return
        repair.candidate_path, repair.candidate_digest = str(candidate), adapter_digest(candidate)
        repair.profile_path = str(profile) if profile else None
        repair.profile_sha256 = file_digest(profile) if profile else None
        append(session, WORKER, "repair.offered", repair_id, {"candidate": repair.candidate_digest})


def repair_refused(
    store: Store,
    repair_id: str,
    *,
    reasons: list[str],
    report: Path | None = None,
    metrics: dict[str, Any] | None = None,
) -> None:
    """The gate said no, for ``reasons``. The case is open again."""
    with store.write() as session:
        repair = _finish(session, repair_id, "refused", metrics or {}, report)
        if repair is not None:
            repair.reasons = list(reasons)
            _reopen(session, repair)
            append(session, WORKER, "repair.refused", repair_id, {"reasons": repair.reasons})


def repair_failed(store: Store, repair_id: str, *, error: str) -> None:
    """The work broke (``error`` names how, without prompt text). The case is open again."""
    with store.write() as session:
        repair = _finish(session, repair_id, "failed", {}, None)
        if repair is not None:
            repair.reasons = [error]
            _reopen(session, repair)
            append(session, WORKER, "repair.failed", repair_id, {"error": error})


def _finish(
    session: Session, repair_id: str, state: str, metrics: dict[str, Any], report: Path | None
) -> Repair | None:
    """Move a repair out of running; None when it is there already (a resumed worker reports twice)."""
    repair = get_repair(session, repair_id, lock=True)
    if repair.state == state:
        return None
    if repair.state not in ("requested", "running"):
        raise Conflict(f"repair {repair_id} is {repair.state}, it cannot become {state}.")
    repair.state, repair.finished_at, repair.metrics = state, now(), metrics
    repair.report_path = str(report) if report else None
    return repair


def _reopen(session: Session, repair: Repair) -> None:
    case = get_case(session, repair.case_id)
    if case.state == "repairing":
        case.state = "open"


# ---- the approver's side ----


def check_decider(session: Session, repair_id: str, caller: Caller) -> Repair:
    """The offered repair, if ``caller`` may decide about it.

    Raises Conflict when it is not offered (a refused candidate can never be approved), Forbidden when the caller asked
    for it, shares an owner with who asked, or one of the two keys issued the other.
    """
    repair = get_repair(session, repair_id)
    if repair.state != "offered":
        why = f" The gate refused it: {'; '.join(map(str, repair.reasons))}" if repair.state == "refused" else ""
        raise Conflict(
            f"repair {repair_id} is {repair.state}; only an offered one can be decided.{why}", code="not_offered"
        )
    if why_not := related(session, repair.requested_by, caller.key_id):
        raise Forbidden(f"a repair is decided by somebody else than who asked for it: {why_not}.", code="same_person")
    return repair


def check_unchanged(repair: Repair) -> Path:
    """The candidate's folder, if its files (and its profile) are still those that passed the gate; else Conflict."""
    folder = Path(repair.candidate_path or "")
    if adapter_digest(folder) != repair.candidate_digest:
        raise Conflict(f"the candidate of {repair.id} was changed after it passed the gate.", code="candidate_changed")
    if repair.profile_path and file_digest(repair.profile_path) != repair.profile_sha256:
        raise Conflict(f"the profile of {repair.id} was changed after it passed the gate.", code="candidate_changed")
    return folder


def approve_repair(session: Session, repair_id: str, revision: str, caller: Caller, comment: str) -> Repair:
    """Record the approval of the candidate that was admitted as ``revision``; the case is closed."""
    repair = check_decider(session, repair_id, caller)
    repair.state, repair.decided_by, repair.decided_at = "approved", caller.key_id, now()
    repair.comment, repair.candidate_revision = comment, revision
    case = get_case(session, repair.case_id)
    case.state, case.closed_at = "closed", now()
    append(session, caller.key_id, "repair.approved", repair_id, {"revision": revision, "comment": comment})
    return repair


def reject_repair(session: Session, repair_id: str, caller: Caller, comment: str) -> Repair:
    """Record the rejection; the case is open again."""
    repair = check_decider(session, repair_id, caller)
    repair.state, repair.decided_by, repair.decided_at = "rejected", caller.key_id, now()
    repair.comment = comment
    _reopen(session, repair)
    append(session, caller.key_id, "repair.rejected", repair_id, {"comment": comment})
    return repair
