"""An httpx transport that calls an ASGI app in this process, streaming as a socket would.

httpx's own ASGITransport collects the whole body before it returns. This one runs the app in a task and hands on each
piece of the body as the app sends it, with backpressure (the app waits until the piece was taken), delivers
`http.disconnect` when the response is closed early, and turns an app that raises into an httpx error. So the gateway
reaches the embedded engine exactly as it reaches a remote one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx

# After the client has gone, how long an app may take to notice before it is cancelled.
_GRACE_S = 5.0
# Pieces of the body that may wait for the reader.
_PIECES = 8


class InProcessTransport(httpx.AsyncBaseTransport):
    """Serves httpx requests from an ASGI app. One task per request; nothing outlives its response."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = b"".join([piece async for piece in request.stream])  # type: ignore[union-attr]
        exchange = _Exchange(self._app, request, body)
        try:
            status, headers = await exchange.start()
        except BaseException:
            await exchange.close()
            raise
        return httpx.Response(status, headers=headers, stream=_Body(exchange), request=request)


class _Exchange:
    """One request and its response on their way between httpx and the app."""

    def __init__(self, app: Any, request: httpx.Request, body: bytes) -> None:
        self._request = request
        self._inbox: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        self._gone = asyncio.Event()
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_PIECES)
        self._read_s = request.extensions.get("timeout", {}).get("read")
        self._ended = False
        self._task = asyncio.create_task(self._run(app(_scope(request), self._receive, self._send)))

    async def _run(self, app: Any) -> None:
        try:
            await app
        finally:
            if not self._gone.is_set():
                await self._messages.put(None)

    async def _receive(self) -> dict[str, Any]:
        if self._inbox:
            return self._inbox.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if not self._gone.is_set():
            await self._messages.put(message)

    async def _next(self) -> dict[str, Any]:
        try:
            # Not wait_for: in Python 3.11 it forgets a cancellation that arrives together with a message.
            async with asyncio.timeout(self._read_s):
                message = await self._messages.get()
        except TimeoutError:
            raise httpx.ReadTimeout(f"the app sent nothing for {self._read_s} s", request=self._request) from None
        if message is not None:
            return message
        await asyncio.wait({self._task})
        error = None if self._task.cancelled() else self._task.exception()
        reason = f"raised {type(error).__name__}" if error is not None else "returned"
        raise httpx.RemoteProtocolError(
            f"the app {reason} before the response was complete", request=self._request
        ) from error

    async def start(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Status and headers."""
        while (message := await self._next())["type"] != "http.response.start":
            pass
        return message["status"], list(message.get("headers", []))

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it is sent."""
        while not self._ended:
            message = await self._next()
            if message["type"] == "http.response.body":
                self._ended = not message.get("more_body", False)
                if piece := message.get("body", b""):
                    yield piece

    async def close(self) -> None:
        """Tells the app that the client has gone, and waits until it is over."""
        self._gone.set()
        while not self._messages.empty():  # an app that waits for room goes on, to find the client gone
            self._messages.get_nowait()
        await asyncio.wait({self._task}, timeout=_GRACE_S)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # seen: nobody is left who would want to hear of it


class _Body(httpx.AsyncByteStream):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._exchange.pieces():
            yield piece

    async def aclose(self) -> None:
        await self._exchange.close()


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        # 2.3: an app learns of a disconnect by listening for it, at once, and not only when it next sends.
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, request.url.port),
        "client": ("127.0.0.1", 0),
        "root_path": "",
    }
