"""Magnitude pruning of an adapter: the smallest entries of each LoRA factor become zero; nothing is trained.

As BackdoorLLM's defence box does it for adapters: per factor, unstructured (reference/backdoor-methods.md §4.2).
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
    """Zero the share ``budget.ratio`` of smallest entries of every factor, in place."""
    zeroed = total = 0
    for parameter in suspect.parameters().values():
        count = int(budget.ratio * parameter.numel())
        smallest = parameter.abs().flatten().argsort(stable=True)[:count]
        parameter.view(-1)[smallest] = 0.0
        zeroed += count
        total += parameter.numel()
    return {"zeroed": zeroed, "of": total}
