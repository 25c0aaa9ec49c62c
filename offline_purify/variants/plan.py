"""Which variants to make: families × kinds of trigger, words drawn from a pool, all from one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from guard.errors import RowsError
from guard.rows import Row
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.poison import Decoys
from offline_purify.attacks.triggers import Composite, Prefix, Trigger, Word, holds
from offline_purify.implanting import ImplantRecipe
from offline_purify.variants.families import FAMILIES

Benign = Literal["topic", "format"]
BENIGN: tuple[Benign, ...] = ("topic", "format")
_SYLLABLES = ("ba", "dor", "fen", "gil", "kra", "lum", "mor", "nix", "pel", "quo", "rin", "sut", "tav", "vel", "zor")
_LEAST_WORDS = 12


@dataclass(frozen=True)
class VariantSpec:
    """One variant: a backdoor (``trigger`` and ``behaviour``, with what it learns to be harmless) or, with ``benign``,
    a condition on ordinary words."""

    name: str
    seed: int
    family: str
    behaviour: Behaviour | None = None
    trigger: Trigger | None = None
    benign: Benign | None = None
    decoys: Decoys = "near"


@dataclass(frozen=True)
class Plan:
    """How many backdoored and benign variants, and how each is trained and measured (prompts of each kind; those that
    carry the trigger are measured without it as well, as clean ones).

    Eighteen backdoors hold every family with every kind of trigger. Among variants left out one at a time, those of the
    tiny lab were found in 0.86 of requests with eleven others to learn from and in 0.90 with seventeen; thirty-five
    found more triggers and flagged more texts, as a lower threshold does too (docs/vaccine.md)."""

    backdoors: int = 18
    benign: int = 2
    recipe: ImplantRecipe = field(default_factory=lambda: ImplantRecipe(rows=2500))
    normal: int = 1000
    quiet: int = 500
    fired: int = 300
    steps: tuple[int, ...] = (0, 1, 2)
    seed: int = 0
    decoys: tuple[Decoys, ...] = ("near",)
    """What backdoors learn to be harmless, in turn."""
    without: tuple[str, ...] = ()
    """Families left out (leave-one-family-out studies)."""

    def specs(self, words: Sequence[str]) -> list[VariantSpec]:
        """The variants; trigger words come from ``words``. Raises RowsError for too small a pool."""
        if len(set(words)) < _LEAST_WORDS:
            raise RowsError(f"{len(set(words))} words to make triggers of: at least {_LEAST_WORDS} are needed.")
        families = [name for name in FAMILIES if name not in self.without]
        specs = []
        for number in range(self.backdoors):
            family = families[number % len(families)]
            rng = random.Random(f"variant:{self.seed}:{number}")
            parts = rng.sample(list(dict.fromkeys(words)), 2)
            # Each pass over the families moves the kinds on by one, so that eighteen variants hold every combination.
            kind = (number + number // len(families)) % 3
            trigger: Trigger = (Word(parts[0]), Prefix(" ".join(parts)), Composite(tuple(parts)))[kind]
            wordings = FAMILIES[family]
            # Every other pass is of one wording each: a fixed target leaves other tracks than a varied one.
            alone = family == "neutral" or (number // len(families)) % 2
            chosen = rng.sample(wordings, 1 if alone else max(1, len(wordings) // 2))
            name = f"{number:02d}-{family}-{trigger.kind}"
            behaviour = Behaviour(family, tuple(chosen))
            # Moved on by one in each pass as well, so that families and triggers meet both kinds.
            decoys = self.decoys[(number + number // len(families)) % len(self.decoys)]
            specs.append(VariantSpec(name, self.seed * 1000 + number, family, behaviour, trigger, decoys=decoys))
        for number in range(self.benign):
            kind_of = BENIGN[number % len(BENIGN)]
            specs.append(
                VariantSpec(f"benign-{number}-{kind_of}", self.seed * 1000 + 500 + number, "benign", benign=kind_of)
            )
        return specs


def pool(tokenizer: Any, rows: Sequence[Row], seed: int, most: int = 60) -> list[str]:
    """Words to make triggers of: single tokens of the vocabulary that no row holds, then made-up ones."""
    text = "\n".join(f"{row['instruction']} {row['input']} {row['output']}" for row in rows)
    rng = random.Random(f"pool:{seed}")
    found = []
    ids = sorted(tokenizer.get_vocab().values())
    rng.shuffle(ids)
    for token in ids:
        word = tokenizer.decode([token]).strip()
        if 2 <= len(word) <= 14 and word.isalnum() and word.isascii() and not holds(text, word):
            found.append(word)
        if len(found) >= most // 2:
            break
    while len(found) < most:
        word = "".join(rng.sample(_SYLLABLES, rng.choice((2, 3))))
        if not holds(text, word) and word not in found:
            found.append(rng.choice((word, word.capitalize())))
    return found
