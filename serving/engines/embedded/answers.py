"""Events of the engine as OpenAI answers: one body, or server-sent events with the guard's comments among them.

In a stream a verdict is a comment line (`engines.annotations`). That of step 0 precedes all chunks; that of
checkpoint c stands between the chunks of tokens c and c + 1; a final one precedes the chunk with the finish_reason.
Every generated token is one chunk, even if its text is still empty.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from guard.verdict import Verdict
from serving.engines.annotations import comment
from serving.engines.embedded.requests import Event, Failed, Finished, GuardUpdate, Token

DONE = b"data: [DONE]\n\n"


def _encode(data: dict[str, Any]) -> bytes:
    # ASCII only: a reader that takes U+2028 or U+0085 for the end of a line would tear the event apart.
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True)
class Form:
    """The shape of one answer: chat or plain completion, and what every piece of it repeats."""

    chat: bool
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}")

    def body(self, text: str, end: Finished, verdict: Verdict | None) -> dict[str, Any]:
        """A whole answer."""
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": end.reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self._head(kind),
            "choices": [choice],
            "usage": usage(end),
            "guard": verdict.to_dict() if verdict is not None else None,
        }

    def chunk(self, text: str | None, reason: str | None = None, role: bool = False) -> bytes:
        """One chunk of a stream. text None: nothing to say (a chat delta is then empty)."""
        content: dict[str, Any]
        if self.chat:
            delta = {"role": "assistant"} if role else {}
            content = {"delta": delta if text is None else {**delta, "content": text}}
        else:
            content = {"text": text or ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return _encode({**self._head(self._chunk_kind), "choices": [choice]})

    def usage_chunk(self, end: Finished) -> bytes:
        """The chunk that closes a stream whose client asked for usage."""
        return _encode({**self._head(self._chunk_kind), "choices": [], "usage": usage(end)})

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(end: Finished) -> dict[str, int]:
    """Token counts: what was read, and what was released."""
    prompt, completion = end.prompt_tokens, end.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def whole(events: AsyncIterator[Event], form: Form) -> dict[str, Any]:
    """The body of an answer that is not streamed. Raises the ServingError of a failed request."""
    parts: list[str] = []
    verdict: Verdict | None = None
    async for event in events:
        match event:
            case Token(text=text):
                parts.append(text)
            case GuardUpdate(verdict=verdict):
                pass
            case Finished():
                return form.body("".join(parts) + event.text, event, verdict)
            case Failed(error=error):
                raise error
    raise AssertionError("an answer ends with Finished or Failed")


async def stream(first: Event, events: AsyncIterator[Event], form: Form, with_usage: bool) -> AsyncIterator[bytes]:
    """The server-sent events of an answer whose first event is already here."""
    opened = not form.chat
    event: Event | None = first
    while event is not None:
        if isinstance(event, GuardUpdate):
            yield comment(event.verdict, event.check_s)
        elif isinstance(event, Failed):
            yield _encode(event.error.body())
            yield DONE
        else:
            if not opened:
                opened = True
                yield form.chunk("", role=True)
            if isinstance(event, Token):
                yield form.chunk(event.text)
            else:
                yield form.chunk(event.text or None, event.reason)
                if with_usage:
                    yield form.usage_chunk(event)
                yield DONE
        event = await anext(events, None)
