"""Rows of watched queries from a paged cache on a GPU, in launches that a CUDA graph can record.

The same sums as `guard.kernels.reference` and HeadGrams.add define, computed in two passes over a row's keys (softmax
statistics first, then the prompt's weights and their Gram) by programs of fixed shape: nothing is read on the host, no
memory is allocated once a `Workspace` exists, dead rows end at once, and no sum depends on the order of threads. What
the programs cannot check (a slot or block out of range) is the plan's duty; the CPU kernel checks the same rows.

Without the triton package this module imports, and `Workspace` raises KernelError.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from guard.errors import KernelError
from guard.gram import HeadGrams
from guard.kernels.paged import PagedRows

# Programs per launch that keep every multiprocessor of a large GPU (132 on an H100) busy, with some to spare. Not
# measured: chosen so that short batches are split and full ones are not.
_PROGRAMS = 256
_MOST_SPLITS = 32
_TILE = 64  # columns at a time; with 32 heads of 128 a tile's keys fill 16 KiB in 16 bits
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Workspace:
    """Persistent scratch of the kernel for up to `rows` rows of `heads` heads; made once, before graphs are captured.

    `usual` is how many rows a batch has most of the time (default: as many): into how many shares a row's keys are
    divided, `splits`, follows from it unless it is given. Raises KernelError if triton is missing.
    """

    def __init__(
        self, rows: int, heads: int, device: torch.device | str, splits: int | None = None, usual: int | None = None
    ) -> None:
        self._programs = _programs()
        self.rows, self.heads = rows, heads
        self.padded = _padded(heads)
        self.splits = splits or max(1, min(_MOST_SPLITS, _PROGRAMS // max(1, usual or rows)))
        self.largest = torch.zeros(rows, self.splits, self.padded, dtype=torch.float32, device=device)
        self.total = torch.zeros_like(self.largest)
        self.shares = torch.zeros(
            rows, self.splits, self.padded, self.padded, dtype=torch.float32, device=self.largest.device
        )
        self.rests = torch.zeros(rows, self.padded, dtype=torch.float32, device=self.largest.device)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return self.largest.nbytes + self.total.nbytes + self.shares.nbytes + self.rests.nbytes

    def observe(
        self, rows: PagedRows, query: Tensor, kv_cache: Tensor, scaling: float, bank: HeadGrams, layer: int
    ) -> None:
        """As the function `observe`, in this workspace."""
        _check(rows, query, kv_cache, self)
        slot = cast(Tensor, rows.slot)
        (_, H, D), (_, H_kv, N, _), n, P = query.shape, kv_cache.shape, len(slot), self.splits
        if n == 0:
            return
        shape = {"H": H, "H_KV": H_kv, "D": D, "HP": self.padded, "DP": _padded(D), "N": N, "P": P, "TILE": _TILE}
        scale = scaling * math.log2(math.e)
        strides = (*query.stride()[:2], *kv_cache.stride(), cast(Tensor, rows.blocks).stride(0))
        where = (query, kv_cache, rows.query, slot, rows.kv_len)
        sink, gram, count = bank.sink[:, layer], bank.gram[:, layer], bank.layer_rows[:, layer]
        self._programs.statistics[(n, P)](*where, rows.blocks, self.largest, self.total, scale, *strides, **shape)
        self._programs.weights[(n, P)](
            *(*where, rows.prompt_len, rows.blocks, self.largest, self.total, self.shares, self.rests),
            *(bank.focus, scale, *strides, bank.focus.stride(0), *bank.focus.shape),
            **shape,
        )
        self._programs.finish[(n,)](
            *(slot, self.shares, self.rests, gram, sink, count, gram.stride(0), sink.stride(0), count.stride(0)),
            H=H, HP=self.padded, P=P,
        )  # fmt: skip


class Reader:
    """Reads a forward's watched rows layer by layer, each in launches that follow its attention: what is queued there
    can be captured, and queries need not be kept.
    """

    def __init__(self, bank: HeadGrams, workspace: Workspace) -> None:
        self._bank, self._workspace = bank, workspace

    def look(self, rows: PagedRows, layer: int, query: Tensor, kv_cache: Tensor, scaling: float) -> None:
        """As `observe`."""
        self._workspace.observe(rows, query, kv_cache, scaling, self._bank, layer)

    def finish(self) -> None:
        """Nothing is left to do."""


def observe(
    rows: PagedRows,
    query: Tensor,
    kv_cache: Tensor,
    scaling: float,
    bank: HeadGrams,
    layer: int,
    workspace: Workspace | None = None,
) -> None:
    """Adds each live row to bank.gram, bank.sink, bank.focus and bank.layer_rows, as HeadGrams.add does.

    rows: int32 tensors on the bank's device. query [T, H, D], last dimension contiguous, and kv_cache
    [B, H_kv, N, 2D] with keys = kv_cache[..., :D], any strides; both float32, bfloat16 or float16. Keys at columns >=
    kv_len are never read. Prompt columns beyond the bank's T_max are dropped. Give the persistent `workspace` when the
    call is captured in a graph; without one, it is made for this call.
    Raises KernelError if triton is missing or a tensor does not fit.
    """
    space = workspace or Workspace(len(rows.slot), query.shape[1], query.device)
    space.observe(rows, query, kv_cache, scaling, bank, layer)


def _padded(size: int) -> int:
    """The next power of two, at least 16: what a matrix product on tensor cores takes."""
    return max(16, 1 << (size - 1).bit_length())


def _programs() -> Any:
    try:
        from guard.kernels import triton_programs
    except ImportError as error:
        raise KernelError(
            f"the GPU kernel needs the triton package, which does not import here ({error}). It comes with torch for "
            "CUDA; install that, or serve on the CPU."
        ) from error
    return triton_programs


def _check(rows: PagedRows, query: Tensor, cache: Tensor, space: Workspace) -> None:
    (_, heads, width), (_, kv_heads, _, doubled) = query.shape, cache.shape
    if query.dtype not in _DTYPES or cache.dtype != query.dtype:
        raise KernelError(
            f"query {query.dtype} and KV cache {cache.dtype}: the GPU kernel reads float32, bfloat16 and float16, the "
            "same for both. Serve without a quantised KV cache."
        )
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        raise KernelError("Triton's interpreter multiplies bits of bfloat16, not values: use float32 on the CPU.")
    if doubled != 2 * width or heads % kv_heads or query.stride(2) != 1:
        raise KernelError(
            f"query {tuple(query.shape)} does not fit KV cache {tuple(cache.shape)}: expected [T, H, D], last "
            "dimension contiguous, and [B, H_kv, N, 2D] with H a multiple of H_kv."
        )
    if len(rows.slot) > space.rows or heads != space.heads:
        raise KernelError(
            f"{len(rows.slot)} rows of {heads} heads do not fit a workspace made for {space.rows} rows of "
            f"{space.heads} heads: make it for the engine's largest batch."
        )
