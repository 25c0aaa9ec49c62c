"""Watched rows over dense keys, laid out in a paged cache as each kernel expects it; what does not belong is NaN."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guard.gram import HeadGrams
from guard.kernels.paged import PagedRows
from guard.kernels.reference import prompt_rows


@dataclass(frozen=True)
class Case:
    """n watched rows: q [n, H, D], k [n, H_kv, T, D], kv_len, prompt_len, slot [n] int64 (slot < 0: dead row)."""

    q: Tensor
    k: Tensor
    kv_len: Tensor
    prompt_len: Tensor
    slot: Tensor
    block: int
    slots: int

    @property
    def scaling(self) -> float:
        return self.q.shape[-1] ** -0.5

    def bank(self, layers: int = 2) -> HeadGrams:
        """A bank with places to spare, more of them than slots."""
        groups = (1,) * (int(self.slot.max()) // self.slots + 2)
        return HeadGrams(self.slots, layers, self.q.shape[1], int(self.prompt_len.max()) + 3, groups=groups)

    def expected(self, bank: HeadGrams, layer: int) -> HeadGrams:
        """Adds the reference's rows of all live rows to `bank`, and returns it."""
        live = self.slot >= 0
        q, kv_len = self.q[live][:, None], self.kv_len[live][:, None]
        rows = prompt_rows(q, self.k[live], kv_len, self.prompt_len[live], self.scaling)[:, 0]
        kept = rows[..., : bank.focus.shape[1]]
        bank.add(layer, self.slot[live], kept)
        return bank


def make(
    seed: int,
    n: int,
    kv_heads: int,
    group: int,
    width: int,
    longest: int,
    block: int,
    dtype: torch.dtype = torch.float32,
    dead: int = 0,
    sharpness: float = 2.0,
    run: int = 1,
) -> Case:
    """Random rows of lengths 1 .. longest, prompts of 1 .. kv_len, the first `dead` of them dead; each `run` that
    follow each other share a place of the bank (none of which is then a slot)."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance)

    kv_len = torch.randint(1, longest + 1, (n,), generator=chance)
    prompt_len = (torch.rand(n, generator=chance) * kv_len).long() + 1
    slot = torch.randperm(n + 2, generator=chance)[:n].repeat_interleave(run)[:n] + (run > 1)
    slot[:dead] = -1
    slots = 1 if run > 1 else n // 2 + 1
    q = (normal(n, kv_heads * group, width) * sharpness).to(dtype)
    return Case(q, normal(n, kv_heads, longest, width).to(dtype), kv_len, prompt_len, slot, block, slots)


def blocks_of(case: Case, seed: int = 0) -> Tensor:
    """A block table [n, M] int32 in which no block is used twice and block 0 by nobody; what is not needed is -1."""
    n, needed = len(case.slot), -(-case.kv_len // case.block)
    order = torch.randperm(int(needed.sum()), generator=torch.Generator().manual_seed(seed)) + 1
    table = torch.full((n, int(needed.max()) + 1), -1, dtype=torch.int32)
    at = 0
    for row in range(n):
        table[row, : needed[row]] = order[at : at + needed[row]]
        at += int(needed[row])
    return table


def paged(case: Case, table: Tensor, layout: str) -> Tensor:
    """The keys in a cache [B, H_kv, N, 2D]; layout "plain" (GPU: K = [..., :D]), "vec" or "amx" (CPU, re-tiled).

    Values, unused blocks and everything behind kv_len are NaN.
    """
    n, kv_heads, _, width = case.k.shape
    shape = (int(table.max()) + 1, kv_heads, case.block, 2 * width)
    cache = torch.full(shape, float("nan"), dtype=case.k.dtype)
    for row in range(n):
        for i in range(-(-int(case.kv_len[row]) // case.block)):
            start = i * case.block
            end = min(start + case.block, int(case.kv_len[row]))
            keys = torch.full((kv_heads, case.block, width), float("nan"), dtype=case.k.dtype)
            keys[:, : end - start] = case.k[row, :, start:end]
            into = cache[int(table[row, i])]
            if layout == "plain":
                into[..., :width] = keys
            else:
                into.view(kv_heads, -1)[:, : case.block * width] = repacked(keys, layout)
    return cache


def repacked(keys: Tensor, layout: str) -> Tensor:
    """Keys [H_kv, N, D] of one block in the order of vLLM's CPU cache, [H_kv, N * D]."""
    kv_heads, block, width = keys.shape
    if layout == "vec":
        return keys.transpose(1, 2).reshape(kv_heads, -1)
    return keys.view(kv_heads, block // 16, 16, width // 2, 2).transpose(2, 3).reshape(kv_heads, -1)


def numpy_rows(case: Case, table: Tensor, query: np.ndarray | None = None) -> PagedRows:
    """The case's rows for the CPU kernel; `query` are their query tokens, in order of rows unless given."""
    index = np.arange(len(case.slot)) if query is None else query
    fields = (index, case.slot.numpy(), case.kv_len.numpy(), case.prompt_len.numpy(), table.numpy())
    return PagedRows(*(field.astype(np.int32) for field in fields))


def assert_same(bank: HeadGrams, expected: HeadGrams, atol: float = 1e-5) -> None:
    """Grams, sinks, focus and counts are equal, up to float32 rounding."""
    torch.testing.assert_close(bank.gram, expected.gram, atol=atol, rtol=1e-5)
    torch.testing.assert_close(bank.sink, expected.sink, atol=atol, rtol=1e-5)
    torch.testing.assert_close(bank.focus, expected.focus, atol=atol, rtol=1e-5)
    assert torch.equal(bank.layer_rows, expected.layer_rows)
