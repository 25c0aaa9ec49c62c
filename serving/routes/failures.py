"""Every way a request can fail, in the one shape that OpenAI clients know."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from guard.errors import GuardError
from serving.engine import EngineError
from serving.errors import BadRequest, ServingError, from_guard

log = logging.getLogger(__name__)


def _answer(status: int, body: dict[str, Any]) -> JSONResponse:
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body, status_code=status, headers=headers)


async def _serving(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServingError)
    return _answer(error.status, error.body())


async def _guard(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GuardError)
    return await _serving(request, from_guard(error))


async def _engine(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineError)
    return _answer(error.status, error.body)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    told = ServingError(
        f"{request.method} {request.url.path}: {error.detail}", code=str(error.detail).lower().replace(" ", "_")
    )
    return _answer(error.status_code, told.body())


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or e['loc'][0]}: {e['msg']}" for e in error.errors())
    return await _serving(request, BadRequest(f"the request is not valid: {told}"))


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    log.error("unforeseen failure", exc_info=error, extra={"path": request.url.path})
    told = ServingError("the gateway failed in a way nobody foresaw; its log has the details.", code="internal_error")
    told.type = "server_error"
    return _answer(500, told.body())


def install(app: FastAPI) -> None:
    """Make ``app`` answer every failure in this shape."""
    app.add_exception_handler(ServingError, _serving)
    app.add_exception_handler(GuardError, _guard)
    app.add_exception_handler(EngineError, _engine)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(Exception, _unforeseen)
