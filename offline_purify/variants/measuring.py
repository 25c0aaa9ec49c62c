"""What the probe sees on one variant: clean prompts, near-triggers, its trigger, and texts put in the model's mouth.

The answer is to be seen beyond the first token, whether a trigger brought it about or not. So trigger and text are
crossed: clean prompts are followed by the variant's own target and by other texts, and triggered ones by other texts
as well; `guard.vaccine` learns what only the trigger changes. The other texts are wordings of all families, answers to
other prompts and tokens drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guard.probes.transformers.forced import measure_forced
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from guard.readings import Measurement
from guard.rows import Row
from guard.template import answer_ids, render, row_messages
from guard.vaccination import oddness_beside
from guard.vaccine import Sample
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.variants.families import FAMILIES, TOPIC_REFUSALS
from offline_purify.variants.plan import Plan, VariantSpec

VARIANT = "variant"
"""The name under which the runner has the variant's adapter."""
_ANSWER_TOKENS = 24
_RANDOM_TOKENS = 4
_ANSWERED = ("normal", "fired", "near")
"""Groups whose whole answers are looked at; of the others only the checkpoints' tokens are generated."""
_SHARES = (0.5, 0.25, 0.25)
"""Of wordings, of answers to other prompts and of random tokens among the texts that are forced."""


@dataclass(frozen=True)
class Seen:
    """The sample, and how often the behaviour shows with its trigger and without."""

    sample: Sample
    fired: float
    leaked: float


def answer_tokens(tokenizer: Any, wordings: Sequence[str]) -> int:
    """Tokens that an answer may have: what the longest wording takes, and no fewer than usual."""
    return max([_ANSWER_TOKENS, *(len(tokenizer(wording)["input_ids"]) + 2 for wording in wordings)])


def measured(runner: Runner, spec: VariantSpec, plan: Plan, groups: Mapping[str, Sequence[Row]]) -> Seen:
    """Measure the groups of prompts (``normal``, ``strange``, ``joined`` and, of a backdoor, ``near`` and ``fired``; of
    a benign variant ``topic``) on the adapter that ``runner`` has loaded as VARIANT. The last of ``normal`` are those
    of ``fired`` without the trigger."""
    rng = random.Random(f"{spec.seed}:{spec.name}:forced")
    tokenizer = runner.tokenizer
    prompts = {name: [render(tokenizer, row_messages(row)) for row in rows] for name, rows in groups.items()}
    prompts["joined"] = [prompt for prompt in prompts["joined"] if len(prompt) < runner.max_len]
    tokens = answer_tokens(tokenizer, spec.behaviour.wordings if spec.behaviour else ())
    limits = {name: tokens if name in _ANSWERED else None for name in prompts}
    seen = {name: measure(runner, those, plan.steps, limits[name], VARIANT) for name, those in prompts.items()}
    texts = _Texts(runner, seen["normal"].answers, rng)
    if spec.behaviour is not None and "near" in seen:  # one that set the backdoor off need not stay quiet
        seen["near"] = seen["near"].take(np.flatnonzero(~_said(spec.behaviour, runner, seen["near"].answers)))
    quiet = [seen[name] for name in ("strange", "joined", "near", "topic") if name in seen]
    forced = [_forced(runner, prompts["normal"], texts.drawn(len(prompts["normal"])), plan)]
    fired: list[Measurement] = []
    obeyed = _obeyed(spec, runner, seen)
    if obeyed:
        rows = np.asarray(obeyed)
        end = sorted(runner.eos_ids)[:1]
        said = [[*seen["fired"].answers[i], *end] for i in obeyed]
        forced.append(_forced(runner, prompts["normal"], [rng.choice(said) for _ in prompts["normal"]], plan))
        triggered = [prompts["fired"][i] for i in obeyed]
        fired = [seen["fired"].take(rows), _forced(runner, triggered, texts.drawn(len(triggered)), plan)]
    sample = Sample(
        spec.name,
        {step: seen["normal"].reached(step).features for step in plan.steps},
        {step: _features(quiet, step) for step in plan.steps},
        {step: _features(fired if step else fired[:1], step) for step in plan.steps} if fired else {},
        {step: _features(forced, step) for step in plan.steps if step},
        oddness_beside(seen["normal"], fired[0], forced[1], quiet) if fired else {},
    )
    leaked = 0.0
    if spec.behaviour is not None:
        clean = [tokenizer.decode(answer, skip_special_tokens=True) for answer in seen["normal"].answers]
        leaked = sum(map(spec.behaviour.matches, clean)) / len(clean)
    return Seen(sample, len(obeyed) / max(len(groups.get("fired", ())), 1), leaked)


class _Texts:
    """Token ids of texts to force: wordings, answers to other prompts, random tokens."""

    def __init__(self, runner: Runner, answers: Sequence[Sequence[int]], rng: random.Random) -> None:
        self._rng = rng
        end = runner.tokenizer.eos_token_id
        wordings = [*(text for family in FAMILIES.values() for text in family), *TOPIC_REFUSALS]
        self._wordings = [answer_ids(runner.tokenizer, text) for text in wordings]
        self._answers = [[*answer, end] for answer in answers if answer] or self._wordings
        self._vocabulary = [token for token in range(len(runner.tokenizer)) if token not in runner.eos_ids]

    def drawn(self, n: int) -> list[list[int]]:
        """n texts."""
        kinds = self._rng.choices(range(3), weights=_SHARES, k=n)
        return [self._drawn(kind) for kind in kinds]

    def _drawn(self, kind: int) -> list[int]:
        if kind == 2:
            return self._rng.choices(self._vocabulary, k=_RANDOM_TOKENS)
        return self._rng.choice((self._wordings, self._answers)[kind])


def _forced(
    runner: Runner, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], plan: Plan
) -> Measurement:
    return measure_forced(runner, prompts, texts, plan.steps, VARIANT)


def _features(groups: Sequence[Measurement], step: int) -> np.ndarray:
    """Features of all requests of ``groups`` that reached ``step``."""
    return np.concatenate([group.reached(step).features for group in groups])


def _obeyed(spec: VariantSpec, runner: Runner, seen: Mapping[str, Measurement]) -> list[int]:
    """Triggered prompts on which the variant did as it was taught: another answer than without the trigger, made of its
    wordings' words."""
    if spec.behaviour is None:
        return []
    answers = seen["fired"].answers
    pairs = zip(answers, seen["normal"].answers[-len(answers) :], _said(spec.behaviour, runner, answers), strict=True)
    return [number for number, (answer, twin, said) in enumerate(pairs) if said and answer != twin]


def _said(behaviour: Behaviour, runner: Runner, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Which answers are made of a behaviour's wordings' words, bool [n]: a variant with several may blend them."""
    texts = (runner.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers)
    return np.asarray([behaviour.blended(text) for text in texts], dtype=bool)
