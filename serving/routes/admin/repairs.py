"""Repairs over HTTP: look, read the report, approve, reject."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse
from sqlalchemy import select

from serving.approvals import approve_repair, check_decider, check_unchanged, get_repair, reject_repair
from serving.auth import Caller
from serving.engine import EngineError
from serving.errors import NotFound, Unavailable
from serving.gateway import Gateway
from serving.routes.admin.cases import Comment
from serving.routes.callers import gateway_of, needs
from serving.store.models import Repair
from serving.views import show_repair

router = APIRouter()
_REPORT_TYPES = {".html": "text/html", ".png": "image/png", ".json": "application/json"}


@router.get("/repairs")
def list_repairs(
    request: Request,
    state: str | None = None,
    case: str | None = None,
    limit: int = 100,
    caller: Caller = Depends(needs("viewer")),
) -> dict[str, Any]:
    """Repairs, the latest first."""
    wanted = select(Repair).order_by(Repair.requested_at.desc()).limit(max(1, min(limit, 1000)))
    wanted = wanted.where(Repair.state == state) if state else wanted
    wanted = wanted.where(Repair.case_id == case) if case else wanted
    with gateway_of(request).store.read() as session:
        return {"repairs": [show_repair(row) for row in session.scalars(wanted)]}


@router.get("/repairs/{repair_id}")
def show(request: Request, repair_id: str, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """One repair."""
    with gateway_of(request).store.read() as session:
        return show_repair(get_repair(session, repair_id))


@router.get("/repairs/{repair_id}/report/{path:path}")
def report(request: Request, repair_id: str, path: str, caller: Caller = Depends(needs("viewer"))) -> FileResponse:
    """One file of a repair's report: HTML, PNG or JSON, and nothing outside its folder."""
    with gateway_of(request).store.read() as session:
        folder = get_repair(session, repair_id).report_path
    if folder is None:
        raise NotFound(f"repair {repair_id} has no report.")
    root = Path(folder).resolve()
    file = (root / (path or "index.html")).resolve()
    media_type = _REPORT_TYPES.get(file.suffix)
    if media_type is None or not file.is_relative_to(root) or not file.is_file():
        raise NotFound(f"the report of {repair_id} has no file {path!r}.")
    safe = {"content-security-policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"}
    return FileResponse(file, media_type=media_type, headers={**safe, "x-content-type-options": "nosniff"})


def _approve(gateway: Gateway, repair_id: str, caller: Caller, comment: str, status: dict[str, Any]) -> Repair:
    """Register the candidate as a revision and record the approval (blocking)."""
    with gateway.store.read() as session:
        repair = check_decider(session, repair_id, caller)
    folder = check_unchanged(repair)
    row, _ = gateway.registry.admit(repair.alias, folder, caller.key_id, source="repair", parent=repair.revision)
    if repair.profile_path:
        gateway.registry.attach_profile(row.revision, Path(repair.profile_path), status, caller.key_id)
    with gateway.store.write() as session:
        return approve_repair(session, repair_id, row.revision, caller, comment)


@router.post("/repairs/{repair_id}/approve")
async def approve(
    request: Request,
    repair_id: str,
    body: Comment | None = None,
    swap: bool = True,
    caller: Caller = Depends(needs("approver")),
) -> dict[str, Any]:
    """Approve a candidate and, unless ``swap=false``, make it the one that answers.

    The approval stands even when the swap fails; the error says why, and an operator can swap later.
    """
    gateway = gateway_of(request)
    try:
        status = await gateway.engine.status()
    except EngineError as error:
        raise Unavailable(f"the engine does not answer: {error}") from error
    comment = body.comment if body else ""
    repair = await asyncio.to_thread(_approve, gateway, repair_id, caller, comment, status)
    await asyncio.to_thread(gateway.aliases.refresh)
    await gateway.tell_decision(repair_id, "approved")
    done = None
    if swap:
        done = (await gateway.swapper.swap(repair.alias, str(repair.candidate_revision), caller.key_id)).to_dict()
    return {"repair": show_repair(repair), "swap": done}


@router.post("/repairs/{repair_id}/reject")
async def reject(
    request: Request, repair_id: str, body: Comment | None = None, caller: Caller = Depends(needs("approver"))
) -> dict[str, Any]:
    """Reject a candidate; its case is open again."""
    gateway = gateway_of(request)

    def decide() -> dict[str, Any]:
        with gateway.store.write() as session:
            return show_repair(reject_repair(session, repair_id, caller, body.comment if body else ""))

    shown = await asyncio.to_thread(decide)
    await gateway.tell_decision(repair_id, "rejected")
    return {"repair": shown}
