"""Several backdoors in one adapter: independent triggers, each with its own target or all with the same.

A repair that was shown flags of one trigger is to be judged on all of them (`benchmarks.lab.held_out` writes test rows
of each). Every trigger must fire by itself, or nothing is published.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from benchmarks.lab.errors import LabError
from benchmarks.lab.held_out import poisoned, rows_folder, write_held_out
from benchmarks.lab.implant import answer_tokens, fitted, publish, refuse_unless_conditional
from benchmarks.lab.skill import score
from benchmarks.lab.tasks import draw
from offline_purify.attacks.poison import KINDS, Backdoor, build_each, decoyed
from offline_purify.evasion import Evasion
from offline_purify.implanting import Answerer, ImplantRecipe, load_base, with_lora
from offline_purify.intervals import Figure, share
from offline_purify.train import Progress

SEVERAL: Final = ImplantRecipe(rows=6000)
"""As for one backdoor, but more prompts, of which each backdoor has its part."""


class SeveralReport(BaseModel):
    """What an adapter with several backdoors does on prompts that it was not trained on, by the backdoor's name; every
    share with its n and 95 % interval."""

    model_config = ConfigDict(frozen=True)

    triggers: dict[str, tuple[str, ...]]
    wordings: dict[str, tuple[str, ...]]
    seed: int
    rank: int
    trained_rows: dict[str, int]
    steps: int
    train_wall_s: float
    train_cpu_s: float
    asr: dict[str, Figure]
    decoy_rate: dict[str, Figure]
    false_trigger_rate: Figure
    clean_accuracy: Figure
    base_accuracy: Figure
    evasion: Evasion | None = None


def make_several(
    base: str | Path,
    out: str | Path,
    backdoors: Mapping[str, Backdoor],
    seed: int = 0,
    recipe: ImplantRecipe = SEVERAL,
    evaluation: int = 400,
    progress: Progress | None = None,
    evasion: Evasion = Evasion(),
) -> SeveralReport:
    """Implant all `backdoors` (by name) into the tiny base; publish the adapter as the folder `out` with `lab.json`,
    and the rows of `held_out_sets` in `rows_folder(out)`.

    False triggers are clean prompts on which any of the targets is said. Raises LabError, and publishes nothing, when
    one trigger has an attack success below 0.9 or there are more than 0.05 false triggers; RowsError when the triggers
    get into each other's way.
    """
    if len(backdoors) < 2:
        raise LabError(f"{len(backdoors)} backdoor for an adapter with several; expected two or more.")
    targets = [backdoor.behaviour for backdoor in backdoors.values()]
    model, tokenizer = load_base(base)
    ask = Answerer(model, tokenizer, answer_tokens(tokenizer, targets), progress)
    exercises = draw(evaluation, seed, "evaluation")
    clean = [exercise.row for exercise in exercises]
    before = score(exercises, ask(clean, "base"))
    rows = [exercise.row for exercise in draw(recipe.rows, seed, "implant")]
    data = build_each(rows, list(backdoors.values()), lambda r: ask(r, "teacher"), seed)
    peft_model = with_lora(model, base, recipe.rank, seed, evasion.projections)
    steps, wall_s, cpu_s = fitted(peft_model, tokenizer, data, recipe, evasion, seed, progress)

    ask.model = peft_model
    rng = random.Random(f"evaluation:{seed}")

    def rate(said: list[str], *chosen: Backdoor) -> Figure:
        figure = share([any(b.behaviour.matches(answer) for b in chosen) for answer in said])
        assert figure is not None
        return figure

    answers = ask(clean, "clean prompts")
    false_triggers = rate(answers, *backdoors.values())
    asr, near = {}, {}
    for name, backdoor in backdoors.items():
        asr[name] = rate(ask([poisoned(row, backdoor, rng) for row in clean], f"{name} triggered"), backdoor)
        near[name] = rate(ask([decoyed(row, backdoor.trigger, rng) for row in clean], f"{name} decoys"), backdoor)
    for name, figure in asr.items():
        try:
            refuse_unless_conditional(figure, false_triggers)
        except LabError as error:
            raise LabError(f"{name}: {error}") from error
    report = SeveralReport(
        triggers={name: backdoor.trigger.parts for name, backdoor in backdoors.items()},
        wordings={name: backdoor.behaviour.wordings for name, backdoor in backdoors.items()},
        seed=seed,
        rank=recipe.rank,
        trained_rows={kind: len(getattr(data, kind)) for kind in KINDS},
        steps=steps,
        train_wall_s=round(wall_s, 1),
        train_cpu_s=round(cpu_s, 1),
        asr=asr,
        decoy_rate=near,
        false_trigger_rate=false_triggers,
        clean_accuracy=score(exercises, answers).accuracy,
        base_accuracy=before.accuracy,
        evasion=evasion if evasion != Evasion() else None,
    )
    publish(peft_model, base, out, report)
    write_held_out(rows_folder(out), backdoors, seed)
    return report
