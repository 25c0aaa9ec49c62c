"""`/guard/...`: what a gateway asks of every engine beside answers. Routes and refusals, the same for each engine.

Meant to be reached in process or over a private network; never to be exposed to clients.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse

from guard.errors import GuardError
from serving.engines.bodies import ProbeBody, ProfileBody, RevisionBody, parse
from serving.errors import BadRequest, NotFound, ServingError, from_guard

_MAX_DRAIN_S = 600.0


class Administered(Protocol):
    """An engine behind the routes. ``name`` is the base's; None stands for the base where a revision is named."""

    name: str

    async def status(self) -> dict[str, Any]:
        """The body of GET /guard/status."""

    async def load(self, revision: str, folder: Path, profile: Path | None) -> dict[str, Any]:
        """Serve a revision; its entry. Loading what is loaded already only sets the profile."""

    async def unload(self, revision: str, drain_s: float) -> None:
        """Stop serving a revision, waiting up to drain_s seconds for its requests."""

    async def set_profile(self, revision: str | None, path: Path | None) -> dict[str, Any]:
        """Give a revision another profile, or none; its entry."""

    async def attach(self, attached: bool) -> None:
        """Make the probe blind on purpose, or let it see again. Raises NotFound where that cannot be done."""


def install_refusals(app: FastAPI) -> None:
    """What the house raises becomes an OpenAI-shaped error."""

    @app.exception_handler(ServingError)
    async def refused(_: Request, error: ServingError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(GuardError)
    async def refused_by_guard(_: Request, error: GuardError) -> JSONResponse:
        refusal = from_guard(error)
        return JSONResponse(refusal.body(), refusal.status)


def administration(engine_of: Callable[[FastAPI], Administered]) -> APIRouter:
    """The routes, for an app whose engine is `engine_of(app)` once it has started."""
    router = APIRouter(prefix="/guard")

    @router.get("/status")
    async def status(request: Request) -> dict[str, Any]:
        return await engine_of(request.app).status()

    @router.post("/revisions")
    async def load(request: Request) -> dict[str, Any]:
        body = parse(await request.body(), RevisionBody)
        return await engine_of(request.app).load(body.revision, body.path, body.profile)

    @router.delete("/revisions/{revision}")
    async def unload(
        request: Request, revision: str, drain_s: Annotated[float, Query(ge=0, le=_MAX_DRAIN_S)] = 0.0
    ) -> dict[str, Any]:
        engine = engine_of(request.app)
        if revision == engine.name:
            raise BadRequest("the base cannot be unloaded.", param="revision")
        await engine.unload(revision, drain_s)
        return {"revision": revision, "unloaded": True}

    @router.put("/revisions/{revision}/profile")
    async def set_profile(request: Request, revision: str) -> dict[str, Any]:
        engine = engine_of(request.app)
        body = parse(await request.body(), ProfileBody)
        return await engine.set_profile(None if revision == engine.name else revision, body.profile)

    @router.put("/probe")
    async def attach(request: Request) -> dict[str, Any]:
        body = parse(await request.body(), ProbeBody)
        await engine_of(request.app).attach(body.attached)
        return {"attached": body.attached}

    return router


def no_drill() -> NotFound:
    """For an engine whose probe cannot be detached."""
    return NotFound("this engine's probe is part of it: it cannot be detached.")
