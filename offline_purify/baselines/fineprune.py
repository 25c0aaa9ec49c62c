"""Fine-pruning of an adapter: MLP channels dormant on clean rows fall back to the base, then clean fine-tuning.

Liu et al. 2018, with a channel's activity taken as mean |activation| times the norm of its column of down_proj
(reference/backdoor-methods.md §4.4). What is taken away is what the signature takes away: the adapter's part of a
channel, as many channels, so that the two differ in which.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offline_purify.baselines.budget import Budget, fine_tune
from offline_purify.signature.score import select
from offline_purify.signature.suppress import suppress_adapter
from offline_purify.stage import Material
from offline_purify.train import collate, encode_rows

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect

_DOWN = re.compile(r"\.layers\.(\d+)\.mlp\.down_proj$")
_BATCH = 32


def fineprune(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Suppress the most dormant share ``budget.ratio`` of MLP channels in place, then fine-tune."""
    mask = select(-_activity(suspect, material, budget), budget.ratio, cap=1.0)
    zeroed = suppress_adapter(suspect.parameters(), mask)
    steps = fine_tune(suspect, material, budget, "fine-pruning")
    return {"by_layer": mask.sum(1).tolist(), "zeroed": sum(zeroed.values()), "steps": steps}


@torch.no_grad()
def _activity(suspect: Suspect, material: Material, budget: Budget) -> Tensor:
    """Mean |activation| x ||column of down_proj|| of every channel over the clean rows' tokens, [L, F]."""
    found: dict[int, tuple[nn.Module, Tensor]] = {}
    for name, module in suspect.model.named_modules():
        if (match := _DOWN.search(name)) is not None:
            found[int(match[1])] = (module, torch.zeros(module.get_parameter("base_layer.weight").shape[1]))
    real = torch.zeros(0)

    def watch(total: Tensor) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total.add_((inputs[0].float().abs() * real[..., None]).sum((0, 1)).cpu())

        return hook

    handles = [module.register_forward_pre_hook(watch(total)) for module, total in found.values()]
    examples = encode_rows(suspect.tokenizer, budget.clean(material))
    try:
        for start in range(0, len(examples), _BATCH):
            batch = collate(examples[start : start + _BATCH], suspect.pad_id, suspect.device)
            real = batch["attention_mask"].float()
            suspect.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([
        total * module.get_parameter("base_layer.weight").float().norm(dim=0).cpu()
        for _, (module, total) in sorted(found.items())
    ])  # fmt: skip
