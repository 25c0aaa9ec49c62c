"""Where the keys of watched queries lie in a paged KV cache: what an engine tells a kernel about one forward.

vLLM keeps keys in blocks of N tokens; a request's block table names its blocks in order, so key c of a request is
token c % N of block `blocks[row, c // N]`. The same rows serve every layer of the forward (and every kernel), whatever
the dtype or the inner layout of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

Ints: TypeAlias = "np.ndarray | Tensor"


@dataclass(frozen=True)
class PagedRows:
    """The watched queries of one forward: n rows, several of one request among them, M blocks in the widest table.

    Every field is int32 and C-contiguous: numpy arrays for the CPU kernel, tensors on the device for the GPU kernel
    (persistent ones, if the forward is captured in a graph). Rows that are added up in one place of the bank stand next
    to each other; a slot itself gets one row a forward.

    query [n]: index among this forward's query tokens; slot [n]: place in the bank, negative for a dead row, which is
    skipped and whose other fields are never read; kv_len [n] >= 1: keys visible to the query (its position + 1);
    prompt_len [n]: prompt columns kept; blocks [n, M]: block table rows, read up to kv_len only.
    """

    query: Ints
    slot: Ints
    kv_len: Ints
    prompt_len: Ints
    blocks: Ints
