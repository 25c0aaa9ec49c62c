"""PURE (Zhao et al. 2024): prune the heads that look at everything alike, and fine-tune with an attention penalty.

    1. fine-tune the suspicious classifier on clean texts;
    2. per head, the variance of the [CLS] row of its attention, averaged over validation texts;
    3. prune heads in groups, lowest variance first, keeping one in every layer, until validation accuracy falls below a
       floor; then bring that group's heads back one by one, highest variance first, until it does not;
    4. from the suspicious weights again: prune the same heads, fine-tune with
       CE + 0.15 * sum_l c_l * sum_h sqrt(sum over batch and tokens of a_cls^2),
       c_l the inverse mean variance of layer l, normalised to sum 1, then spread over [0, 1].

After reference/backdoor-methods.md §4.10. Rows are taken as padded to ``LONGEST`` tokens, as published. The published
floor is an accuracy of 0.85 for a BERT that reaches 0.91; here it is so many points below the fine-tuned classifier.
A head is pruned by zeroing its columns of the output projection, and keeping them zero: nothing of it is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offline_purify.encoder.classifier import LONGEST, Classifier, Sample
from offline_purify.encoder.finetune import train_classifier
from offline_purify.encoder.material import Material
from offline_purify.heads.finetune import ScaledUpdates

_BATCH = 32


@dataclass(frozen=True)
class PureConfig:
    """Heads pruned at a time, accuracy that pruning may cost (points of the fine-tuned classifier's), weight of the
    penalty, and the share of clean texts that only validates."""

    group: int = 10
    accuracy_lost: float = 0.06
    penalty: float = 0.15
    validation: float = 0.25


@torch.no_grad()
def cls_variance(classifier: Classifier, samples: Sequence[Sample]) -> Tensor:
    """Variance of each head's [CLS] row over the first ``LONGEST`` - 1 places, padding as zeros; mean over samples,
    fp32 [L, H]."""
    places = LONGEST - 1
    layout = classifier.layout
    total = torch.zeros(layout.layers, layout.heads)
    with classifier.attention_matrices():
        for start in range(0, len(samples), _BATCH):
            batch = classifier.collate(samples[start : start + _BATCH])
            out = classifier.forward(batch, attentions=True)
            real = batch["attention_mask"][:, None, :places]
            for layer, attention in enumerate(out.attentions):
                row = attention[:, :, 0, :places].float() * real
                variance = row.square().sum(-1) / places - (row.sum(-1) / places).square()
                total[layer] += variance.sum(0).cpu()
    return total / max(len(samples), 1)


def penalty_weights(variance: Tensor) -> Tensor:
    """c_l of every layer [L] from head variances [L, H]: the layer of lowest variance gets 1, that of highest 0."""
    inverse = 1 / variance.mean(1).clamp(min=1e-12)
    share = inverse / inverse.sum()
    return (share - share.min()) / (share.max() - share.min()).clamp(min=1e-12)


def next_group(variance: Tensor, pruned: Tensor, size: int) -> list[tuple[int, int]]:
    """The ``size`` heads (layer, head) of lowest variance that may still go: one of every layer stays. ``pruned`` bool
    [L, H]."""
    left = (~pruned).sum(1).tolist()
    group: list[tuple[int, int]] = []
    for flat in variance.flatten().argsort(stable=True).tolist():
        layer, head = divmod(flat, variance.shape[1])
        if len(group) == size:
            break
        if not bool(pruned[layer, head]) and left[layer] > 1:
            left[layer] -= 1
            group.append((layer, head))
    return group


class _Pruner:
    """Takes heads away and brings them back."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.pruned = torch.zeros(classifier.layout.layers, classifier.layout.heads, dtype=torch.bool)
        parameters = classifier.parameters()
        self.original = {name: parameters[name].detach().clone() for name in self.masks()}

    def masks(self) -> dict[str, Tensor]:
        """1 on output columns of heads that are there, 0 on those of pruned ones, by parameter name."""
        there = (~self.pruned).float()
        return self.classifier.layout.masks(self.classifier.parameters(), there, there, projections="o")

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the columns of pruned heads; all others are as they were at construction."""
        parameters = self.classifier.parameters()
        for name, mask in self.masks().items():
            parameters[name].copy_(self.original[name] * mask)

    def set(self, heads: Sequence[tuple[int, int]], pruned: bool) -> None:
        """Prune heads, or bring them back."""
        for layer, head in heads:
            self.pruned[layer, head] = pruned
        self.apply()


def _accuracy(classifier: Classifier, samples: Sequence[Sample]) -> float:
    correct = classifier.correct(samples)
    return sum(correct) / max(len(correct), 1)


def choose_heads(
    classifier: Classifier, variance: Tensor, validation: Sequence[Sample], floor: float, group: int
) -> Tensor:
    """Which heads to prune, bool [L, H]: as many groups of lowest variance as keep validation accuracy at ``floor``,
    and what of the last group can go. The classifier is left pruned so."""
    pruner = _Pruner(classifier)
    while heads := next_group(variance, pruner.pruned, group):
        pruner.set(heads, True)
        if _accuracy(classifier, validation) >= floor:
            continue
        for head in reversed(heads):
            pruner.set([head], False)
            if _accuracy(classifier, validation) >= floor:
                break
        break
    return pruner.pruned


def pure(classifier: Classifier, material: Material, config: PureConfig | None = None) -> dict[str, Any]:
    """Prune and fine-tune the classifier in place; returns what was done, JSON-able."""
    config = config or PureConfig()
    training = replace(material.training, seed=material.seed)
    samples = classifier.samples(material.clean)
    held = max(1, round(config.validation * len(samples)))
    validation, learning = samples[:held], samples[held:]
    suspicious = classifier.state()

    train_classifier(classifier, learning, training, progress=material.progress, what="PURE: fine-tuning")
    tuned = _accuracy(classifier, validation)
    variance = cls_variance(classifier, validation)
    pruned = choose_heads(classifier, variance, validation, tuned - config.accuracy_lost, config.group)
    pruned_accuracy = _accuracy(classifier, validation)

    classifier.restore(suspicious)
    pruner = _Pruner(classifier)
    pruner.set([(int(layer), int(head)) for layer, head in pruned.nonzero().tolist()], True)
    updates = ScaledUpdates(classifier.parameters(), pruner.masks())
    weights, there = penalty_weights(variance), (~pruned).float()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with classifier.attention_matrices():
            out = classifier.forward(batch, attentions=True)
        total = cross_entropy(out.logits, batch["labels"])
        for layer, attention in enumerate(out.attentions):
            norms = attention[:, :, 0].square().sum((0, 2)).sqrt()
            total = total + config.penalty * weights[layer].item() * (norms * there[layer].to(norms.device)).sum()
        return total

    log = train_classifier(
        classifier,
        learning,
        training,
        loss=loss,
        before_step=updates.before,
        after_step=updates.after,
        progress=material.progress,
        what="PURE: regularised",
    )
    return {
        "pruned": pruned.nonzero().tolist(),
        "accuracy_tuned": tuned,
        "accuracy_pruned": pruned_accuracy,
        "penalty_weights": weights.tolist(),
        "losses": [log.losses[0], log.last()],
    }
