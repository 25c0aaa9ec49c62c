"""Cases over HTTP: look, exclude false alarms, close, ask for a repair."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from serving.approvals import repair_failed, request_repair
from serving.auth import Caller
from serving.cases import close_case, exclude_request, get_case, prompt_of
from serving.errors import Unavailable
from serving.routes.callers import gateway_of, needs
from serving.store.models import Case, FlaggedRequest
from serving.views import show_case, show_repair, show_request
from serving.words import decisive_words

log = logging.getLogger(__name__)
router = APIRouter()


class Comment(BaseModel):
    """Why."""

    model_config = ConfigDict(extra="forbid")

    comment: str = Field("", max_length=2000)


class Exclusion(BaseModel):
    """Whether a flagged request is kept from the clinic."""

    model_config = ConfigDict(extra="forbid")

    excluded: bool = True


class RepairRequest(BaseModel):
    """Options for the clinic, passed on to its worker."""

    model_config = ConfigDict(extra="forbid")

    options: dict[str, Any] = Field(default_factory=dict)


@router.get("/cases")
def list_cases(
    request: Request,
    state: str | None = None,
    alias: str | None = None,
    limit: int = 100,
    caller: Caller = Depends(needs("viewer")),
) -> dict[str, Any]:
    """Cases, the latest first."""
    wanted = select(Case).order_by(Case.updated_at.desc()).limit(max(1, min(limit, 1000)))
    wanted = wanted.where(Case.state == state) if state else wanted
    wanted = wanted.where(Case.alias == alias) if alias else wanted
    with gateway_of(request).store.read() as session:
        return {"cases": [show_case(case) for case in session.scalars(wanted)]}


@router.get("/cases/{case_id}")
def show(request: Request, case_id: str, limit: int = 100, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """One case and its latest requests, redacted for who asks."""
    gateway = gateway_of(request)
    wanted = select(FlaggedRequest).where(FlaggedRequest.case_id == case_id).order_by(FlaggedRequest.id.desc())
    with gateway.store.read() as session:
        case = get_case(session, case_id)
        rows = session.scalars(wanted.limit(max(1, min(limit, 1000))))
        return {**show_case(case), "requests": [show_request(row, caller, gateway.sealer) for row in rows]}


@router.post("/cases/{case_id}/close")
def close(
    request: Request, case_id: str, body: Comment | None = None, caller: Caller = Depends(needs("operator"))
) -> dict[str, Any]:
    """Close a case without a repair."""
    with gateway_of(request).store.write() as session:
        shown = show_case(close_case(session, case_id, caller.key_id, body.comment if body else ""))
    gateway_of(request).aliases.refresh()
    return shown


@router.post("/cases/{case_id}/requests/{request_id}/exclude")
def exclude(
    request: Request,
    case_id: str,
    request_id: str,
    body: Exclusion | None = None,
    caller: Caller = Depends(needs("operator")),
) -> dict[str, Any]:
    """Mark a flagged request as a false alarm, or take that back."""
    gateway = gateway_of(request)
    with gateway.store.write() as session:
        excluded = body.excluded if body else True
        row = exclude_request(session, case_id, request_id, caller.key_id, excluded)
        return show_request(row, caller, gateway.sealer)


@router.post("/cases/{case_id}/requests/{request_id}/words")
async def words(
    request: Request, case_id: str, request_id: str, caller: Caller = Depends(needs("operator"))
) -> dict[str, Any]:
    """The words that a flag hangs on: the engine is asked again, once without each word of the prompt."""
    gateway = gateway_of(request)

    def read() -> tuple[str, float, list[dict[str, Any]]]:
        with gateway.store.write() as session:
            case = get_case(session, case_id)
            messages = prompt_of(session, gateway.sealer, case_id, request_id, caller.key_id)
            return case.revision, gateway.aliases.route(case.alias).policy.alpha, messages

    revision, alpha, messages = await asyncio.to_thread(read)
    with gateway.in_flight.hold(revision, standby=True):
        timeout_s = gateway.settings.request_timeout_s
        return await decisive_words(gateway.engine, revision, messages, alpha, timeout_s)


@router.post("/cases/{case_id}/repair", status_code=202)
async def repair(
    request: Request, case_id: str, body: RepairRequest | None = None, caller: Caller = Depends(needs("operator"))
) -> dict[str, Any]:
    """Ask the clinic for a repaired candidate. Somebody else decides about it."""
    gateway = gateway_of(request)

    def ask() -> dict[str, Any]:
        options = body.options if body else {}
        with gateway.store.write() as session:
            return show_repair(request_repair(session, case_id, caller, options, gateway.settings.max_running_repairs))

    row = await asyncio.to_thread(ask)
    if gateway.enqueue is None:  # a worker that watches the database will find it
        return row
    try:
        await asyncio.to_thread(gateway.enqueue, row["id"])
    except Exception as error:
        log.exception("a repair could not be enqueued", extra={"repair": row["id"]})
        why = f"it could not be enqueued: {type(error).__name__}"
        await asyncio.to_thread(repair_failed, gateway.store, row["id"], error=why)
        raise Unavailable(f"repair {row['id']} failed: {why}.", code="no_clinic") from error
    return row
