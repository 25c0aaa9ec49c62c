"""Silencing MLP channels and heads: in a LoRA adapter they fall back to the base, in a full model they start again.

Channel j of an MLP owns row j of gate_proj (where there is one) and up_proj and column j of down_proj; in LoRA factors
that is row j of lora_B for gate and up and column j of lora_A for down. The other factors are shared by all channels
and never touched. A bias element of gate or up belongs to its channel, one of q, k or v to its head. Fused and
transposed weights are read through the architecture's table (`offline_purify.architectures`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from offline_purify.architectures import CHANNELS, SEPARATE, Family, Stake
from offline_purify.heads.layout import HeadLayout

Start = Literal["xavier", "initializer", "zero_down", "zero"]
"""What replaced weights are: uniform within sqrt(6 / (in + out)) of the *whole* projection (the fans of the slice would
inflate it); normal as the architecture begins; as xavier but with the down columns (o columns of a head) zero, so that
the unit starts from silence and not from noise; or zero, a pruned unit that no training brings back."""


def channel_slices(parameters: Mapping[str, nn.Parameter], family: Family = SEPARATE) -> dict[str, tuple[Stake, ...]]:
    """The shares of weights, biases and LoRA factors that MLP channels own, by parameter name."""
    found = {}
    for name, parameter in parameters.items():
        stakes = tuple(s for s in family.stakes(name, parameter.shape) if s.part in CHANNELS)
        if stakes:
            found[name] = stakes
    return found


@torch.no_grad()
def suppress_adapter(parameters: Mapping[str, nn.Parameter], mask: Tensor, family: Family = SEPARATE) -> dict[str, int]:
    """Zero the slices of the channels in ``mask`` (bool [L, F]), in place: those channels compute what the base does.

    Returns the elements zeroed, by parameter name. Raises ValueError when no factor belongs to an MLP channel, or when
    one has another number of channels.
    """
    slices = channel_slices(parameters, family)
    if not slices:
        raise ValueError("the adapter changes no gate_proj, up_proj or down_proj: it has no MLP channels to suppress.")
    return _restart(parameters, slices, mask, "zero")


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
    family: Family = SEPARATE,
) -> dict[str, int]:
    """Give the channels in ``mask`` (bool [L, F]) of a full model new weights (`Start`), in place; biases become zero.

    deviation: that of ``initializer``. Returns the elements replaced, by parameter name. Raises ValueError when there
    is no MLP weight of that layout, or when one has another number of channels.
    """
    slices = channel_slices(parameters, family)
    if not slices:
        raise ValueError("the model has no gate_proj, up_proj or down_proj weights: its MLP layout is not supported.")
    return _restart(parameters, slices, mask, start, seed, deviation)


@torch.no_grad()
def suppress_model_heads(
    parameters: Mapping[str, nn.Parameter],
    layout: HeadLayout,
    mask: Tensor,
    start: Start = "xavier",
    seed: int = 0,
    deviation: float = 0.02,
) -> dict[str, int]:
    """Give the heads in ``mask`` (bool [L, H]) of a full model new weights (`Start`), in place: q's rows and o's
    columns, and k's and v's rows where every head of the group is in it; their biases become zero.

    Returns the elements replaced, by parameter name.
    """
    own, shared = (
        values.repeat_interleave(layout.head_dim, dim=-1) for values in (mask, layout.by_group(mask).all(-1))
    )
    replaced: dict[str, int] = {}
    for parts, wide in (("qo", own), ("kv", shared)):
        slices = {
            name: tuple(s for s in layout.stakes(name, p.shape) if s.part in parts) for name, p in parameters.items()
        }
        slices = {name: stakes for name, stakes in slices.items() if stakes}
        for name, count in _restart(parameters, slices, wide, start, seed, deviation).items():
            replaced[name] = replaced.get(name, 0) + count
    return replaced


def fresh_weights(
    stake: Stake, parameter: Tensor, count: int, start: Start, deviation: float, generator: torch.Generator
) -> Tensor:
    """New values for ``count`` of a share's units, as `Start` says; zero for a bias. Fans are those of the projection,
    also where it shares a fused weight with others."""
    shape = list(parameter.shape)
    shape[stake.dimension] = count
    if parameter.ndim == 1 or start == "zero" or (start == "zero_down" and stake.part in ("down", "o")):
        return torch.zeros(shape)
    if start == "initializer":
        return torch.randn(shape, generator=generator) * deviation
    bound = math.sqrt(6.0 / (stake.length + parameter.shape[1 - stake.dimension]))
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def _restart(
    parameters: Mapping[str, nn.Parameter],
    slices: Mapping[str, tuple[Stake, ...]],
    mask: Tensor,
    start: Start,
    seed: int = 0,
    deviation: float = 0.02,
) -> dict[str, int]:
    """Replace the entries of each share that ``mask`` [L, length] names; returns the elements replaced by name."""
    generator = torch.Generator().manual_seed(seed)
    replaced: dict[str, int] = {}
    for name, stakes in slices.items():
        parameter = parameters[name]
        for stake in stakes:
            chosen = mask[stake.layer].to(parameter.device)
            if stake.length != len(chosen):
                raise ValueError(f"{name} has {stake.length} channels, the signature {len(chosen)}.")
            places = chosen.nonzero().flatten()
            fresh = fresh_weights(stake, parameter, len(places), start, deviation, generator)
            stake.of(parameter).index_copy_(stake.dimension, places, fresh.to(parameter))
            replaced[name] = replaced.get(name, 0) + fresh.numel()
    return replaced
