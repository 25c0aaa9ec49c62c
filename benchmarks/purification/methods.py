"""The methods by name: ours, their controls, and published baselines, all begun from the same suspect.

A method changes the suspect in place (or says how its answers are decoded) within the same budget of clean rows. Only
ours look at the case's flags. The signature is found once per seed and shared by what is made of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from guard.errors import GuardError
from offline_purify.baselines.budget import Budget
from offline_purify.baselines.cleangen import cleangen_answers
from offline_purify.baselines.crow import crow
from offline_purify.baselines.fineprune import fineprune
from offline_purify.baselines.finetune import finetune
from offline_purify.baselines.int4 import int4
from offline_purify.baselines.magnitude import magnitude
from offline_purify.baselines.reinit import reinit
from offline_purify.baselines.wanda import wanda
from offline_purify.countertraining import counter_train
from offline_purify.heads.stage import repair_heads
from offline_purify.signature.find import find_signature
from offline_purify.signature.score import Signature
from offline_purify.signature.stage import Choice, SignatureConfig, silence
from offline_purify.stage import Material, StageResult
from offline_purify.suspect import Suspect

Answers = Callable[[Sequence[Sequence[int]], int], list[str]]


@dataclass
class Attempt:
    """One seed's work on one suspect: what methods are given, and the signature once it has been found; ``donors`` are
    other adapters of the same base, whose signatures an ablation tries."""

    material: Material
    budget: Budget
    config: SignatureConfig
    donors: tuple[Path, ...] = ()
    found: Signature | None = None
    finding_s: float = 0.0

    def signature(self, suspect: Suspect) -> Signature:
        """The signature of the suspect as it came, which ``suspect`` must still hold."""
        if self.found is None:
            began = time.monotonic()
            self.found = find_signature(suspect, self.material, self.config.search)
            self.finding_s = time.monotonic() - began
        return self.found


@dataclass(frozen=True)
class Outcome:
    """What a method did: details for the result file, why it changed nothing (None: it did), how answers are decoded
    where that is not the model's own greedy way, and whether the search for the signature is part of its price."""

    details: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    answers: Answers | None = None
    searched: bool = False


Method = Callable[[Suspect, Attempt], Outcome]


def _baseline(function: Callable[[Suspect, Material, Budget], dict[str, Any]]) -> Method:
    return lambda suspect, attempt: Outcome(function(suspect, attempt.material, attempt.budget))


def silenced(choice: Choice, ratio: float | None = None, **changes: Any) -> Method:
    """Channels silenced at the budget's ratio, chosen by ``choice``; ``changes`` are of the signature's config."""

    def method(suspect: Suspect, attempt: Attempt) -> Outcome:
        signature = attempt.signature(suspect)
        config = replace(attempt.config, choice=choice, **changes)
        told = silence(suspect, attempt.material, config, signature, ratio or attempt.budget.ratio)
        return Outcome({**signature.told, **told}, searched=choice not in ("random", "none"))

    return method


def staged(*stages: Callable[[Suspect, Material], StageResult]) -> Method:
    """Stages one after the other; one that fails puts its own work back and is named."""

    def method(suspect: Suspect, attempt: Attempt) -> Outcome:
        results = [stage(suspect, attempt.material) for stage in stages]
        failed = [f"{r.name}: {r.reason}" for r in results if not r.ok]
        details = {r.name: {"ok": r.ok, "seconds": r.seconds} for r in results}
        return Outcome(details, "; ".join(failed) or None)

    return method


def _after(choice: Choice, *stages: Callable[[Suspect, Material], StageResult]) -> Method:
    first, then = silenced(choice), staged(*stages)

    def method(suspect: Suspect, attempt: Attempt) -> Outcome:
        channels, rest = first(suspect, attempt), then(suspect, attempt)
        return Outcome({choice: channels.details, **rest.details}, rest.reason, searched=channels.searched)

    return method


def _cleangen(suspect: Suspect, attempt: Attempt) -> Outcome:
    with suspect.reference():
        pass  # a whole model without one is refused by name before anything is measured

    def answers(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        return cleangen_answers(suspect, prompts, max_new_tokens, attempt.material.progress)[0]

    return Outcome(answers=answers)


def _pure(_: Suspect, __: Attempt) -> Outcome:
    raise GuardError(
        "PURE prunes heads by the attention of an encoder's [CLS] row: it has nothing to say of a decoder."
    )


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "none": lambda suspect, attempt: Outcome(),
        "finetune": _baseline(finetune),
        "magnitude": _baseline(magnitude),
        "wanda": _baseline(wanda),
        "fineprune": _baseline(fineprune),
        "int4": _baseline(int4),
        "crow": _baseline(crow),
        "reinit": _baseline(reinit),
        "cleangen": _cleangen,
        "pure": _pure,
        "random": silenced("random"),
        "signature": silenced("signature"),
        "heads": staged(repair_heads),
        "both": _after("signature", repair_heads),
        "counter": staged(counter_train),
        "random_counter": _after("random", counter_train),
        "signature_counter": _after("signature", counter_train),
        "full": _after("signature", repair_heads, counter_train),
    }
)
