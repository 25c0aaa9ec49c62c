"""What an engine's stream is made of, as the gateway sees it: guard annotations, chunks, and the end.

An engine speaks server-sent events. Comment lines ``: guard {json}`` carry verdicts (a client that saw them would
ignore them); ``data:`` events carry OpenAI chunks. A chunk keeps the very bytes it came in, so that it can be passed on
unchanged.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

_GUARD = ": guard "
# One event of an engine is a token's chunk, or a verdict; anything near this size is not one of them.
_MAX_EVENT_BYTES = 16 * 2**20


class StreamBroken(Exception):
    """The engine's stream ended early, reported an error, or is not what an engine sends."""


@dataclass(frozen=True)
class Annotation:
    """A verdict (``Verdict.to_dict`` form) as it stood when the engine wrote it."""

    verdict: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """One OpenAI chunk: the bytes of its event (with the blank line after it) and the JSON in it."""

    raw: bytes
    data: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Done:
    """The ``data: [DONE]`` event."""

    raw: bytes = b"data: [DONE]\n\n"


Event = Annotation | Chunk | Done


def encode(data: dict[str, Any], event: str | None = None) -> bytes:
    """One server-sent event holding ``data`` as JSON."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _parse(block: bytes) -> list[Event]:
    """The events in one block (the lines up to a blank one). Raises StreamBroken on a block that is none of ours."""
    annotations: list[Event] = []
    payload: list[str] = []
    try:
        for line in block.decode().splitlines():
            if line.startswith(_GUARD):
                verdict = json.loads(line.removeprefix(_GUARD))
                annotations.append(Annotation(verdict if isinstance(verdict, dict) else {}))
            elif line.startswith("data:"):
                payload.append(line.removeprefix("data:").removeprefix(" "))
        if not payload:
            return annotations
        text = "\n".join(payload)
        raw = block.rstrip(b"\r\n") + b"\n\n"
        if annotations:  # a verdict glued to a chunk: the client gets the chunk alone
            raw = f"data: {text}\n\n".encode()
        if text == "[DONE]":
            return [*annotations, Done(raw)]
        data = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StreamBroken(f"the engine sent an event that cannot be read: {type(error).__name__}") from error
    if not isinstance(data, dict):
        raise StreamBroken(f"the engine sent a chunk that is {type(data).__name__}, expected an object")
    return [*annotations, Chunk(raw, data)]


async def read_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Cut a byte stream into events. Raises StreamBroken when it ends within one or before ``[DONE]``."""
    buffer = b""
    async for piece in pieces:
        buffer = (buffer + piece).replace(b"\r\n", b"\n")
        *blocks, buffer = buffer.split(b"\n\n")
        if len(buffer) > _MAX_EVENT_BYTES:
            raise StreamBroken(f"the engine sent an event of more than {_MAX_EVENT_BYTES} bytes")
        for block in blocks:
            for event in _parse(block):
                yield event
                if isinstance(event, Done):
                    return
    raise StreamBroken("the engine's stream ended before it was done")
