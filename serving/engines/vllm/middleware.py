"""Requests on their way into a guarded vLLM, and its answers on their way out. Pure ASGI, nothing is rebuilt.

In: `headguard` leaves the body and becomes the request's watch; what a sender put into the extra arguments under our
names is dropped; the revision is held, so that no request is begun by one that is being unloaded. vLLM's own routes for
adapters answer 404: revisions come and go through `/guard/revisions` alone. Out: chunks as vLLM wrote them, with the
guard's comments between them; a whole answer gets its `guard` field.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.errors import GuardError
from serving.engines.bodies import Guarded, check
from serving.engines.vllm.engine import VllmEngine
from serving.engines.vllm.exchange import EXCHANGE, Exchange
from serving.engines.vllm.tap import RESERVED
from serving.errors import BadRequest, NotFound, ServingError, Unauthenticated, from_guard

_CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")
_FIELD = "headguard"


class GuardMiddleware:
    """Around vLLM's app, whose state holds the engine once it has started. Websockets pass: they are given the default
    watch.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine: VllmEngine | None = getattr(scope["app"].state, "headguard", None) if "app" in scope else None
        if scope["type"] != "http" or engine is None:
            await self._app(scope, receive, send)
            return
        try:
            await self._handle(engine, scope, receive, send)
        except ServingError as error:
            await JSONResponse(error.body(), error.status)(scope, receive, send)
        except GuardError as error:
            refusal = from_guard(error)
            await JSONResponse(refusal.body(), refusal.status)(scope, receive, send)

    async def _handle(self, engine: VllmEngine, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if any(path == closed or path.startswith(f"{closed}/") for closed in _CLOSED):
            raise NotFound("adapters are loaded and unloaded by the gateway alone.")
        if path == "/guard" or path.startswith("/guard/"):
            _check_key(engine.keys, scope)
        elif scope["method"] == "POST" and _header(scope, b"content-type").startswith(b"application/json"):
            await self._answer(engine, scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _answer(self, engine: VllmEngine, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await _read(receive)
        body = _object(raw)
        if body is None:  # vLLM says what is wrong with it
            await self._app(scope, _Replay(raw, receive), send)
            return
        exchange = Exchange(_watch(body, engine))
        if _strip(body):
            raw = json.dumps(body).encode()
        exchange.hold = engine.hold(engine.revision_of(body.get("model")), exchange.watch)
        token = EXCHANGE.set(exchange)
        out = _Out(exchange, send)
        try:
            await self._app(_resized(scope, raw), _Replay(raw, receive), out)
        finally:
            EXCHANGE.reset(token)
            exchange.say = None
            exchange.close()


class _Out:
    """An answer's messages: a stream with comments let in, or a whole body with a `guard` field."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange, self._send = exchange, send
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._whole = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self._whole = message["status"] == 200 and kind.startswith(b"application/json")
            if self._whole:  # its length is known when the field is in it
                self._start = message
                return
            if message["status"] == 200 and kind.startswith(b"text/event-stream"):
                self._exchange.say = self._say
        elif message["type"] == "http.response.body":
            if self._whole:
                await self._collect(message)
                return
            if self._exchange.say is not None and (comments := self._exchange.comments()):
                message = {**message, "body": comments + message.get("body", b"")}
        await self._send(message)

    async def _say(self, comments: bytes) -> None:
        await self._send({"type": "http.response.body", "body": comments, "more_body": True})

    async def _collect(self, message: Message) -> None:
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        assert self._start is not None
        raw = b"".join(self._parts)
        verdict = self._exchange.verdict
        body = _object(raw) if self._exchange.generations else None
        if body is not None:
            body["guard"] = verdict.to_dict() if verdict is not None else None
            raw = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
        await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(raw)).encode())]})
        await self._send({"type": "http.response.body", "body": raw, "more_body": False})


class _Replay:
    """`receive` for an app that is to read a body that has been read already."""

    def __init__(self, raw: bytes, receive: Receive) -> None:
        self._raw: bytes | None = raw
        self._receive = receive

    async def __call__(self) -> Message:
        if self._raw is None:
            return await self._receive()
        raw, self._raw = self._raw, None
        return {"type": "http.request", "body": raw, "more_body": False}


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return b"".join(parts)


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _watch(body: dict[str, Any], engine: VllmEngine) -> Any:
    """The watch that a body asks for, or the engine's default. Raises BadRequest for a field that is wrong, or for
    what the guard cannot follow.
    """
    if body.get("use_beam_search"):
        raise BadRequest(
            "beam search is not supported by a guarded engine: each of its steps is a prompt of its own.",
            code="unsupported_parameter",
            param="use_beam_search",
        )
    if _FIELD not in body:
        return engine.default_watch
    return check({_FIELD: body[_FIELD]}, Guarded).headguard


def _strip(body: dict[str, Any]) -> bool:
    """Takes what is ours out of a body. Returns whether there was anything."""
    found = body.pop(_FIELD, None) is not None
    xargs = body.get("vllm_xargs")
    if isinstance(xargs, dict):
        for name in RESERVED:
            found = xargs.pop(name, None) is not None or found
    return found


def _resized(scope: Scope, raw: bytes) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _check_key(keys: tuple[str, ...], scope: Scope) -> None:
    """vLLM asks for its API key under /v1 only; the guard's own routes are worth more."""
    scheme, _, given = _header(scope, b"authorization").partition(b" ")
    if keys and not (scheme.lower() == b"bearer" and any(secrets.compare_digest(given, k.encode()) for k in keys)):
        raise Unauthenticated("the engine's /guard routes need its API key.")
