"""The OpenAI API: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``.

What a client sends is checked only as far as the guard depends on it, then passed to the engine as it is. Nothing a
client sends can reach the guard: a body or header that tries to is refused, so that nobody believes it worked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Literal, TypeVar
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.answer import Ask, RevisionLost, Streamed
from serving.auth import Caller
from serving.errors import BadRequest, ServingError
from serving.gateway import Gateway
from serving.routes.callers import gateway_of, needs

router = APIRouter(prefix="/v1")
T = TypeVar("T")
_OURS = ("headguard", "guard")
# nginx's number for a client that hung up; nobody is there to read it.
_CLIENT_GONE = 499
_CANCEL_AGAIN_S = 1.0


class Busy(ServingError):
    """More requests at once than the gateway is set to answer."""

    status, type, code = 429, "rate_limit_error", "too_many_requests"


class ClientGone(Exception):
    """The client closed the connection before it had an answer."""


class GuardedStream(Response):
    """Sends a stream whose headers are known, and stops the engine's work when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, streamed: Streamed) -> None:
        super().__init__(None, headers={**streamed.headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = streamed.chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _unless_gone(receive, write())
        except (ClientGone, OSError):
            pass
        finally:
            await self._chunks.aclose()


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; when the client hangs up first, ``work`` is cancelled and ClientGone raised."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            while not task.done():  # a library may swallow one cancellation; the engine's work must end all the same
                task.cancel()
                await asyncio.wait({task}, timeout=_CANCEL_AGAIN_S)
            if not task.cancelled():
                task.exception()  # seen: it was raised above, or nobody is left to hear it


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


async def _read(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body(), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="malformed_json") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {type(body).__name__}, expected a JSON object.", code="malformed_json")
    return body


def _refuse_guard_fields(request: Request, body: dict[str, Any]) -> None:
    """Raise BadRequest when a client speaks to the guard: the policy of a model is its operator's alone."""
    xargs = body.get("vllm_xargs")
    names = [*body, *(xargs if isinstance(xargs, dict) else ())]
    tries = [name for name in names if name.lower().replace("-", "_").split("_")[0] in _OURS]
    tries += [name for name in request.headers if name.startswith(("x-headguard", "x-guard"))]
    if tries:
        raise BadRequest(
            f"{', '.join(sorted(tries))}: clients cannot set anything of the guard. Leave it out.",
            code="guard_field_refused",
            param=tries[0],
        )


def _check(kind: Literal["chat", "text"], body: dict[str, Any]) -> None:
    """Raise BadRequest for what the guard could not treat rightly; the rest is the engine's to judge."""
    if not isinstance(body.get("model"), str):
        raise BadRequest("'model' must name a model.", param="model", code="missing_model")
    if kind == "chat":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise BadRequest("'messages' must be a list of at least one message object.", param="messages")
    else:
        prompt = body.get("prompt")
        ids = isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
        if not isinstance(prompt, str) and not ids:
            raise BadRequest(
                "'prompt' must be one string or one list of token ids: send several prompts one by one.", param="prompt"
            )
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise BadRequest(
                f"{name} must be 1: each answer has its own verdict, so ask for them one by one.", param=name
            )
    if type(body.get("stream")) not in (bool, type(None)):
        raise BadRequest("'stream' must be true or false.", param="stream")
    if not isinstance(body.get("stream_options"), dict | None):
        raise BadRequest("'stream_options' must be an object.", param="stream_options")


async def _answer(request: Request, kind: Literal["chat", "text"], caller: Caller) -> Response:
    gateway = gateway_of(request)
    try:
        body = await _read(request)
    except ClientDisconnect:
        return Response(status_code=_CLIENT_GONE)
    _refuse_guard_fields(request, body)
    _check(kind, body)
    if gateway.in_flight.requests >= gateway.settings.max_concurrent_requests:
        raise Busy("too many requests at once; try again shortly.")
    ask = Ask(f"req-{uuid4().hex}", kind, body, gateway.aliases.route(body["model"]), caller.key_id)
    try:
        return await _ask(request, gateway, ask)
    except RevisionLost:
        # Another gateway may have swapped a moment ago: the name is looked up once more.
        await asyncio.to_thread(gateway.aliases.refresh)
        route = gateway.aliases.route(body["model"])
        if route.revision == ask.route.revision:
            gateway.answers.count_lost(ask)
            raise
        ask = replace(ask, route=route)
    try:
        return await _ask(request, gateway, ask)
    except RevisionLost:
        gateway.answers.count_lost(ask)
        raise


async def _ask(request: Request, gateway: Gateway, ask: Ask) -> Response:
    try:
        if ask.body.get("stream"):
            return GuardedStream(await _unless_gone(request.receive, gateway.answers.streamed(ask)))
        whole = await _unless_gone(request.receive, gateway.answers.whole(ask))
    except ClientGone:
        return Response(status_code=_CLIENT_GONE)
    return JSONResponse(whole.body, headers=whole.headers)


@router.post("/chat/completions")
async def chat_completions(request: Request, caller: Caller = Depends(needs("client"))) -> Response:
    """Answer a conversation."""
    return await _answer(request, "chat", caller)


@router.post("/completions")
async def completions(request: Request, caller: Caller = Depends(needs("client"))) -> Response:
    """Continue a prompt."""
    return await _answer(request, "text", caller)


def _model(alias: str, revision: str) -> dict[str, Any]:
    return {"id": alias, "object": "model", "created": 0, "owned_by": "headguard", "root": revision}


@router.get("/models")
async def models(request: Request, caller: Caller = Depends(needs("client"))) -> dict[str, Any]:
    """The public model names."""
    routes = gateway_of(request).aliases.routes()
    return {"object": "list", "data": [_model(route.alias, route.revision) for route in routes]}


@router.get("/models/{model}")
async def model(request: Request, model: str, caller: Caller = Depends(needs("client"))) -> dict[str, Any]:
    """One public model name."""
    route = gateway_of(request).aliases.route(model)
    return _model(route.alias, route.revision)
