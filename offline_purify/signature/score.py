"""From inner products between variants to the signature: how much every variant moves a channel, and how alike.

Of channel j: m_j, the mean length of its differences over the N variants; a_j, the mean over pairs of variants of the
positive part of their cosine; s_j = m_j + lambda a_j. The signature is the top share of s (immunization-signature
paper, Eqs. 4-6; reference/backdoor-methods.md §5.1). Both terms are kept, because the published weight 0.01 makes the
second one nearly silent wherever lengths are large: whoever reads the scores must be able to see that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Scope = Literal["global", "per_layer"]
Term = Literal["both", "magnitude", "alignment"]


@dataclass(frozen=True)
class Scores:
    """magnitude, alignment: [L, F] each; weight: lambda."""

    magnitude: Tensor
    alignment: Tensor
    weight: float = 0.01

    def of(self, term: Term = "both") -> Tensor:
        """The score [L, F]: both terms, or one of them alone (a control)."""
        if term == "magnitude":
            return self.magnitude
        if term == "alignment":
            return self.alignment
        return self.magnitude + self.weight * self.alignment

    def spread(self) -> dict[str, float]:
        """Standard deviation over all channels of each term as it enters the sum: which of them decides."""
        return {
            "magnitude": float(self.magnitude.std()),
            "alignment": float(self.weight * self.alignment.std()),
        }


def score_channels(grams: Tensor, weight: float = 0.01, by_layer: bool = False) -> Scores:
    """Scores of channels from their Grams [L, N, N, F].

    by_layer divides lengths by their layer's median, so that layers which move more than others do not take everything
    (then a weight of 0.1 to 1 is on the same scale). A channel that some variant does not move has cosine 0 with it; a
    single variant has nothing to be compared with: alignment 0. Raises ValueError for Grams of another shape.
    """
    if grams.ndim != 4 or grams.shape[1] != grams.shape[2] or not grams.shape[1]:
        raise ValueError(f"expected Grams [layers, variants, variants, channels], found {tuple(grams.shape)}.")
    grams = grams.double()
    n = grams.shape[1]
    lengths = grams.diagonal(dim1=1, dim2=2).movedim(-1, 1).clamp(min=0).sqrt()  # [L, N, F]
    magnitude = lengths.mean(1)
    if by_layer:
        magnitude = magnitude / magnitude.median(dim=-1, keepdim=True).values.clamp(min=1e-30)
    if n == 1:
        return Scores(magnitude.float(), torch.zeros_like(magnitude).float(), weight)
    products = lengths[:, :, None] * lengths[:, None]
    cosines = torch.where(products > 0, grams / products.clamp(min=1e-300), 0.0).clamp(0.0, 1.0)
    first, second = torch.triu_indices(n, n, offset=1)
    return Scores(magnitude.float(), cosines[:, first, second].mean(1).float(), weight)


@dataclass(frozen=True)
class Signature:
    """Inner products between N variants: ``channels`` [L, N, N, F] of MLP channels, ``heads`` [L, N, N, H] of attention
    heads; ``told`` is what a report says of the variants (JSON-able, no prompt)."""

    channels: Tensor
    heads: Tensor
    told: dict[str, Any]

    def scores(self, weight: float = 0.01, by_layer: bool = False) -> tuple[Scores, Scores]:
        """Scores of channels [L, F] and of heads [L, H]."""
        return score_channels(self.channels, weight, by_layer), score_channels(self.heads, weight, by_layer)

    def of_first(self, variants: int) -> Signature:
        """What the first few variants alone would have given."""
        return Signature(self.channels[:, :variants, :variants], self.heads[:, :variants, :variants], self.told)

    def save(self, path: Path) -> None:
        """Write to one safetensors file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        tensors = {"channels": self.channels.contiguous(), "heads": self.heads.contiguous()}
        save_file(tensors, temporary, {"told": json.dumps(self.told)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Signature:
        """Read what ``save`` wrote."""
        with safe_open(path, "pt") as file:
            return cls(file.get_tensor("channels"), file.get_tensor("heads"), json.loads(file.metadata()["told"]))


def select(scores: Tensor, ratio: float, scope: Scope = "global", cap: float = 0.5) -> Tensor:
    """The top share ``ratio`` of channels as a mask, bool [L, F]; ties go to the earlier channel.

    global ranks all layers together and never takes more than the share ``cap`` of one layer (what a full layer cannot
    take goes to the next best of the others, as far as there are any); per_layer takes the share of every layer.
    Raises ValueError for a ratio or cap outside (0, 1].
    """
    if not 0 < ratio <= 1 or not 0 < cap <= 1:
        raise ValueError(f"ratio and cap must lie in (0, 1], found {ratio} and {cap}.")
    layers, channels = scores.shape
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(channels).expand(layers, -1).contiguous())
    if scope == "per_layer":
        return rank < round(ratio * channels)
    allowed = rank < max(1, round(cap * channels))
    wanted = min(round(ratio * layers * channels), int(allowed.sum()))
    flat = scores.masked_fill(~allowed, -torch.inf).flatten()
    mask = torch.zeros(layers * channels, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:wanted]] = True
    return mask.reshape(layers, channels)


def random_like(mask: Tensor, seed: int) -> Tensor:
    """As many channels of each layer, drawn at random: the control without which nothing can be credited to a score."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros_like(mask)
    for layer, count in enumerate(mask.sum(1).tolist()):
        drawn[layer, torch.randperm(mask.shape[1], generator=generator)[:count]] = True
    return drawn
