"""Head-wise fine-tuning: every head learns clean rows at its own rate (paper, "Head-wise Fine-tuning").

One tensor holds all heads, so the *update* is scaled, not the gradient: snapshot, optimiser step at the highest rate,
then p = p_old + (rate of the head / highest rate) * (p - p_old). Under Adam a scaled gradient is a silent no-op,
because the step is normalised. Rates low / mid / high for suspicious / middle / safe heads; a key/value head takes the
smallest rate of the query heads that share it; factors shared by all heads, and everything outside attention, stay
frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offline_purify.heads.partition import Partition
from offline_purify.train import Example, TrainConfig, TrainLog, train

if TYPE_CHECKING:
    from offline_purify.patient import Patient
    from offline_purify.suspect import Suspect


class ScaledUpdates:
    """Scales what an optimiser step did, element by element: call ``before`` and ``after`` around the step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self.pairs = [(parameters[name], masks[name]) for name in masks if name in parameters]
        self.old: list[Tensor] = []

    def before(self) -> None:
        """Remember the values."""
        self.old = [p.detach().clone() for p, _ in self.pairs]

    @torch.no_grad()
    def after(self) -> None:
        """p = p_old + mask * (p - p_old); where the mask is 0 the old bits return."""
        for (p, mask), old in zip(self.pairs, self.old, strict=True):
            p.copy_(torch.where(mask == 0, old, old + mask * (p - old)))


@dataclass(frozen=True)
class HeadwiseRates:
    """Learning rates by class of head; the paper's 5e-6 / 1e-4 / 2e-4, times ``scale`` for small models."""

    low: float = 5e-6
    mid: float = 1e-4
    high: float = 2e-4
    scale: float = 1.0

    def of(self, parts: Partition) -> Tensor:
        """Rate of every head, fp32 [L, H]."""
        rates = torch.full(parts.safe.shape, self.mid)
        rates[parts.safe] = self.high
        rates[parts.suspicious] = self.low
        return rates * self.scale


def finetune_heads(
    suspect: Suspect,
    examples: Sequence[Example],
    parts: Partition,
    rates: HeadwiseRates,
    *,
    epochs: float = 3.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> TrainLog:
    """Fine-tune attention slices in place on ``examples``, each head at its own rate."""
    config = TrainConfig(
        epochs=epochs, lr=rates.high * rates.scale, batch_size=batch_size, weight_decay=0.0, clip=1.0, seed=seed
    )
    return train(
        suspect.model,
        examples,
        config,
        pad_id=suspect.pad_id,
        **headwise(suspect, parts, rates),
        progress=progress,
        what="fine-tuning heads",
    )


def headwise(patient: Patient, parts: Partition, rates: HeadwiseRates) -> dict[str, Any]:
    """What makes a training at the highest rate head-wise: the parameters that move, and what is done to them before
    and after every step (arguments of `offline_purify.train.train`)."""
    per_head = rates.of(parts) / (rates.high * rates.scale)
    masks = patient.layout.masks(patient.parameters(), per_head, patient.layout.kv_minimum(per_head))
    parameters = {name: p for name, p in patient.parameters().items() if name in masks}
    updates = ScaledUpdates(parameters, masks)
    return {"parameters": parameters.values(), "before_step": updates.before, "after_step": updates.after}
