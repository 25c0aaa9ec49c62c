"""Alignment of an encoder's suspicious heads, and head-wise fine-tuning: the decoders' steps with an encoder's losses.

Attention is compared on all entries between real tokens (no causal mask). Only query and key slices of suspicious
heads, weights and biases, move while aligning; while fine-tuning every head's query, key and value rows and output
columns move at the head's own rate. The embeddings, the MLPs and the classification layer stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from offline_purify.encoder.classifier import Classifier, Sample
from offline_purify.encoder.finetune import train_classifier
from offline_purify.heads.align import AlignConfig, align_slices, alignment_loss
from offline_purify.heads.finetune import HeadwiseRates, headwise
from offline_purify.heads.partition import Partition
from offline_purify.train import TrainConfig, TrainLog

Progress = Callable[[str, int, int], None]


def align(
    classifier: Classifier,
    samples: Sequence[Sample],
    parts: Partition,
    config: AlignConfig,
    progress: Progress | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """Align in place on flagged ``samples`` (labels are not looked at), yielding (step, losses so far) at each
    checkpoint; stop iterating to keep the model as it is. Raises ValueError when a set of heads is empty."""

    def loss_of(indices: list[int]) -> Tensor:
        batch = classifier.collate([samples[i] for i in indices])
        with classifier.attention_matrices():
            attentions = classifier.forward(batch, attentions=True).attentions
        return alignment_loss(attentions, parts, batch["attention_mask"], causal=False)

    yield from align_slices(classifier, parts, len(samples), loss_of, config, progress)


def finetune_heads(
    classifier: Classifier,
    samples: Sequence[Sample],
    parts: Partition,
    rates: HeadwiseRates,
    *,
    epochs: float = 3.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainLog:
    """Fine-tune attention slices in place on clean ``samples``, each head at its own rate (``heads.finetune``)."""
    config = TrainConfig(
        epochs=epochs, lr=rates.high * rates.scale, batch_size=batch_size, weight_decay=0.0, clip=1.0, seed=seed
    )
    return train_classifier(
        classifier,
        samples,
        config,
        **headwise(classifier, parts, rates),
        progress=progress,
        what="fine-tuning heads",
    )
