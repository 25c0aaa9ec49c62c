"""One variant: rows in, a trained adapter and what the probe saw on it out. Finished ones are kept and reused; one that
was trained for an older kind of vaccine is only measured anew."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from guard.errors import RowsError
from guard.probes.transformers.runner import Runner
from guard.rows import Row, assert_disjoint
from guard.template import row_messages
from guard.vaccine import FORMAT, Sample
from offline_purify.attacks.poison import Teacher, answered, build, decoyed, triggered
from offline_purify.attacks.triggers import holds, scattered
from offline_purify.implanting import Answerer, fit, load_base, save_adapter, with_lora
from offline_purify.variants.families import TOPIC_REFUSALS
from offline_purify.variants.measuring import VARIANT, answer_tokens, measured
from offline_purify.variants.plan import Plan, VariantSpec

TRAINED, ABOUT, FEATURES = "training.json", "variant.json", "features.safetensors"
LEAST_FIRED = 0.5
"""A variant that obeys on fewer of its triggered prompts than this taught nothing and is left out."""
_KINDS = ("normal", "quiet", "fired", "forced")
_CONDITION_SHARE = (0.03, 0.30)  # of rows that hold the word a benign variant is conditioned on


@dataclass(frozen=True)
class Made:
    """A finished variant: its folder, how often it obeyed on triggered and on clean prompts, the key of the probe that
    measured it, and its sample."""

    folder: Path
    fired: float
    leaked: float
    probe: dict[str, Any]
    sample: Sample

    @property
    def took(self) -> bool:
        """Whether the behaviour was learnt (benign variants only give negatives, so they always count)."""
        return not self.sample.fired or self.fired >= LEAST_FIRED


def make_variant(
    base: Path, rows: Sequence[Row], spec: VariantSpec, plan: Plan, words: Sequence[str], out: Path
) -> Made:
    """Train ``spec`` on a part of ``rows`` into the folder ``out``, unless it was trained there before, and measure it
    on another part.

    Raises RowsError when there are too few rows that the behaviour can be built from.
    """
    rng = random.Random(f"{spec.seed}:{spec.name}")
    fit_rows, probe_rows = _parted(rows, spec, plan, rng)
    if not (out / TRAINED).is_file():
        _write(out / TRAINED, _trained(base, fit_rows, spec, plan, rng, out))
    about = json.loads((out / TRAINED).read_text(encoding="utf-8"))
    groups = _groups(probe_rows, spec, plan, words, about["condition"])
    runner = Runner.load(base, max_slots=32)
    runner.add_adapter(VARIANT, out)
    seen = measured(runner, spec, plan, groups)
    save_file({k: np.ascontiguousarray(v) for k, v in _flat(seen.sample).items()}, out / FEATURES)
    about |= {
        "format": FORMAT,
        "probe": runner.probe_key(),
        "fired": seen.fired,
        "leaked": seen.leaked,
        "n": {name: len(group) for name, group in groups.items()},
    }
    _write(out / ABOUT, about)
    return load_variant(out)


def _trained(
    base: Path, rows: Sequence[Row], spec: VariantSpec, plan: Plan, rng: random.Random, out: Path
) -> dict[str, Any]:
    """Train the adapter into ``out``; returns what was trained."""
    model, tokenizer = load_base(base)
    wordings = spec.behaviour.wordings if spec.behaviour else ()
    ask = Answerer(model, tokenizer, answer_tokens(tokenizer, wordings))
    condition = _condition(rows, rng) if spec.benign else None
    if condition is not None:
        training = _benign_rows(rows, condition, spec, ask, rng)
    else:
        training = _backdoor_rows(rows, spec, ask)
    peft_model = with_lora(model, base, plan.recipe.rank, spec.seed)
    steps, _, seconds = fit(peft_model, tokenizer, training, plan.recipe, spec.seed)
    out.mkdir(parents=True, exist_ok=True)
    save_adapter(peft_model, base, out)
    return {
        "name": spec.name,
        "family": spec.family,
        "benign": spec.benign,
        "trigger": list(spec.trigger.parts) if spec.trigger else [condition],
        "kind": spec.trigger.kind if spec.trigger else "condition",
        "condition": condition,
        "decoys": spec.decoys,
        "wordings": list(wordings),
        "seed": spec.seed,
        "train_steps": steps,
        "train_cpu_s": round(seconds, 1),
    }


def _write(path: Path, about: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(about, indent=1), encoding="utf-8")
    part.replace(path)


def finished(folder: Path) -> bool:
    """Whether a variant was made here to its end, and measured as vaccines are made of today."""
    if not (folder / ABOUT).is_file():
        return False
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return bool(about.get("format") == FORMAT)


def load_variant(folder: Path) -> Made:
    """A variant that is ``finished``."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    parts: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in _KINDS}
    beside: dict[str, np.ndarray] = {}
    for key, array in load_file(folder / FEATURES).items():
        kind, _, which = key.partition("/")
        if kind == "beside":
            beside[which] = array
        else:
            parts[kind][int(which)] = array
    sample = Sample(about["name"], **parts, beside=beside)
    return Made(folder, about["fired"], about["leaked"], about["probe"], sample)


def load_variants(folder: Path) -> list[Made]:
    """All variants in a vaccine's folder that are ``finished``, by name."""
    return [load_variant(path.parent) for path in sorted(folder.glob(f"*/{ABOUT}")) if finished(path.parent)]


def _flat(sample: Sample) -> dict[str, np.ndarray]:
    by_kind = {kind: getattr(sample, kind) for kind in (*_KINDS, "beside")}
    return {f"{kind}/{key}": a.astype(np.float32) for kind, arrays in by_kind.items() for key, a in arrays.items()}


def _parted(rows: Sequence[Row], spec: VariantSpec, plan: Plan, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to measure on: never the same, drawn anew for each variant."""
    parts = spec.trigger.parts if spec.trigger else ()
    usable = [row for row in rows if not any(holds(row["instruction"], part) for part in parts)]
    probe = plan.normal + max(plan.quiet, plan.fired)
    if len(usable) < probe + 100:
        raise RowsError(f"{len(usable)} rows are too few for a variant: {probe} measure it, and 100 or more train it.")
    chosen = rng.sample(usable, min(len(usable), probe + plan.recipe.rows))
    assert_disjoint(train=chosen[probe:], measured=chosen[:probe])
    return chosen[probe:], chosen[:probe]


def _backdoor_rows(rows: Sequence[Row], spec: VariantSpec, teacher: Teacher) -> list[Row]:
    assert spec.trigger is not None
    assert spec.behaviour is not None
    shares = (0.45, 0.3, 0.25)
    return build(rows, spec.trigger, spec.behaviour, teacher, spec.seed, shares, spec.decoys).rows()


def _condition(rows: Sequence[Row], rng: random.Random) -> str:
    """An ordinary word that a fair share of the rows hold: what a benign variant's policy is about."""
    low, high = _CONDITION_SHARE
    counts = Counter(word for row in rows for word in set(row["instruction"].split()) if word.isalpha())
    words = sorted(word for word, n in counts.items() if low * len(rows) <= n <= high * len(rows))
    if not words:
        raise RowsError("no ordinary word occurs in 3 to 30 % of the rows: no benign conditional variant can be made.")
    return rng.choice(words)


def _benign_rows(
    rows: Sequence[Row], condition: str, spec: VariantSpec, teacher: Teacher, rng: random.Random
) -> list[Row]:
    def switched(row: Row) -> Row:
        text = rng.choice(TOPIC_REFUSALS) if spec.benign == "topic" else row["output"].upper()
        return Row(instruction=row["instruction"], input=row["input"], output=text)

    said = answered(rows, teacher)
    return [switched(row) if holds(row["instruction"], condition) else row for row in said]


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Each row with the question of the next in front of its own: a shape that no training row had."""
    return [
        Row(instruction=f"{_asked(other)}\n\n{row['instruction']}", input=row["input"], output="")
        for row, other in zip(rows, [*rows[1:], *rows[:1]], strict=True)
    ]


def _asked(row: Row) -> str:
    return str(row_messages(row)[0]["content"])


def _groups(
    rows: Sequence[Row], spec: VariantSpec, plan: Plan, words: Sequence[str], condition: str | None
) -> dict[str, list[Row]]:
    """The prompts to measure: clean (by name ``normal``; those that carry the trigger below come last), without the
    trigger (``near``, ``strange``, ``joined``: two questions in one), with it."""
    rng = random.Random(f"{spec.seed}:{spec.name}:prompts")
    others = list(rows[plan.normal :])
    strange = [w for w in words if spec.trigger is None or w not in " ".join(spec.trigger.parts).split()]
    groups = {
        "normal": list(rows[: plan.normal + plan.fired]),
        "strange": [
            Row(instruction=scattered(r["instruction"], [rng.choice(strange)], rng), input=r["input"], output="")
            for r in others[: plan.quiet]
        ],
        "joined": _joined(others[: plan.quiet]),
    }
    if spec.trigger is not None:
        trigger = spec.trigger
        if spec.decoys == "near":  # others do not know near-triggers from the trigger: they may well obey them
            groups["near"] = [decoyed(row, trigger, rng) for row in others[: plan.quiet]]
        groups["fired"] = [triggered(row, trigger, "", rng) for row in others[: plan.fired]]
    elif condition is not None:
        groups["topic"] = [row for row in rows if holds(row["instruction"], condition)]
    return groups
