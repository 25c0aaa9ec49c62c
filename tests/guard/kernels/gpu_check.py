"""The GPU kernel against the reference, run as a program: `python -m tests.guard.kernels.gpu_check cases|graph`.

A program, because whether Triton interprets or compiles is decided when it is imported: the tests start it with
TRITON_INTERPRET=1, on a machine with a GPU also without, and `graph` (a captured CUDA graph) only there.
"""

import sys

import pytest
import torch

from guard.errors import KernelError
from guard.gram import HeadGrams
from guard.kernels import triton
from guard.kernels.paged import PagedRows
from tests.guard.kernels.paging import Case, assert_same, blocks_of, make, numpy_rows, paged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (n, kv_heads, group, width, longest, block, dead, run)
SHAPES = {
    "multi-head, mixed lengths": (4, 3, 1, 32, 60, 16, 0, 1),
    "grouped queries, blocks of 32": (3, 2, 4, 64, 150, 32, 0, 1),
    "prompts longer than a tile, blocks of 128": (2, 2, 2, 32, 300, 128, 0, 1),
    "head size no power of two": (2, 2, 2, 80, 90, 16, 0, 1),
    "dead rows": (5, 2, 2, 32, 100, 16, 3, 1),
    "nothing but dead rows": (2, 2, 2, 32, 40, 16, 2, 1),
    "more than sixteen heads": (1, 3, 7, 16, 70, 16, 0, 1),
    "rows that share a place": (7, 2, 2, 32, 100, 16, 0, 3),
    "rows that share a place, dead ones before": (6, 2, 2, 32, 100, 16, 2, 2),
}


def device_rows(case: Case, table: torch.Tensor) -> PagedRows:
    rows = numpy_rows(case, table)
    fields = (rows.query, rows.slot, rows.kv_len, rows.prompt_len, rows.blocks)
    return PagedRows(*(torch.from_numpy(field).to(DEVICE) for field in fields))


def on_device(bank: HeadGrams) -> HeadGrams:
    bank.gram, bank.sink, bank.focus, bank.layer_rows = (
        t.to(DEVICE) for t in (bank.gram, bank.sink, bank.focus, bank.layer_rows)
    )
    return bank


def back(bank: HeadGrams) -> HeadGrams:
    bank.gram, bank.sink, bank.focus, bank.layer_rows = (
        t.cpu() for t in (bank.gram, bank.sink, bank.focus, bank.layer_rows)
    )
    return bank


def cases() -> None:
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
    for name, (n, kv_heads, group, width, longest, block, dead, run) in SHAPES.items():
        for dtype in dtypes:
            for splits in (1, 3):
                case = make(splits, n, kv_heads, group, width, longest, block, dtype, dead, run=run)
                table, bank, expected = blocks_of(case), on_device(case.bank()), case.bank()
                rows, cache = device_rows(case, table), paged(case, table, "plain").to(DEVICE)
                space = triton.Workspace(n + 1, kv_heads * group, DEVICE, splits)
                for layer in (1, 0, 1):  # accumulates, in the layer it is told
                    triton.observe(rows, case.q.to(DEVICE), cache, case.scaling, bank, layer, space)
                    case.expected(expected, layer)
                try:
                    assert_same(back(bank), expected)
                except AssertionError as error:
                    raise SystemExit(f"{name}, {dtype}, {splits} splits: {error}") from error
    strided_cache()
    refused()


def strided_cache() -> None:
    """A cache whose tokens lie outside its heads, as vLLM's NHC layout has it, gives the same sums."""
    case = make(7, 3, 2, 2, 32, 100, 16)
    table, bank = blocks_of(case), on_device(case.bank())
    cache = paged(case, table, "plain").to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    triton.observe(device_rows(case, table), case.q.to(DEVICE), cache, case.scaling, bank, 1)
    assert_same(back(bank), case.expected(case.bank(), 1))


def refused() -> None:
    """What does not fit is refused by name."""
    case = make(7, 3, 2, 2, 32, 100, 16)
    table = blocks_of(case)
    rows, cache = device_rows(case, table), paged(case, table, "plain").to(DEVICE)
    query, bank = case.q.to(DEVICE), on_device(case.bank())
    for q, kv, space, said in (
        (query.double(), cache.double(), None, "float64"),
        (query, cache[..., :32], None, "does not fit"),
        (query, cache, triton.Workspace(2, 4, DEVICE), "3 rows of 4 heads"),
    ):
        with pytest.raises(KernelError, match=said):
            triton.observe(rows, q, kv, case.scaling, bank, 0, space)


def graph() -> None:
    """A graph captured with dead rows only observes, at replay, whatever rows its buffers hold by then."""
    case = make(11, 4, 2, 4, 64, 200, 16, torch.bfloat16, run=2)
    table, bank, expected = blocks_of(case), on_device(case.bank()), case.bank()
    rows, cache, query = device_rows(case, table), paged(case, table, "plain").cuda(), case.q.cuda()
    space, slots = triton.Workspace(4, 8, "cuda"), rows.slot.clone()
    rows.slot.fill_(-1)
    triton.observe(rows, query, cache, case.scaling, bank, 1, space)  # compiles
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        triton.observe(rows, query, cache, case.scaling, bank, 1, space)
    captured.replay()
    assert bank.layer_rows.sum() == 0
    rows.slot.copy_(slots)
    for _ in range(3):
        captured.replay()
        case.expected(expected, 1)
    assert_same(back(bank), expected)


if __name__ == "__main__":
    {"cases": cases, "graph": graph}[sys.argv[1]]()
