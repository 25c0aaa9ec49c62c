"""The device programs of the GPU kernel: statistics of a row's softmax, its weights' Gram, and their sum.

Legend: n rows, H query heads (padded to HP, a power of two >= 16), H_kv key heads, D head size (padded to DP), N tokens
per block, M blocks in a table row, P splits of a row, TILE columns at a time.

Three launches of fixed shape, none of which reads a value on the host:
  statistics [n, P]: for its share of all kv_len keys, per head the largest score and the sum of exponentials;
  weights    [n, P]: merges the shares' statistics, recomputes the scores of its share of the prompt columns, adds
                     the largest of all heads to the slot's focus (each column has one owner) and leaves its share of
                     P P^T and the sink;
  finish     [n]:    adds what the rows of one place left, in order (no atomics: the same bits every time), and counts
                     them; a place's first row does it for all that follow.
A dead row (slot < 0) ends each program at once. Scores of all heads of one tile come from H_kv products, the queries
of other key heads zeroed, because a tile of weights must hold all heads to be multiplied with itself; that is H_pad
operations per byte of keys read, below what tensor cores do while memory delivers that byte.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile_scores(
    query,
    cache,
    table,
    columns,
    visible,
    scale,
    stride_qh,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores [HP, TILE] float32, base 2, of the row's query with keys at `columns`; -inf where not `visible`."""
    heads = tl.arange(0, HP)
    d = tl.arange(0, DP)
    mine = (heads[:, None] < H) & (d[None, :] < D)
    q = tl.load(query + heads[:, None] * stride_qh + d[None, :], mask=mine, other=0.0)
    block = tl.load(table + columns // N, mask=visible, other=0).to(tl.int64)
    at = block * stride_b + (columns % N) * stride_n
    scores = tl.zeros([HP, TILE], dtype=tl.float32)
    for kv_head in range(H_KV):
        k = tl.load(
            cache + kv_head * stride_h + at[None, :] + d[:, None] * stride_d,
            mask=visible[None, :] & (d[:, None] < D),
            other=0.0,
        )
        group = tl.where((heads // (H // H_KV) == kv_head)[:, None], q, tl.zeros_like(q))
        scores = tl.dot(group, k, acc=scores, input_precision="ieee")
    return tl.where(visible[None, :], scores * scale, float("-inf"))


@triton.jit
def statistics(
    query,  # [T, H, D], strides of a token and a head; D contiguous
    cache,  # [B, H_kv, N, 2D] by strides, keys first
    token,  # [n] int32, and so slot, kv_len; blocks [n, M]
    slot,
    kv_len,
    blocks,
    largest,  # [n, P, HP] float32: out, -inf where the share is empty
    total,  # [n, P, HP] float32: out, sum of 2**(score - largest)
    scale,  # scaling * log2(e)
    stride_t,
    stride_qh,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    stride_table,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(slot + row) < 0:
        return
    length = tl.load(kv_len + row)
    tiles = tl.cdiv(tl.cdiv(length, TILE), P)
    first = split * tiles * TILE
    m = tl.full([HP], float("-inf"), dtype=tl.float32)
    s = tl.zeros([HP], dtype=tl.float32)
    q = query + tl.load(token + row).to(tl.int64) * stride_t
    for start in range(first, tl.minimum(first + tiles * TILE, length), TILE):
        columns = start + tl.arange(0, TILE)
        scores = _tile_scores(
            q, cache, blocks + row.to(tl.int64) * stride_table, columns, columns < length, scale,
            stride_qh, stride_b, stride_h, stride_n, stride_d, H, H_KV, D, HP, DP, N, TILE,
        )  # fmt: skip
        higher = tl.maximum(m, tl.max(scores, axis=1))
        s = s * tl.exp2(m - higher) + tl.sum(tl.exp2(scores - higher[:, None]), axis=1)
        m = higher
    out = (row * P + split) * HP + tl.arange(0, HP)
    tl.store(largest + out, m)
    tl.store(total + out, s)


@triton.jit
def weights(
    query,
    cache,
    token,
    slot,
    kv_len,
    prompt_len,  # [n] int32
    blocks,
    largest,
    total,
    shares,  # [n, P, HP, HP] float32: out
    rests,  # [n, HP] float32: out
    focus,  # [S, T_max] float32, stride of a slot
    scale,
    stride_t,
    stride_qh,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    stride_table,
    stride_focus,
    S,
    T_MAX,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    row, split = tl.program_id(0), tl.program_id(1)
    at = tl.load(slot + row).to(tl.int64)
    if at < 0:
        return
    heads = tl.arange(0, HP)
    m = tl.full([HP], float("-inf"), dtype=tl.float32)
    for other in range(P):
        m = tl.maximum(m, tl.load(largest + (row * P + other) * HP + heads))
    s = tl.zeros([HP], dtype=tl.float32)
    for other in range(P):
        part = (row * P + other) * HP + heads
        s += tl.load(total + part) * tl.exp2(tl.load(largest + part) - m)
    inverse = tl.where(heads < H, 1.0 / s, 0.0)  # padded heads weigh nothing
    length = tl.load(kv_len + row)
    width = tl.minimum(tl.minimum(tl.load(prompt_len + row), length), T_MAX)
    shown = tl.where(at < S, width, 0)
    tiles = tl.cdiv(tl.cdiv(width, TILE), P)
    first = split * tiles * TILE
    gram = tl.zeros([HP, HP], dtype=tl.float32)
    resting = tl.zeros([HP], dtype=tl.float32)
    q = query + tl.load(token + row).to(tl.int64) * stride_t
    for start in range(first, tl.minimum(first + tiles * TILE, width), TILE):
        columns = start + tl.arange(0, TILE)
        kept = columns < width
        scores = _tile_scores(
            q, cache, blocks + row.to(tl.int64) * stride_table, columns, kept, scale,
            stride_qh, stride_b, stride_h, stride_n, stride_d, H, H_KV, D, HP, DP, N, TILE,
        )  # fmt: skip
        a = tl.exp2(scores - m[:, None]) * inverse[:, None]
        gram = tl.dot(a, tl.trans(a), acc=gram, input_precision="ieee")
        resting += tl.sum(tl.where(columns[None, :] == 0, a, 0.0), axis=1)
        into = focus + at * stride_focus + columns
        seen = columns < shown
        tl.store(into, tl.load(into, mask=seen, other=0.0) + tl.max(a, axis=0), mask=seen)
    if split == 0:
        tl.store(rests + row * HP + heads, resting)
    square = heads[:, None] * HP + heads[None, :]
    tl.store(shares + (row * P + split) * HP * HP + square, gram)


@triton.jit
def finish(
    slot,
    shares,
    rests,
    gram,  # [S, L, H, H] float32 from this layer on, stride of a place
    sink,  # [S, L, H] float32 from this layer on, stride of a place
    layer_rows,  # [S, L] int64 from this layer on, stride of a place
    stride_gram,
    stride_sink,
    stride_rows,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.load(slot + row)
    before = tl.load(slot + row - 1, mask=row > 0, other=-1)
    if (at < 0) | (before == at):
        return
    heads = tl.arange(0, HP)
    square = heads[:, None] * HP + heads[None, :]
    added = tl.zeros([HP, HP], dtype=tl.float32)
    rested = tl.zeros([HP], dtype=tl.float32)
    count = 0
    here = at
    while here == at:
        for split in range(P):
            added += tl.load(shares + ((row + count) * P + split) * HP * HP + square)
        rested += tl.load(rests + (row + count) * HP + heads)
        count += 1
        here = tl.load(slot + row + count, mask=row + count < tl.num_programs(0), other=-1)
    place = at.to(tl.int64)
    mine = (heads[:, None] < H) & (heads[None, :] < H)
    into = gram + place * stride_gram + heads[:, None] * H + heads[None, :]
    tl.store(into, tl.load(into, mask=mine, other=0.0) + added, mask=mine)
    into = sink + place * stride_sink + heads
    tl.store(into, tl.load(into, mask=heads < H, other=0.0) + rested, mask=heads < H)
    into = layer_rows + place * stride_rows
    tl.store(into, tl.load(into) + count)
