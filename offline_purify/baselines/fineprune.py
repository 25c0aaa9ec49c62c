"""Fine-pruning: MLP channels dormant on clean rows are taken away, then clean fine-tuning.

Liu et al. 2018, with a channel's activity taken as mean |activation| times the norm of its column of down_proj
(reference/backdoor-methods.md §4.4). As many channels as the signature takes, so that the two differ in which: of an
adapter its part of them, which then fall back to the base; of a whole model the channels themselves, for good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offline_purify.baselines.budget import Budget, fine_tune
from offline_purify.signature.score import select
from offline_purify.stage import Material
from offline_purify.train import collate, encode_rows

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect

_BATCH = 32


def fineprune(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Suppress the most dormant share ``budget.ratio`` of MLP channels in place, then fine-tune."""
    mask = select(-_activity(suspect, material, budget), budget.ratio, cap=1.0)
    zeroed = suspect.suppress_channels(mask, "zero")
    steps = fine_tune(suspect, material, budget, "fine-pruning")
    return {"by_layer": mask.sum(1).tolist(), "zeroed": sum(zeroed.values()), "steps": steps}


@torch.no_grad()
def _activity(suspect: Suspect, material: Material, budget: Budget) -> Tensor:
    """Mean |activation| x ||column of down_proj|| of every channel over the clean rows' tokens, [L, F]."""
    family = suspect.layout.family
    found: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
    for _, layer, module in family.projections(suspect.model, "down"):
        weight = family.out_in(getattr(module, "base_layer", module).get_parameter("weight"))
        found[layer] = (module, weight, torch.zeros(weight.shape[1]))
    real = torch.zeros(0)

    def watch(total: Tensor) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total.add_((inputs[0].float().abs() * real[..., None]).sum((0, 1)).cpu())

        return hook

    handles = [module.register_forward_pre_hook(watch(total)) for module, _, total in found.values()]
    examples = encode_rows(suspect.tokenizer, budget.clean(material))
    try:
        for start in range(0, len(examples), _BATCH):
            batch = collate(examples[start : start + _BATCH], suspect.pad_id, suspect.device)
            real = batch["attention_mask"].float()
            suspect.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([total * weight.float().norm(dim=0).cpu() for _, (_, weight, total) in sorted(found.items())])
