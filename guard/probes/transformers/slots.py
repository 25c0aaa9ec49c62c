"""Slots: keys and values of every running request, preallocated, one row of memory per request.

`SlotCache` owns the tensors. A forward over some of the slots gets a `SlotView`, the transformers `Cache` that writes
the new keys and values into those slots and returns what the batch may attend to. Column 0 is always the first token
of the request: batches are padded on the right, so positions never move and prompt columns can be told by position
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from guard.probes.transformers.attention import AttentionShape


class SlotCache:
    """Keys and values [L][S, H_kv, T_max, D] of `slots` requests and how many tokens each holds."""

    def __init__(
        self, shape: AttentionShape, slots: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        size = (slots, shape.kv_heads, max_len, shape.head_dim)
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.max_len = max_len
        self.lengths = [0] * slots
        self._written = [0] * slots  # columns that hold anything, padding of a batched prefill included

    def clear(self, slot: int) -> None:
        """Empties a slot and zeroes its memory: a masked column still meets its value times zero, and NaN times
        zero is NaN.
        """
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[slot, :, : self._written[slot]].zero_()
            values[slot, :, : self._written[slot]].zero_()
        self.lengths[slot] = self._written[slot] = 0

    def view(self, slots: Sequence[int], starts: Sequence[int], columns: int) -> SlotView:
        """The cache of one forward: rows i of the batch is slots[i], its first new token goes to column starts[i].

        `columns` is how many columns the batch attends over. With more than one new token per row, all starts are
        equal.
        """
        for slot in slots:
            self._written[slot] = max(self._written[slot], columns)
        return SlotView(self, slots, starts, columns)


class SlotView(Cache):
    """What the model sees of a SlotCache during one forward."""

    def __init__(self, store: SlotCache, slots: Sequence[int], starts: Sequence[int], columns: int) -> None:
        super().__init__(layers=[])
        device = store.keys[0].device
        self._store, self._columns, self._starts = store, columns, list(starts)
        first, last = slots[0], slots[-1]
        contiguous = list(slots) == list(range(first, last + 1))
        self._span = slice(first, last + 1) if contiguous else None
        self._slots = torch.tensor(list(slots), dtype=torch.int64, device=device)
        self._start = torch.tensor(self._starts, dtype=torch.int64, device=device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes [N, H_kv, T_q, D] new keys and values; returns [N, H_kv, columns, D] of both."""
        out = []
        for memory, new in (
            (self._store.keys[layer_idx], key_states),
            (self._store.values[layer_idx], value_states),
        ):
            if new.shape[2] == 1:
                memory[self._slots, :, self._start] = new[:, :, 0]
            else:
                memory[self._slots, :, self._starts[0] : self._starts[0] + new.shape[2]] = new
            rows = memory[self._span] if self._span is not None else memory.index_select(0, self._slots)
            out.append(rows[:, :, : self._columns])
        return out[0], out[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held before this forward, of the longest row."""
        return max(self._starts)
