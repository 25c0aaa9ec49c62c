"""INT4: every projection rounded to four bits, an adapter merged first; nothing is trained.

Symmetric, groups of 64 along the input, scaled by the largest value: what weight-only kernels store. Merged first,
because a backdoor that stays beside a quantised base in full precision was never quantised
(reference/backdoor-methods.md §4.5). What comes out of an adapter is a full model: this baseline shows what
quantisation would do, it offers no candidate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_purify.baselines.budget import Budget
from offline_purify.stage import Material

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect

GROUP = 64
_LEVELS = 7


def rounded(weight: Tensor, group: int = GROUP) -> Tensor:
    """A weight [out, in] on the grid -7 … 7 times its group's largest value over 7; a last short group is its own."""
    parts = [
        torch.where(scale > 0, (part / scale).round() * scale, part)
        for part in weight.split(group, dim=1)
        for scale in [part.abs().amax(dim=1, keepdim=True) / _LEVELS]
    ]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def int4(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Round every projection of a whole model, or every adapted one, merged, in the suspect's base (whose adapter
    becomes zero)."""
    family = suspect.layout.family
    layers, error, size = 0, 0.0, 0.0
    for _, _, layer in family.projections(suspect.model):
        adapted = hasattr(layer, "get_delta_weight")
        if suspect.setting == "adapter" and not adapted:
            continue
        weight = layer.get_parameter("base_layer.weight" if adapted else "weight")
        exact = weight + layer.get_delta_weight("default") if adapted else weight.clone()  # type: ignore[operator]
        family.out_in(weight).copy_(rounded(family.out_in(exact)))
        layers += 1
        error += float((weight - exact).square().sum())
        size += float(exact.square().sum())
    if suspect.setting == "adapter":
        for parameter in suspect.parameters().values():
            parameter.zero_()
    return {"layers": layers, "relative_error": (error / size) ** 0.5 if size else 0.0}
