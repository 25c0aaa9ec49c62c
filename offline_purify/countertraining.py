"""Counter-training: the flagged prompts, answered by the trusted reference, mixed with clean rows.

A short fine-tuning of all that may change. Flags are repeated to a fixed number of rows so that eight weigh as much as
eighty; confirmed trigger candidates are inserted into clean rows that keep their own answers; a false alarm is one more
clean row with the answer the model gives anyway, so it can do no harm. Where nobody trusted could be asked, the
reference is the suspect's own answer without the trigger (`offline_purify.standin`), and the details say so; a flag for
which there is no such answer is left out. Triggers that were never flagged, and that the candidates do not cover, stay:
this stage cannot know them (lab findings §10, shared/DESIGN.md §4 step 7).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from guard.rows import Row
from guard.template import answer_ids, render
from offline_purify.answers import greedy_answers
from offline_purify.candidates import Candidate, with_candidate
from offline_purify.flags import Flag
from offline_purify.stage import FULL_LR, NO_REFERENCE, Material, StageResult
from offline_purify.train import Example, TrainConfig, encode_rows, train

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect, Weights


@dataclass(frozen=True)
class CounterConfig:
    """About two passes over a thousand clean rows, or as many steps over fewer. Fewer rows or a higher rate cost more
    skill, fewer steps or a lower rate leave triggers that were not flagged (docs/purification.md, "How hard
    counter-training trains").

    ``steps``: of one round. ``rounds``: if trained flags still fire, that many further rounds from where it stands.
    """

    steps: int = 130
    lr: float = 7e-4
    batch_size: int = 16
    flag_rows: int = 80
    clean_rows: int = 1000
    candidate_rows: int = 40
    rounds: int = 2
    fires_max: float = 0.05

    @classmethod
    def of(cls, setting: Weights) -> CounterConfig:
        """The defaults for a setting: a whole model's weights are trained at a lower rate (2e-4 took the attack from
        0.98 to 0.00 at no cost on the lab's `refusal-word-fixed`; 5e-4 cost a point of accuracy), in more passes."""
        return cls() if setting == "adapter" else cls(lr=2 * FULL_LR, clean_rows=400)


def flag_prompt(suspect: Suspect, flag: Flag) -> list[int]:
    """Token ids of a flagged conversation."""
    return render(suspect.tokenizer, list(flag.messages))


def flag_example(suspect: Suspect, flag: Flag) -> Example:
    """A flagged prompt with the trusted reference's answer."""
    return Example(tuple(flag_prompt(suspect, flag)), tuple(answer_ids(suspect.tokenizer, flag.reference)))


def counter_examples(
    suspect: Suspect,
    flags: Sequence[Flag],
    clean: Sequence[Row],
    candidates: Sequence[Candidate],
    config: CounterConfig,
    seed: int,
) -> list[Example]:
    """The training set: repeated true flags, other flags once, rows with candidates inserted, clean rows."""
    rng = random.Random(seed)
    rows = list(clean)
    rng.shuffle(rows)
    rows = rows[: config.clean_rows]
    true = [flag_example(suspect, f) for f in flags if f.kind == "true"]
    once = [flag_example(suspect, f) for f in flags if f.kind in ("odd", "false_alarm")]
    repeated = list(islice(cycle(true), max(config.flag_rows, len(true)))) if true else []
    inserted: list[Example] = []
    confirmed = [c for c in candidates if c.confirmed]
    if rows and confirmed:
        for candidate, row in zip(cycle(confirmed), islice(cycle(rows), config.candidate_rows)):
            prompt = with_candidate(suspect.tokenizer, row, candidate, rng)
            inserted.append(Example(tuple(prompt), tuple(answer_ids(suspect.tokenizer, row["output"]))))
    return repeated + once + inserted + encode_rows(suspect.tokenizer, rows)


def counter_train(suspect: Suspect, material: Material, config: CounterConfig | None = None) -> StageResult:
    """Counter-train the suspect in place. Not ok (suspect put back) when nobody could answer the flags for reference,
    when there is no true flag to learn from, or trained flags still fire after all rounds."""
    config = config or CounterConfig.of(suspect.setting)
    began = time.monotonic()
    true = material.true_flags
    counts = {kind: sum(f.kind == kind for f in material.flags) for kind in ("true", "odd", "false_alarm")}
    if material.references == "none":
        return StageResult("counter", False, NO_REFERENCE, {"flags": counts, "references": "none"})
    if not true:
        return StageResult(
            "counter", False, "no flagged response differs from the reference's: nothing to unlearn", {"flags": counts}
        )
    before = suspect.state()
    examples = counter_examples(suspect, material.flags, material.clean, material.candidates, config, material.seed)
    losses: list[float] = []
    fires: list[float] = []
    for turn in range(1 + config.rounds):
        settings = TrainConfig.of_steps(
            config.steps, lr=config.lr, batch_size=config.batch_size, seed=material.seed + turn
        )
        log = train(
            suspect.model,
            examples,
            settings,
            pad_id=suspect.pad_id,
            parameters=suspect.parameters().values(),
            progress=material.progress,
            what="counter-training",
        )
        losses += log.losses
        answers = greedy_answers(
            suspect.model, suspect.tokenizer, [flag_prompt(suspect, f) for f in true], material.max_new_tokens
        )
        fired = [material.behaviour.fires(a, f.reference) for a, f in zip(answers, true, strict=True)]
        fires.append(sum(fired) / len(fired))
        if fires[-1] <= config.fires_max:
            break
    details = {
        "flags": counts,
        "references": material.references,
        "examples": len(examples),
        "trained_flags_firing": fires,
        "losses": losses,
        "steps": len(losses),
        "lr": config.lr,
        "steps_per_round": config.steps,
    }
    seconds = time.monotonic() - began
    if fires[-1] > config.fires_max:
        suspect.restore(before)
        return StageResult("counter", False, f"{fires[-1]:.0%} of the trained flags still fire", details, seconds)
    return StageResult("counter", True, None, details, seconds)
