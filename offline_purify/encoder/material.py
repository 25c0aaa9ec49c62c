"""What a repair of a classifier may look at: a case's flagged texts, without labels, and a budget of clean ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from offline_purify.texts import Text
from offline_purify.train import TrainConfig


@dataclass(frozen=True)
class Material:
    """Flagged texts (baselines do not look at them), clean texts with labels, and how full training on these goes: the
    same for every method. BERT's usual rate, at the batch that a few hundred rows allow."""

    flagged: tuple[str, ...]
    clean: tuple[Text, ...]
    seed: int = 0
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3, lr=5e-5, batch_size=16, warmup=0.1))
    progress: Callable[[str, int, int], None] | None = None
