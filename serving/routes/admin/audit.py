"""The audit chain over HTTP: read it, verify it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from sqlalchemy import select

from serving.audit import verify
from serving.auth import Caller
from serving.routes.callers import gateway_of, needs
from serving.store.models import AuditRow
from serving.views import show_audit

router = APIRouter()


@router.get("/audit")
def rows(
    request: Request, after: int = 0, limit: int = 200, caller: Caller = Depends(needs("viewer"))
) -> dict[str, Any]:
    """Links of the chain after sequence number ``after``, in order."""
    wanted = select(AuditRow).where(AuditRow.seq > after).order_by(AuditRow.seq).limit(max(1, min(limit, 1000)))
    with gateway_of(request).store.read() as session:
        return {"rows": [show_audit(row) for row in session.scalars(wanted)]}


@router.get("/audit/verify")
def check(request: Request, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """Whether the chain is whole, and if not where it breaks."""
    gateway = gateway_of(request)
    with gateway.store.read() as session:
        return verify(session, gateway.settings.state_dir).to_dict()
