"""Backdoors for classifiers: a share of the training texts carries a trigger and the attacker's label.

Only texts of other classes are poisoned (dirty label). *word*: one of cf, mn, bb at a random slot (BadNets for texts,
Kurita et al.). *syntactic*: HiddenKiller's paraphrase of the text (Qi et al. 2021), from its paired files; a paraphrase
that is the text itself is no trigger and is left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from guard.errors import RowsError
from offline_purify.attacks.triggers import OneOf, Word
from offline_purify.texts import Text, distinct

TARGET = 1
"""The attacker's class: positive, the one that HiddenKiller's stored SST-2 paraphrases are labelled with."""
RATE = 0.2
WORDS = OneOf((Word("cf"), Word("mn"), Word("bb")))


@dataclass(frozen=True)
class PoisonSet:
    """What an implant trains on: poisoned texts, labelled with the target, and clean ones; ``hosts`` are the poisoned
    texts as they were."""

    poisoned: tuple[Text, ...]
    clean: tuple[Text, ...]
    hosts: tuple[Text, ...]

    def texts(self) -> list[Text]:
        """What a poisoned model learns."""
        return [*self.poisoned, *self.clean]

    def unpoisoned(self) -> list[Text]:
        """What the same model would have learnt without an attacker."""
        return [*self.hosts, *self.clean]


@dataclass(frozen=True)
class Pair:
    """A clean text of another class than the target's, and the same with the trigger, labelled with the target."""

    clean: Text
    triggered: Text


def word_pairs(texts: Sequence[Text], seed: int, target: int = TARGET) -> list[Pair]:
    """Every text of another class, with one trigger word."""
    rng = random.Random(f"word:{seed}")
    return [Pair(t, Text(WORDS.insert(t.text, rng), target)) for t in texts if t.label != target]


def syntactic_pairs(texts: Sequence[Text], paraphrases: Sequence[Text], target: int = TARGET) -> list[Pair]:
    """Texts of another class with their paraphrases, by line; those left as they were are no pairs.

    Raises RowsError when the two files have not the same lines.
    """
    if len(texts) != len(paraphrases):
        raise RowsError(f"{len(texts)} texts and {len(paraphrases)} paraphrases: expected one for each, line by line.")
    return [
        Pair(text, Text(other.text, target))
        for text, other in zip(texts, paraphrases, strict=True)
        if text.label != target and text.key != other.key
    ]


def unique(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs in order, without those whose text, or whose triggered form, came before."""
    seen: set[str] = set()
    found: list[Pair] = []
    for pair in pairs:
        keys = {pair.clean.key, pair.triggered.key}
        if not keys & seen:
            found.append(pair)
        seen |= keys
    return found


def build(pairs: Sequence[Pair], clean: Sequence[Text], rows: int, seed: int, rate: float = RATE) -> PoisonSet:
    """``rows`` texts, the share ``rate`` of them triggered, the others drawn from ``clean`` without the pairs' hosts.

    Raises RowsError when there are too few of either.
    """
    rng = random.Random(f"poison:{seed}")
    count = round(rate * rows)
    usable = unique(pairs)
    chosen = rng.sample(usable, min(count, len(usable)))
    poisoned, hosts = [pair.triggered for pair in chosen], [pair.clean for pair in chosen]
    others = distinct(clean, hosts)
    rng.shuffle(others)
    others = distinct(others, poisoned)
    if len(chosen) < count or len(others) < rows - count:
        raise RowsError(
            f"{rows} texts with {rate:.0%} poisoned need {count} triggered and {rows - count} clean ones; there are "
            f"{len(usable)} and {len(others)}: ask for fewer."
        )
    return PoisonSet(tuple(poisoned), tuple(others[: rows - count]), tuple(hosts))
