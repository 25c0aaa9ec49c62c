"""Cases: the flags of one revision, gathered until somebody decides what to do about them.

A flood of flags (an attacker, or a stale profile) must not fill a disk nor bury a person: one open case per revision,
limits on what is kept per case, per minute and altogether, and a count of what was dropped. Flags beyond a limit are
counted, never lost silently. Evidence is erased after its time to live.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from guard.verdict import Verdict
from serving.audit import append
from serving.errors import Conflict, NotFound
from serving.evidence import EvidenceError, Sealer
from serving.metrics import Metrics
from serving.settings import Settings
from serving.store.database import Store, new_id, now
from serving.store.models import Adapter, Case, FlaggedRequest, Repair

log = logging.getLogger(__name__)
GATEWAY = "gateway"
OPEN_STATES = ("open", "repairing")
_DAY_S = 86_400


@dataclass(frozen=True)
class Flag:
    """One flagged request, on its way into a case. ``action`` is what was done, ``would_…`` what would have been."""

    request_id: str
    alias: str
    revision: str
    key_id: str
    action: str
    verdict: Verdict
    messages: list[dict[str, Any]]
    response: str


class Cases:
    """Keeps flags. Blocking: call it from a thread."""

    def __init__(self, store: Store, sealer: Sealer, settings: Settings, metrics: Metrics) -> None:
        self._store, self._sealer, self._settings, self._metrics = store, sealer, settings, metrics
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()

    def keep(self, flag: Flag) -> None:
        """Store one flag. Never raises: what was decided about the answer stands even when it cannot be recorded."""
        try:
            with self._lock:
                result = self._keep(flag)
        except SQLAlchemyError as error:
            log.error(
                "a flag could not be stored", extra={"request_id": flag.request_id, "error": type(error).__name__}
            )
            result = "failed"
        self._metrics.quarantine_writes.labels(result).inc()

    def _keep(self, flag: Flag) -> str:
        stored, spans = _without_text(flag.verdict)
        evidence = {"messages": flag.messages, "response": flag.response, "spans": spans}
        sealed = self._sealer.write(evidence)
        size = len(sealed or b"")
        with self._store.write() as session:
            session.get(Adapter, flag.alias, with_for_update=True)  # one writer per alias opens the case
            case = self._open_case(session, flag)
            if case is None:
                return "dropped_cases"
            case.flags += 1
            case.updated_at = now()
            case.heads = _tally(case.heads, [f"{h.layer}.{h.head}" for h in flag.verdict.heads])
            case.signals = _tally(case.signals, [flag.verdict.signal or "unknown"])
            if refused := self._full(session, case, size):
                case.dropped += 1
                return refused
            case.kept += 1
            session.add(
                FlaggedRequest(
                    case_id=case.id,
                    request_id=flag.request_id,
                    at=now(),
                    key_id=flag.key_id,
                    action=flag.action,
                    verdict=stored,
                    evidence_mode=self._sealer.mode,
                    evidence=sealed,
                    evidence_bytes=size,
                    excluded=False,
                )
            )
        return "kept"

    def _open_case(self, session: Session, flag: Flag) -> Case | None:
        wanted = select(Case).where(Case.revision == flag.revision, Case.state.in_(OPEN_STATES))
        case = session.scalars(wanted).first()
        if case is not None:
            return case
        opened = session.scalar(select(func.count()).select_from(Case).where(Case.state.in_(OPEN_STATES)))
        if (opened or 0) >= self._settings.max_open_cases:
            return None
        case = Case(
            id=new_id("case"), alias=flag.alias, revision=flag.revision, state="open", opened_at=now(),
            updated_at=now(), flags=0, kept=0, dropped=0, heads={}, signals={},
        )  # fmt: skip
        session.add(case)
        append(session, GATEWAY, "case.opened", case.id, {"revision": flag.revision})
        return case

    def _full(self, session: Session, case: Case, size: int) -> str | None:
        limits = self._settings
        at = now()
        while self._recent and self._recent[0] < at - 60:
            self._recent.popleft()
        if case.kept >= limits.max_flags_per_case:
            return "dropped_case_full"
        if len(self._recent) >= limits.max_flags_per_minute:
            return "dropped_rate"
        held = session.scalar(select(func.coalesce(func.sum(FlaggedRequest.evidence_bytes), 0)))
        if int(held or 0) + size > limits.max_evidence_bytes:
            return "dropped_bytes"
        self._recent.append(at)
        return None

    def erase_expired(self) -> int:
        """Erase evidence older than its time to live; the verdicts stay. Returns how many were erased."""
        before = now() - self._settings.evidence_ttl_days * _DAY_S
        with self._store.write() as session:
            done = session.execute(
                update(FlaggedRequest)
                .where(FlaggedRequest.at < before, FlaggedRequest.evidence.is_not(None))
                .values(evidence=None, evidence_bytes=0, evidence_mode="erased")
            )
            erased = int(done.rowcount)  # type: ignore[attr-defined]
            if erased:
                append(session, GATEWAY, "evidence.erased", "evidence", {"requests": erased})
        return erased

    def measure(self) -> None:
        """Bring the quarantine gauges up to date."""
        with self._store.read() as session:
            by_state = (
                select(Case.state, func.count(FlaggedRequest.id))
                .join(FlaggedRequest, FlaggedRequest.case_id == Case.id)
                .group_by(Case.state)
            )
            counts = {row[0]: row[1] for row in session.execute(by_state)}
            stored = FlaggedRequest.evidence.is_not(None)
            size, oldest = session.execute(
                select(func.coalesce(func.sum(FlaggedRequest.evidence_bytes), 0), func.min(FlaggedRequest.at)).where(
                    stored
                )
            ).one()
        for state in (*OPEN_STATES, "closed"):
            self._metrics.quarantine.labels(state).set(counts.get(state, 0))
        self._metrics.quarantine_bytes.set(int(size))
        self._metrics.quarantine_age.set(max(0.0, now() - oldest) if oldest else 0.0)


def _without_text(verdict: Verdict) -> tuple[dict[str, Any], list[str]]:
    """A verdict as it may be stored in clear, and the span texts that may not."""
    told = verdict.to_dict()
    return told | {"spans": [{**s, "text": ""} for s in told["spans"]]}, [s["text"] for s in told["spans"]]


def _tally(counts: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return dict((Counter(counts) + Counter(names)).most_common(256))


def get_case(session: Session, case_id: str) -> Case:
    """A case by id, or NotFound."""
    case = session.get(Case, case_id)
    if case is None:
        raise NotFound(f"there is no case {case_id!r}.")
    return case


def get_request(session: Session, case_id: str, request_id: str) -> FlaggedRequest:
    """A flagged request of a case, or NotFound."""
    wanted = select(FlaggedRequest).where(FlaggedRequest.case_id == case_id, FlaggedRequest.request_id == request_id)
    flagged = session.scalars(wanted).one_or_none()
    if flagged is None:
        raise NotFound(f"case {case_id!r} has no request {request_id!r}.")
    return flagged


def prompt_of(session: Session, sealer: Sealer, case_id: str, request_id: str, actor: str) -> list[dict[str, Any]]:
    """The messages of a flagged request, for an operator's question about it; that it was asked is audited. Raises
    NotFound, or Conflict when its evidence is not there or cannot be read."""
    flagged = get_request(session, case_id, request_id)
    if flagged.evidence is None:
        raise Conflict(
            f"of request {request_id!r} no evidence is kept ({flagged.evidence_mode}): nothing can be asked."
        )
    try:
        evidence = sealer.read(flagged.evidence, flagged.evidence_mode)
    except EvidenceError as error:
        raise Conflict(f"request {request_id!r}: {error}") from error
    append(session, actor, "case.words_asked", case_id, {"request": request_id})
    messages: list[dict[str, Any]] = evidence["messages"]
    return messages


def is_suspect(session: Session, revision: str) -> bool:
    """Whether a revision is not one to fall back on: its case is open, or a repair of it was approved."""
    case = select(Case.id).where(Case.revision == revision, Case.state.in_(OPEN_STATES))
    repaired = select(Repair.id).where(Repair.revision == revision, Repair.state == "approved")
    return session.scalars(case).first() is not None or session.scalars(repaired).first() is not None


def close_case(session: Session, case_id: str, actor: str, comment: str = "") -> Case:
    """Close an open case; the next flag of its revision opens a new one. Raises Conflict while it is being repaired."""
    case = get_case(session, case_id)
    if case.state != "open":
        raise Conflict(f"case {case_id} is {case.state}: only an open case can be closed.")
    case.state, case.closed_at = "closed", now()
    append(session, actor, "case.closed", case_id, {"comment": comment})
    return case


def exclude_request(session: Session, case_id: str, request_id: str, actor: str, excluded: bool) -> FlaggedRequest:
    """Mark a flagged request as a false alarm (it is not given to the clinic), or take that back."""
    flagged = get_request(session, case_id, request_id)
    flagged.excluded = excluded
    append(
        session,
        actor,
        "case.request_excluded" if excluded else "case.request_included",
        case_id,
        {"request": request_id},
    )
    return flagged


def export_flags(store: Store, sealer: Sealer, case_id: str, path: Path) -> int:
    """Write the evidence of a case as JSON lines for the clinic (mode 600); returns how many. For the worker only.

    Each line: {"request_id", "messages", "response", "verdict", "revision"}. Excluded and erased requests are left out.
    """
    count = 0
    part = path.with_name(path.name + ".part")
    with store.read() as session, open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        case = get_case(session, case_id)
        wanted = select(FlaggedRequest).where(
            FlaggedRequest.case_id == case_id,
            FlaggedRequest.evidence.is_not(None),
            FlaggedRequest.excluded.is_(False),
        )
        for flagged in session.scalars(wanted.order_by(FlaggedRequest.id)).yield_per(100):
            evidence = sealer.read(flagged.evidence or b"", flagged.evidence_mode)
            spans = [{**s, "text": t} for s, t in zip(flagged.verdict["spans"], evidence["spans"], strict=True)]
            line = {
                "request_id": flagged.request_id,
                "messages": evidence["messages"],
                "response": evidence["response"],
                "verdict": {**flagged.verdict, "spans": spans},
                "revision": case.revision,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    part.replace(path)
    return count
