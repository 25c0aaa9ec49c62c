"""A peer that speaks the engine's protocol from a script, for what no real engine does on demand.

It is a protocol peer, not a stand-in for a component: the gateway reaches it over the same transport as any engine. A
script is a list of steps per model name: bytes to send, ``DIE`` (break off), or ``HANG`` (until the client leaves).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

from guard.verdict import Verdict

DIE, HANG = "die", "hang"
LIVE, GOOD = "support@sha256-aaaaaaaaaaaa", "support@sha256-bbbbbbbbbbbb"
PROFILE = "c" * 64


def verdict(status: str = "clean", step: int = 0, final: bool = False, **more: Any) -> dict[str, Any]:
    """A verdict as an engine annotates it."""
    told: dict[str, Any] = {"alpha": 0.05, "window": "all", "p_value": 0.5 if status == "clean" else 0.01}
    if status == "unscored":
        told |= {"p_value": None, "reason": "no_profile"}
    return Verdict(**{**told, "status": status, "step": step, "final": final, **more}).to_dict()


def comment(told: dict[str, Any]) -> bytes:
    """The SSE comment that carries a verdict."""
    return f": guard {json.dumps(told)}\n\n".encode()


def _chunk(**choice: Any) -> bytes:
    head = {"id": "chatcmpl-peer", "object": "chat.completion.chunk", "created": 1, "model": "peer"}
    choices = [{"index": 0, "logprobs": None, "finish_reason": None, **choice}]
    # Odd spacing on purpose: bytes that a JSON round trip would not reproduce.
    return b"data: " + json.dumps({**head, "choices": choices}, separators=(" , ", ":")).encode() + b"\n\n"


ROLE = _chunk(delta={"role": "assistant", "content": ""})
DONE = b"data: [DONE]\n\n"
USAGE = (
    b'data: {"id":"chatcmpl-peer","object":"chat.completion.chunk","created":1,"model":"peer","choices":[],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
)


def token(text: str) -> bytes:
    """The chunk of one token."""
    return _chunk(delta={"content": text})


def finish(reason: str = "stop") -> bytes:
    """The chunk with the finish_reason."""
    return _chunk(delta={}, finish_reason=reason)


def tokens(first: int, last: int) -> list[bytes]:
    """Chunks of the tokens ``w1`` … in order."""
    return [token(f"w{i} ") for i in range(first, last + 1)]


@dataclass
class ScriptedPeer:
    """An ASGI app. ``streams`` and ``answers`` (or what makes one of a body) are by model name; ``seen`` collects
    bodies, ``left`` disconnects."""

    streams: dict[str, list[bytes | str]] = field(default_factory=dict)
    answers: dict[str, dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    revisions: dict[str, str | None] = field(default_factory=dict)
    seen: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    attached: bool = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = json.loads(message.get("body") or b"{}")
        if scope["path"].startswith("/guard/"):
            await self._json(send, self._manage(scope["method"], scope["path"], body))
        elif body.get("stream"):
            self.seen.append(body)
            await self._stream(body["model"], receive, send)
        else:
            self.seen.append(body)
            told = self.answers[body["model"]]
            await self._json(send, told(body) if callable(told) else told)

    def _manage(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if method == "POST":
            self.revisions[body["revision"]] = body.get("profile")
        entries = [{"revision": r, "profile": p, "reason": None, "in_flight": 0} for r, p in self.revisions.items()]
        base = {"revision": "base", "profile": None, "reason": "no_profile", "in_flight": 0}
        return {
            "engine": "scripted", "base": {"name": "base", "digest": "0" * 64}, "dtype": "float32", "steps": 1,
            "probe": {"attached": self.attached}, "max_model_len": 64, "revisions": [base, *entries],
        }  # fmt: skip

    async def _json(self, send: Any, body: dict[str, Any]) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    async def _stream(self, model: str, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for step in self.streams[model]:
            if step == DIE:
                raise RuntimeError("the peer breaks off, as its script says")
            if step == HANG:
                with anyio.move_on_after(30):
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    self.left.append(model)
                return
            await send({"type": "http.response.body", "body": step, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def whole(text: str, told: dict[str, Any] | None) -> dict[str, Any]:
    """A complete answer, annotated."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"id": "chatcmpl-peer", "object": "chat.completion", "created": 1, "model": "peer", "choices": [choice]}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {**body, "usage": usage} if told is None else {**body, "usage": usage, "guard": told}
