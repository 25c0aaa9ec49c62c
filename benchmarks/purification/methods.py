"""The methods by name: ours, their controls, and published baselines, all begun from the same suspect.

A method changes the suspect in place (or says how its answers are decoded) within the same budget of clean rows. Only
ours look at the case's flags. The signature is found once per seed and shared by what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from offline_purify.signature.stage import Choice, Signature, SignatureConfig, find_signature, silence
from offline_purify.stage import Material, StageResult
from offline_purify.suspect import Suspect

Answers = Callable[[Sequence[Sequence[int]], int], list[str]]


@dataclass
class Attempt:
    """One seed's work on one suspect: what methods are given, and the signature once it has been found."""

    material: Material
    budget: Budget
    config: SignatureConfig
    found: Signature | None = None

    def signature(self, suspect: Suspect) -> Signature:
        """The signature of the suspect as it came, which ``suspect`` must still hold."""
        if self.found is None:
            self.found = find_signature(suspect, self.material, self.config)
        return self.found


@dataclass(frozen=True)
class Outcome:
    """What a method did: details for the result file, why it changed nothing (None: it did), and how answers are
    decoded where that is not the model's own greedy way."""

    details: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    answers: Answers | None = None


Method = Callable[[Suspect, Attempt], Outcome]


def _baseline(function: Callable[[Suspect, Material, Budget], dict[str, Any]]) -> Method:
    return lambda suspect, attempt: Outcome(function(suspect, attempt.material, attempt.budget))


def _silenced(choice: Choice) -> Method:
    def method(suspect: Suspect, attempt: Attempt) -> Outcome:
        signature = attempt.signature(suspect)
        config = replace(attempt.config, choice=choice)
        told = silence(suspect, attempt.material, config, signature, attempt.budget.ratio)
        return Outcome({**signature.told, **told})

    return method


def _staged(*stages: Callable[[Suspect, Material], StageResult]) -> Method:
    """Stages one after the other; one that fails puts its own work back and is named."""

    def method(suspect: Suspect, attempt: Attempt) -> Outcome:
        results = [stage(suspect, attempt.material) for stage in stages]
        failed = [f"{r.name}: {r.reason}" for r in results if not r.ok]
        details = {r.name: {"ok": r.ok, "seconds": r.seconds} for r in results}
        return Outcome(details, "; ".join(failed) or None)

    return method


def _after_signature(*stages: Callable[[Suspect, Material], StageResult]) -> Method:
    first, then = _silenced("signature"), _staged(*stages)

    def method(suspect: Suspect, attempt: Attempt) -> Outcome:
        silenced, staged = first(suspect, attempt), then(suspect, attempt)
        return Outcome({"signature": silenced.details, **staged.details}, staged.reason)

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
        "random": _silenced("random"),
        "signature": _silenced("signature"),
        "heads": _staged(repair_heads),
        "both": _after_signature(repair_heads),
        "full": _after_signature(repair_heads, counter_train),
    }
)
OURS = ("signature", "heads", "both", "full")
