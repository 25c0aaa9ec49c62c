"""Token ids to text, one token at a time: no half characters, and nothing that may turn out to be a stop string.

A token can end in the middle of a UTF-8 character, and a stop string can span tokens. Text is released only when
neither can change it any more, so every released piece stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"


class Detokenizer:
    """Incremental decoding: the pieces returned by `push` and `flush` concatenate to the decoded text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Text up to `_done` is released. Decoding starts at `_context`, a few tokens earlier: whether a token begins
        # with a space depends on what stands before it.
        self._context = 0
        self._done = 0

    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._ids.append(token)
        before, now = self._decode(self._done), self._decode(len(self._ids))
        if now.endswith(_BROKEN) or len(now) <= len(before):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end, broken characters included."""
        before, now = self._decode(self._done), self._decode(len(self._ids))
        self._context = self._done = len(self._ids)
        return now[len(before) :]

    def _decode(self, end: int) -> str:
        ids = self._ids[self._context : end]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Withholds text that could be the beginning of a stop string, and says when one is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Text that may be released. After a hit: what stood before the stop string, and from then on nothing."""
        if self.hit:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.hit = True
            released, self._held = self._held[: min(places)], ""
            return released
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def flush(self) -> str:
        """What was withheld, at the end of an answer that no stop string ended."""
        released, self._held = self._held, ""
        return released

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
