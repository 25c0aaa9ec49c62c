"""Where each attention head lives in a LoRA adapter: rows of lora_B for q, k, v and columns of lora_A for o.

Query head h owns rows h*D:(h+1)*D of q's lora_B and the same columns of o's lora_A; key/value head g = h // (H / H_kv)
owns rows g*D:(g+1)*D of k's and v's lora_B. The other factor of each pair (lora_A of q, k, v; lora_B of o) is shared by
all heads, so no head may claim it. D is the configuration's head_dim, never hidden_size / H.

Shapes: L layers, H query heads, H_kv key/value heads, D head size, r LoRA rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

_FACTOR = re.compile(r"\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.lora_([AB])\.")
_HEADED = {"q": "B", "k": "B", "v": "B", "o": "A"}


@dataclass(frozen=True)
class HeadLayout:
    """L layers of H query heads over H_kv key/value heads of size D."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def by_group(self, values: Tensor) -> Tensor:
        """Per-head values [L, H] as [L, H_kv, H / H_kv]."""
        return values.reshape(self.layers, self.kv_heads, self.group_size)

    def kv_minimum(self, values: Tensor) -> Tensor:
        """Smallest value among the query heads that share a key/value head: [L, H] -> [L, H_kv]."""
        return self.by_group(values).amin(-1)

    def kv_alignable(self, suspicious: Tensor, safe: Tensor) -> Tensor:
        """Key heads that alignment may move: used by a suspicious head and by no safe one. bool [L, H] -> [L, H_kv]."""
        return self.by_group(suspicious).any(-1) & ~self.by_group(safe).any(-1)

    def masks(
        self, parameters: Mapping[str, nn.Parameter], q_values: Tensor, kv_values: Tensor, projections: str = "qkvo"
    ) -> dict[str, Tensor]:
        """Value of the owning head for every element of the head-wise LoRA factors, by parameter name.

        ``q_values`` [L, H] apply to q and o, ``kv_values`` [L, H_kv] to k and v; only the letters in ``projections``.
        Parameters that no single head owns are absent. Each mask has its parameter's shape and dtype.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            match = _FACTOR.search(name)
            if match is None or match[2] not in projections or _HEADED[match[2]] != match[3]:
                continue
            values = (q_values if match[2] in "qo" else kv_values)[int(match[1])]
            line = values.to(parameter.dtype).to(parameter.device).repeat_interleave(self.head_dim)
            expanded = line[:, None] if match[3] == "B" else line[None, :]
            found[name] = expanded.expand_as(parameter).clone()
        return found


class HeadOwner(Protocol):
    """A model under repair, seen as parameters that belong to heads: a suspect adapter or an encoder."""

    @property
    def layout(self) -> HeadLayout:
        """Which head owns what."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What may change, by parameter name."""


def random_partition_like(suspicious: Tensor, safe: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random disjoint head sets of the same sizes, each bool [L, H]: the control of every head-wise repair."""
    order = torch.randperm(suspicious.numel(), generator=torch.Generator().manual_seed(seed))
    n, m = int(suspicious.sum()), int(safe.sum())
    first, second = torch.zeros(suspicious.numel(), dtype=torch.bool), torch.zeros(suspicious.numel(), dtype=torch.bool)
    first[order[:n]] = True
    second[order[n : n + m]] = True
    return first.view_as(suspicious), second.view_as(safe)
