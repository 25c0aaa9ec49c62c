"""Fine-tuning on clean rows and nothing else: what any other method has to beat at the same budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offline_purify.baselines.budget import Budget, fine_tune
from offline_purify.stage import Material

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect


def finetune(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Fine-tune the suspect in place."""
    return {"steps": fine_tune(suspect, material, budget, "fine-tuning")}
