"""Silencing MLP channels and heads: in a LoRA adapter they fall back to the base, in a full model they start again.

Channel j of a gated MLP owns row j of gate_proj and up_proj and column j of down_proj; in LoRA factors that is row j of
lora_B for gate and up and column j of lora_A for down. The other factors are shared by all channels and never touched.
A bias element of gate or up belongs to its channel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from offline_purify.heads.layout import HeadLayout

Start = Literal["xavier", "initializer", "zero_down"]
_FACTOR = re.compile(r"\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.lora_([AB])\.")
_WEIGHT = re.compile(r"\.?layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)$")
_OWNED = {"gate": "B", "up": "B", "down": "A"}


def channel_slices(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, int]]:
    """The LoRA factors that channels own a slice of, by parameter name: (layer, dimension along which channels lie)."""
    found = {}
    for name in parameters:
        match = _FACTOR.search(name)
        if match is not None and _OWNED[match[2]] == match[3]:
            found[name] = int(match[1]), 0 if match[3] == "B" else 1
    return found


@torch.no_grad()
def suppress_adapter(parameters: Mapping[str, nn.Parameter], mask: Tensor) -> dict[str, int]:
    """Zero the slices of the channels in ``mask`` (bool [L, F]), in place: those channels compute what the base does.

    Returns the elements zeroed, by parameter name. Raises ValueError when no factor belongs to an MLP channel, or when
    one has another number of channels.
    """
    slices = channel_slices(parameters)
    if not slices:
        raise ValueError("the adapter changes no gate_proj, up_proj or down_proj: it has no MLP channels to suppress.")
    zeroed = {}
    for name, (layer, dimension) in slices.items():
        parameter = parameters[name]
        chosen = mask[layer].to(parameter.device)
        if parameter.shape[dimension] != len(chosen):
            raise ValueError(f"{name} has {parameter.shape[dimension]} channels, the signature {len(chosen)}.")
        parameter.index_fill_(dimension, chosen.nonzero().flatten(), 0.0)
        zeroed[name] = int(chosen.sum()) * parameter.shape[1 - dimension]
    return zeroed


@torch.no_grad()
def suppress_heads(parameters: Mapping[str, nn.Parameter], layout: HeadLayout, mask: Tensor) -> dict[str, int]:
    """Zero what an adapter changes in the heads of ``mask`` (bool [L, H]), in place: rows of q's lora_B and columns of
    o's lora_A, and rows of k's and v's where every head of the group is in it (another head needs them).

    Returns the elements zeroed, by parameter name; empty for an adapter without attention factors.
    """
    shared = layout.by_group(mask).all(-1)
    masks = layout.masks(parameters, mask.float(), shared.float())
    for name, chosen in masks.items():
        parameters[name].masked_fill_(chosen > 0, 0.0)
    return {name: int((chosen > 0).sum()) for name, chosen in masks.items()}


@torch.no_grad()
def suppress_model(
    parameters: Mapping[str, nn.Parameter],
    mask: Tensor,
    start: Start = "xavier",
    seed: int = 0,
    deviation: float = 0.02,
) -> dict[str, int]:
    """Give the channels in ``mask`` (bool [L, F]) of a full model new weights, in place.

    xavier: uniform within sqrt(6 / (in + out)) of the *whole* matrix (the fans of the slice would inflate it);
    initializer: normal with ``deviation``, as the architecture begins; zero_down: as xavier, and the down column zero,
    so that the channel starts from silence and not from noise. Biases become zero. Returns the elements replaced, by
    parameter name. Raises ValueError when there is no MLP weight of that layout.
    """
    generator = torch.Generator().manual_seed(seed)
    replaced = {}
    for name, parameter in parameters.items():
        match = _WEIGHT.search(name)
        if match is None:
            continue
        chosen = mask[int(match[1])].to(parameter.device).nonzero().flatten()
        if match[3] == "bias":
            if match[2] != "down":
                parameter[chosen] = 0.0
                replaced[name] = len(chosen)
            continue
        dimension = 1 if match[2] == "down" else 0
        if parameter.shape[dimension] != mask.shape[1]:
            raise ValueError(f"{name} has {parameter.shape[dimension]} channels, the signature {mask.shape[1]}.")
        shape = list(parameter.shape)
        shape[dimension] = len(chosen)
        if start == "zero_down" and match[2] == "down":
            fresh = torch.zeros(shape)
        elif start == "initializer":
            fresh = torch.randn(shape, generator=generator) * deviation
        else:
            bound = math.sqrt(6.0 / sum(parameter.shape))
            fresh = (2 * torch.rand(shape, generator=generator) - 1) * bound
        parameter.index_copy_(dimension, chosen, fresh.to(parameter))
        replaced[name] = fresh.numel()
    if not replaced:
        raise ValueError("the model has no gate_proj, up_proj or down_proj weights: its MLP layout is not supported.")
    return replaced
