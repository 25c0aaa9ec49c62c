"""Head Grams: what the guard remembers of a request's attention, in constant space per layer.

Each observed query gives, per layer, the rows a_t in [H, T]: attention of every head over the prompt columns.
The paper compares heads by the cosine of their flattened [T_g, T_p] matrices (001 section 4.1, Eq. 5). That cosine is
a streaming sum, so no matrix over time is ever kept:

    G_t = G_{t-1} + a_t a_t^T   in [L, H, H]          cos(h, j) = G[h, j] / sqrt(G[h, h] G[j, j])

What the strongest head of each layer spends on each prompt token, added up over layers and the same rows, is the focus
f in [T_p]: where a request is looked at. In a sum over heads, many that look where they always do would drown the one
that looks at a trigger.
Beside them stands the sink: what each head spends on prompt token 0, where heads that have nothing to do rest.
And the norms: how large the query that asked for a row was, the key and value that its token wrote, and the output
that each head brought back. A row says where a head looked, not how hard it looked nor what it found there
(docs/vaccine.md).

Generated rows join the row of the last prompt position. The rows of the positions before that one are kept apart from
it (`earlier`), in groups: no answer exists yet that could be mistaken for a trigger, and one sum of them all would let
one row drown another.

`HeadGrams` is the bank of these for a fixed number of slots; it knows nothing of models, engines or tokens. It also
counts the rows each layer delivered, so that a guard that went blind is noticed instead of believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

# Squared norms below this are a head that never looked at the prompt: its cosines read 0, not NaN.
_SMALLEST_SQUARED_NORM = 1e-30
_SMALLEST_NORM = 1e-6  # below it a vector is one that was never there: its logarithm is finite

PROMPT_GROUPS: Final = (1, 1, 2, 4, 8, 16)
"""How many rows of the prompt are added up in each of its places, from the last position back: the nearer, the finer
(docs/vaccine.md)."""
PROMPT_ROWS: Final = sum(PROMPT_GROUPS)
"""Prompt positions, counted from the last, whose rows are read."""
PROMPT_KEY: Final = "+".join(map(str, PROMPT_GROUPS))
"""What the key of a probe says of them."""


def prompt_positions(prompt_tokens: int, rows: int = PROMPT_ROWS) -> list[int]:
    """The positions of a prompt that are read, the last one first; a prompt with fewer repeats its first."""
    return [max(prompt_tokens - 1 - back, 0) for back in range(rows)]


def cosine(gram: Tensor) -> Tensor:
    """Cosine of every pair of heads. `gram` is [..., H, H] float32; returns the same shape in [-1, 1], diagonal 1.

    A head whose rows were all zero has cosine 0 with every head, itself included.
    """
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(_SMALLEST_SQUARED_NORM).sqrt()
    return (gram / norm.unsqueeze(-1) / norm.unsqueeze(-2)).clamp(-1.0, 1.0)


def log_norms(vectors: Tensor) -> Tensor:
    """Logarithms of the norms of a token's vectors, [..., 2 (H + H_kv), D] -> [..., 2 (H + H_kv)] float32: the H
    queries first, then the H outputs, the H_kv keys and the H_kv values."""
    return vectors.float().norm(dim=-1).clamp_min_(_SMALLEST_NORM).log_()


class Earlier(NamedTuple):
    """The groups of rows before the last prompt position, the nearest first, as if each were its mean row: gram
    [..., R - 1, L, H, H] (a sum, over the square of the group's rows), sink [..., R - 1, L, H] and norms
    [..., R - 1, L, 2 (H + H_kv)] float32."""

    gram: Tensor
    sink: Tensor
    norms: Tensor


class HeadSums(NamedTuple):
    """One slot's sums over the rows from the last prompt position on: gram [L, H, H], sink [L, H], norms
    [L, 2 (H + H_kv)] (`log_norms`), focus [T_p], all float32; and at step 0 the groups of rows before it (None where a
    bank keeps none)."""

    gram: Tensor
    sink: Tensor
    norms: Tensor
    focus: Tensor
    earlier: Earlier | None = None

    def cpu(self) -> HeadSums:
        """The same on the CPU."""
        earlier = None if self.earlier is None else Earlier(*(part.cpu() for part in self.earlier))
        return HeadSums(self.gram.cpu(), self.sink.cpu(), self.norms.cpu(), self.focus.cpu(), earlier)


class HeadGrams:
    """Streaming head Grams, sinks, norms, focus and row counts for `slots` requests at a time.

    Attributes (all on `device`): gram [R S, L, H, H], sink [R S, L, H], norms [R S, L, 2 (H + H_kv)] float32,
    layer_rows [R S, L] int64, focus [S, T_max] float32, for the R `groups` of prompt rows: the first S places are the
    slots' sums, the others (`place`) the groups before the last prompt position, which need no focus. `kv_heads` are as
    many as heads unless it is told.
    """

    def __init__(
        self,
        slots: int,
        layers: int,
        heads: int,
        max_prompt_tokens: int,
        device: torch.device | str = "cpu",
        groups: Sequence[int] = (1,),
        kv_heads: int | None = None,
    ) -> None:
        self.slots, self.groups = slots, tuple(groups)
        self._group_of = [number for number, size in enumerate(groups) for _ in range(size)]
        places = slots * len(self.groups)
        self.gram = torch.zeros(places, layers, heads, heads, dtype=torch.float32, device=device)
        self.sink = torch.zeros(places, layers, heads, dtype=torch.float32, device=device)
        wide = 2 * (heads + (heads if kv_heads is None else kv_heads))
        self.norms = torch.zeros(places, layers, wide, dtype=torch.float32, device=device)
        self.focus = torch.zeros(slots, max_prompt_tokens, dtype=torch.float32, device=device)
        self.layer_rows = torch.zeros(places, layers, dtype=torch.int64, device=device)
        self._rows = torch.tensor(self.groups[1:], dtype=torch.float32, device=device)
        self._prompt_tokens = [0] * slots

    @property
    def rows_seen(self) -> Tensor:
        """[S] int64: rows from the last prompt position on that every layer has delivered since the slot was reset."""
        return self.layer_rows[: self.slots].amin(dim=1)

    def place(self, slot: int, back: int) -> int:
        """Where the row goes that is `back` positions before the last of the prompt in `slot`."""
        return self._group_of[back] * self.slots + slot

    def reset(self, slots: Sequence[int], prompt_tokens: Sequence[int] | None = None) -> None:
        """Forgets what `slots` held; `prompt_tokens` are the lengths T_p of the requests that take them next."""
        mine = torch.tensor(slots, dtype=torch.int64, device=self.gram.device)
        places = torch.cat([mine + number * self.slots for number in range(len(self.groups))])
        self.gram.index_fill_(0, places, 0.0)
        self.sink.index_fill_(0, places, 0.0)
        self.norms.index_fill_(0, places, 0.0)
        self.focus.index_fill_(0, mine, 0.0)
        self.layer_rows.index_fill_(0, places, 0)
        for slot, tokens in zip(slots, prompt_tokens or [0] * len(slots), strict=True):
            self._prompt_tokens[slot] = tokens

    def prompt_tokens(self, slot: int) -> int:
        """T_p of the request in `slot`, as told to `reset`."""
        return self._prompt_tokens[slot]

    def add(self, layer: int, places: Tensor, rows: Tensor) -> None:
        """Adds observed queries. places [N] int64, slots or other places; rows [N, H, T] float32, T <= T_max."""
        self.gram[:, layer].index_add_(0, places, rows @ rows.transpose(-1, -2))
        self.sink[:, layer].index_add_(0, places, rows[..., 0])
        looked = rows.amax(dim=1) * (places < self.slots).unsqueeze(-1)
        self.focus[:, : rows.shape[-1]].index_add_(0, places % self.slots, looked)
        self.layer_rows[:, layer].index_add_(0, places, torch.ones_like(places))

    def add_norms(self, places: Tensor, norms: Tensor, layer: int | None = None) -> None:
        """Adds the norms of the same queries' tokens in one layer, [N, 2 (H + H_kv)], or for no `layer` in all of them,
        [N, L, 2 (H + H_kv)]. places [N] int64."""
        (self.norms if layer is None else self.norms[:, layer]).index_add_(0, places, norms)

    def read(self, slot: int, step: int = 0) -> HeadSums:
        """Copies of what one slot holds at a step; the groups before the last prompt position, which do not change,
        only at step 0."""
        tokens = self._prompt_tokens[slot]
        earlier = None
        if step == 0 and len(self.groups) > 1:
            before = slice(slot + self.slots, None, self.slots)
            rows = self._rows[:, None, None]
            grams = self.gram[before] / rows[..., None] ** 2
            earlier = Earlier(grams, self.sink[before] / rows, self.norms[before] / rows)
        gram, sink, norms = (part[slot].clone() for part in (self.gram, self.sink, self.norms))
        return HeadSums(gram, sink, norms, self.focus[slot, :tokens].clone(), earlier)

    def complete(self, slot: int, expected_rows: int) -> bool:
        """True if every layer delivered exactly `expected_rows` rows from the last prompt position on for this slot,
        and its own number for each group before it: the probe was not blind."""
        rows = self.layer_rows[slot :: self.slots]
        return bool((rows[0] == expected_rows).all() and (rows[1:] == self._rows[:, None]).all())
