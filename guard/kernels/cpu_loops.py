"""The compiled loops of the CPU kernel: from packed keys to softmax weights, from weights to Gram, focus and sink.

Every function here is compiled by numba and kept in numba's cache; all of them stand in this one file because that
cache notices changes of the file a function stands in, and of no other.

Legend: n rows, H query heads, H_kv key heads, G = H / H_kv, D head size, N tokens per block, B blocks, S slots.
Elements are told apart by the dtype of the numpy view: float32 is itself, uint16 the bits of bfloat16, int16 the bits
of float16, and uint32 two neighbouring bfloat16 of one key (vLLM's AMX packing). A block of keys is [D, N] for the
first three and [N/16, D/2, 16] for the last. Loops run over tokens, which are contiguous in both, so that they
vectorise without reordering a sum; slices are taken outside the inner loops, because an index that numba cannot prove
to be non-negative costs the vectorisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

_F32, _I32 = ir.FloatType(), ir.IntType(32)

# Columns whose weights (H x 4 B each) stay in the first-level cache while heads are multiplied with each other.
_GRAM_COLUMNS = 256
# Heads one task multiplies with all others.
GRAM_HEADS = 4
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of the mantissa

OK, BAD_SLOT, BAD_QUERY, BAD_LENGTH, BAD_PROMPT, BAD_BLOCK = 0, 1, 2, 3, 4, 5


def _compiled(fastmath: set[str], parallel: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    options = {"fastmath": fastmath, "parallel": parallel, "nogil": True, "error_model": "numpy"}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # nowhere to write a cache: compile at every start instead
            return njit(**options)(function)

    return decorate


@intrinsic
def _widen(context: Any, bits: Any) -> Any:
    """The float32 that an element stands for."""

    def float32(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return args[0]

    def bfloat16(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    def float16(_: Any, builder: Any, __: Any, args: Any) -> Any:
        # Exponent and mantissa moved to float32's place, then 2**112 for the other bias: right for every finite half.
        wide = builder.zext(args[0], _I32)
        sign = builder.shl(builder.and_(wide, ir.Constant(_I32, 0x8000)), ir.Constant(_I32, 16))
        rest = builder.shl(builder.and_(wide, ir.Constant(_I32, 0x7FFF)), ir.Constant(_I32, 13))
        return builder.fmul(builder.bitcast(builder.or_(sign, rest), _F32), ir.Constant(_F32, 2.0**112))

    if bits not in (types.float32, types.uint16, types.int16):
        return None
    return types.float32(bits), {types.float32: float32, types.uint16: bfloat16, types.int16: float16}[bits]


@intrinsic
def _first(context: Any, pair: Any) -> Any:
    """The bfloat16 in the low half of a pair, as float32."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(args[0], ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint32), generate


@intrinsic
def _second(context: Any, pair: Any) -> Any:
    """The bfloat16 in the high half of a pair, as float32."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(args[0], ir.Constant(_I32, 0xFFFF0000)), _F32)

    return types.float32(types.uint32), generate


@intrinsic
def _power_of_rounded(context: Any, rounded: Any) -> Any:
    """2**k for a float32 that holds _ROUND + k, -126 <= k <= 127."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        shifted = builder.shl(builder.bitcast(args[0], _I32), ir.Constant(_I32, 23))
        return builder.bitcast(builder.add(shifted, ir.Constant(_I32, 0x3F800000)), _F32)

    return types.float32(types.float32), generate


@_compiled({"contract"})
def _exp2(x: Any) -> Any:
    """2**x for x <= 0, relative error below 3e-7; not less than 2**-126, and NaN for NaN. Vectorises, unlike libm's."""
    x = np.float32(-126.0) if x < np.float32(-126.0) else x
    rounded = x + _ROUND
    f = x - (rounded - _ROUND)
    p = np.float32(1.5403530393e-4)  # ln(2)**k / k!, k = 6 .. 0
    p = p * f + np.float32(1.3333558146e-3)
    p = p * f + np.float32(9.6181291076e-3)
    p = p * f + np.float32(5.5504108665e-2)
    p = p * f + np.float32(2.4022650696e-1)
    p = p * f + np.float32(6.9314718056e-1)
    p = p * f + np.float32(1.0)
    return p * _power_of_rounded(rounded)


@_compiled({"contract"})
def _columns_times(keys: Any, start: int, width: int, q: Any, out: Any) -> None:
    """out[:, start : start + width] = q [G, D] @ keys [D, N] of the first `width` tokens. D is a multiple of 4."""
    G, D = q.shape
    N = keys.size // D
    for g in range(0, G - 1, 2):
        a, b, qa, qb = out[g][start : start + width], out[g + 1][start : start + width], q[g], q[g + 1]
        a[:] = np.float32(0.0)
        b[:] = np.float32(0.0)
        for d in range(0, D, 4):
            k0, k1 = keys[d * N : (d + 1) * N], keys[(d + 1) * N : (d + 2) * N]
            k2, k3 = keys[(d + 2) * N : (d + 3) * N], keys[(d + 3) * N : (d + 4) * N]
            a0, a1, a2, a3 = qa[d], qa[d + 1], qa[d + 2], qa[d + 3]
            b0, b1, b2, b3 = qb[d], qb[d + 1], qb[d + 2], qb[d + 3]
            for c in range(width):
                x0, x1, x2, x3 = _widen(k0[c]), _widen(k1[c]), _widen(k2[c]), _widen(k3[c])
                a[c] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                b[c] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
    if G % 2:
        a, qa = out[G - 1][start : start + width], q[G - 1]
        a[:] = np.float32(0.0)
        for d in range(0, D, 4):
            k0, k1 = keys[d * N : (d + 1) * N], keys[(d + 1) * N : (d + 2) * N]
            k2, k3 = keys[(d + 2) * N : (d + 3) * N], keys[(d + 3) * N : (d + 4) * N]
            a0, a1, a2, a3 = qa[d], qa[d + 1], qa[d + 2], qa[d + 3]
            for c in range(width):
                a[c] += a0 * _widen(k0[c]) + a1 * _widen(k1[c]) + a2 * _widen(k2[c]) + a3 * _widen(k3[c])


@_compiled({"contract"})
def _pairs_times(keys: Any, start: int, width: int, q: Any, out: Any) -> None:
    """The same for keys [N/16, D/2, 16] of bfloat16 pairs. Writes whole tiles of 16 tokens: out is wide enough."""
    G, D = q.shape
    for tile in range((width + 15) // 16):
        block = keys[tile * 8 * D : (tile + 1) * 8 * D]
        for g in range(G):
            a, qg = out[g][start + tile * 16 : start + tile * 16 + 16], q[g]
            a[:] = np.float32(0.0)
            for d in range(0, D, 4):
                k0, k1 = block[d * 8 : d * 8 + 16], block[d * 8 + 16 : d * 8 + 32]
                a0, a1, a2, a3 = qg[d], qg[d + 1], qg[d + 2], qg[d + 3]
                for c in range(16):
                    a[c] += a0 * _first(k0[c]) + a1 * _second(k0[c]) + a2 * _first(k1[c]) + a3 * _second(k1[c])


def _block_scores(keys: Any, start: int, width: int, q: Any, out: Any) -> None:
    raise NotImplementedError("only compiled code calls this")


@overload(_block_scores, strict=False)  # strict also compares annotations
def _choose_packing(keys: Any, start: Any, width: Any, q: Any, out: Any) -> Any:
    if keys.dtype == types.uint32:
        return lambda keys, start, width, q, out: _pairs_times(keys, start, width, q, out)
    return lambda keys, start, width, q, out: _columns_times(keys, start, width, q, out)


@_compiled({"nnan", "nsz"})
def _largest(scores: Any) -> Any:
    largest = scores[0]
    for c in range(scores.size):
        if scores[c] > largest:
            largest = scores[c]
    return largest


@_compiled({"reassoc", "contract"})
def _exponentiate(scores: Any, largest: Any) -> Any:
    """scores <- 2**(scores - largest); returns their sum."""
    total = np.float32(0.0)
    for c in range(scores.size):
        weight = _exp2(scores[c] - largest)
        scores[c] = weight
        total += weight
    return total


@_compiled({"contract"})
def _weights(
    cache: Any,
    first: int,
    stride: int,
    words: int,
    blocks: Any,
    block: int,
    kv_len: int,
    q: Any,
    out: Any,
    inverse: Any,
) -> None:
    """Softmax weights of one key head's G heads: q [G, D] scaled for base 2, out [G, >= kv_len, padded].

    The weights are not yet normalised; inverse [G] gets the reciprocals of their sums over all kv_len keys. `first` is
    where this key head begins in block 0 of the cache, `stride` the way from block to block, `words` what it fills.
    """
    for start in range(0, kv_len, block):
        at = blocks[start // block] * stride + first
        _block_scores(cache[at : at + words], start, min(block, kv_len - start), q, out)
    for g in range(q.shape[0]):
        scores = out[g][:kv_len]
        inverse[g] = np.float32(1.0) / _exponentiate(scores, _largest(scores))


@_compiled({"reassoc", "contract"})
def _dots(x: Any, y0: Any, y1: Any, y2: Any, y3: Any) -> Any:
    s0 = s1 = s2 = s3 = np.float32(0.0)
    for c in range(x.size):
        s0 += x[c] * y0[c]
        s1 += x[c] * y1[c]
        s2 += x[c] * y2[c]
        s3 += x[c] * y3[c]
    return s0, s1, s2, s3


@_compiled({"contract"})
def _multiply_heads(weights: Any, inverse: Any, width: int, first: int, gram: Any) -> None:
    """Adds P P^T to gram [H, H] for heads first .. first + GRAM_HEADS and those before them, and the mirror image."""
    H = weights.shape[0]
    for c in range(0, width, _GRAM_COLUMNS):
        end = min(width, c + _GRAM_COLUMNS)
        for h in range(first, min(first + GRAM_HEADS, H)):
            x = weights[h][c:end]
            for j in range(0, h + 1, 4):
                j1, j2, j3 = min(j + 1, h), min(j + 2, h), min(j + 3, h)
                s = _dots(x, weights[j][c:end], weights[j1][c:end], weights[j2][c:end], weights[j3][c:end])
                for i in range(min(4, h + 1 - j)):
                    value = s[i] * (inverse[h] * inverse[j + i])
                    gram[h, j + i] += value
                    if j + i != h:
                        gram[j + i, h] += value


@_compiled({"contract"})
def _sum_heads(weights: Any, inverse: Any, width: int, sink: Any, focus: Any) -> None:
    """Adds the weights on column 0 to sink [H] and those of all heads together to focus [>= width]."""
    H = weights.shape[0]
    into = focus[:width]
    for h in range(H):
        scale, row = inverse[h], weights[h][:width]
        for c in range(width):
            into[c] += scale * row[c]
        if width > 0:
            sink[h] += scale * row[0]


@_compiled(set())
def _refusal(
    query: Any, slot: Any, kv_len: Any, prompt_len: Any, blocks: Any, block: int, limits: tuple[int, int, int, int]
) -> tuple[int, int]:
    """(row, code) of the first live row that points outside what it is read against, or (0, OK)."""
    tokens, slots, columns, cache_blocks = limits
    for row in range(slot.size):
        if slot[row] < 0:
            continue
        if slot[row] >= slots:
            return row, BAD_SLOT
        if query[row] < 0 or query[row] >= tokens:
            return row, BAD_QUERY
        if kv_len[row] < 1 or kv_len[row] > blocks.shape[1] * block:
            return row, BAD_LENGTH
        if prompt_len[row] < 0 or min(prompt_len[row], kv_len[row]) > columns:
            return row, BAD_PROMPT
        for i in range((kv_len[row] + block - 1) // block):
            if blocks[row, i] < 0 or blocks[row, i] >= cache_blocks:
                return row, BAD_BLOCK
    return 0, OK


@_compiled({"contract"}, parallel=True)
def add_rows(
    query: Any,  # [n] int32, and so the next three; blocks [n, M] int32
    slot: Any,
    kv_len: Any,
    prompt_len: Any,
    blocks: Any,
    q: Any,  # the query tokens' elements, 1-D, with strides of a token and a head
    q_strides: tuple[int, int],
    cache: Any,  # the cache's elements, 1-D, with strides of a block and a key head
    strides: tuple[int, int],
    block: int,
    words: int,  # elements of one block's keys, per key head
    limits: tuple[int, int, int, int],  # query tokens, slots, focus columns, cache blocks
    scale: Any,  # float32: scaling * log2(e)
    scaled: Any,  # workspace [n, H, D] float32
    weights: Any,  # workspace [rows at a time, H, longest kv_len, padded to 16] float32
    inverse: Any,  # workspace [rows at a time, H] float32
    gram: Any,  # [S, H, H] float32: this layer's part of the bank, and so the next; focus [S, T_max]
    sink: Any,
    focus: Any,
    layer_rows: Any,  # [S] int64
    kv_heads: int,
) -> tuple[int, int]:
    """Everything `guard.kernels.cpu.observe` does, or (row, code) of a row that must not be read; then nothing."""
    bad, code = _refusal(query, slot, kv_len, prompt_len, blocks, block, limits)
    if code != OK:
        return bad, code
    n, H, D = scaled.shape
    G = H // kv_heads
    for row in range(n):
        if slot[row] >= 0:
            for h in range(H):
                at = query[row] * q_strides[0] + h * q_strides[1]
                elements, into = q[at : at + D], scaled[row, h]
                for d in range(D):
                    into[d] = _widen(elements[d]) * scale
    group = weights.shape[0]
    parts = (H + GRAM_HEADS - 1) // GRAM_HEADS
    for begin in range(0, n, group):
        rows = min(group, n - begin)
        for task in prange(rows * kv_heads):
            i, kv_head = task // kv_heads, task % kv_heads
            row, h = begin + i, kv_head * G
            if slot[row] >= 0:
                _weights(
                    cache,
                    kv_head * strides[1],
                    strides[0],
                    words,
                    blocks[row],
                    block,
                    kv_len[row],
                    scaled[row][h : h + G],
                    weights[i][h : h + G],
                    inverse[i][h : h + G],
                )
        for task in prange(rows * (parts + 1)):
            i, part = task // (parts + 1), task % (parts + 1)
            row = begin + i
            at = slot[row]
            if at >= 0:
                width = min(prompt_len[row], kv_len[row])
                if part < parts:
                    _multiply_heads(weights[i], inverse[i], width, part * GRAM_HEADS, gram[at])
                else:
                    _sum_heads(weights[i], inverse[i], width, sink[at], focus[at])
                    layer_rows[at] += 1
    return 0, OK
