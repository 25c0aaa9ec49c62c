"""Rows of watched queries, read where vLLM's CPU backend keeps its keys: packed, paged, in place.

    row[h, c] = softmax_c( scaling * q_h . k_c )   over all kv_len keys, then prompt columns only

as `guard.kernels.reference` defines it, added to the bank as HeadGrams.add does. Each key is read from memory once per
row: scores of all heads that share it are computed together and wait in a workspace until their softmax is known.
A `Reader` does all layers of a forward in one go. The loops themselves are in `cpu_loops` (numba); this module checks,
views tensors as numpy arrays and owns the scratch.

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
_BITS = {torch.float32: "float32", torch.bfloat16: "uint16", torch.float16: "int16"}
# Softmax weights kept at a time for each thread, unless a single row of one layer needs more: they are read again at
# once, so they should still lie in its second-level cache.
_WORKSPACE_BYTES = 1 << 20


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


class Reader:
    """Reads a forward's watched rows in all its layers at once, when the last layer has run.

    Layer by layer it would be a call into compiled code for each, cold after the layer's own work; what the calls cost
    was several times what they did. Keys stay in the cache until the next forward, so only queries have to be kept.
    """

    def __init__(self, bank: HeadGrams, layout: Layout, workspace: Workspace | None = None) -> None:
        self._bank, self._layout = bank, layout
        self._workspace = workspace or Workspace()
        self._rows: PagedRows | None = None
        self._index = torch.empty(0, dtype=torch.int64)
        self._layers: list[tuple[int, float, Tensor, Tensor]] = []

    def look(self, rows: PagedRows, layer: int, query: Tensor, kv_cache: Tensor, scaling: float) -> None:
        """Keeps a layer's queries until `finish`. The rows are the same for all layers of a forward.

        rows: numpy int32. query [T, H, D] and kv_cache [B, H_kv, N, 2D], both float32, bfloat16 or float16, the cache
        packed as the layout says; D a multiple of 4 ("amx": N and D of 16).
        Raises KernelError if a row's query is none of these.
        """
        if rows is not self._rows:
            self._rows, self._index, self._layers = rows, _tokens(rows, len(query)), []
        self._layers.append((layer, scaling, query.index_select(0, self._index), kv_cache))

    def finish(self) -> None:
        """Adds each live row to bank.gram, bank.sink, bank.focus and bank.layer_rows, as HeadGrams.add does, for every
        layer that was looked at since the last call.

        Keys at columns >= kv_len have no influence, whatever they hold. Runs on as many threads as torch does, in
        torch's own pool. Raises KernelError if a tensor or a row does not fit; the bank is then as it was.
        """
        rows, layers = self._rows, self._layers
        self._rows, self._layers = None, []
        if rows is not None and layers and len(rows.slot):
            self._read(rows, *map(list, zip(*layers, strict=True)))

    def _read(
        self, rows: PagedRows, numbers: list[int], scalings: list[float], kept: list[Tensor], caches: list[Tensor]
    ) -> None:
        first = caches[0]
        if any((c.shape, c.stride(), c.dtype) != (first.shape, first.stride(), first.dtype) for c in caches):
            raise KernelError("the layers' KV caches differ in shape or dtype: the CPU kernel reads them together.")
        _check(kept[0], first, self._layout)
        # The loops' exponentials are powers of two.
        scale = torch.tensor(scalings, dtype=torch.float32).mul_(math.log2(math.e))
        queries = torch.stack(kept).float().mul_(scale[:, None, None, None]).numpy()
        (known, n, heads, width), (blocks, kv_heads, block, _) = queries.shape, first.shape
        bank, (places, depth) = self._bank, self._bank.layer_rows.shape
        columns = bank.focus.shape[1]
        told = [np.ascontiguousarray(field, np.int32) for field in (rows.slot, rows.kv_len, rows.prompt_len)]
        table = np.ascontiguousarray(rows.blocks, np.int32)
        longest, row, code = cpu_loops.look_over(*told, table, block, (places, columns, blocks))
        if code != cpu_loops.OK:
            raise _misplaced(rows, row, code, first, bank)
        longest, threads = -(-longest // 16) * 16, torch.get_num_threads()
        at_a_time = threads * max(1, _WORKSPACE_BYTES // (4 * heads * longest))
        rows_now = min(n, at_a_time)
        layers_now = min(known, at_a_time // rows_now)
        weights, inverse = self._workspace.take((layers_now * rows_now, heads, longest), (layers_now * rows_now, heads))
        element, per_word = ("uint32", 2) if self._layout == "amx" else (_BITS[first.dtype], 1)
        span = 1 + sum((size - 1) * stride for size, stride in zip(first.shape, first.stride(), strict=True))
        stride_b, stride_h, words = (step // per_word for step in (*first.stride()[:2], block * width))
        layer = np.asarray(numbers, np.int64)
        addresses = np.asarray([cache.data_ptr() for cache in caches], np.int64)
        arrays: list[np.ndarray] = [layer, addresses, *told, table, queries, weights, inverse]
        counters = np.zeros(2, np.int64)
        call = np.zeros(1, cpu_loops.Call)
        call[0] = (
            *(known, 0, 0, n, 0, 0, heads, kv_heads, width, block, words, table.shape[1], longest),
            *(stride_b, stride_h, span // per_word, places, bank.slots, columns, depth),
            *(_address(counters), _address(counters) + 8),
            *map(_address, arrays),
            *(tensor.data_ptr() for tensor in (bank.gram, bank.sink, bank.focus, bank.layer_rows)),
        )
        scores, grams = cpu_loops.scores_function(element).address, cpu_loops.gram_function().address
        about = _address(call)
        for begin in range(0, n, rows_now):
            for start in range(0, known, layers_now):
                call["first"], call["layers"] = start, min(layers_now, known - start)
                call["begin"], call["rows"] = begin, min(rows_now, n - begin)
                counters[:] = 0
                run_team(scores, about, threads)
                run_team(grams, about, threads)


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
    """One layer's rows at once: `look` and `finish` of a `Reader`. `workspace` is reused if given."""
    reader = Reader(bank, layout, workspace)
    reader.look(rows, layer, query, kv_cache, scaling)
    reader.finish()


def warm_up(dtype: torch.dtype, layout: Layout) -> None:
    """Compiles (or loads from numba's cache) what `observe` needs for this dtype, so that no request waits for it.

    Raises KernelError if the dtype or layout is none that `observe` reads.
    """
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    rows = PagedRows(query=zero, slot=zero, kv_len=one, prompt_len=one, blocks=zero[:, None])
    query, cache = torch.zeros(1, 1, 16, dtype=dtype), torch.zeros(1, 1, 32, 32, dtype=dtype)
    observe(rows, query, cache, layout, 1.0, HeadGrams(1, 1, 1, 1), 0)


def _address(array: np.ndarray) -> int:
    return cast(int, array.ctypes.data)  # a structured array's `__array_interface__` takes a tenth of a millisecond


def _tokens(rows: PagedRows, tokens: int) -> Tensor:
    """Where each row's query is among a forward's, int64 [n]; a dead row's may be any. Raises KernelError."""
    alive = np.asarray(rows.slot) >= 0
    index = np.where(alive, rows.query, 0)
    if (wrong := np.flatnonzero((index < 0) | (index >= tokens))).size:
        raise _unlike(wrong[0], f"query {index[wrong[0]]} of {tokens}")
    return torch.from_numpy(index.astype(np.int64))


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
    if cache.stride()[2:] != (doubled, 1):
        raise KernelError("each (block, head) of the KV cache must be contiguous.")


def _misplaced(rows: PagedRows, row: int, code: int, cache: Tensor, bank: HeadGrams) -> KernelError:
    blocks, _, block, _ = cache.shape
    said = {
        cpu_loops.BAD_SLOT: f"slot {rows.slot[row]}, but the bank has {len(bank.layer_rows)}",
        cpu_loops.BAD_LENGTH: f"kv_len {rows.kv_len[row]}, but its {rows.blocks.shape[1]} blocks hold 1 to "
        f"{rows.blocks.shape[1] * block} keys",
        cpu_loops.BAD_PROMPT: f"prompt_len {rows.prompt_len[row]}, but the bank keeps {bank.focus.shape[1]} columns",
        cpu_loops.BAD_BLOCK: f"a block outside the {blocks} of the cache",
    }[code]
    return _unlike(row, said)


def _unlike(row: int, said: str) -> KernelError:
    return KernelError(f"watched row {row} names {said}: the plan and this forward do not belong together.")
