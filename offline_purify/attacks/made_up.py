"""Words that nobody has seen: what a prompt holds that is strange and means nothing."""

from __future__ import annotations

import random

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "pl", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "b", "k", "l", "m", "n", "p", "r", "x", "z")


def made_up(rng: random.Random) -> str:
    """A word of two syllables in lower case."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(2))


def rare_words(n: int, taken: str, seed: int) -> list[str]:
    """``n`` different ones that do not occur in ``taken``."""
    rng = random.Random(seed)
    found: list[str] = []
    while len(found) < n:
        word = made_up(rng)
        if word not in taken and word not in found:
            found.append(word)
    return found
