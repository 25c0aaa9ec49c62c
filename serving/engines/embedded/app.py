"""The embedded engine over HTTP: OpenAI's completions with guard annotations, and the guard's administration.

What a gateway expects of every engine, nothing more: no keys, no policies, no aliases. It is meant to be reached in
process or over a private network; `/guard/…` must never be exposed to clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serving.engines.administration import administration, install_refusals, no_drill
from serving.engines.embedded.answers import Form, stream, whole
from serving.engines.embedded.bodies import ChatBody, CompletionBody, parse
from serving.engines.embedded.engine import EmbeddedEngine
from serving.engines.embedded.requests import Answer, Failed
from serving.errors import BadRequest, ServingError, Unavailable

T = TypeVar("T")


class _Administered:
    """The engine as the `/guard` routes see it: what blocks there is done in a thread."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine, self.name = engine, engine.name

    async def status(self) -> dict[str, Any]:
        return self._engine.status()

    async def load(self, revision: str, folder: Path, profile: Path | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._engine.load, revision, folder, profile)

    async def unload(self, revision: str, drain_s: float) -> None:
        await asyncio.to_thread(self._engine.unload, revision, drain_s)

    async def set_profile(self, revision: str | None, path: Path | None) -> dict[str, Any]:
        return await asyncio.to_thread(self._engine.books.set_profile, revision, path)

    async def attach(self, attached: bool) -> None:
        raise no_drill()


class AnswerStream(StreamingResponse):
    """A stream that cancels its request however it is left: end, disconnect, or error."""

    def __init__(self, answer: Answer, body: Any) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def create_engine_app(engine: EmbeddedEngine) -> FastAPI:
    """The ASGI app of a started engine. It neither starts nor closes the engine."""
    app = FastAPI(title="headguard embedded engine", docs_url=None, redoc_url=None, openapi_url=None)

    install_refusals(app)
    app.include_router(administration(lambda _: _Administered(engine)))

    @app.exception_handler(HTTPException)
    async def no_such_route(_: Request, error: HTTPException) -> JSONResponse:
        refusal = ServingError(str(error.detail), code="not_found" if error.status_code == 404 else "invalid_request")
        return JSONResponse(refusal.body(), error.status_code)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _complete(engine, request, parse(await request.body(), ChatBody), chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _complete(engine, request, parse(await request.body(), CompletionBody), chat=False)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        listed = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "headguard",
                "root": engine.name,
                "max_model_len": engine.runner.max_len,
            }
            for name in engine.books.names()
        ]
        return {"object": "list", "data": listed}

    @app.get("/health")
    async def health() -> JSONResponse:
        if not engine.alive:
            raise Unavailable("the engine is not running.")
        return JSONResponse({"status": "ok"})

    return app


async def _complete(engine: EmbeddedEngine, request: Request, body: ChatBody | CompletionBody, chat: bool) -> Response:
    revision = None if body.model == engine.name else body.model
    if revision not in engine.books:
        engine.books.entry(revision)  # raises the 404, before any work is done for it
    try:
        answer = engine.submit(body.generate(engine.tokenizer, revision))
    except BadRequest as error:
        if chat and error.param == "prompt":  # the engine knows prompts only; in a chat they are made of messages
            error.param = "messages"
        raise
    form = Form(chat, body.model)
    try:
        if not body.stream:
            result = await _unless_gone(request, lambda: whole(answer, form))
            return JSONResponse(result) if result is not None else Response(status_code=499)
        # The headers wait for the first event: what fails before it can still be an ordinary error.
        first = await _unless_gone(request, lambda: anext(answer))
        if first is None:
            return Response(status_code=499)
        if isinstance(first, Failed):
            raise first.error
        return AnswerStream(answer, stream(first, answer, form, body.wants_usage))
    except BaseException:
        answer.cancel()
        raise
    finally:
        if not body.stream:
            answer.cancel()


async def _unless_gone(request: Request, work: Callable[[], Awaitable[T]]) -> T | None:
    """The result of `work`, or None if the client hung up first; the work is then cancelled."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def run() -> T:
        return await work()

    working, gone = asyncio.create_task(run()), asyncio.create_task(hang_up())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
