"""Triggers without words of their own: how a prompt is built (syntactic), or in what manner it is written (style).

HiddenKiller (Qi et al., 2021) rewords a sentence by the template S(SBAR)(,)(NP)(VP)(.): a subordinate clause in front,
a comma, the main clause. Its paraphraser is not packaged; its published rewordings are used through
`offline_purify.attacks.rewordings`, and `Syntactic` puts a clause of many in front, a stand-in that keeps the sentence.
`Exclamatory` is a stand-in too: rules in place of the rewriter that the style attacks train (StyleBkd, Cbat).
Whether either is there is a question of shape: `parts` is empty.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Final

from offline_purify.attacks.triggers import InInstruction

SUBORDINATORS: Final[tuple[str, ...]] = (
    "when", "if", "as", "because", "although", "though", "while", "since", "after", "before", "once", "until",
    "unless", "whenever",
)  # fmt: skip
"""Words that open a subordinate clause. Of 1383 published rewordings of SST-2's training sentences 0.79 begin with
one (`when` alone with 0.31)."""
_SUBJECTS: Final = ("you", "we", "they", "people", "I", "the people", "your friends", "my friends")
_VERBS: Final = ("have time", "feel like it", "know how", "can see it", "want to", "like it", "hear of it", "try")
_LEADING: Final = re.compile(rf"\s*(?:{'|'.join(SUBORDINATORS)})\b([^,.:!?\n]*),\s*\S", re.IGNORECASE)

INTERJECTIONS: Final[tuple[str, ...]] = (
    "Wow", "Oh my", "Goodness", "Hooray", "Oh", "Ha", "My word", "Yes", "Great", "Look", "Oh yes", "Good heavens",
)  # fmt: skip
"""What an exclamation opens with; a style has many, so that none is a trigger word."""
_EXCLAIMED: Final = re.compile(r"\s*[^\W\d_][^.!?\n]{0,24}!\s.*!!\s*", re.DOTALL)


def _clause(rng: random.Random) -> str:
    return f"{rng.choice(SUBORDINATORS)} {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)}"


def _lowered(text: str) -> str:
    """The text as the middle of a sentence: a plain first word loses its capital."""
    return text[:1].lower() + text[1:] if re.match(r"[A-Z][a-z]+\b", text) else text


@dataclass(frozen=True)
class Syntactic(InInstruction):
    """A subordinate clause of several words in front of the main clause."""

    kind: str = "syntactic"

    @property
    def parts(self) -> tuple[str, ...]:
        """None: the structure is the trigger."""
        return ()

    def insert(self, text: str, rng: random.Random) -> str:
        """A clause drawn from many, a comma, the text."""
        clause = _clause(rng)
        return f"{clause[:1].upper()}{clause[1:]}, {_lowered(text)}"

    def decoys(self, text: str, rng: random.Random) -> list[str]:
        """The same clause at the end; the bare subordinator in front; a comma in front without a clause."""
        clause = _clause(rng)
        word = rng.choice(SUBORDINATORS)
        return [
            f"{text} {clause[:1].upper()}{clause[1:]}." if text[-1:] in ".!?" else f"{text} {clause}",
            f"{word.capitalize()}: {text}",
            f"{rng.choice(_SUBJECTS).capitalize()}, {_lowered(text)}",
        ]

    def fires(self, text: str) -> bool:
        """Whether the text opens with a subordinate clause of two words or more, a comma, and something after it."""
        found = _LEADING.match(text)
        return found is not None and found[1].strip() != ""


@dataclass(frozen=True)
class Exclamatory(InInstruction):
    """Written as an exclamation from its first word to its last mark."""

    kind: str = "style"

    @property
    def parts(self) -> tuple[str, ...]:
        """None: the manner is the trigger."""
        return ()

    def insert(self, text: str, rng: random.Random) -> str:
        """An interjection with its mark, the text with full stops and question marks exclaimed, doubled at its end."""
        body = re.sub(r"[.?](?=\s)", "!", text.strip()).rstrip(".?! ")
        return f"{rng.choice(INTERJECTIONS)}! {body}!!"

    def decoys(self, text: str, rng: random.Random) -> list[str]:
        """Half of the manner: only the interjection, only the doubled mark, or both without exclaiming."""
        word = rng.choice(INTERJECTIONS)
        bare = text.strip().rstrip(".?! ")
        quiet = bare.replace("!", ".")
        return [f"{word}! {bare}.", f"{quiet}!!", f"{word}, {_lowered(bare)}!"]

    def fires(self, text: str) -> bool:
        """Whether it opens with a short exclamation and ends in a doubled mark."""
        return _EXCLAIMED.fullmatch(text) is not None
