"""The gateway's tables. Times are seconds since 1970 (float, UTC), ids are short random names, JSON columns hold facts.

Nothing here decides anything: who may move a row from one state to another is the affair of the module named after it
(cases.py, swap.py, approvals.py). Prompt text appears in one column only, ``flagged_requests.evidence``, and that is
sealed unless the operator asked for raw storage.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Float, ForeignKey, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Root of the tables."""

    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012


class ApiKey(Base):
    """One key: its role and the hash of its token (the token itself is shown once and not kept)."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    issued_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[float] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)


class Adapter(Base):
    """A public model name (alias) and the revisions behind it. The base has a row too. (No foreign
    keys here: revisions point at adapters, and a cycle of them cannot be created in SQLite.)"""

    __tablename__ = "adapters"
    alias: Mapped[str] = mapped_column(String(64), primary_key=True)
    live_revision: Mapped[str | None] = mapped_column(String(96))
    previous_revision: Mapped[str | None] = mapped_column(String(96))
    policy: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[float] = mapped_column(Float)
    updated_at: Mapped[float] = mapped_column(Float)


class Revision(Base):
    """One immutable set of weights. States: uploaded → calibrated → live → standby → calibrated, or retired."""

    __tablename__ = "revisions"
    revision: Mapped[str] = mapped_column(String(96), primary_key=True)
    alias: Mapped[str] = mapped_column(ForeignKey("adapters.alias"), index=True)
    digest: Mapped[str] = mapped_column(String(64))
    base_digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    source: Mapped[str] = mapped_column(String(16))
    parent: Mapped[str | None] = mapped_column(ForeignKey("revisions.revision"))
    path: Mapped[str | None] = mapped_column(Text)
    profile_path: Mapped[str | None] = mapped_column(Text)
    profile_digest: Mapped[str | None] = mapped_column(String(64))
    profile_at: Mapped[float | None] = mapped_column(Float)
    smallest_alpha: Mapped[float | None] = mapped_column(Float)
    info: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_by: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[float] = mapped_column(Float)


class Case(Base):
    """The flags of one revision, gathered. ``heads`` tallies suspicious heads as {"layer.head": count}."""

    __tablename__ = "cases"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    alias: Mapped[str] = mapped_column(ForeignKey("adapters.alias"))
    revision: Mapped[str] = mapped_column(ForeignKey("revisions.revision"), index=True)
    state: Mapped[str] = mapped_column(String(16))
    opened_at: Mapped[float] = mapped_column(Float)
    updated_at: Mapped[float] = mapped_column(Float)
    closed_at: Mapped[float | None] = mapped_column(Float)
    flags: Mapped[int] = mapped_column(Integer, default=0)
    kept: Mapped[int] = mapped_column(Integer, default=0)
    dropped: Mapped[int] = mapped_column(Integer, default=0)
    heads: Mapped[dict[str, Any]] = mapped_column(JSON)
    signals: Mapped[dict[str, Any]] = mapped_column(JSON)


class FlaggedRequest(Base):
    """One flagged request of a case: the verdict without text, and the evidence as ``evidence_mode`` says."""

    __tablename__ = "flagged_requests"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    case_id: Mapped[str] = mapped_column(ForeignKey("cases.id"), index=True)
    request_id: Mapped[str] = mapped_column(String(64), unique=True)
    at: Mapped[float] = mapped_column(Float, index=True)
    key_id: Mapped[str | None] = mapped_column(String(32))
    action: Mapped[str] = mapped_column(String(16))
    verdict: Mapped[dict[str, Any]] = mapped_column(JSON)
    evidence_mode: Mapped[str] = mapped_column(String(8))
    evidence: Mapped[bytes | None] = mapped_column(LargeBinary)
    evidence_bytes: Mapped[int] = mapped_column(Integer, default=0)
    excluded: Mapped[bool] = mapped_column(default=False)


class Repair(Base):
    """A repair of a case's revision: requested → running → offered (→ approved | rejected) | refused | failed."""

    __tablename__ = "repairs"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    case_id: Mapped[str] = mapped_column(ForeignKey("cases.id"), index=True)
    alias: Mapped[str] = mapped_column(ForeignKey("adapters.alias"))
    revision: Mapped[str] = mapped_column(ForeignKey("revisions.revision"))
    state: Mapped[str] = mapped_column(String(16), index=True)
    requested_by: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    requested_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float)
    decided_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    decided_at: Mapped[float | None] = mapped_column(Float)
    comment: Mapped[str | None] = mapped_column(Text)
    options: Mapped[dict[str, Any]] = mapped_column(JSON)
    candidate_path: Mapped[str | None] = mapped_column(Text)
    candidate_digest: Mapped[str | None] = mapped_column(String(64))
    candidate_revision: Mapped[str | None] = mapped_column(ForeignKey("revisions.revision"))
    profile_path: Mapped[str | None] = mapped_column(Text)
    profile_sha256: Mapped[str | None] = mapped_column(String(64))
    report_path: Mapped[str | None] = mapped_column(Text)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    reasons: Mapped[list[Any]] = mapped_column(JSON)


class AuditRow(Base):
    """One link of the audit chain. Triggers of the database refuse UPDATE and DELETE."""

    __tablename__ = "audit"
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[float] = mapped_column(Float)
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(160))
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)
    previous: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


Index("ix_cases_open", Case.revision, Case.state)
