"""Re-init: the top layers start again, then clean fine-tuning.

An adapter's layer starts from zero change and falls back to the base; a whole model's projections are drawn anew from
what the architecture begins with, biases zero. As many layers as make up the budget's share of all (at least one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offline_purify.baselines.budget import Budget, fine_tune
from offline_purify.stage import Material

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect


def reinit(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Start the top layers again in place, then fine-tune."""
    layers, family = suspect.layout.layers, suspect.layout.family
    first = layers - max(1, round(budget.ratio * layers))
    generator = torch.Generator().manual_seed(material.seed)
    deviation = float(getattr(suspect.model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name, parameter in suspect.parameters().items():
            layer = family.layer(name)
            if layer is None or layer < first or ".lora_A." in name:
                continue
            if ".lora_B." in name or parameter.ndim < 2:
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return {"layers": list(range(first, layers)), "steps": fine_tune(suspect, material, budget, "re-init")}
