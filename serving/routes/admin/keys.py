"""API keys over HTTP. A token is in the answer to its making and nowhere else."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from serving.auth import Caller, Role, issue, revoke
from serving.routes.callers import gateway_of, needs
from serving.store.models import ApiKey
from serving.views import show_key

router = APIRouter()


class KeyRequest(BaseModel):
    """Who is to hold a key, and what it may do."""

    model_config = ConfigDict(extra="forbid")

    owner: str
    role: Role


@router.get("/keys")
def list_keys(request: Request, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """All keys, without their tokens."""
    with gateway_of(request).store.read() as session:
        return {"keys": [show_key(row) for row in session.scalars(select(ApiKey).order_by(ApiKey.created_at))]}


@router.post("/keys", status_code=201)
def make_key(request: Request, body: KeyRequest, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """Make a key. Operators may make client and viewer keys, approvers those and operator keys."""
    with gateway_of(request).store.write() as session:
        row, token = issue(session, body.owner, body.role, caller)
        return {**show_key(row), "key": token}


@router.delete("/keys/{key_id}")
def revoke_key(request: Request, key_id: str, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """Revoke a key: one's own, or one that the caller could have issued."""
    with gateway_of(request).store.write() as session:
        return show_key(revoke(session, key_id, caller))
