"""What the gateway asks of an engine, in-process or remote alike: answer, stream, and manage revisions.

The engine speaks OpenAI HTTP; its own errors are OpenAI-shaped already and are passed to the client as they are when
they are the client's fault (4xx). Everything else an engine does wrong is ``Unavailable``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from serving.engines.client import EngineError, EngineUnavailable
from serving.events import Event

__all__ = ["Engine", "EngineError", "EngineUnavailable"]


class Engine(Protocol):
    """One engine. Every method raises EngineError; ``complete`` and ``stream`` also StreamBroken."""

    @property
    def members(self) -> Sequence[Engine]:
        """The single engines behind it: itself, or those of a pool."""

    async def status(self) -> dict[str, Any]:
        """``GET /guard/status``: base, dtype, probe, and the revisions loaded with their profiles."""

    async def load(self, revision: str, path: str, profile: str | None = None) -> dict[str, Any]:
        """Load a revision from a folder (nothing happens if it is loaded already)."""

    async def unload(self, revision: str, drain_s: float = 0.0) -> dict[str, Any]:
        """Forget a revision, waiting up to ``drain_s`` seconds for its requests (those of other gateways too)."""

    async def set_profile(self, revision: str, path: str | None) -> dict[str, Any]:
        """Attach a profile to a loaded revision or to the base."""

    async def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request in one piece; ``path`` is the OpenAI route."""

    def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        """Answer a request in events. Closing the generator cancels the request in the engine."""

    async def aclose(self) -> None:
        """Let go of the engine."""
