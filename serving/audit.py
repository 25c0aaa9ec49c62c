"""The audit chain: who did what, when, in an order that cannot be changed without being noticed.

Each row holds the SHA-256 of its own content together with the hash of the row before it. The database refuses UPDATE
and DELETE by trigger; whoever gets around that (a file copy, a superuser) breaks the chain, and ``verify`` names the
first broken row. Cutting rows off the end leaves a chain that is whole, so the last hash and count are also kept in a
file next to the state (``audit.head``): whoever edits both leaves no trace, so copy that file elsewhere now and then.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from serving.store.database import now
from serving.store.models import AuditRow

GENESIS = "0" * 64
HEAD_FILE = "audit.head"
# Any fixed number: PostgreSQL's advisory lock under which one transaction at a time extends the chain.
_CHAIN_LOCK = 7_401_523


@dataclass(frozen=True)
class AuditReport:
    """What verification found. ``broken_at`` is the sequence number of the first row that does not fit."""

    ok: bool
    rows: int
    head: str
    broken_at: int | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _link(seq: int, at: float, actor: str, action: str, subject: str, detail: dict[str, Any], previous: str) -> str:
    content = {
        "seq": seq,
        "at": repr(at),
        "actor": actor,
        "action": action,
        "subject": subject,
        "detail": detail,
        "previous": previous,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def append(session: Session, actor: str, action: str, subject: str, detail: dict[str, Any] | None = None) -> AuditRow:
    """Add one row inside the caller's transaction: the deed and its record are kept together or not at all.

    ``detail`` must be JSON-able and must hold no prompt text.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CHAIN_LOCK})
    last = session.scalars(select(AuditRow).order_by(AuditRow.seq.desc()).limit(1)).one_or_none()
    seq, previous = (last.seq + 1, last.hash) if last else (1, GENESIS)
    at = now()
    detail = json.loads(json.dumps(detail or {}, default=str))
    row = AuditRow(
        seq=seq, at=at, actor=actor, action=action, subject=subject, detail=detail, previous=previous,
        hash=_link(seq, at, actor, action, subject, detail, previous),
    )  # fmt: skip
    session.add(row)
    session.flush()
    state_dir = session.info.get("state_dir")
    if state_dir is not None:
        session.info["after_commit"].append(partial(_keep_head, state_dir, seq, row.hash))
    return row


def _check_row(row: AuditRow, seq: int, previous: str) -> str | None:
    if row.seq != seq:
        return f"row {seq} is missing"
    if row.previous != previous:
        return f"row {seq} does not follow the row before it"
    if row.hash != _link(row.seq, row.at, row.actor, row.action, row.subject, row.detail, row.previous):
        return f"row {seq} was changed after it was written"
    return None


def verify(session: Session, state_dir: Path | None = None) -> AuditReport:
    """Walk the whole chain, and compare its end with the head file in ``state_dir`` if there is one."""
    head = read_head(state_dir) if state_dir else None
    previous, seq = GENESIS, 0
    for row in session.scalars(select(AuditRow).order_by(AuditRow.seq)).yield_per(1000):
        if problem := _check_row(row, seq + 1, previous):
            return AuditReport(False, seq, previous, seq + 1, problem)
        seq, previous = row.seq, row.hash
        if head and head[0] == seq and head[1] != previous:
            return AuditReport(False, seq, previous, seq, f"row {seq} is not the one recorded in {HEAD_FILE}")
    if head and head[0] > seq:
        return AuditReport(
            False, seq, previous, seq + 1, f"rows {seq + 1} to {head[0]} were cut off: {HEAD_FILE} still counts them"
        )
    return AuditReport(True, seq, previous)


def read_head(state_dir: Path) -> tuple[int, str] | None:
    """(count, hash) of the last row this host wrote, or None if it wrote none yet."""
    try:
        count, value = (state_dir / HEAD_FILE).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return None
    return int(count), value


def _keep_head(state_dir: Path, seq: int, value: str) -> None:
    """Write the head file, unless it already counts further (two commits may arrive here in either order)."""
    known = read_head(state_dir)
    if known is not None and known[0] >= seq:
        return
    temporary = state_dir / f".{HEAD_FILE}.{os.getpid()}.{seq}"
    temporary.write_text(f"{seq} {value}\n", encoding="ascii")
    temporary.replace(state_dir / HEAD_FILE)
