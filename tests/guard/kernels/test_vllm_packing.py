"""The CPU kernel on caches that vLLM's own op has written, and the packing the other tests assume."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.guard.kernels.paging import Case, assert_same, blocks_of, make, numpy_rows, paged, repacked

pytest.importorskip("numba")
from guard.kernels import cpu

# Importing vLLM takes seconds: only the tests that need it do.
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def write(case: Case, table: torch.Tensor, isa: str) -> torch.Tensor:
    """The case's keys (and values: noise) put into a cache by vLLM."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    n, kv_heads, _, width = case.k.shape
    cache = torch.zeros(int(table.max()) + 1, kv_heads, case.block, 2 * width, dtype=case.k.dtype)
    key_cache, value_cache = cache.view(len(cache), kv_heads, 2 * case.block, width).chunk(2, dim=2)
    for row in range(n):
        column = np.arange(int(case.kv_len[row]))
        slots = table[row].long()[column // case.block] * case.block + torch.from_numpy(column % case.block)
        keys = case.k[row, :, : len(column)].transpose(0, 1).contiguous()
        ops.cpu_attn_reshape_and_cache(keys, torch.randn_like(keys), key_cache, value_cache, slots, isa)
    return cache


def check(dtype: torch.dtype, isa: str, layout: cpu.Layout, width: int) -> None:
    case = make(1, 3, 2, 2, width, 150, 32, dtype)
    table, bank = blocks_of(case), case.bank()
    cache, mine = write(case, table, isa), paged(case, table, layout)
    whole = [int(b) for row in range(3) for b in table[row, : int(case.kv_len[row]) // case.block]]
    keys = case.block * width
    assert whole
    for block in whole:
        assert torch.equal(cache[block].view(2, -1)[:, :keys], mine[block].view(2, -1)[:, :keys])
    cpu.observe(numpy_rows(case, table), case.q, cache, layout, case.scaling, bank, 1)
    assert_same(bank, case.expected(case.bank(), 1))


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("isa", "width"), [("vec", 64), ("vec16", 80)])
def test_keys_of_isa_vec_lie_column_major(dtype, isa, width):
    check(dtype, isa, "vec", width)


@pytest.mark.slow
@needs_vllm
def test_keys_of_isa_amx_lie_in_vnni_pairs():
    if not (torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()):
        pytest.skip("this processor has no AMX: vLLM's op cannot write that packing here")
    check(torch.bfloat16, "amx", "amx", 64)


def test_amx_packing_as_the_other_tests_build_it_pairs_neighbouring_elements_of_sixteen_tokens():
    keys = torch.arange(32 * 8).view(1, 32, 8)
    packed = repacked(keys, "amx")[0].tolist()
    assert packed[:4] == [0, 1, 8, 9]  # tokens 0 and 1, elements 0 and 1
    assert packed[32:34] == [2, 3]  # token 0, elements 2 and 3
    assert packed[128:130] == [128, 129]  # token 16 begins the second tile
