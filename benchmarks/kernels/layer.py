"""One decoder layer's decode step, in parts that can be timed: attention, probe, and the projections.

The attention is the one the probe accompanies: vLLM's CPU op where vLLM is installed, else torch's sdpa over dense keys
of the same size. Contents are random; every request has T keys, all of them prompt (the dearest case), and tables that
scatter its blocks over the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.shape import Shape
from guard.gram import HeadGrams
from guard.kernels.paged import PagedRows

_CPU_BLOCK, _GPU_BLOCK = 128, 16  # vLLM's defaults


@dataclass(frozen=True)
class Layer:
    """What to time, in the order of a step; `attention_kernel` names whose attention it is."""

    attention: Callable[[], object]
    probe: Callable[[], object]
    linear: Callable[[], object]
    attention_kernel: str
    passes: int


def build(shape: Shape, rows: int, keys: int, dtype: torch.dtype, device: str) -> Layer:
    """A layer for R = rows requests of T = keys keys on "cpu" or "cuda"."""
    gpu = device != "cpu"
    block = _GPU_BLOCK if gpu else _CPU_BLOCK
    each = -(-keys // block)
    table = (torch.randperm(rows * each, device=device).int() + 1).view(rows, each)
    cache = torch.randn(
        rows * each + 1, shape.kv_heads, block, 2 * shape.head_size, dtype=torch.float32, device=device
    ).to(dtype)
    query = torch.randn(rows, shape.heads, shape.head_size, device=device).to(dtype)
    bank = HeadGrams(rows, 1, shape.heads, keys, device)
    index, length = torch.arange(rows, device=device).int(), torch.full((rows,), keys, device=device).int()
    linear = partial(_project, *_projections(shape, rows, dtype, device))
    scaling = shape.head_size**-0.5
    if gpu:
        from guard.kernels import triton

        space = triton.Workspace(rows, shape.heads, device)
        plan = PagedRows(index, index, length, length, table)
        probe = partial(triton.observe, plan, query, cache, scaling, bank, 0, space)
        return Layer(_sdpa(query, cache, rows, keys), probe, linear, "torch sdpa over dense keys", 2)
    from guard.kernels import cpu

    layout: cpu.Layout = "amx" if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
    numbers: list[np.ndarray] = [tensor.numpy() for tensor in (index, index, length, length, table)]
    cpu.warm_up(dtype, layout)
    probe = partial(cpu.observe, PagedRows(*numbers), query, cache, layout, scaling, bank, 0, cpu.Workspace())
    attention = _vllm(query, cache, table, length, layout)
    if attention is None:
        return Layer(_sdpa(query, cache, rows, keys), probe, linear, "torch sdpa over dense keys", 1)
    return Layer(attention, probe, linear, "vllm cpu_attention_with_kv_cache", 1)


def _projections(shape: Shape, rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    """x [R, hidden], and one layer's weights: q, k and v; o; gate and up; down."""
    inner = shape.heads * shape.head_size
    sizes = [
        (inner + 2 * shape.kv_heads * shape.head_size, shape.hidden),
        (shape.hidden, inner),
        (2 * shape.mlp, shape.hidden),
        (shape.hidden, shape.mlp),
    ]
    weights = [torch.empty(size, dtype=dtype, device=device).fill_(0.01) for size in sizes]
    return torch.ones(rows, shape.hidden, dtype=dtype, device=device), weights


def _project(x: Tensor, weights: list[Tensor]) -> Tensor:
    qkv, o, gate_up, down = weights
    y = F.linear(F.linear(x, qkv)[:, : o.shape[1]], o)
    return F.linear(F.linear(y, gate_up)[:, : down.shape[1]], down)


def _sdpa(query: Tensor, cache: Tensor, rows: int, keys: int) -> Callable[[], object]:
    _, kv_heads, _, doubled = cache.shape
    dense = torch.randn(2, rows, kv_heads, keys, doubled // 2, device=query.device).to(query.dtype)
    return partial(F.scaled_dot_product_attention, query[:, :, None], dense[0], dense[1], enable_gqa=True)


def _vllm(query: Tensor, cache: Tensor, table: Tensor, length: Tensor, isa: str) -> Callable[[], object] | None:
    """vLLM's CPU decode attention on this cache, or None where vLLM's CPU build is not installed."""
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        metadata = ops.cpu_attn_get_scheduler_metadata
    except (ImportError, AttributeError):
        return None
    if isa == "amx":
        torch.cpu._init_amx()
    (rows, heads, width), (blocks, kv_heads, block, _) = query.shape, cache.shape
    key_cache, value_cache = cache.view(blocks, kv_heads, 2 * block, width).chunk(2, dim=2)
    starts = torch.arange(rows + 1).int()
    plan = metadata(
        num_reqs=rows, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, seq_lens=length, dtype=query.dtype,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    return partial(
        ops.cpu_attention_with_kv_cache,
        query=query, key_cache=key_cache, value_cache=value_cache, output=torch.empty_like(query),
        query_start_loc=starts, seq_lens=length, scale=width**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
        block_table=table, softcap=0.0, scheduler_metadata=plan, s_aux=None,
    )  # fmt: skip
