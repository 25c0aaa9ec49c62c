"""Rows of the database as the admin plane shows them: who may see what is decided here, once.

Viewers never see text. Operators see the text of focus spans (what the heads looked at), and prompts and answers only
where the operator of the machine chose raw storage. Paths, hashes of keys and evidence stay inside.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from serving.auth import Caller
from serving.evidence import EvidenceError, Sealer
from serving.store.models import Adapter, ApiKey, AuditRow, Case, FlaggedRequest, Repair, Revision


def show_revision(row: Revision) -> dict[str, Any]:
    """One revision."""
    return {
        "revision": row.revision,
        "alias": row.alias,
        "digest": row.digest,
        "base_digest": row.base_digest,
        "state": row.state,
        "source": row.source,
        "parent": row.parent,
        "profile": row.profile_digest,
        "smallest_alpha": row.smallest_alpha,
        "info": row.info,
        "created_by": row.created_by,
        "created_at": row.created_at,
    }


def show_adapter(session: Session, row: Adapter, policy: dict[str, Any], in_flight: int) -> dict[str, Any]:
    """One public name, its revisions, and its open case if there is one. ``policy`` is the one in force."""
    revisions = session.scalars(select(Revision).where(Revision.alias == row.alias).order_by(Revision.created_at))
    case = session.scalars(select(Case.id).where(Case.alias == row.alias, Case.state != "closed")).first()
    return {
        "alias": row.alias,
        "live_revision": row.live_revision,
        "previous_revision": row.previous_revision,
        "policy": policy,
        "policy_is_default": row.policy is None,
        "revisions": [show_revision(revision) for revision in revisions],
        "in_flight": in_flight,
        "open_case": case,
        "updated_at": row.updated_at,
    }


def show_case(row: Case) -> dict[str, Any]:
    """One case without its requests."""
    return {
        "id": row.id,
        "alias": row.alias,
        "revision": row.revision,
        "state": row.state,
        "opened_at": row.opened_at,
        "updated_at": row.updated_at,
        "closed_at": row.closed_at,
        "flags": row.flags,
        "kept": row.kept,
        "dropped": row.dropped,
        "heads": row.heads,
        "signals": row.signals,
    }


def show_request(row: FlaggedRequest, caller: Caller, sealer: Sealer) -> dict[str, Any]:
    """One flagged request, as far as ``caller`` may see it."""
    verdict = {**row.verdict, "spans": [{k: v for k, v in s.items() if k != "text"} for s in row.verdict["spans"]]}
    shown = {
        "request_id": row.request_id,
        "at": row.at,
        "action": row.action,
        "excluded": row.excluded,
        "evidence": row.evidence_mode,
        "verdict": verdict,
    }
    if not caller.may("operator") or row.evidence is None:
        return shown
    try:
        evidence = sealer.read(row.evidence, row.evidence_mode)
    except EvidenceError as error:
        return {**shown, "evidence_problem": str(error)}
    verdict["spans"] = [{**s, "text": t} for s, t in zip(verdict["spans"], evidence["spans"], strict=True)]
    if row.evidence_mode == "raw":
        shown |= {"messages": evidence["messages"], "response": evidence["response"]}
    return shown


def show_repair(row: Repair) -> dict[str, Any]:
    """One repair."""
    return {
        "id": row.id,
        "case": row.case_id,
        "alias": row.alias,
        "revision": row.revision,
        "state": row.state,
        "requested_by": row.requested_by,
        "requested_at": row.requested_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "decided_by": row.decided_by,
        "decided_at": row.decided_at,
        "comment": row.comment,
        "options": row.options,
        "candidate_digest": row.candidate_digest,
        "candidate_revision": row.candidate_revision,
        "has_report": row.report_path is not None,
        "metrics": row.metrics,
        "reasons": row.reasons,
    }


def show_key(row: ApiKey) -> dict[str, Any]:
    """One key, without anything that could stand for it."""
    return {
        "id": row.id,
        "owner": row.owner,
        "role": row.role,
        "issued_by": row.issued_by,
        "created_at": row.created_at,
        "revoked_at": row.revoked_at,
    }


def show_audit(row: AuditRow) -> dict[str, Any]:
    """One link of the audit chain."""
    return {
        "seq": row.seq,
        "at": row.at,
        "actor": row.actor,
        "action": row.action,
        "subject": row.subject,
        "detail": row.detail,
        "previous": row.previous,
        "hash": row.hash,
    }
