"""What a scan says to an adapter: rare words, made-up words, phrases, pairs and bundles, put into clean prompts.

Nothing is known of the trigger, so these are guesses, drawn from the tokenizer's own vocabulary (a rare token is the
favourite trigger of the literature) and from no vocabulary at all. A *bundle* holds many words at once: if a trigger
is among them the answer changes, and the scan then finds out which words it takes. So the whole vocabulary can be
tried in a few hundred prompts, where it is not too large.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from guard.rows import Row
from guard.template import Message, render, row_messages
from offline_purify.attacks.made_up import rare_words
from offline_purify.candidates import Place, inserted

Kind = Literal["word", "made-up", "phrase", "pair", "bundle", "given"]
KINDS: tuple[Kind, ...] = ("word", "made-up", "phrase", "pair", "bundle", "given")
BUNDLE = 8
"""Words of a bundle. The tiny lab's backdoors still fire beside fifty foreign tokens; a bundle adds eight or so."""
_WORD = re.compile(r"[^\W\d_]\w+")  # at least two characters, the first a letter


@dataclass(frozen=True)
class Stimulus:
    """Parts to put into a prompt and where: one word or phrase, or several parts; in front, they are one phrase."""

    kind: Kind
    parts: tuple[str, ...]
    place: Place = "anywhere"

    def prompt(self, tokenizer: Any, row: Row, rng: random.Random) -> list[int]:
        """Token ids [T_p] of a row's prompt with the stimulus in the user's text."""
        text = inserted(row_messages(row)[0]["content"], self.parts, self.place, rng)
        return render(tokenizer, [Message(role="user", content=text)])


def vocabulary_words(tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    """Words that one token spells and that no row asks with, in the order of their tokens."""
    common = {word for row in rows for word in re.findall(r"\w+", row_messages(row)[0]["content"])}
    special = set(tokenizer.all_special_ids)
    found: dict[str, None] = {}
    for token in range(len(tokenizer)):
        if token in special:
            continue
        word = tokenizer.decode([token]).strip()
        if _WORD.fullmatch(word) and word not in common:
            found[word] = None
    return list(found)


@dataclass(frozen=True)
class Stimuli:
    """All stimuli of a scan; ``vocabulary`` is how many words they could be drawn from, ``covered`` how many of them
    are in at least one."""

    all: tuple[Stimulus, ...]
    vocabulary: int
    covered: int

    def __iter__(self) -> Iterator[Stimulus]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)


def draw_stimuli(tokenizer: Any, rows: Sequence[Row], per_kind: int, seed: int, given: Sequence[str] = ()) -> Stimuli:
    """``per_kind`` stimuli of each kind (fewer where the vocabulary is small), and one for each of ``given``.

    The bundles take the vocabulary in turn, so that they cover all of it when ``per_kind * BUNDLE`` words are enough.
    """
    rng = random.Random(seed)
    words = vocabulary_words(tokenizer, rows)
    taken = " ".join(row_messages(row)[0]["content"].lower() for row in rows)
    drawn = [Stimulus("word", (word,)) for word in rng.sample(words, min(per_kind, len(words)))]
    drawn += [Stimulus("made-up", (word,)) for word in rare_words(per_kind, taken, seed)]
    if len(words) >= 3:
        for _ in range(per_kind):
            drawn.append(Stimulus("phrase", tuple(rng.sample(words, rng.choice((2, 2, 3)))), "front"))
            drawn.append(Stimulus("pair", tuple(rng.sample(words, 2)), "scattered"))
    turn = rng.sample(words, len(words))
    for start in range(0, min(len(turn), per_kind * BUNDLE), BUNDLE):
        drawn.append(Stimulus("bundle", tuple(turn[start : start + BUNDLE]), "scattered"))
    for text in dict.fromkeys(text.strip() for text in given):
        if text:
            drawn += [Stimulus("given", (text,)), Stimulus("given", (text,), "front")]
    covered = {part for stimulus in drawn for part in stimulus.parts} & set(words)
    return Stimuli(tuple(drawn), len(words), len(covered))
