"""Rows of watched queries read straight from vLLM's packed CPU cache (being written: the signatures stand)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from guard.gram import HeadGrams
from guard.kernels.paged import PagedRows

Layout = Literal["vec", "amx"]


class Workspace:
    """Scratch that `observe` reuses from call to call; it grows to the longest kv_len seen. Not for two threads."""


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

    query [T, H, D], kv_cache [B, H_kv, N, 2D] of one dtype (float32, bfloat16, float16).
    """
    raise NotImplementedError


def warm_up(dtype: torch.dtype, layout: Layout) -> None:
    """Compiles what `observe` needs for this dtype and layout, so that the first request does not wait for it."""
    raise NotImplementedError
