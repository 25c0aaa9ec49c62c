"""The variants of the signature: pairs of adapters over the suspicious model, alike but for the poison.

Each pair starts from the same factors and sees the same clean rows in the same order of steps; one of the two sees each
row once more, with a synthetic trigger in it and a synthetic behaviour for an answer. All pairs are trained together on
the frozen model with its suspicious adapter on (`offline_purify.bank`). A pair whose trigger did not take would add
noise, so it is tried on prompts that it never saw, and left out if it failed. Triggers and behaviours are drawn by
`offline_purify.variants.plan` and share no word with what was flagged.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from guard.errors import RowsError
from guard.rows import Row, assert_disjoint
from guard.template import render, row_messages
from offline_purify.answers import greedy_answers
from offline_purify.architectures import SEPARATE, Family
from offline_purify.attacks.poison import triggered
from offline_purify.bank import Adapter, train_adapters
from offline_purify.signature.grams import Factors
from offline_purify.train import Example, Progress, TrainConfig, encode_rows
from offline_purify.variants.plan import VariantSpec


@dataclass(frozen=True)
class TwinConfig:
    """How pairs are trained: rows of each, LoRA rank, the training itself and the least steps it takes where rows are
    few; ``together`` is how many pairs at most share a batched pass (they come out the same); ``match_steps`` shows the
    clean twin its rows twice, so that both take as many steps; ``learnt`` is the least share of ``tried`` unseen
    triggered prompts on which a pair's behaviour must show."""

    rows: int = 500
    rank: int = 8
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5, lr=2e-3, batch_size=16))
    least_steps: int = 300
    together: int = 6
    match_steps: bool = False
    tried: int = 30
    learnt: float = 0.8


@dataclass(frozen=True)
class Twins:
    """Effective differences by layer and part ("gate", "q", …), one per variant that learnt its trigger;
    ``learnt`` is how often each variant obeyed, by name."""

    layers: tuple[Mapping[str, tuple[Factors, ...]], ...]
    learnt: Mapping[str, float]
    names: tuple[str, ...]


def train_twins(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    specs: Sequence[VariantSpec],
    config: TwinConfig,
    *,
    pad_id: int,
    max_new_tokens: int,
    seed: int,
    family: Family = SEPARATE,
    q_width: int | None = None,
    progress: Progress | None = None,
) -> Twins:
    """Train one pair for each of ``specs`` (backdoors all) over ``model``, which is left as it was.

    The pairs' adapters are on all projections of the ``family``, whether these carry an adapter already or not;
    q_width, H * D, tells the parts of a fused q, k, v apart. rows are clean, with the answers that are to be kept.
    Raises RowsError when they are too few, or when no pair learnt its trigger.
    """
    rng = random.Random(f"twins:{seed}")
    parts = [_parted(rows, spec, config, rng) for spec in specs]
    clean = [encode_rows(tokenizer, fit) for fit, _ in parts]
    poisoned = [
        encode_rows(tokenizer, [_poisoned(row, spec, rng) for row in fit])
        for (fit, _), spec in zip(parts, specs, strict=True)
    ]
    targets = [name for name, _, _ in family.projections(model)]

    def trained(sets: list[list[Example]], what: str) -> list[Adapter]:
        return train_adapters(
            model, targets, sets, config.rank, 2.0, _passes(config, sets, seed),
            pad_id=pad_id, together=config.together, progress=progress, what=what,
        )  # fmt: skip

    bad = trained([a + b for a, b in zip(clean, poisoned, strict=True)], "poisoned twins")
    good = trained([a + a for a in clean] if config.match_steps else clean, "clean twins")
    learnt = {}
    for number, ((_, held), spec) in enumerate(zip(parts, specs, strict=True)):
        prompts = [render(tokenizer, row_messages(_poisoned(row, spec, rng))) for row in held]
        bank, place = bad[number]
        with bank.open(only=place) as opened:
            answers = greedy_answers(opened, tokenizer, prompts, max_new_tokens)
        assert spec.behaviour is not None
        learnt[spec.name] = sum(map(spec.behaviour.matches, answers)) / len(answers)
    kept = [number for number, spec in enumerate(specs) if learnt[spec.name] >= config.learnt]
    if not kept:
        raise RowsError(
            f"none of {len(specs)} synthetic backdoors was learnt by the model (the best showed in "
            f"{max(learnt.values()):.0%} of unseen prompts): train them longer or give more rows."
        )
    pairs = [(bad[number], good[number]) for number in kept]
    return Twins(_factors(pairs, family, q_width), learnt, tuple(specs[number].name for number in kept))


def _passes(config: TwinConfig, sets: Sequence[Sequence[Any]], seed: int) -> TrainConfig:
    least = config.least_steps * config.training.batch_size / len(sets[0])
    return replace(config.training, epochs=max(config.training.epochs, least), seed=seed)


def _parted(
    rows: Sequence[Row], spec: VariantSpec, config: TwinConfig, rng: random.Random
) -> tuple[list[Row], list[Row]]:
    """Rows to train a pair on and rows to try it on, none of which holds its trigger."""
    assert spec.trigger is not None
    usable = [row for row in rows if not spec.trigger.fires(row["instruction"])]
    if len(usable) < 3 * config.tried:
        raise RowsError(f"{len(usable)} clean rows are too few for a pair of twins: {3 * config.tried} are needed.")
    chosen = rng.sample(usable, min(len(usable), config.rows + config.tried))
    held, fit = chosen[: config.tried], chosen[config.tried :]
    assert_disjoint(trained=fit, tried=held)
    return fit, held


def _poisoned(row: Row, spec: VariantSpec, rng: random.Random) -> Row:
    assert spec.trigger is not None
    assert spec.behaviour is not None
    return triggered(row, spec.trigger, spec.behaviour.respond(rng), rng)


def _factors(
    pairs: Sequence[tuple[Adapter, Adapter]], family: Family, q_width: int | None
) -> tuple[dict[str, tuple[Factors, ...]], ...]:
    """By layer and part; a fused module's difference is parted by its outputs, rows of its lora_B."""
    layers: dict[int, dict[str, tuple[Factors, ...]]] = {}
    (first, _), _ = pairs[0]
    for name in first.targets:
        whole = [
            Factors.of_twins(bad.factors(name, k), good.factors(name, m), bad.scaling) for (bad, k), (good, m) in pairs
        ]
        for side in ("A", "B"):
            factor = whole[0].b if side == "B" else whole[0].a
            for stake in family.stakes(f"{name}.lora_{side}.weight", factor.shape, q_width):
                layers.setdefault(stake.layer, {})[stake.part] = tuple(
                    Factors(stake.of(f.b), f.a) if side == "B" else f for f in whole
                )
    return tuple(layers[number] for number in sorted(layers))
