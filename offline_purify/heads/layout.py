"""Where each attention head lives in a model's weights or in a LoRA adapter: outputs of q, k, v and inputs of o.

Query head h owns rows h*D:(h+1)*D of q's weight (and bias, and lora_B) and the same columns of o's weight (and lora_A);
key/value head g = h // (H / H_kv) owns rows g*D:(g+1)*D of k's and v's. What is shared by all heads (lora_A of q, k, v;
lora_B and bias of o) no head may claim. D is the configuration's head_dim, never hidden_size / H. Where the parts lie
in fused or transposed weights is the architecture's table (`offline_purify.architectures`).

Shapes: L layers, H query heads, H_kv key/value heads, D head size, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offline_purify.architectures import SEPARATE, Family, Stake


@dataclass(frozen=True)
class HeadLayout:
    """L layers of H query heads over H_kv key/value heads of size D; ``windows`` is how many tokens each layer's
    queries see at most, their own included (None: all; empty: all in every layer)."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    family: Family = SEPARATE
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, None without one."""
        return self.windows[layer] if self.windows else None

    def stakes(self, name: str, shape: torch.Size) -> tuple[Stake, ...]:
        """The shares of a parameter that heads or MLP channels own."""
        return self.family.stakes(name, shape, self.heads * self.head_dim)

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
        """Value of the owning head for every element of weights, biases and LoRA factors, by parameter name.

        ``q_values`` [L, H] apply to q and o, ``kv_values`` [L, H_kv] to k and v; only the letters in ``projections``
        (in a fused weight the other parts get 0). Parameters that no single head owns are absent. Each mask has its
        parameter's shape and dtype.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            stakes = [s for s in self.stakes(name, parameter.shape) if s.part in projections]
            if not stakes:
                continue
            found[name] = torch.zeros_like(parameter, requires_grad=False)
            for stake in stakes:
                values = (q_values if stake.part in "qo" else kv_values)[stake.layer]
                line = values.to(parameter.dtype).to(parameter.device).repeat_interleave(self.head_dim)
                shape = [-1 if d == stake.dimension else 1 for d in range(parameter.ndim)]
                stake.of(found[name]).copy_(line.view(shape).expand_as(stake.of(parameter)))
        return found


def random_partition_like(suspicious: Tensor, safe: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random disjoint head sets of the same sizes, each bool [L, H]: the control of every head-wise repair."""
    order = torch.randperm(suspicious.numel(), generator=torch.Generator().manual_seed(seed))
    n, m = int(suspicious.sum()), int(safe.sum())
    first, second = torch.zeros(suspicious.numel(), dtype=torch.bool), torch.zeros(suspicious.numel(), dtype=torch.bool)
    first[order[:n]] = True
    second[order[n : n + m]] = True
    return first.view_as(suspicious), second.view_as(safe)
