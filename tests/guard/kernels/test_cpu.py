"""The CPU kernel, for both of vLLM's packings, against the reference on the same keys in dense form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import KernelError
from guard.kernels.paged import PagedRows
from tests.guard.kernels.paging import Case, assert_same, blocks_of, make, numpy_rows, paged

pytest.importorskip("numba")
from guard.kernels import cpu, cpu_loops

PACKINGS = [(torch.float32, "vec"), (torch.bfloat16, "vec"), (torch.float16, "vec"), (torch.bfloat16, "amx")]


def observed(case: Case, layout: str, workspace: cpu.Workspace | None = None):
    table, bank = blocks_of(case), case.bank()
    cpu.observe(numpy_rows(case, table), case.q, paged(case, table, layout), layout, case.scaling, bank, 1, workspace)
    return bank


@pytest.mark.parametrize(("dtype", "layout"), PACKINGS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    width=st.sampled_from([16, 32, 80]),
    longest=st.integers(1, 150),
    block=st.sampled_from([16, 32, 128]),
    run=st.integers(1, 4),
)
def test_rows_of_any_shape_are_those_of_the_reference(
    dtype, layout, seed, n, kv_heads, group, width, longest, block, run
):
    case = make(seed, n, kv_heads, group, width, longest, block, dtype, run=run)
    assert_same(observed(case, layout), case.expected(case.bank(), 1))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("workspace_bytes", [1, 40_000, 1 << 20])
def test_several_steps_of_a_growing_request_accumulate_in_every_layer(monkeypatch, threads, workspace_bytes):
    monkeypatch.setattr(cpu, "_WORKSPACE_BYTES", workspace_bytes)
    case, before = make(3, 3, 2, 2, 32, 60, 32), torch.get_num_threads()
    other = make(4, 3, 2, 2, 32, 60, 32)
    table, bank, expected = blocks_of(case), case.bank(), case.bank()
    caches = {0: paged(case, table, "vec"), 1: paged(replace(case, k=other.k), table, "vec")}
    reader = cpu.Reader(bank, "vec")
    torch.set_num_threads(threads)
    try:
        for step in range(4):
            kv_len = torch.clamp(case.kv_len - 4 + step, min=1)
            prompt_len = torch.minimum(case.prompt_len, kv_len)
            rows = None
            for layer, keys in ((1, other.k), (0, case.k)):
                now = replace(case, q=case.q * (step + layer + 1), k=keys, kv_len=kv_len, prompt_len=prompt_len)
                rows = rows or numpy_rows(now, table)
                reader.look(rows, layer, now.q / (layer + 1), caches[layer], case.scaling * (layer + 1))
                now.expected(expected, layer)
            reader.finish()
    finally:
        torch.set_num_threads(before)
    assert_same(bank, expected)
    assert bank.layer_rows.max() == 4


def test_a_reader_forgets_a_forward_that_was_never_finished_and_needs_caches_of_one_shape():
    case = make(43, 2, 2, 2, 32, 60, 32)
    table, bank = blocks_of(case), case.bank()
    cache, reader = paged(case, table, "vec"), cpu.Reader(bank, "vec")
    reader.look(numpy_rows(case, table), 0, case.q * 7, cache, case.scaling)
    reader.look(numpy_rows(case, table), 1, case.q, cache, case.scaling)
    reader.finish()
    reader.finish()
    assert_same(bank, case.expected(case.bank(), 1))
    rows = numpy_rows(case, table)
    for layer, its in ((0, cache), (1, torch.cat((cache, cache)))):
        reader.look(rows, layer, case.q, its, case.scaling)
    with pytest.raises(KernelError, match="differ in shape"):
        reader.finish()
    assert_same(bank, case.expected(case.bank(), 1))


def test_the_order_of_rows_and_of_query_tokens_does_not_matter():
    case = make(5, 4, 2, 3, 32, 100, 32)
    table = blocks_of(case)
    order, tokens = torch.tensor([2, 0, 3, 1]), np.array([9, 1, 6, 4])
    query = torch.full((11, *case.q.shape[1:]), float("nan"))
    query[tokens] = case.q
    rows = numpy_rows(case, table, tokens)
    shuffled = PagedRows(
        *(field[order.numpy()] for field in (rows.query, rows.slot, rows.kv_len, rows.prompt_len)),
        rows.blocks[order.numpy()],
    )
    bank = case.bank()
    cpu.observe(shuffled, query, paged(case, table, "vec"), "vec", case.scaling, bank, 1)
    assert_same(bank, case.expected(case.bank(), 1))


def test_dead_rows_are_skipped_and_their_other_fields_never_read():
    case = make(7, 4, 2, 2, 32, 100, 32, dead=2)
    table, bank = blocks_of(case), case.bank()
    cache, rows = paged(case, table, "vec"), numpy_rows(case, table)
    for field in (rows.query, rows.kv_len, rows.prompt_len, rows.blocks):
        field[:2] = np.iinfo(np.int32).max
    cpu.observe(rows, case.q, cache, "vec", case.scaling, bank, 1)
    assert_same(bank, case.expected(case.bank(), 1))


@pytest.mark.parametrize("run", [1, 3])
def test_more_rows_than_the_workspace_holds_at_a_time_are_all_added(monkeypatch, run):
    case = make(11, 6, 2, 2, 32, 100, 32, run=run)
    monkeypatch.setattr(cpu, "_WORKSPACE_BYTES", 1)
    assert_same(observed(case, "vec"), case.expected(case.bank(), 1))


@pytest.mark.parametrize("run", [1, 4])
def test_any_number_of_threads_gives_the_same_sums(run):
    case, before, banks = make(13, 12, 2, 4, 32, 200, 32, run=run), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            banks.append(observed(case, "vec"))
            assert_same(banks[-1], case.expected(case.bank(), 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bank.gram, banks[0].gram) and torch.equal(bank.sink, banks[0].sink) for bank in banks)


def test_the_workspace_is_kept_from_call_to_call():
    case, workspace = make(17, 3, 2, 2, 32, 100, 32), cpu.Workspace()
    observed(case, "vec", workspace)
    held = workspace.nbytes
    observed(case, "vec", workspace)
    assert 0 < held == workspace.nbytes


def test_queries_and_caches_that_are_slices_of_wider_tensors_are_read_in_place():
    case = make(19, 3, 2, 2, 32, 100, 32)
    table, bank = blocks_of(case), case.bank()
    cache = paged(case, table, "vec")
    wide = torch.full((len(cache), 5, *cache.shape[2:]), float("nan"))
    wide[:, 1:3] = cache
    qkv = torch.full((3, 4 * 32 + 50), float("nan"))
    qkv[:, : 4 * 32] = case.q.flatten(1)
    query = qkv[:, : 4 * 32].view(3, 4, 32)
    cpu.observe(numpy_rows(case, table), query, wide[:, 1:3], "vec", case.scaling, bank, 1)
    assert_same(bank, case.expected(case.bank(), 1))


def test_a_query_that_is_not_finite_is_not_taken_for_a_clean_one():
    case = make(23, 1, 1, 2, 32, 40, 32)
    case.q[0, 1, 3] = float("nan")
    gram = observed(case, "vec").gram[case.slot[0], 1]
    assert gram[1].isnan().all()
    assert not gram[0, 0].isnan()


def test_very_sharp_attention_neither_overflows_nor_loses_the_row():
    case = make(29, 2, 2, 2, 32, 100, 32, sharpness=200.0)
    assert_same(observed(case, "vec"), case.expected(case.bank(), 1), atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("slot", 99, "slot 99"),
        ("query", 9, "query 9"),
        ("kv_len", 0, "kv_len 0"),
        ("kv_len", 2**31 - 1, "keys"),
        ("prompt_len", -1, "prompt_len -1"),
        ("blocks", 77, "block outside"),
    ],
)
def test_a_row_that_points_outside_is_refused_before_anything_is_written(field, value, said):
    case = make(31, 2, 2, 2, 32, 100, 32)
    table, bank = blocks_of(case), case.bank()
    cache, rows = paged(case, table, "vec"), numpy_rows(case, table)
    getattr(rows, field)[1] = value
    with pytest.raises(KernelError, match=said):
        cpu.observe(rows, case.q, cache, "vec", case.scaling, bank, 0)
    assert_same(bank, case.bank())


def test_what_the_kernel_cannot_read_is_refused_by_name():
    case = make(37, 1, 1, 1, 32, 20, 32)
    table = blocks_of(case)
    rows, cache = numpy_rows(case, table), paged(case, table, "vec")
    for query, kv_cache, layout, said in (
        (case.q.double(), cache.double(), "vec", "float64"),
        (case.q, cache.to(torch.float8_e4m3fn), "vec", "float8_e4m3fn"),
        (case.q, cache, "amx", "amx layout holds bfloat16"),
        (case.q, cache, "neon", "'neon' is unknown"),
        (case.q[..., :16], cache, "vec", "does not fit"),
        (case.q, cache.transpose(2, 3).contiguous().transpose(2, 3), "vec", "contiguous"),
    ):
        with pytest.raises(KernelError, match=said):
            cpu.observe(rows, query, kv_cache, layout, 1.0, case.bank(), 0)


def test_nothing_is_compiled_after_warm_up():
    cpu.warm_up(torch.bfloat16, "vec")
    compiled = (cpu_loops.look_over,)
    before = [len(function.signatures) for function in compiled], cpu_loops.scores_function.cache_info().currsize
    observed(make(41, 3, 2, 2, 32, 100, 32, torch.bfloat16), "vec")
    after = [len(function.signatures) for function in compiled], cpu_loops.scores_function.cache_info().currsize
    assert after == before
