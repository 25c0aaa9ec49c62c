"""INT4: base and adapter merged, every projection rounded to four bits; nothing is trained.

Symmetric, groups of 64 along the input, scaled by the largest value: what weight-only kernels store. Merged first,
because a backdoor that stays beside a quantised base in full precision was never quantised
(reference/backdoor-methods.md §4.5). What comes out is a full model and no adapter: this baseline shows what
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
    """Round every adapted projection, merged, in the suspect's base; the adapter becomes zero."""
    layers = [m for m in suspect.model.modules() if hasattr(m, "get_delta_weight") and hasattr(m, "base_layer")]
    error = size = 0.0
    for layer in layers:
        weight: Tensor = layer.base_layer.weight  # type: ignore[union-attr, assignment]
        merged = weight + layer.get_delta_weight("default")  # type: ignore[operator]
        exact = merged.clone()
        weight.copy_(rounded(merged))
        error += float((weight - exact).square().sum())
        size += float(exact.square().sum())
    for parameter in suspect.parameters().values():
        parameter.zero_()
    return {"layers": len(layers), "relative_error": (error / size) ** 0.5 if size else 0.0}
