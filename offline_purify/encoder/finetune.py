"""Training of a classifier, and the plain fine-tuning baseline: every weight learns from clean texts, nothing else.

The steps are the clinic's (AdamW, warm-up and cosine, clipped, dropout off); the loss is the cross-entropy of the
labels, with whatever a method adds to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offline_purify.encoder.classifier import Classifier, Sample
from offline_purify.encoder.material import Material
from offline_purify.train import TrainConfig, TrainLog, descend, index_batches

Loss = Callable[[dict[str, Tensor]], Tensor]


def train_classifier(
    classifier: Classifier,
    samples: Sequence[Sample],
    config: TrainConfig,
    *,
    loss: Loss | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    what: str = "training",
) -> TrainLog:
    """Train in place on ``samples``; ``loss`` of a batch instead of the labels' cross-entropy, only ``parameters``
    instead of all weights. Raises ValueError when there is nothing to train on."""
    if not samples:
        raise ValueError("no samples to train on: at least one text with a label is needed")

    def loss_of(indices: list[int]) -> tuple[Tensor, int]:
        batch = classifier.collate([samples[i] for i in indices])
        if loss is not None:
            return loss(batch), len(indices)
        return cross_entropy(classifier.forward(batch).logits, batch["labels"]), len(indices)

    return descend(
        classifier.model,
        list(index_batches(samples, config)),
        loss_of,
        config,
        parameters=classifier.parameters().values() if parameters is None else parameters,
        before_step=before_step,
        after_step=after_step,
        progress=progress,
        what=what,
    )


def finetune(classifier: Classifier, material: Material) -> dict[str, Any]:
    """Fine-tune all weights in place on the clean texts; returns what was done, JSON-able."""
    log = train_classifier(
        classifier,
        classifier.samples(material.clean),
        replace(material.training, seed=material.seed),
        progress=material.progress,
        what="fine-tuning",
    )
    return {"steps": log.steps, "losses": [log.losses[0], log.last()]}
