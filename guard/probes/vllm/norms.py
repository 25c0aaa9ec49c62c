"""Norms of what a forward's watched tokens asked, were given and offer to others (`guard.gram.log_norms`).

Their vectors are kept until the last layer has run and are worked on all at once: layer by layer, starting the
arithmetic on a few small vectors would cost several times the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guard.gram import HeadGrams, log_norms
from guard.kernels.paged import PagedRows


class Norms:
    """Adds the norms of watched tokens to a bank, a forward at a time."""

    def __init__(self, bank: HeadGrams) -> None:
        self._bank = bank
        self._rows: PagedRows | None = None
        self._index = torch.empty(0, dtype=torch.int32)
        self._kept: list[Tensor] = []

    def look(self, rows: PagedRows, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """After a layer's attention, in the order of layers: query and output [T, H, D], key and value [T, H_kv, D].
        The rows are the same for all layers of a forward."""
        if rows is not self._rows:
            self._rows, self._index, self._kept = rows, torch.as_tensor(rows.query), []
        parts = [query, output, key, value]
        if len(query) > len(self._index):
            self._kept.append(torch.cat([part.index_select(0, self._index) for part in parts], dim=1))
        else:  # every token is watched, as when all requests decode: fewer launches
            self._kept.append(torch.cat(parts, dim=1).index_select(0, self._index))

    def finish(self) -> None:
        """After the forward's last layer. Nothing is added of a forward whose layers were not all looked at: its row
        counts tell that it was not."""
        rows, kept = self._rows, self._kept
        self._rows, self._kept = None, []
        if rows is not None and len(kept) == self._bank.norms.shape[1]:
            self._bank.add_norms(torch.as_tensor(rows.slot), log_norms(torch.stack(kept, dim=1)))
