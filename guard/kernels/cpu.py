"""Rows of watched queries, read where vLLM's CPU backend keeps its keys: packed, paged, in place.

    row[h, c] = softmax_c( scaling * q_h . k_c )   over all kv_len keys, then prompt columns only

as `guard.kernels.reference` defines it, added to the bank as HeadGrams.add does. Each key is read from memory once per
row: scores of all heads that share it are computed together and wait in a workspace until their softmax is known.
The loops themselves are in `cpu_loops` (numba); this module checks, views tensors as numpy arrays and owns the scratch.

vLLM 0.32 views one layer's cache [B, H_kv, N, 2D] as [B, H_kv, 2N, D]; the first N*D elements per (block, key head) are
its keys, re-tiled ("vec", the ISAs vec and vec16: column-major [D, N]; "amx": [N/16, D/2, 16, 2]).
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from guard.errors import KernelError
from guard.gram import HeadGrams
from guard.kernels import cpu_loops
from guard.kernels.paged import PagedRows
from guard.kernels.team import run_team

Layout = Literal["vec", "amx"]

# numba has no 16-bit floats: their bits travel as these, and cpu_loops widens them.
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
# Softmax weights kept at a time, unless one row per thread needs more: about what a second-level cache holds, and
# above what small batches need, so that these take two parallel regions per layer and no more.
_WORKSPACE_BYTES = 16 << 20


class Workspace:
    """Scratch that `observe` reuses from call to call; it grows to the longest kv_len seen. Not for two threads."""

    def __init__(self) -> None:
        self._flat = np.empty(0, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes held at present."""
        return self._flat.nbytes

    def take(self, *shapes: tuple[int, ...]) -> list[np.ndarray]:
        """Float32 arrays of these shapes, uninitialised, valid until the next call."""
        ends = list(accumulate(math.prod(shape) for shape in shapes))
        if self._flat.size < ends[-1]:
            self._flat = np.empty(ends[-1] + ends[-1] // 4, np.float32)
        return [self._flat[a:b].reshape(shape) for a, b, shape in zip([0, *ends], ends, shapes, strict=False)]


def observe(
    rows: PagedRows,
    query: Tensor,
    kv_cache: Tensor,
    layout: Layout,
    scaling: float,
    bank: HeadGrams,
    layer: int,
    workspace: Workspace | None = None,
) -> None:
    """Adds each live row to bank.gram, bank.sink, bank.focus and bank.layer_rows, as HeadGrams.add does.

    rows: numpy int32, live slots all different. query [T, H, D] and kv_cache [B, H_kv, N, 2D], both float32, bfloat16
    or float16, the cache packed as `layout` says; D a multiple of 4 ("amx": N and D of 16). Keys at columns >= kv_len
    have no influence, whatever they hold. `workspace` is reused if given, else made for this call. Runs on as many
    threads as torch does, in torch's own pool.
    Raises KernelError if a tensor or a row does not fit; the bank is then as it was.
    """
    _check(query, kv_cache, layout)
    (tokens, heads, width), (blocks, kv_heads, block, _) = query.shape, kv_cache.shape
    (slots, layers), columns = bank.layer_rows.shape, bank.focus.shape[1]
    index = [np.ascontiguousarray(f, np.int32) for f in (rows.query, rows.slot, rows.kv_len, rows.prompt_len)]
    table = np.ascontiguousarray(rows.blocks, np.int32)
    n, room = table.shape
    if n == 0:
        return
    threads = torch.get_num_threads()
    longest = -(-min(cpu_loops.longest(index[1], index[2]), room * block) // 16) * 16
    at_a_time = min(n, max(threads, _WORKSPACE_BYTES // (4 * heads * longest)))
    scaled, weights, inverse = (workspace or Workspace()).take(
        (n, heads, width), (at_a_time, heads, longest), (at_a_time, heads)
    )
    scale = np.float32(scaling * math.log2(math.e))  # the loops' exponentials are powers of two
    row, code = cpu_loops.prepare(
        *index, table, block, (tokens, slots, columns, blocks), _flat(query), query.stride()[:2], scale, scaled
    )
    if code != cpu_loops.OK:
        raise _misplaced(rows, row, code, query, kv_cache, bank)
    elements, per_word = _flat(kv_cache), 1
    if layout == "amx":
        elements, per_word = elements.view(np.uint32), 2
    stride_b, stride_h, words = (step // per_word for step in (*kv_cache.stride()[:2], block * width))
    counters = np.zeros(2, np.int64)
    call = np.zeros(1, cpu_loops.Call)
    call[0] = (
        *(n, 0, 0, heads, kv_heads, width, block, words, room, longest),
        *(stride_b, stride_h, elements.size, slots, columns, layers, layer),
        *(_address(counters), _address(counters) + 8),
        *(_address(array) for array in (*index[1:], table, elements, scaled, weights, inverse)),
        *(tensor.data_ptr() for tensor in (bank.gram, bank.sink, bank.focus, bank.layer_rows)),
    )
    for begin in range(0, n, at_a_time):
        call["begin"], call["rows"] = begin, min(at_a_time, n - begin)
        counters[:] = 0
        run_team(cpu_loops.scores_function(elements.dtype.name).address, _address(call), threads)
        run_team(cpu_loops.gram_function().address, _address(call), threads)


def warm_up(dtype: torch.dtype, layout: Layout) -> None:
    """Compiles (or loads from numba's cache) what `observe` needs for this dtype, so that no request waits for it.

    Raises KernelError if the dtype or layout is none that `observe` reads.
    """
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    rows = PagedRows(query=zero, slot=zero, kv_len=one, prompt_len=one, blocks=zero[:, None])
    query, cache = torch.zeros(1, 1, 16, dtype=dtype), torch.zeros(1, 1, 32, 32, dtype=dtype)
    observe(rows, query, cache, layout, 1.0, HeadGrams(1, 1, 1, 1), 0)


def _address(array: np.ndarray) -> int:
    return cast(int, array.__array_interface__["data"][0])


def _flat(tensor: Tensor) -> np.ndarray:
    """All elements from the tensor's first to its last, strides and gaps included, as a 1-D numpy view of bits."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return cast(np.ndarray, tensor.detach().as_strided((span,), (1,)).view(_BITS[tensor.dtype]).numpy())


def _check(query: Tensor, cache: Tensor, layout: Layout) -> None:
    (_, heads, width), (_, kv_heads, block, doubled) = query.shape, cache.shape
    if layout not in get_args(Layout):
        raise KernelError(f"CPU cache layout {layout!r} is unknown; this kernel reads {', '.join(get_args(Layout))}.")
    for name, tensor in (("query", query), ("KV cache", cache)):
        if tensor.dtype not in _BITS:
            raise KernelError(
                f"the {name} is {tensor.dtype}; the CPU kernel reads float32, bfloat16 and float16. Serve with one of "
                "these (--dtype) and without a quantised KV cache."
            )
    if layout == "amx" and cache.dtype != torch.bfloat16:
        raise KernelError(f"the amx layout holds bfloat16, this KV cache is {cache.dtype}: use layout 'vec'.")
    if doubled != 2 * width or heads % kv_heads or width % 4 or (layout == "amx" and (width % 16 or block % 16)):
        raise KernelError(
            f"query {tuple(query.shape)} does not fit KV cache {tuple(cache.shape)} in layout {layout!r}: expected "
            "[T, H, D] and [B, H_kv, N, 2D] with H a multiple of H_kv and D of 4 (amx: D and N of 16)."
        )
    if query.stride(2) != 1 or cache.stride()[2:] != (doubled, 1):
        raise KernelError("the last dimension of the query and each (block, head) of the KV cache must be contiguous.")


def _misplaced(rows: PagedRows, row: int, code: int, query: Tensor, cache: Tensor, bank: HeadGrams) -> KernelError:
    blocks, _, block, _ = cache.shape
    said = {
        cpu_loops.BAD_SLOT: f"slot {rows.slot[row]}, but the bank has {len(bank.layer_rows)}",
        cpu_loops.BAD_QUERY: f"query {rows.query[row]} of {len(query)}",
        cpu_loops.BAD_LENGTH: f"kv_len {rows.kv_len[row]}, but its {rows.blocks.shape[1]} blocks hold 1 to "
        f"{rows.blocks.shape[1] * block} keys",
        cpu_loops.BAD_PROMPT: f"prompt_len {rows.prompt_len[row]}, but the bank keeps {bank.focus.shape[1]} columns",
        cpu_loops.BAD_BLOCK: f"a block outside the {blocks} of the cache",
    }[code]
    return KernelError(f"watched row {row} names {said}: the plan and this forward do not belong together.")
