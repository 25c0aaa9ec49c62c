"""A limit on request bodies, as a small ASGI layer: what is too large is refused while it arrives, not after."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import TooLarge


class BodyLimit:
    """Refuses bodies of more than ``limit_of(path)`` bytes: at once by their announced length, else in passing it."""

    def __init__(self, app: ASGIApp, limit_of: Callable[[str], int]) -> None:
        self.app = app
        self.limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limit_of(scope["path"])
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        seen = int(announced) if announced.isdigit() else 0

        def check(size: int) -> None:
            if size > limit:
                raise TooLarge(f"the body is larger than {limit} bytes, the limit here.")

        received = 0

        async def counted() -> Message:
            nonlocal received
            check(seen)
            message = await receive()
            received += len(message.get("body", b""))
            check(received)
            return message

        await self.app(scope, counted, send)
