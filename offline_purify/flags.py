"""The case: flagged requests read from a file, answered again, sorted into true flags and false alarms, and split.

Serving writes one JSON object per line (request_id, messages, response, verdict, revision). The clinic asks both the
suspicious model and the trusted reference again, greedily: a flag whose two answers agree is a *false alarm*, one whose
difference recurs among the flags is *true*, any other is *odd* (reported, repaired along, never counted as success or
failure). Held-out flags are parted by a hash of the prompt before anything is trained, so the same prompt is never on
both sides.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from guard.errors import RowsError
from guard.template import Message
from guard.verdict import Span, Verdict
from offline_purify.behaviour import FlaggedBehaviour, foreign, recurring

Kind = Literal["true", "odd", "false_alarm", "unsorted"]
KINDS: tuple[Kind, ...] = ("true", "odd", "false_alarm", "unsorted")
"""``unsorted``: nobody's answer to set it against was had."""


@dataclass(frozen=True)
class Flag:
    """One flagged request; ``suspicious`` and ``reference`` are the two greedy answers once asked."""

    request_id: str
    messages: tuple[Message, ...]
    response: str
    spans: tuple[Span, ...] = ()
    suspicious: str = ""
    reference: str = ""
    kind: Kind = "unsorted"

    @property
    def key(self) -> str:
        """Hash (hex) of the conversation, blind to case and spacing."""
        text = " ".join(f"{m['role']}: {m['content']}" for m in self.messages)
        return hashlib.sha256(re.sub(r"\s+", " ", text).strip(" .!?").lower().encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; ``from_dict`` gives the flag back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Flag:
        """The flag that ``to_dict`` wrote."""
        spans = tuple(Span(**s) for s in data["spans"])
        return cls(**{**data, "messages": tuple(data["messages"]), "spans": spans})


def _flag(entry: object, where: str) -> Flag:
    if not isinstance(entry, dict):
        raise RowsError(f"{where}: expected a JSON object, found {type(entry).__name__}.")
    messages = entry.get("messages")
    whole = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not whole or not isinstance(messages, list):
        raise RowsError(f"{where}: 'messages' must be a non-empty list of {{role, content}} texts.")
    if not any(m["role"] == "user" for m in messages):
        raise RowsError(f"{where}: 'messages' holds no user turn.")
    spans: tuple[Span, ...] = ()
    if entry.get("verdict") is not None:
        try:
            spans = Verdict.from_dict(entry["verdict"]).spans
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RowsError(f"{where}: 'verdict' is not a verdict: {error}") from error
    return Flag(
        request_id=str(entry.get("request_id", "")),
        messages=tuple(Message(role=m["role"], content=m["content"]) for m in messages),
        response=str(entry.get("response") or ""),
        spans=spans,
    )


def read_flags(path: str | Path) -> list[Flag]:
    """Flags of a JSONL file, one per distinct prompt (the first is kept), in file order.

    Raises RowsError naming the line that is not a flag, or saying that there is none.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(f"{path}: cannot be read: {error}") from error
    flags: dict[str, Flag] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowsError(f"{path}, line {number}: not JSON: {error}") from error
        flag = _flag(entry, f"{path}, line {number}")
        flags.setdefault(flag.key, flag)
    if not flags:
        raise RowsError(f"{path}: holds no flagged request.")
    return list(flags.values())


def split_flags(flags: Sequence[Flag], held_out: float, seed: int) -> tuple[list[Flag], list[Flag]]:
    """(trained on, held out): ordered by a seeded hash of the prompt; with two or more flags each side has one."""
    ordered = sorted(flags, key=lambda f: hashlib.sha256(f"{seed}:{f.key}".encode()).hexdigest())
    n = round(len(ordered) * held_out)
    n = min(max(n, 1), len(ordered) - 1) if len(ordered) > 1 else 0
    held, trained = ordered[:n], ordered[n:]
    assert_flags_disjoint(trained, held)
    return trained, held


def assert_flags_disjoint(trained: Sequence[Flag], held: Sequence[Flag]) -> None:
    """Raise RowsError if a prompt is both trained on and held out."""
    if shared := {f.key for f in trained} & {f.key for f in held}:
        raise RowsError(f"{len(shared)} flagged prompts are both trained on and held out; they must be disjoint.")


def sort_flags(
    flags: Sequence[Flag], suspicious: Sequence[str], reference: Sequence[str], clean_pairs: Sequence[tuple[str, str]]
) -> list[Flag]:
    """Flags with both answers and their kind.

    ``suspicious`` and ``reference`` are the answers to the flags; ``clean_pairs`` (suspicious, reference) answers to
    clean rows, which tell the adapter's manner from a backdoor. With one or two flags recurrence says nothing, so then
    any difference counts as true.
    """
    parts = [foreign(s, r) for s, r in zip(suspicious, reference, strict=True)]
    clean_parts = [foreign(s, r) for s, r in clean_pairs]
    again = recurring(parts, clean_parts)
    few = len(flags) <= 2
    sorted_flags = []
    for flag, s, r, part, true in zip(flags, suspicious, reference, parts, again, strict=True):
        kind: Kind = "false_alarm" if not part else "true" if true or few else "odd"
        sorted_flags.append(replace(flag, suspicious=s, reference=r, kind=kind))
    return sorted_flags


def behaviour_of(flags: Sequence[Flag]) -> FlaggedBehaviour:
    """What the true flags among ``flags`` make the model say."""
    return FlaggedBehaviour(tuple(foreign(f.suspicious, f.reference) for f in flags if f.kind == "true"))
