"""What every baseline may spend: clean rows, and one fine-tuning on them (reference/backdoor-methods.md §4)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from guard.rows import Row
from offline_purify.stage import FULL_LR, Material
from offline_purify.train import TrainConfig, encode_rows, train

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect, Weights


DEFAULT_RATIO: Mapping[str, float] = MappingProxyType({"adapter": 0.35, "full": 0.03})
"""Share of units taken away: the signature paper's for 7B models, in adapters and in whole models."""


@dataclass(frozen=True)
class Budget:
    """Clean rows and how they are trained on (200 rows, 5 epochs at 2e-4 for adapters, batch 8: the signature method's
    recovery); ``ratio`` is the share of units that pruning methods take away, that of the signature."""

    rows: int = 200
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5, lr=2e-4, batch_size=8, warmup=0.1))
    ratio: float = 0.35

    @classmethod
    def of(cls, setting: Weights, rows: int = 200, ratio: float | None = None) -> Budget:
        """The budget of a setting: training at 2e-4 for adapters, at `FULL_LR` for whole models."""
        ratio = DEFAULT_RATIO[setting] if ratio is None else ratio
        if setting == "adapter":
            return cls(rows, ratio=ratio)
        return cls(rows, TrainConfig(epochs=5, lr=FULL_LR, batch_size=8, warmup=0.1), ratio)

    def clean(self, material: Material) -> Sequence[Row]:
        """The clean rows to use, drawn from the material's."""
        rows = list(material.clean)
        random.Random(f"budget:{material.seed}").shuffle(rows)
        return rows[: self.rows]


def fine_tune(suspect: Suspect, material: Material, budget: Budget, what: str) -> int:
    """Fine-tune the suspect on the budget's clean rows; returns the steps taken."""
    log = train(
        suspect.model,
        encode_rows(suspect.tokenizer, budget.clean(material)),
        replace(budget.training, seed=material.seed),
        pad_id=suspect.pad_id,
        parameters=suspect.parameters().values(),
        progress=material.progress,
        what=what,
    )
    return log.steps
