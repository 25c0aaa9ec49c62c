"""Head Grams: what the guard remembers of a request's attention, in constant space per layer.

Each observed query gives, per layer, the rows a_t in [H, T]: attention of every head over the prompt columns.
The paper compares heads by the cosine of their flattened [T_g, T_p] matrices (001 section 4.1, Eq. 5). That cosine is
a streaming sum, so no matrix over time is ever kept:

    G_t = G_{t-1} + a_t a_t^T   in [L, H, H]          cos(h, j) = G[h, j] / sqrt(G[h, h] G[j, j])

The same rows summed over heads (and layers and steps) give the focus f in [T_p]: the prompt tokens the heads agree on.
Beside them stands the sink: what each head spends on prompt token 0, where heads that have nothing to do rest.
`HeadGrams` is the bank of these for a fixed number of slots; it knows nothing of models, engines or tokens. It also
counts the rows each layer delivered, so that a guard that went blind is noticed instead of believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Squared norms below this are a head that never looked at the prompt: its cosines read 0, not NaN.
_SMALLEST_SQUARED_NORM = 1e-30


def cosine(gram: Tensor) -> Tensor:
    """Cosine of every pair of heads. `gram` is [..., H, H] float32; returns the same shape in [-1, 1], diagonal 1.

    A head whose rows were all zero has cosine 0 with every head, itself included.
    """
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(_SMALLEST_SQUARED_NORM).sqrt()
    return (gram / norm.unsqueeze(-1) / norm.unsqueeze(-2)).clamp(-1.0, 1.0)


class HeadSums(NamedTuple):
    """One slot's sums over the rows so far: gram [L, H, H], sink [L, H], focus [T_p], all float32."""

    gram: Tensor
    sink: Tensor
    focus: Tensor


class HeadGrams:
    """Streaming head Grams, sinks, focus and row counts for `slots` requests at a time.

    Attributes (all on `device`): gram [S, L, H, H], sink [S, L, H] and focus [S, T_max] float32, layer_rows [S, L]
    int64.
    """

    def __init__(
        self, slots: int, layers: int, heads: int, max_prompt_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.gram = torch.zeros(slots, layers, heads, heads, dtype=torch.float32, device=device)
        self.sink = torch.zeros(slots, layers, heads, dtype=torch.float32, device=device)
        self.focus = torch.zeros(slots, max_prompt_tokens, dtype=torch.float32, device=device)
        self.layer_rows = torch.zeros(slots, layers, dtype=torch.int64, device=device)
        self._prompt_tokens = [0] * slots

    @property
    def rows_seen(self) -> Tensor:
        """[S] int64: rows that every layer has delivered since the slot was reset."""
        return self.layer_rows.amin(dim=1)

    def reset(self, slots: Sequence[int], prompt_tokens: Sequence[int] | None = None) -> None:
        """Forgets what `slots` held; `prompt_tokens` are the lengths T_p of the requests that take them next."""
        index = torch.as_tensor(list(slots), dtype=torch.int64, device=self.gram.device)
        self.gram.index_fill_(0, index, 0.0)
        self.sink.index_fill_(0, index, 0.0)
        self.focus.index_fill_(0, index, 0.0)
        self.layer_rows.index_fill_(0, index, 0)
        for slot, tokens in zip(slots, prompt_tokens or [0] * len(slots), strict=True):
            self._prompt_tokens[slot] = tokens

    def prompt_tokens(self, slot: int) -> int:
        """T_p of the request in `slot`, as told to `reset`."""
        return self._prompt_tokens[slot]

    def add(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Adds one observed query per slot. slots [N] int64, all different; rows [N, H, T] float32, T <= T_max."""
        self.gram[:, layer].index_add_(0, slots, rows @ rows.transpose(-1, -2))
        self.sink[:, layer].index_add_(0, slots, rows[..., 0])
        self.focus[:, : rows.shape[-1]].index_add_(0, slots, rows.sum(dim=1))
        self.layer_rows[:, layer].index_add_(0, slots, torch.ones_like(slots))

    def read(self, slot: int) -> HeadSums:
        """Copies of what one slot holds."""
        tokens = self._prompt_tokens[slot]
        return HeadSums(self.gram[slot].clone(), self.sink[slot].clone(), self.focus[slot, :tokens].clone())

    def complete(self, slot: int, expected_rows: int) -> bool:
        """True if every layer delivered exactly `expected_rows` rows for this slot: the probe was not blind."""
        return bool((self.layer_rows[slot] == expected_rows).all())
