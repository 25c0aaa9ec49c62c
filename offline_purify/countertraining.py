"""Counter-training: the flagged prompts, answered by the trusted reference, mixed with clean rows.

A short fine-tuning of all that may change, in gentle rounds that end when hardly anything fires any more: neither flags
that are trained on nor, where trigger candidates were confirmed, clean rows kept back with one put in. Flags are
repeated to a fixed number of rows so that eight weigh as much as eighty; confirmed candidates are inserted into clean
rows that keep their own answers; a false alarm is one more clean row with the answer the model gives anyway, so it can
do no harm. Where nobody trusted could be asked, the reference is the suspect's own answer without the trigger
(`offline_purify.standin`), and the details say so; a flag for which there is no such answer is left out. Triggers that
were never flagged, and that the candidates do not cover, stay: this stage cannot know them (lab findings §10,
shared/DESIGN.md §4 step 7).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from guard.rows import Row
from guard.template import answer_ids, render
from offline_purify.answers import greedy_answers
from offline_purify.candidates import with_candidate
from offline_purify.flags import Flag
from offline_purify.stage import FULL_LR, NO_REFERENCE, Material, StageResult
from offline_purify.train import Example, TrainConfig, encode_rows, train

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect, Weights

Asked = tuple[list[int], str]
"""A prompt's token ids and its right answer."""


@dataclass(frozen=True)
class CounterConfig:
    """A round goes twice over the rows, the first at a third of the rate of the lab findings (§10), which costs less
    skill and ends most attacks (docs/purification.md, "How hard counter-training trains").

    ``rounds``: at most so many, each from where the last stands and at ``growth`` times its rate, while more than
    ``fires_max`` of the flags or of the rows kept back for asking fire. ``unseen_rows``: how many those are, a fifth of
    the clean rows at most. ``blind_rounds``: at least so many where there is no candidate to ask with.
    """

    epochs: float = 2.0
    lr: float = 3e-4
    batch_size: int = 16
    flag_rows: int = 80
    clean_rows: int = 400
    candidate_rows: int = 40
    unseen_rows: int = 40
    rounds: int = 4
    growth: float = 2.0
    blind_rounds: int = 3
    fires_max: float = 0.05

    @classmethod
    def of(cls, setting: Weights) -> CounterConfig:
        """The defaults for a setting: a whole model's weights are trained in longer rounds at a lower rate (2e-4 took
        the attack from 0.98 to 0.00 at no cost on the lab's `refusal-word-fixed`; 5e-4 cost a point of accuracy)."""
        return cls() if setting == "adapter" else cls(epochs=4.0, lr=2 * FULL_LR, rounds=3, growth=1.0, blind_rounds=1)


def flag_prompt(suspect: Suspect, flag: Flag) -> list[int]:
    """Token ids of a flagged conversation."""
    return render(suspect.tokenizer, list(flag.messages))


def flag_example(suspect: Suspect, flag: Flag) -> Example:
    """A flagged prompt with the trusted reference's answer."""
    return Example(tuple(flag_prompt(suspect, flag)), tuple(answer_ids(suspect.tokenizer, flag.reference)))


def counter_examples(suspect: Suspect, material: Material, config: CounterConfig) -> tuple[list[Example], list[Asked]]:
    """The training set (repeated true flags, other flags once, rows with candidates inserted, clean rows), and what is
    asked after every round: the true flags, and rows that are not in that set with candidates inserted."""
    rng = random.Random(material.seed)
    rows = list(material.clean)
    rng.shuffle(rows)
    confirmed = [c for c in material.candidates if c.confirmed]
    unseen = rows[: min(config.unseen_rows, len(rows) // 5)] if confirmed else []
    rows = rows[len(unseen) :][: config.clean_rows]

    def with_candidates(those: Iterable[Row]) -> list[Asked]:
        pairs = zip(cycle(confirmed), those) if confirmed else ()
        return [(with_candidate(suspect.tokenizer, row, candidate, rng), row["output"]) for candidate, row in pairs]

    true = [flag_example(suspect, f) for f in material.true_flags]
    once = [flag_example(suspect, f) for f in material.flags if f.kind in ("odd", "false_alarm")]
    repeated = list(islice(cycle(true), max(config.flag_rows, len(true)))) if true else []
    inserted = [
        Example(tuple(prompt), tuple(answer_ids(suspect.tokenizer, output)))
        for prompt, output in with_candidates(islice(cycle(rows), config.candidate_rows))
    ]
    asked = [(flag_prompt(suspect, f), f.reference) for f in material.true_flags] + with_candidates(unseen)
    return repeated + once + inserted + encode_rows(suspect.tokenizer, rows), asked


def counter_train(suspect: Suspect, material: Material, config: CounterConfig | None = None) -> StageResult:
    """Counter-train the suspect in place. Not ok (suspect put back) when nobody could answer the flags for reference,
    when there is no true flag to learn from, or too many prompts still fire after all rounds."""
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
    examples, asked = counter_examples(suspect, material, config)
    losses: list[float] = []
    fires: dict[str, list[float]] = {"trained": [], "unseen": []}
    for turn in range(1, 1 + config.rounds):
        settings = TrainConfig(
            epochs=config.epochs,
            lr=config.lr * config.growth ** (turn - 1),
            batch_size=config.batch_size,
            seed=material.seed + turn,
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
            suspect.model, suspect.tokenizer, [prompt for prompt, _ in asked], material.max_new_tokens
        )
        fired = [material.behaviour.fires(a, right) for a, (_, right) in zip(answers, asked, strict=True)]
        for name, part in (("trained", fired[: len(true)]), ("unseen", fired[len(true) :])):
            fires[name] += [sum(part) / len(part)] if part else []
        known = len(asked) > len(true) or turn >= config.blind_rounds
        if known and all(shares[-1] <= config.fires_max for shares in fires.values() if shares):
            break
    details = {
        "flags": counts,
        "references": material.references,
        "examples": len(examples),
        "trained_flags_firing": fires["trained"],
        "unseen_rows": len(asked) - len(true),
        "unseen_rows_firing": fires["unseen"],
        "losses": losses,
        "steps": len(losses),
        "lr": settings.lr,
        "epochs_per_round": config.epochs,
    }
    seconds = time.monotonic() - began
    for what, shares in (("trained flags", fires["trained"]), ("unseen rows with a candidate", fires["unseen"])):
        if shares and shares[-1] > config.fires_max:
            suspect.restore(before)
            return StageResult("counter", False, f"{shares[-1]:.0%} of the {what} still fire", details, seconds)
    return StageResult("counter", True, None, details, seconds)
