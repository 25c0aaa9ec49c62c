"""Wanda: entries whose weight times input norm is smallest in their row become zero.

Sun et al. 2023: score |W_ij| ||X_j||_2, compared within each output row. W are the weights of a whole model, or an
adapter's LoRA factors, and X what reaches them on clean rows (the layer's input for A, A's output for B), all measured
before any is pruned; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offline_purify.baselines.budget import Budget
from offline_purify.stage import Material
from offline_purify.train import collate, encode_rows

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect

_BATCH = 32


@torch.no_grad()
def wanda(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Zero the share ``budget.ratio`` of each row of every factor or weight, in place."""
    suspicious = {id(p): p for p in suspect.parameters().values() if p.ndim == 2}
    modules = [m for m in suspect.model.modules() if isinstance(m, nn.Linear | Conv1D) and id(m.weight) in suspicious]
    norms = _input_norms(suspect, modules, material, budget)
    zeroed = 0
    for module in modules:
        weight = _out_in(module)
        scores = weight.abs() * norms[module]
        count = int(budget.ratio * scores.shape[1])
        weight.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], 0.0)
        zeroed += count * len(scores)
    return {"zeroed": zeroed, "of": sum(p.numel() for p in suspicious.values())}


def _out_in(module: nn.Module) -> Tensor:
    """A layer's weight as a view [out, in]."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def _input_norms(
    suspect: Suspect, modules: Sequence[nn.Module], material: Material, budget: Budget
) -> dict[nn.Module, Tensor]:
    """Norm of every input feature of each module over the tokens of the budget's clean rows, padding left out."""
    squares = {module: torch.zeros(_out_in(module).shape[1]) for module in modules}
    real = torch.zeros(0)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[module] += (inputs[0].float() * real[..., None]).square().sum((0, 1)).cpu()

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    examples = encode_rows(suspect.tokenizer, budget.clean(material))
    try:
        for start in range(0, len(examples), _BATCH):
            batch = collate(examples[start : start + _BATCH], suspect.pad_id, suspect.device)
            real = batch["attention_mask"].float()
            suspect.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {module: total.sqrt().to(suspect.device) for module, total in squares.items()}
