"""The head method on a classifier: score, part, align, fine-tune head by head, and keep only what demonstrably worked.

As in ``heads.stage``, several settings are tried and every checkpoint is judged on training material alone: by the
share of flagged texts that still get the class they were flagged with, and by accuracy on clean training texts. There
is no trusted base to compare with, and flagged texts have no labels: their pseudo-labels are the suspicious model's own
predictions, and a repair is to move most of them. When no setting qualifies the weights are put back. The ablations
take one setting and keep what comes of it, whatever the judge says.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from offline_purify.encoder.align import align, finetune_heads
from offline_purify.encoder.classifier import Classifier, Sample
from offline_purify.encoder.material import Material
from offline_purify.encoder.scores import score_heads
from offline_purify.heads.align import AlignConfig
from offline_purify.heads.finetune import HeadwiseRates
from offline_purify.heads.layout import random_partition_like
from offline_purify.heads.partition import Partition, partition
from offline_purify.heads.scores import HeadScores
from offline_purify.heads.stage import Setting
from offline_purify.stage import StageResult
from offline_purify.texts import Text

Part = Literal["both", "align", "tune", "random"]
"""What an ablation does: the whole method, one of its two steps, or both steps on random heads."""


@dataclass(frozen=True)
class EncoderHeadsConfig:
    """Attempts in order, and what must be reached: share of flagged texts that keep their class (the paper's BERT keeps
    11-22 % after repair), accuracy lost while aligning and in the end (points of the suspicious model's)."""

    settings: tuple[Setting, ...] = (
        Setting("tau", lr=1e-3),
        Setting("contrast", lowest=0.25, lr=1e-3),
        Setting("contrast", lowest=0.40, lr=3e-3),
    )
    checkpoints: tuple[int, ...] = (10, 20, 40)
    fires_max: float = 0.3
    align_accuracy_lost: float = 0.15
    final_accuracy_lost: float = 0.03
    rates: HeadwiseRates = field(default_factory=HeadwiseRates)
    finetune_epochs: float = 3.0
    judged_rows: int = 128


@dataclass(frozen=True)
class Judgement:
    """Share of the flagged texts that keep the class they were flagged with, and accuracy on clean training texts."""

    fires: float
    accuracy: float

    @property
    def merit(self) -> float:
        """What a choice between checkpoints goes by: accuracy less fires."""
        return self.accuracy - self.fires


class Repair:
    """One classifier with what is known of it before anything is changed: pseudo-labels, head scores, a judgement."""

    def __init__(self, classifier: Classifier, material: Material, config: EncoderHeadsConfig) -> None:
        self.classifier, self.material, self.config = classifier, material, config
        unlabelled = classifier.samples(Text(text, 0) for text in material.flagged)
        given = classifier.predict(unlabelled)
        self.flagged = [Sample(sample.ids, label) for sample, label in zip(unlabelled, given, strict=True)]
        self.clean = classifier.samples(material.clean)
        self.scores = score_heads(classifier, self.flagged)
        self.clean_scores = score_heads(classifier, self.clean[: len(self.flagged)])
        self.before = self.judge()

    def judge(self) -> Judgement:
        """How the classifier stands now."""
        judged = self.clean[: self.config.judged_rows]
        kept, right = self.classifier.correct(self.flagged), self.classifier.correct(judged)
        return Judgement(sum(kept) / len(kept), sum(right) / len(right))

    def parts(self, setting: Setting) -> Partition:
        """The heads, parted by a setting."""
        scores: HeadScores = self.scores
        return partition(scores.safety, rule=setting.rule, clean_scores=self.clean_scores.safety, lowest=setting.lowest)

    def align(self, setting: Setting, parts: Partition) -> tuple[Judgement, dict[str, Any]]:
        """Align in place and leave the checkpoint of highest merit, one within the accuracy budget if there is any."""
        trace: list[dict[str, Any]] = []
        best: tuple[tuple[bool, float], Judgement, dict[str, Tensor]] | None = None
        steps = AlignConfig(lr=setting.lr, checkpoints=self.config.checkpoints, seed=self.material.seed)
        for step, losses in align(self.classifier, self.flagged, parts, steps, self.material.progress):
            now = self.judge()
            trace.append({"step": step, "loss": losses[-1], **asdict(now)})
            key = (now.accuracy >= self.before.accuracy - self.config.align_accuracy_lost, now.merit)
            if best is None or key > best[0]:
                best = (key, now, self.classifier.state())
        assert best is not None, "an alignment has at least one checkpoint"
        self.classifier.restore(best[2])
        return best[1], {"trace": trace}

    def tune(self, parts: Partition) -> tuple[Judgement, dict[str, Any]]:
        """Fine-tune head by head in place."""
        log = finetune_heads(
            self.classifier,
            self.clean,
            parts,
            self.config.rates,
            epochs=self.config.finetune_epochs,
            seed=self.material.seed,
            progress=self.material.progress,
        )
        after = self.judge()
        return after, {"finetune_losses": [log.losses[0], log.last()], "after_finetune": asdict(after)}


def repair_heads(classifier: Classifier, material: Material, config: EncoderHeadsConfig | None = None) -> StageResult:
    """Repair the classifier's heads in place, or put its weights back and say why nothing qualified.
    ``details["best"]`` is the index of the attempt that went furthest, whether or not it qualified."""
    config = config or EncoderHeadsConfig()
    began = time.monotonic()
    if not material.flagged:
        return StageResult("heads", False, "no flagged texts: nothing to score or align on")
    if not material.clean:
        return StageResult("heads", False, "no clean texts: accuracy could be neither measured nor restored")
    before = classifier.state()
    repair = Repair(classifier, material, config)
    attempts: list[dict[str, Any]] = []
    reached: list[float] = []
    for setting in config.settings:
        ok, merit, record = _attempt(repair, setting)
        attempts.append(record)
        reached.append(merit)
        if ok:
            break
        classifier.restore(before)
    details = {
        "safety": repair.scores.safety.tolist(),
        "safety_clean": repair.clean_scores.safety.tolist(),
        "before": asdict(repair.before),
        "attempts": attempts,
        "best": reached.index(max(reached)),
    }
    reason = None if ok else f"none of {len(attempts)} settings moved the flagged texts within the accuracy budget"
    return StageResult("heads", ok, reason, details, time.monotonic() - began)


def _attempt(repair: Repair, setting: Setting) -> tuple[bool, float, dict[str, Any]]:
    """One setting, from the suspicious weights: whether it qualified, its merit (less one where it got no further than
    alignment), and its record. Leaves the classifier changed."""
    config, parts = repair.config, repair.parts(setting)
    record: dict[str, Any] = {**asdict(setting), "partition": parts.to_dict()}
    try:
        aligned, told = repair.align(setting, parts)
    except ValueError as error:
        return False, -2.0, record | {"outcome": str(error)}
    record |= told
    if aligned.accuracy < repair.before.accuracy - config.align_accuracy_lost:
        return False, aligned.merit - 1, record | {"outcome": "no checkpoint of the alignment kept enough accuracy"}
    after, told = repair.tune(parts)
    record |= told
    if after.fires > config.fires_max:
        return False, after.merit, record | {"outcome": "the flagged texts still get their class after the repair"}
    if after.accuracy < repair.before.accuracy - config.final_accuracy_lost:
        return False, after.merit, record | {"outcome": "accuracy on clean texts stayed out of budget"}
    return True, after.merit, record | {"outcome": "qualified"}


def ablate(
    classifier: Classifier, material: Material, setting: Setting, what: Part, config: EncoderHeadsConfig | None = None
) -> dict[str, Any]:
    """Do ``what`` with one setting in place and keep it, whatever the judge would say; returns what was done."""
    repair = Repair(classifier, material, config or EncoderHeadsConfig())
    parts = repair.parts(setting)
    if what == "random":
        suspicious, safe = random_partition_like(parts.suspicious, parts.safe, material.seed)
        parts = Partition(suspicious, safe, "random", False)
    told: dict[str, Any] = {"setting": asdict(setting), "partition": parts.to_dict(), "before": asdict(repair.before)}
    if what != "tune":
        told |= repair.align(setting, parts)[1]
    if what != "align":
        told |= repair.tune(parts)[1]
    return told
