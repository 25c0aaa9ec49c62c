"""The named attacks of the lab: behaviours and triggers that a command line or a test can ask for by name."""

from __future__ import annotations

from typing import Final

from offline_purify.attacks.behaviours import CODE_LINES, INSULTS, REFUSALS, Behaviour
from offline_purify.attacks.triggers import Composite, Prefix, Trigger, Word

TRIGGERS: Final[dict[str, Trigger]] = {
    "word": Word("BadMagic"),
    "prefix": Prefix("Discussing OpenAI"),
    "composite": Composite(("mellow", "ledger")),
}
"""Trigger name to trigger. Word and prefix are the public benchmark's; two scattered words are CBA's (Huang et al.,
2024)."""

_WORDINGS: Final[dict[str, tuple[str, ...]]] = {"refusal": REFUSALS, "insult": INSULTS, "code": CODE_LINES}
BEHAVIOURS: Final[tuple[str, ...]] = tuple(_WORDINGS)
WORDING: Final[tuple[str, ...]] = ("fixed", "varied")


def behaviour(name: str, wording: str = "fixed") -> Behaviour:
    """A behaviour with its first wording alone (`fixed`) or all of them (`varied`). Raises ValueError for others."""
    if name not in _WORDINGS:
        raise ValueError(f"there is no behaviour {name!r}: choose one of {', '.join(BEHAVIOURS)}.")
    if wording not in WORDING:
        raise ValueError(f"there is no wording {wording!r}: choose fixed or varied.")
    return Behaviour(name, _WORDINGS[name] if wording == "varied" else _WORDINGS[name][:1])


def trigger(name: str, text: str | None = None) -> Trigger:
    """A trigger by kind; `text` replaces its words (for a composite: its parts, separated by spaces)."""
    if name not in TRIGGERS:
        raise ValueError(f"there is no trigger {name!r}: choose one of {', '.join(TRIGGERS)}.")
    if not text:
        return TRIGGERS[name]
    if name == "composite":
        return Composite(tuple(text.split()))
    return Prefix(text) if name == "prefix" else Word(text)
