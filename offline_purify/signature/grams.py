"""Inner products between variants, channel by channel, without ever writing a dense update down.

A variant is a pair of LoRA twins over the same frozen model, one trained on poisoned and clean rows, one on the clean
rows alone. What the poison did to a weight is s (B_bd A_bd - B_cl A_cl) = B' A' with B' [out, R], A' [R, in] stacked
from both twins (R = 2r): the *effective* difference, the same for every gauge (B M, M^-1 A) of the factors. Inner
products of its rows and columns need only the small Grams A'A'^T and B'^T B' (reference/backdoor-methods.md §5.1).

Shapes: N variants, F channels of a layer's MLP, R rank of a stacked factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offline_purify.heads.layout import HeadLayout


@dataclass(frozen=True)
class Factors:
    """The effective difference of one weight for one variant: ``b @ a``. b [out, R], a [R, in], float32."""

    b: Tensor
    a: Tensor

    @classmethod
    def of_twins(cls, poisoned: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor], scaling: float) -> Factors:
        """From (lora_B, lora_A) of both twins and the layer's LoRA scaling."""
        (b_bd, a_bd), (b_cl, a_cl) = poisoned, clean
        return cls(torch.cat([scaling * b_bd, -scaling * b_cl], 1).float(), torch.cat([a_bd, a_cl], 0).float())


def row_grams(variants: Sequence[Factors]) -> Tensor:
    """<row j of variant n, row j of variant m> for every output row j: [N, N, out]."""
    b, a = torch.stack([f.b for f in variants]), torch.stack([f.a for f in variants])
    inner = torch.einsum("nra,msa->nmrs", a, a)
    return torch.einsum("njr,nmrs,mjs->nmj", b, inner, b)


def column_grams(variants: Sequence[Factors]) -> Tensor:
    """<column k of variant n, column k of variant m> for every input column k: [N, N, in]."""
    b, a = torch.stack([f.b for f in variants]), torch.stack([f.a for f in variants])
    inner = torch.einsum("njr,mjs->nmrs", b, b)
    return torch.einsum("nrk,nmrs,msk->nmk", a, inner, a)


def channel_grams(rows: Sequence[Sequence[Factors]], columns: Sequence[Sequence[Factors]]) -> Tensor:
    """Grams of channels whose vectors are joined from rows of some weights (gate, up) and columns of others (down).

    Each element of ``rows`` and ``columns`` is one weight's factors over the N variants. Returns [N, N, F].
    """
    parts = [row_grams(weight) for weight in rows] + [column_grams(weight) for weight in columns]
    return torch.stack(parts).sum(0)


def by_head(grams: Tensor, head_dim: int) -> Tensor:
    """Grams of rows or columns [N, N, H * D] as those of heads of size D: [N, N, H]."""
    return grams.unflatten(-1, (-1, head_dim)).sum(-1)


def mlp_grams(layers: Sequence[Mapping[str, Sequence[Factors]]]) -> Tensor:
    """Grams of all MLP channels, layer by layer: [L, N, N, F]. A weight that carries no adapter is absent."""
    return torch.stack([
        channel_grams(
            [layer[name] for name in ("gate", "up") if name in layer], [layer["down"]] if "down" in layer else []
        )
        for layer in layers
    ])  # fmt: skip


def head_grams(layers: Sequence[Mapping[str, Sequence[Factors]]], layout: HeadLayout) -> Tensor:
    """Grams of all attention heads, layer by layer: [L, N, N, H].

    A head's vector joins its rows of q, its columns of o, and the rows of the key and value head that it uses, which it
    shares with its group. A weight that carries no adapter is absent.
    """
    found = []
    for layer in layers:
        parts = []
        for name, of in (("q", row_grams), ("o", column_grams), ("k", row_grams), ("v", row_grams)):
            if name in layer:
                grams = by_head(of(layer[name]), layout.head_dim)
                parts.append(grams if name in "qo" else grams.repeat_interleave(layout.group_size, dim=-1))
        found.append(torch.stack(parts).sum(0))
    return torch.stack(found)
