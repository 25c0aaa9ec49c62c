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
from typing import Literal, cast, get_args

import numba
import numpy as np
import torch
from torch import Tensor

from guard.errors import KernelError
from guard.gram import HeadGrams
from guard.kernels import cpu_loops
from guard.kernels.paged import PagedRows

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
        sizes = [math.prod(shape) for shape in shapes]
        if self._flat.size < sum(sizes):
            self._flat = np.empty(sum(sizes) + sum(sizes) // 4, np.float32)
        ends = np.cumsum(sizes).tolist()
        return [self._flat[e - s : e].reshape(shape) for e, s, shape in zip(ends, sizes, shapes, strict=True)]


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
    or float16, the cache packed as `layout` says, N and D multiples of 16 (of 4 for "vec"). Keys at columns >= kv_len
    have no influence, whatever they hold. `workspace` is reused if given, else made for this call.
    Raises KernelError if a tensor or a row does not fit; the bank is then as it was.
    """
    _check(query, kv_cache, layout)
    (_, heads, width), (blocks, kv_heads, block, _) = query.shape, kv_cache.shape
    n, longest = len(rows.slot), int(np.max(rows.kv_len, where=np.asarray(rows.slot) >= 0, initial=1))
    padded = -(-longest // 16) * 16
    at_a_time = min(n, max(_use_threads(), _WORKSPACE_BYTES // (4 * heads * padded)))
    scaled, weights, inverse = (workspace or Workspace()).take(
        (n, heads, width), (at_a_time, heads, padded), (at_a_time, heads)
    )
    if n == 0:
        return
    elements, strides, words = _flat(kv_cache), kv_cache.stride()[:2], block * width
    if layout == "amx":
        elements, strides, words = elements.view(np.uint32), (strides[0] // 2, strides[1] // 2), words // 2
    bad, code = cpu_loops.add_rows(
        *(
            np.ascontiguousarray(f, np.int32)
            for f in (rows.query, rows.slot, rows.kv_len, rows.prompt_len, rows.blocks)
        ),
        _flat(query),
        query.stride()[:2],
        elements,
        strides,
        block,
        words,
        (query.shape[0], len(bank.layer_rows), bank.focus.shape[1], blocks),
        np.float32(scaling * math.log2(math.e)),
        scaled,
        weights,
        inverse,
        bank.gram.numpy()[:, layer],
        bank.sink.numpy()[:, layer],
        bank.focus.numpy(),
        bank.layer_rows.numpy()[:, layer],
        kv_heads,
    )
    if code != cpu_loops.OK:
        raise _misplaced(rows, bad, code, query, kv_cache, bank)


def warm_up(dtype: torch.dtype, layout: Layout) -> None:
    """Compiles (or loads from numba's cache) what `observe` needs for this dtype, so that no request waits for it.

    Call it once per process, before the engine binds its threads to cores if it can be arranged: it also chooses
    numba's OpenMP threads, which are torch's own (both load libgomp.so.1), so that the two never compete for cores.
    """
    rows = PagedRows(*(np.array([v], np.int32) for v in (0, 0, 1, 1)), blocks=np.zeros((1, 1), np.int32))
    query, cache = torch.zeros(1, 1, 16, dtype=dtype), torch.zeros(1, 1, 32, 32, dtype=dtype)
    observe(rows, query, cache, layout, 1.0, HeadGrams(1, 1, 1, 1), 0)


def _use_threads() -> int:
    """Lets numba use as many threads as torch, and says how many that is."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return cast(int, threads)


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
