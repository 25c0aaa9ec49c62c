"""The gateway's view of an engine: one client for the embedded and the remote one.

Answers come back as JSON or as a stream of events (`serving.events`). Whatever goes wrong is an `EngineError` with the
status and the OpenAI-shaped body to answer with; an engine that cannot be reached, or breaks off, is
`EngineUnavailable`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, cast
from urllib.parse import quote

import httpx

from serving.events import Event, StreamBroken, read_events

# Servers close idle connections after five seconds (uvicorn's default): one that may be closed any moment is not used.
_IDLE_S = 2.0


class EngineError(Exception):
    """The engine answered with an error. status: of HTTP; body: OpenAI-shaped."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status, self.body = status, body
        super().__init__(f"engine answered {status}: {body.get('error', {}).get('message', '')}")

    @property
    def lost(self) -> bool:
        """Whether the engine does not serve the revision that was asked for."""
        return self.status == 404 and self.body.get("error", {}).get("code") == "model_not_found"


class EngineUnavailable(EngineError):
    """No connection to the engine, or it was lost; 503."""

    def __init__(self, message: str) -> None:
        error = {"message": message, "type": "server_error", "param": None, "code": "engine_unavailable"}
        super().__init__(503, {"error": error})


class EngineClient:
    """Speaks to one engine at `base_url`; `transport` makes it the one in this process. Close it when done.

    timeout_s: longest wait for the next byte of an answer.
    """

    def __init__(
        self,
        base_url: str = "http://engine",
        transport: httpx.AsyncBaseTransport | None = None,
        timeout_s: float = 300.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.url = base_url
        self._http = httpx.AsyncClient(
            base_url=base_url,
            transport=transport,
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            # How many requests run at once is the engine's to limit; a pool would queue them silently.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S),
            headers=dict(headers or {}),
            trust_env=False,
        )

    @property
    def members(self) -> tuple[EngineClient, ...]:
        """The engines behind this one: itself."""
        return (self,)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def complete(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The engine's answer to a request that does not stream. Raises EngineError."""
        return await self._call("POST", path, body, headers)

    async def stream(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Event]:
        """The events of a streamed answer, up to and with Done. Closing this generator cancels the request.

        Raises EngineError before the first event, EngineUnavailable at any point, StreamBroken for a stream that is
        not one of an engine.
        """
        try:
            async with self._http.stream("POST", path, json=body, headers=dict(headers or {})) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _error(response)
                # The iterator of a closed generator is closed here and now, not when it is collected.
                events = cast(Any, read_events(response.aiter_bytes()))
                try:
                    async for event in events:
                        yield event
                finally:
                    await events.aclose()
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"the engine cannot be reached ({type(error).__name__}).") from error

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return await self._call("GET", "/v1/models")

    async def status(self) -> dict[str, Any]:
        """GET /guard/status."""
        return await self._call("GET", "/guard/status")

    async def load(self, revision: str, path: str, profile: str | None = None) -> dict[str, Any]:
        """Loads a revision from a folder on the engine's disk; again if it is already there."""
        return await self._call(
            "POST", "/guard/revisions", {"revision": revision, "path": str(path), "profile": _text(profile)}
        )

    async def unload(self, revision: str, drain_s: float = 0.0) -> dict[str, Any]:
        """Unloads a revision. Raises EngineError 409 if requests still run it after drain_s seconds."""
        return await self._call("DELETE", f"/guard/revisions/{quote(revision, safe='')}?drain_s={drain_s}")

    async def set_profile(self, revision: str, path: str | None) -> dict[str, Any]:
        """Gives a revision another profile, or none."""
        place = f"/guard/revisions/{quote(revision, safe='')}/profile"
        return await self._call("PUT", place, {"profile": _text(path)})

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=body, headers=dict(headers or {}))
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"the engine cannot be reached ({type(error).__name__}).") from error
        if response.status_code != 200:
            raise _error(response)
        try:
            return response.json()
        except ValueError as error:
            raise StreamBroken("the engine's answer is not JSON") from error


def _text(path: object | None) -> str | None:
    return None if path is None else str(path)


def _error(response: httpx.Response) -> EngineError:
    """The engine's own error, or one made for it if what it sent is not OpenAI-shaped."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or not isinstance(body.get("error"), dict):
        message = f"the engine answered with status {response.status_code}."
        body = {"error": {"message": message, "type": "server_error", "param": None, "code": "engine_error"}}
    return EngineError(response.status_code, body)
