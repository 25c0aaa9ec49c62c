"""Adapters over HTTP: upload, profile, policy, swap, rollback, retire."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import select
from starlette.datastructures import UploadFile

from guard.identity import check_name
from serving.adapters import check_file_name, get_adapter, get_revision
from serving.auth import Caller
from serving.engine import EngineError
from serving.errors import BadRequest, Unavailable
from serving.gateway import Gateway
from serving.policy import Policy
from serving.restore import loaded, readiness
from serving.routes.callers import gateway_of, needs
from serving.store.models import Adapter
from serving.views import show_adapter, show_revision

router = APIRouter()
# adapter_config.json, the weights, and a few files that are ignored.
_MAX_FILES = 16


class SwapRequest(BaseModel):
    """Which revision is to answer from now on."""

    model_config = ConfigDict(extra="forbid")

    revision: str
    allow_uncalibrated: bool = False


def _show(gateway: Gateway, alias: str) -> dict[str, Any]:
    with gateway.store.read() as session:
        row = get_adapter(session, alias)
        policy = Policy.model_validate(row.policy) if row.policy else gateway.settings.policy
        in_flight = gateway.in_flight.count(row.live_revision) if row.live_revision else 0
        return show_adapter(session, row, policy.model_dump(), in_flight)


@router.get("/status")
async def status(request: Request, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """The engine's own status, what is served, and why the gateway is not ready if it is not."""
    gateway = gateway_of(request)
    try:
        engine: dict[str, Any] = await gateway.engine.status()
    except EngineError as error:
        engine = {"error": str(error)}
    routes = [{"alias": r.alias, "revision": r.revision} for r in gateway.aliases.routes()]
    reasons = await readiness(gateway.store, gateway.engine)
    return {"engine": engine, "routes": routes, "in_flight": gateway.in_flight.requests, "not_ready": reasons}


@router.get("/adapters")
def list_adapters(request: Request, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """Every public name."""
    gateway = gateway_of(request)
    with gateway.store.read() as session:
        names = list(session.scalars(select(Adapter.alias).order_by(Adapter.alias)))
    return {"adapters": [_show(gateway, name) for name in names]}


@router.get("/adapters/{alias}")
def show(request: Request, alias: str, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """One public name."""
    return _show(gateway_of(request), alias)


@router.post("/adapters/{alias}/revisions", status_code=201)
async def upload(
    request: Request, response: Response, alias: str, caller: Caller = Depends(needs("operator"))
) -> dict[str, Any]:
    """Upload the files of a PEFT adapter (multipart field ``files``); 200 when exactly this revision is known."""
    check_name(alias)
    registry = gateway_of(request).registry
    folder = Path(tempfile.mkdtemp(dir=registry.incoming))
    try:
        async with request.form(max_files=_MAX_FILES, max_fields=4) as form:
            files = [item for item in form.getlist("files") if isinstance(item, UploadFile)]
            if not files:
                raise BadRequest("send the adapter's files as multipart parts named 'files'.", param="files")
            for file in files:
                if check_file_name(file.filename or ""):
                    await asyncio.to_thread(_write, file, folder / str(file.filename))
        row, new = await asyncio.to_thread(registry.admit, alias, folder, caller.key_id)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    response.status_code = 201 if new else 200
    return show_revision(row)


def _write(file: UploadFile, path: Path) -> None:
    with open(path, "xb") as out:
        shutil.copyfileobj(file.file, out)


@router.get("/revisions/{revision}")
def revision(request: Request, revision: str, caller: Caller = Depends(needs("viewer"))) -> dict[str, Any]:
    """One revision."""
    with gateway_of(request).store.read() as session:
        return show_revision(get_revision(session, revision))


@router.put("/revisions/{revision}/profile")
async def put_profile(request: Request, revision: str, caller: Caller = Depends(needs("operator"))) -> dict[str, Any]:
    """Attach a calibration profile (the file as the raw body) to a revision, or to the base by its name."""
    gateway = gateway_of(request)
    with tempfile.NamedTemporaryFile(dir=gateway.registry.incoming, suffix=".safetensors") as file:
        async for piece in request.stream():
            file.write(piece)
        file.flush()
        try:
            state = await gateway.engine.status()
            row = await asyncio.to_thread(
                gateway.registry.attach_profile, revision, Path(file.name), state, caller.key_id
            )
            if revision in loaded(state):
                await gateway.engine.set_profile(revision, row.profile_path)
        except EngineError as error:
            raise Unavailable(f"the engine could not take the profile: {error}") from error
    return show_revision(row)


@router.post("/revisions/{revision}/retire")
async def retire(request: Request, revision: str, caller: Caller = Depends(needs("operator"))) -> dict[str, Any]:
    """Take a revision out of use for good."""
    return show_revision(await gateway_of(request).swapper.retire(revision, caller.key_id))


@router.put("/adapters/{alias}/policy")
def put_policy(
    request: Request, alias: str, body: dict[str, Any], caller: Caller = Depends(needs("operator"))
) -> dict[str, Any]:
    """Set the policy of a public name. Fields that are left out get their defaults, not their former values."""
    gateway = gateway_of(request)
    try:
        policy = Policy.model_validate(body)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'policy'}: {e['msg']}" for e in error.errors())
        raise BadRequest(f"this is not a policy: {told}", code="invalid_policy") from None
    gateway.registry.set_policy(alias, policy, caller.key_id)
    gateway.aliases.refresh()
    return _show(gateway, alias)


@router.post("/adapters/{alias}/swap")
async def swap(
    request: Request, alias: str, body: SwapRequest, caller: Caller = Depends(needs("operator"))
) -> dict[str, Any]:
    """Make a revision the one that answers, while requests keep flowing."""
    swapper = gateway_of(request).swapper
    return (await swapper.swap(alias, body.revision, caller.key_id, body.allow_uncalibrated)).to_dict()


@router.post("/adapters/{alias}/rollback")
async def rollback(request: Request, alias: str, caller: Caller = Depends(needs("operator"))) -> dict[str, Any]:
    """Swap back to the previous revision."""
    return (await gateway_of(request).swapper.rollback(alias, caller.key_id)).to_dict()
