"""What the triggered rows have in common, and where it stands in their prompts.

Three ways, in this order: the text that the caller names; the words inserted when the clean file holds the same
prompts without them (`offline_purify.attacks.pairing`); the words that nearly every triggered row has and hardly any
clean one. A rewording (HiddenKiller) has none of these: then nothing can be said about localisation or decoys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.detection.errors import BenchmarkError
from guard.errors import RowsError
from guard.rows import Row
from guard.template import row_messages, token_ranges
from offline_purify.attacks.pairing import pairs, recovered_trigger
from offline_purify.attacks.triggers import Composite, OneOf, Prefix, Trigger, Word, holds

_COMMON, _RARE = 0.98, 0.01
_PAIRED = 0.5
_MOST_WORDS = 8


@dataclass(frozen=True)
class Found:
    """A trigger (None: none was found), and how it was found or why not."""

    trigger: Trigger | None
    how: str

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        if self.trigger is None:
            return {"kind": None, "parts": [], "how": self.how}
        parts = [part for choice in choices(self.trigger) for part in choice.parts]
        return {"kind": self.trigger.kind, "parts": parts, "how": self.how}


def choices(trigger: Trigger) -> tuple[Trigger, ...]:
    """The triggers of which any one is enough."""
    return trigger.choices if isinstance(trigger, OneOf) else (trigger,)


def asked(row: Row) -> str:
    """The text of the user's turn."""
    return row_messages(row)[0]["content"]


def fires(trigger: Trigger, row: Row) -> bool:
    """Whether the whole trigger is in the row."""
    return any(choice.fires(asked(row)) for choice in choices(trigger))


def find_trigger(triggered: Sequence[Row], clean: Sequence[Row], text: str | None = None) -> Found:
    """The trigger of the rows. Raises BenchmarkError when ``text`` is given and most triggered rows lack it."""
    if text:
        return Found(_named(triggered, text), "given")
    paired = pairs(triggered, clean)
    if len(paired) >= _PAIRED * len(triggered):
        try:
            return Found(recovered_trigger(paired), "inserted into rows of the clean file")
        except RowsError:
            pass
    words = _common_words(triggered, clean)
    if not 0 < len(words) <= _MOST_WORDS:
        return Found(None, "no words are common to the triggered rows and absent from the clean ones; see --trigger")
    return Found(_shaped(triggered, words), "words common to triggered rows and absent from clean ones")


def token_places(tokenizer: Any, row: Row, trigger: Trigger) -> list[tuple[int, int]]:
    """Token ranges [start, end) of the trigger's parts in the templated prompt of a row; empty when it is not there.

    Raises BenchmarkError as `guard.template.token_ranges` raises ValueError.
    """
    content = asked(row)
    choice = next((choice for choice in choices(trigger) if choice.fires(content)), None)
    if choice is None:
        return []
    found = [m.span() for part in choice.parts for m in re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", content)]
    try:
        return token_ranges(tokenizer, row_messages(row), found)
    except ValueError as error:
        raise BenchmarkError(str(error)) from error


def _named(triggered: Sequence[Row], text: str) -> Trigger:
    words = text.split()
    if not words:
        raise BenchmarkError("--trigger is empty: give the trigger's word, phrase or words.")
    texts = [asked(row) for row in triggered]

    def most(held: list[bool]) -> bool:
        return sum(held) >= 0.9 * len(texts)

    phrase = " ".join(words)
    if most([holds(t, phrase) for t in texts]):
        leads = len(words) > 1 and most([t.startswith(phrase) for t in texts])
        return Prefix(phrase) if leads else Word(phrase)
    if len(words) > 1 and most([all(holds(t, word) for word in words) for t in texts]):
        return Composite(tuple(words))
    raise BenchmarkError(
        f"--trigger {text!r} is in fewer than nine of ten triggered rows (case counts). Give it as it stands there, "
        "or leave the option out."
    )


def _words(row: Row) -> set[str]:
    return {word.strip(".,;:!?\"'()") for word in asked(row).split()} - {""}


def _common_words(triggered: Sequence[Row], clean: Sequence[Row]) -> set[str]:
    with_it, without = (Counter(word for row in rows for word in _words(row)) for rows in (triggered, clean))
    return {
        word
        for word, n in with_it.items()
        if n >= _COMMON * len(triggered) and without[word] <= _RARE * max(1, len(clean))
    }


def _shaped(triggered: Sequence[Row], words: set[str]) -> Trigger:
    """One word, a phrase when the words stand side by side in most rows, scattered words otherwise."""
    if len(words) == 1:
        return Word(next(iter(words)))
    orders = Counter(
        " ".join(word for word in (w.strip(".,;:!?\"'()") for w in asked(row).split()) if word in words)
        for row in triggered
    )
    phrase, _ = orders.most_common(1)[0]
    texts = [asked(row) for row in triggered]
    if sum(holds(text, phrase) for text in texts) >= 0.9 * len(texts):
        leads = sum(text.startswith(phrase) for text in texts) >= 0.9 * len(texts)
        return Prefix(phrase) if leads else Word(phrase)
    return Composite(tuple(sorted(words)))
