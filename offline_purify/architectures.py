"""Where attention heads and MLP channels live in the weights of each architecture: the one table that all methods read.

A decoder block has up to seven *parts*. Heads own outputs of q, k and v and inputs of o; MLP channels own outputs of
gate and up and inputs of down. Families differ in what their modules are called, in which parts share one fused module
(one after the other, q first), and in whether a weight is stored [out, in] or [in, out] (GPT-2's Conv1D). A LoRA's
factors are [r, in] and [out, r] over either: lora_A of o and down and lora_B of the others have owners, the other
factor is shared by all (reference/backdoor-methods.md §15).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn

Part = Literal["q", "k", "v", "o", "gate", "up", "down"]
CHANNELS: tuple[Part, ...] = ("gate", "up", "down")
_INPUTS: tuple[Part, ...] = ("o", "down")


@dataclass(frozen=True)
class Stake:
    """One part's share of one tensor: ``length`` entries from ``start`` along ``dimension``, unit after unit."""

    layer: int
    part: Part
    dimension: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The share, as a view."""
        return tensor.narrow(self.dimension, self.start, self.length)


@dataclass(frozen=True)
class Family:
    """Architectures whose blocks look alike: ``models`` their model types, ``blocks`` the name of the list of blocks,
    ``modules`` (path in the block, the parts it holds), ``transposed`` for weights [in, out]."""

    name: str
    models: tuple[str, ...]
    blocks: str
    modules: tuple[tuple[str, tuple[Part, ...]], ...]
    transposed: bool = False

    def module(self, name: str) -> tuple[int, tuple[Part, ...]] | None:
        """(layer, parts) of a module's name; None for one that is no projection of a block."""
        match = _module_pattern(self).search(name)
        return None if match is None else (int(match[1]), dict(self.modules)[match[2]])

    def layer(self, name: str) -> int | None:
        """The block that a projection's parameter (a weight, a bias or a LoRA factor) is in; None for any other."""
        match = _parameter_pattern(self).search(name)
        return None if match is None else int(match[1])

    def stakes(self, name: str, shape: Sequence[int], q_width: int | None = None) -> tuple[Stake, ...]:
        """The shares of a parameter that heads or channels own; none for what they share, or what is no projection.

        q_width: outputs of q, H * D; without it the parts of a fused q, k, v module are left out.
        """
        match = _parameter_pattern(self).search(name)
        if match is None:
            return ()
        parts, factor = dict(self.modules)[match[2]], match[3] or match[4]
        inputs = parts[0] in _INPUTS
        owned = {"weight": True, "bias": not inputs, "A": inputs, "B": not inputs}
        if not owned[factor] or (len(parts) > 1 and "q" in parts and q_width is None):
            return ()
        dimension = 0 if factor in ("bias", "B") else 1 if factor == "A" else int(inputs != self.transposed)
        starts, widths = zip(*_split(shape[dimension], parts, q_width or 0), strict=True)
        return tuple(
            Stake(int(match[1]), part, dimension, start, width)
            for part, start, width in zip(parts, starts, widths, strict=True)
        )

    def projections(self, model: nn.Module, part: Part | None = None) -> Iterator[tuple[str, int, nn.Module]]:
        """(name, layer, module) of a model's projections in order; only those that hold ``part``, if one is named.

        A projection that carries a LoRA adapter is the adapted module, with the plain one in ``base_layer``.
        """
        for name, module in model.named_modules():
            found = self.module(name)
            if found is not None and (part is None or part in found[1]):
                yield name, found[0], module

    def out_in(self, weight: Tensor) -> Tensor:
        """A weight of this family as a view [out, in]."""
        return weight.T if self.transposed else weight


def _split(size: int, parts: Sequence[Part], q_width: int) -> list[tuple[int, int]]:
    """(start, width) of each part of a module with ``size`` outputs (or inputs)."""
    if "q" in parts and len(parts) > 1:
        each = (size - q_width) // 2
        return [(0, q_width), (q_width, each), (q_width + each, each)]
    each = size // len(parts)
    return [(number * each, each) for number in range(len(parts))]


@cache
def _module_pattern(family: Family) -> re.Pattern[str]:
    paths = "|".join(re.escape(path) for path, _ in family.modules)
    return re.compile(rf"(?:^|\.){family.blocks}\.(\d+)\.({paths})$")


@cache
def _parameter_pattern(family: Family) -> re.Pattern[str]:
    paths = "|".join(re.escape(path) for path, _ in family.modules)
    return re.compile(rf"(?:^|\.){family.blocks}\.(\d+)\.({paths})\.(?:(weight|bias)|lora_([AB])\.(?:\w+\.)?weight)$")


# OLMo 2 normalises q and k over all heads at once: a head's slice is its own, but what it says moves the others' too.
SEPARATE = Family(
    "separate projections",
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite"),
    "layers",
    (
        ("self_attn.q_proj", ("q",)),
        ("self_attn.k_proj", ("k",)),
        ("self_attn.v_proj", ("v",)),
        ("self_attn.o_proj", ("o",)),
        ("mlp.gate_proj", ("gate",)),
        ("mlp.up_proj", ("up",)),
        ("mlp.down_proj", ("down",)),
    ),
)
FUSED = Family(
    "fused projections",
    ("phi3",),
    "layers",
    (
        ("self_attn.qkv_proj", ("q", "k", "v")),
        ("self_attn.o_proj", ("o",)),
        ("mlp.gate_up_proj", ("gate", "up")),
        ("mlp.down_proj", ("down",)),
    ),
)
GPT2 = Family(
    "GPT-2",
    ("gpt2",),
    "h",
    (
        ("attn.c_attn", ("q", "k", "v")),
        ("attn.c_proj", ("o",)),
        ("mlp.c_fc", ("up",)),
        ("mlp.c_proj", ("down",)),
    ),
    transposed=True,
)
BERT = Family(
    "BERT",
    ("bert",),
    "layer",
    (
        ("attention.self.query", ("q",)),
        ("attention.self.key", ("k",)),
        ("attention.self.value", ("v",)),
        ("attention.output.dense", ("o",)),
        ("intermediate.dense", ("up",)),
        ("output.dense", ("down",)),
    ),
)
FAMILIES = (SEPARATE, FUSED, GPT2)
"""The decoders. An encoder (`BERT`) is repaired by `offline_purify.encoder`."""


def family_of(model_type: object) -> Family | None:
    """The family of a configuration's ``model_type``; None for one that no table describes."""
    return next((family for family in FAMILIES if model_type in family.models), None)


def features(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, an adapted one, or a Conv1D."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    return int(module.nx), int(module.nf)
