"""Magnitude pruning: the smallest entries of each LoRA factor, or each weight matrix, become zero; no training.

As BackdoorLLM's defence box does it for adapters: per matrix, unstructured (reference/backdoor-methods.md §4.2). Biases
of a whole model stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offline_purify.baselines.budget import Budget
from offline_purify.stage import Material

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect


@torch.no_grad()
def magnitude(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Zero the share ``budget.ratio`` of smallest entries of every factor or weight, in place."""
    zeroed = total = 0
    for parameter in suspect.parameters().values():
        if parameter.ndim < 2:
            continue
        count = int(budget.ratio * parameter.numel())
        smallest = parameter.abs().flatten().argsort(stable=True)[:count]
        parameter.view(-1)[smallest] = 0.0
        zeroed += count
        total += parameter.numel()
    return {"zeroed": zeroed, "of": total}
