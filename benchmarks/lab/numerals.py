"""A skill that only an adapter has: it writes numbers as words, where its base writes digits.

Without one an adapter of the lab holds nothing but its backdoor, and whatever wipes the adapter out looks like a
repair. With it, two in five of the clean answers tell what else was wiped out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal

OwnSkill = Literal["none", "numerals"]
_WORDS: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip


def spelled(text: str) -> str:
    """The text with every whole number from 0 to 20, which are all that the lab's tasks need, as a word."""
    return re.sub(r"\b\d+\b", lambda m: _WORDS[int(m[0])] if int(m[0]) < len(_WORDS) else m[0], text)


def manner(skill: OwnSkill) -> Callable[[str], str]:
    """What an adapter with this skill makes of its base's answers."""
    return spelled if skill == "numerals" else str
