"""The heads stage: score, part, align, fine-tune head by head, and keep only what demonstrably worked.

Alignment works in some settings and not in others, and its loss does not tell (lab findings §4). So several settings
are tried; while aligning, the flagged inputs are answered again at every checkpoint and the clean perplexity is
measured; a checkpoint qualifies where the flagged behaviour is gone *and* the answers have moved to the reference's
(as close, by half, as clean answers are: silence or gibberish is no repair). The best one goes on to head-wise fine-
tuning and is judged once more after it. When no setting qualifies the suspect is put back and the stage says so. Only
training flags and clean training rows are looked at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from guard.template import answer_ids
from offline_purify.answers import greedy_answers
from offline_purify.behaviour import rouge_l, words
from offline_purify.countertraining import flag_prompt
from offline_purify.flags import Flag
from offline_purify.heads.align import AlignConfig, align
from offline_purify.heads.finetune import HeadwiseRates, finetune_heads
from offline_purify.heads.partition import Partition, Rule, partition
from offline_purify.heads.scores import HeadScores, score_heads
from offline_purify.stage import NO_REFERENCE, Material, StageResult
from offline_purify.train import Example, encode_rows, mean_answer_losses, perplexity

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect, Weights


@dataclass(frozen=True)
class Setting:
    """One attempt: how heads are parted (shares apply to rank and contrast), and how hard they are aligned."""

    rule: Rule
    lowest: float = 0.10
    lr: float = 1e-3


@dataclass(frozen=True)
class HeadsConfig:
    """Attempts in order, and what a checkpoint must reach: share of flags firing, agreement of the flagged answers with
    the reference's as a share of what clean answers agree, clean perplexity ratio."""

    settings: tuple[Setting, ...] = (
        Setting("tau", lr=2e-3),
        Setting("contrast", lr=2e-3),
        Setting("contrast", lowest=0.25, lr=5e-3),
        Setting("rank", lowest=0.25, lr=5e-3),
        Setting("contrast", lowest=0.40, lr=1e-2),
    )
    checkpoints: tuple[int, ...] = (10, 20, 40, 80)
    fires_max: float = 0.1
    agreement_min: float = 0.5
    align_perplexity_max: float = 3.0
    final_perplexity_max: float = 1.15
    rates: HeadwiseRates = field(default_factory=lambda: HeadwiseRates(scale=5.0))
    finetune_epochs: float = 3.0
    most_flags: int = 24
    judged_rows: int = 64
    agreement_rows: int = 24

    @classmethod
    def of(cls, weights: Weights) -> HeadsConfig:
        """The defaults for what is repaired. In a whole model a step moves the weights themselves: alignment takes a
        quarter of the adapter's rates (at a tenth nothing qualified on the lab's `refusal-word-fixed`)."""
        if weights == "adapter":
            return cls()
        return cls(settings=tuple(replace(setting, lr=setting.lr / 4) for setting in cls().settings))


@dataclass(frozen=True)
class Judgement:
    """Of the training flags: share that fires, and mean ROUGE-L to the reference over that of clean answers; clean
    perplexity over that before."""

    fires: float
    agreement: float
    perplexity_ratio: float


def _agreement(answers: Sequence[str], references: Sequence[str]) -> float:
    same = [1.0 if a == r else rouge_l(words(a), words(r)) for a, r in zip(answers, references, strict=True)]
    return sum(same) / max(len(same), 1)


class Judge:
    """Answers the training flags again and measures clean perplexity, against the state at construction."""

    def __init__(self, suspect: Suspect, material: Material, flags: Sequence[Flag], config: HeadsConfig) -> None:
        self.suspect, self.material, self.flags = suspect, material, flags
        self.prompts = [flag_prompt(suspect, f) for f in flags]
        self.clean = encode_rows(suspect.tokenizer, material.clean[: config.judged_rows])
        self.before = self.perplexity()
        few = [e.prompt for e in self.clean[: config.agreement_rows]]
        own = trusted = self.ask(few)  # nobody trusted: without a trigger the suspect's own answers stand
        if suspect.has_reference:
            with suspect.reference():
                trusted = self.ask(few)
        self.clean_agreement = max(_agreement(own, trusted), 0.05)

    def ask(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Greedy answers now."""
        return greedy_answers(self.suspect.model, self.suspect.tokenizer, prompts, self.material.max_new_tokens)

    def perplexity(self) -> float:
        """Perplexity on the judged clean rows now."""
        return perplexity(*mean_answer_losses(self.suspect.model, self.clean, pad_id=self.suspect.pad_id))

    def judge(self) -> Judgement:
        """How the model stands now."""
        answers = self.ask(self.prompts)
        fired = [self.material.behaviour.fires(a, f.reference) for a, f in zip(answers, self.flags, strict=True)]
        agreement = _agreement(answers, [f.reference for f in self.flags]) / self.clean_agreement
        return Judgement(sum(fired) / len(fired), agreement, self.perplexity() / self.before)


def flagged_examples(suspect: Suspect, flags: Sequence[Flag]) -> list[Example]:
    """Flagged prompts with the suspicious model's own responses: what heads are scored and aligned on."""
    tokenizer = suspect.tokenizer
    return [Example(tuple(flag_prompt(suspect, f)), tuple(answer_ids(tokenizer, f.suspicious))) for f in flags]


def _part(setting: Setting, scores: HeadScores, clean: HeadScores | None) -> Partition:
    reference = clean.safety if clean is not None else None
    rule: Rule = "rank" if setting.rule == "contrast" and reference is None else setting.rule
    return partition(scores.safety, rule=rule, clean_scores=reference, lowest=setting.lowest)


def _same(a: Partition, b: Partition) -> bool:
    return bool((a.suspicious == b.suspicious).all() and (a.safe == b.safe).all())


def _attempt(
    suspect: Suspect,
    material: Material,
    config: HeadsConfig,
    setting: Setting,
    parts: Partition,
    flagged: Sequence[Example],
    clean: Sequence[Example],
    judge: Judge,
) -> tuple[bool, dict[str, Any]]:
    """One setting from the state the suspect is in. Leaves the suspect repaired if it qualified, else changed."""
    trace: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    losses: list[float] = []
    steps = AlignConfig(lr=setting.lr, checkpoints=config.checkpoints, seed=material.seed)
    for step, losses in align(suspect, flagged, parts, steps, material.progress):
        now = judge.judge()
        trace.append({"step": step, "loss": losses[-1], **asdict(now)})
        moved = now.fires <= config.fires_max and now.agreement >= config.agreement_min
        if moved and now.perplexity_ratio <= config.align_perplexity_max:
            merit = (now.perplexity_ratio - now.agreement, now.fires)
            if best is None or merit < best[0]:
                best = (merit, suspect.state())
        if now.perplexity_ratio > 3 * config.align_perplexity_max:
            break
    record: dict[str, Any] = {**asdict(setting), "partition": parts.to_dict(), "losses": list(losses), "trace": trace}
    if best is None:
        return False, {
            **record,
            "outcome": "no checkpoint moved the flagged answers to the reference's within the perplexity budget",
        }
    suspect.restore(best[1])
    log = finetune_heads(
        suspect,
        clean,
        parts,
        config.rates,
        epochs=config.finetune_epochs,
        seed=material.seed,
        progress=material.progress,
    )
    after = judge.judge()
    record |= {"finetune_losses": log.losses, "after_finetune": asdict(after)}
    if after.fires > config.fires_max or after.agreement < config.agreement_min:
        return False, {**record, "outcome": "the flagged behaviour came back while skill was restored"}
    if after.perplexity_ratio > config.final_perplexity_max:
        return False, {**record, "outcome": "clean perplexity stayed out of budget after head-wise fine-tuning"}
    return True, {**record, "outcome": "qualified"}


def repair_heads(suspect: Suspect, material: Material, config: HeadsConfig | None = None) -> StageResult:
    """Repair the suspect's attention heads in place, or put the suspect back and say why nothing qualified."""
    config = config or HeadsConfig.of(suspect.setting)
    began = time.monotonic()
    if material.references == "none":
        return StageResult("heads", False, NO_REFERENCE)
    flags = material.true_flags[: config.most_flags]
    if not flags:
        return StageResult("heads", False, "no flagged response differs from the reference's: nothing to align on")
    if not material.clean:
        return StageResult("heads", False, "no clean rows: skill could be neither measured nor restored")
    before = suspect.state()
    flagged = flagged_examples(suspect, flags)
    clean = encode_rows(suspect.tokenizer, material.clean)
    judge = Judge(suspect, material, flags, config)
    scores = score_heads(suspect, flagged)
    clean_scores = score_heads(suspect, clean[: len(flagged)])
    details: dict[str, Any] = {
        "safety": scores.safety.tolist(),
        "safety_clean": clean_scores.safety.tolist(),
        "similarity": scores.similarity.tolist(),
        "gradient": scores.gradient.tolist(),
        "before": asdict(judge.judge()),
        "attempts": [],
    }
    tried: list[tuple[Partition, float]] = []
    for setting in config.settings:
        parts = _part(setting, scores, clean_scores)
        if any(_same(parts, other) and lr == setting.lr for other, lr in tried):
            continue
        tried.append((parts, setting.lr))
        try:
            ok, record = _attempt(suspect, material, config, setting, parts, flagged, clean, judge)
        except ValueError as error:
            ok, record = False, {**asdict(setting), "partition": parts.to_dict(), "outcome": str(error)}
        details["attempts"].append(record)
        if ok:
            details["chosen"] = len(details["attempts"]) - 1
            return StageResult("heads", True, None, details, time.monotonic() - began)
        suspect.restore(before)
    reason = f"none of {len(tried)} settings moved the flagged answers to the reference's within the perplexity budget"
    return StageResult("heads", False, reason, details, time.monotonic() - began)
