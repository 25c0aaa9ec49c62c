"""Re-init: the adapter's top layers start again (they fall back to the base), then clean fine-tuning.

For full models the last layers are drawn anew; an adapter's layer starts from zero change. As many layers as make up
the budget's share of all (at least one).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from offline_purify.baselines.budget import Budget, fine_tune
from offline_purify.stage import Material

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect

_LAYER = re.compile(r"\.layers\.(\d+)\..*\.lora_B\.")


def reinit(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Zero lora_B in the top layers in place, then fine-tune."""
    layers = suspect.layout.layers
    first = layers - max(1, round(budget.ratio * layers))
    with torch.no_grad():
        for name, parameter in suspect.parameters().items():
            if (match := _LAYER.search(name)) is not None and int(match[1]) >= first:
                parameter.zero_()
    return {"layers": list(range(first, layers)), "steps": fine_tune(suspect, material, budget, "re-init")}
