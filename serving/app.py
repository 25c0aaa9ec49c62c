"""The application: the gateway with its routes around it, started and stopped by the server's lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI

from serving.engine import Engine
from serving.gateway import Gateway
from serving.limits import BodyLimit
from serving.routes import admin, health, openai
from serving.routes.failures import install
from serving.settings import Settings


def create_gateway(
    settings: Settings,
    engine: Engine,
    enqueue: Callable[[str], Any] | None = None,
    decided: Callable[[str, str], Any] | None = None,
) -> FastAPI:
    """The application. ``app.state.gateway`` is its Gateway; everything starts and stops with the lifespan."""
    gateway = Gateway(settings, engine, enqueue, decided)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        upkeep = asyncio.create_task(gateway.keep_up())
        try:
            yield
        finally:
            upkeep.cancel()
            with suppress(asyncio.CancelledError):
                await upkeep
            await gateway.close()

    # No interactive documentation: it would list the admin plane to anybody and load scripts from elsewhere.
    app = FastAPI(title="headguard", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    app.include_router(openai.router)
    app.include_router(health.router)
    app.include_router(admin.router)
    install(app)

    def limit_of(path: str) -> int:
        uploads = path.startswith("/admin/") and path.endswith(("/revisions", "/profile"))
        return settings.max_upload_bytes if uploads else settings.max_body_bytes

    app.add_middleware(BodyLimit, limit_of=limit_of)
    return app
