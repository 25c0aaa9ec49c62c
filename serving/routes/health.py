"""Whether the gateway lives, whether it is ready to guard, and its metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving.restore import readiness
from serving.routes.callers import gateway_of

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers. Says nothing about the engine."""
    return {"status": "alive"}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 only while every live adapter is guarded; else 503 with the reasons."""
    gateway = gateway_of(request)
    reasons = await readiness(gateway.store, gateway.engine)
    return JSONResponse({"ready": not reasons, "reasons": reasons}, status_code=503 if reasons else 200)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    gateway = gateway_of(request)
    await gateway.observe_engine()
    await asyncio.to_thread(gateway.measure)
    return Response(gateway.metrics.render(), media_type=CONTENT_TYPE_LATEST)
