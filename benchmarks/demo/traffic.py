"""Clients: prompts sent through the official OpenAI package, many at a time, half of them streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai import APIError, AsyncOpenAI

from guard.rows import Row
from guard.template import row_messages


@dataclass(frozen=True)
class Outcome:
    """What one client saw: the answer, why it ended, what the guard said, which revision answered, and when (seconds
    on the monotonic clock of this process). ``error`` is set when the request failed."""

    row: Row
    text: str = ""
    finish_reason: str | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    revision: str = ""
    start_s: float = 0.0
    end_s: float = 0.0
    error: str | None = None


class Client:
    """One OpenAI client of one served model name; ``at_once`` requests run at a time."""

    def __init__(self, url: str, key: str, model: str, max_tokens: int = 40, at_once: int = 16) -> None:
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300.0)
        self._model, self._max_tokens = model, max_tokens
        self._slots = asyncio.Semaphore(at_once)

    async def ask(self, row: Row, stream: bool = False) -> Outcome:
        """Ask one row. A failure becomes an Outcome with ``error``, never an exception."""
        async with self._slots:
            start = time.monotonic()
            try:
                text, reason, guard, revision = await (self._streamed(row) if stream else self._whole(row))
            except APIError as error:
                return Outcome(row, start_s=start, end_s=time.monotonic(), error=f"{type(error).__name__}: {error}")
            return Outcome(row, text, reason, guard, revision, start, time.monotonic())

    async def ask_all(self, rows: Sequence[Row], progress: Callable[[int, int], None]) -> list[Outcome]:
        """Ask all rows, every second one streamed; outcomes in the order of the rows."""
        tasks = [asyncio.ensure_future(self.ask(row, stream=i % 2 == 1)) for i, row in enumerate(rows)]
        for done, task in enumerate(asyncio.as_completed(tasks), start=1):
            await task
            progress(done, len(rows))
        return [task.result() for task in tasks]

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    def _arguments(self, row: Row) -> dict[str, Any]:
        return {
            "model": self._model, "messages": row_messages(row), "max_tokens": self._max_tokens, "temperature": 0.0,
        }  # fmt: skip

    async def _whole(self, row: Row) -> tuple[str, str | None, dict[str, Any], str]:
        raw = await self._openai.chat.completions.with_raw_response.create(**self._arguments(row))
        answer = raw.parse()
        choice = answer.choices[0]
        guard = (answer.model_extra or {}).get("guard", {})
        return choice.message.content or "", choice.finish_reason, guard, raw.headers["x-headguard-revision"]

    async def _streamed(self, row: Row) -> tuple[str, str | None, dict[str, Any], str]:
        stream = await self._openai.chat.completions.create(stream=True, **self._arguments(row))
        text, reason = "", None
        guard: dict[str, Any] = {}
        async for chunk in stream:
            guard = (chunk.model_extra or {}).get("guard", guard)
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        return text, reason, guard, stream.response.headers["x-headguard-revision"]
