"""The attention rows of single queries over the prompt, in plain torch: the definition every faster kernel is held to.

    row[h, c] = softmax_c( scaling * q_h . k_c )   over ALL visible keys c < kv_len, then columns c >= prompt_len set
    to 0

Generated keys take their share of the softmax and are dropped afterwards; rows are not renormalised (001 section 4.1).
Queries and keys are those the model's own attention sees (after rotary embedding and any q/k norm).
"""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_rows(q: Tensor, k: Tensor, kv_len: Tensor, prompt_len: Tensor, scaling: float) -> Tensor:
    """Rows of R queries each of N requests. Grouped-query attention is a reshape: keys are never repeated.

    q [N, R, H, D] any float; k [N, H_kv, T, D] any float, H a multiple of H_kv, column 0 = first token;
    kv_len [N, R] int: keys visible to the query; prompt_len [N] int: prompt columns kept.
    Returns rows [N, R, H, T] float32. Whatever lies in columns >= kv_len (stale or NaN keys) has no influence.
    """
    n, queries, heads, width = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    grouped = q.float().view(n, queries, kv_heads, heads // kv_heads, width).transpose(1, 2)
    scores = torch.matmul(grouped.flatten(2, 3), k.float().transpose(-1, -2)).mul_(scaling)
    scores = scores.view(n, kv_heads, queries, heads // kv_heads, columns)
    column = torch.arange(columns, device=k.device)
    scores.masked_fill_((column >= kv_len[..., None])[:, None, :, None], float("-inf"))
    rows = scores.softmax(dim=-1)
    rows.masked_fill_((column >= prompt_len[:, None])[:, None, None, None], 0.0)
    return rows.transpose(1, 2).reshape(n, queries, heads, columns)
