"""The compiled loops of the CPU kernel: from packed keys to softmax weights, from weights to Gram, focus and sink.

Every function here is compiled by numba and kept in numba's cache; they stand in one file because that cache notices
changes of the file a function stands in, and of no other.

Legend: K layers, n rows, H query heads, H_kv key heads, G = H / H_kv, D head size, N tokens per block, B blocks, P
places of the bank, S slots (its first places).
Elements are told apart by the dtype of the numpy view: float32 is itself, uint16 the bits of bfloat16, int16 the bits
of float16, and uint32 two neighbouring bfloat16 of one key (vLLM's AMX packing). A block of keys is [D, N] for the
first three and [N/16, D/2, 16] for the last. Loops run over tokens, which are contiguous in both, so that they
vectorise without reordering a sum; slices are taken outside the inner loops, because an index that numba cannot prove
to be non-negative costs the vectorisation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import overload

from guard.kernels.cpu_bits import ROUND, first, pointer, power_of_rounded, second, take, widen

# Columns whose weights (H x 4 B each) stay in the first-level cache while heads are multiplied with each other.
_GRAM_COLUMNS = 256
# Heads one task multiplies with all others.
_GRAM_HEADS = 4
# Columns that are looked through for their strongest head at a time.
_FOCUS_COLUMNS = 1024

OK, BAD_SLOT, BAD_LENGTH, BAD_PROMPT, BAD_BLOCK = 0, 1, 2, 3, 4


def _compiled(fastmath: set[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    options = {"fastmath": fastmath, "nogil": True, "error_model": "numpy"}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # nowhere to write a cache: compile at every start instead
            return njit(**options)(function)

    return decorate


@_compiled({"contract"})
def _exp2(x: Any) -> Any:
    """2**x for x <= 0, relative error below 3e-7; not less than 2**-126, and NaN for NaN. Vectorises, unlike libm's."""
    x = np.float32(-126.0) if x < np.float32(-126.0) else x
    rounded = x + ROUND
    f = x - (rounded - ROUND)
    p = np.float32(1.5403530393e-4)  # ln(2)**k / k!, k = 6 .. 0
    p = p * f + np.float32(1.3333558146e-3)
    p = p * f + np.float32(9.6181291076e-3)
    p = p * f + np.float32(5.5504108665e-2)
    p = p * f + np.float32(2.4022650696e-1)
    p = p * f + np.float32(6.9314718056e-1)
    p = p * f + np.float32(1.0)
    return p * power_of_rounded(rounded)


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
                x0, x1, x2, x3 = widen(k0[c]), widen(k1[c]), widen(k2[c]), widen(k3[c])
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
                a[c] += a0 * widen(k0[c]) + a1 * widen(k1[c]) + a2 * widen(k2[c]) + a3 * widen(k3[c])


@_compiled({"contract"})
def _pairs_times(keys: Any, start: int, width: int, q: Any, out: Any) -> None:
    """The same for keys [N/16, D/2, 16] of bfloat16 pairs. Writes whole tiles of 16 tokens: out is wide enough."""
    G, D = q.shape
    for tile in range((width + 15) // 16):
        block = keys[tile * 8 * D : (tile + 1) * 8 * D]
        at = start + tile * 16
        for g in range(0, G - 1, 2):
            a, b, qa, qb = out[g][at : at + 16], out[g + 1][at : at + 16], q[g], q[g + 1]
            a[:] = np.float32(0.0)
            b[:] = np.float32(0.0)
            for d in range(0, D, 4):
                k0, k1 = block[d * 8 : d * 8 + 16], block[d * 8 + 16 : d * 8 + 32]
                a0, a1, a2, a3 = qa[d], qa[d + 1], qa[d + 2], qa[d + 3]
                b0, b1, b2, b3 = qb[d], qb[d + 1], qb[d + 2], qb[d + 3]
                for c in range(16):
                    x0, x1, x2, x3 = first(k0[c]), second(k0[c]), first(k1[c]), second(k1[c])
                    a[c] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                    b[c] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
        if G % 2:
            a, qa = out[G - 1][at : at + 16], q[G - 1]
            a[:] = np.float32(0.0)
            for d in range(0, D, 4):
                k0, k1 = block[d * 8 : d * 8 + 16], block[d * 8 + 16 : d * 8 + 32]
                a0, a1, a2, a3 = qa[d], qa[d + 1], qa[d + 2], qa[d + 3]
                for c in range(16):
                    a[c] += a0 * first(k0[c]) + a1 * second(k0[c]) + a2 * first(k1[c]) + a3 * second(k1[c])


def _block_scores(keys: Any, start: int, width: int, q: Any, out: Any) -> None:
    # Never run: numba puts one of the two below in the place of every call. It stands here to have a name.
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
    """Adds P P^T to gram [H, H] for heads first .. first + _GRAM_HEADS and those before them, and the mirror image."""
    H = weights.shape[0]
    for c in range(0, width, _GRAM_COLUMNS):
        end = min(width, c + _GRAM_COLUMNS)
        for h in range(first, min(first + _GRAM_HEADS, H)):
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
def _look(weights: Any, inverse: Any, width: int, strongest: Any, focus: Any) -> None:
    """Adds the largest weight of all heads to focus [>= width]. strongest [_FOCUS_COLUMNS]: scratch."""
    for c in range(0, width, _FOCUS_COLUMNS):
        end = min(width, c + _FOCUS_COLUMNS)
        most, into = strongest[: end - c], focus[c:end]
        most[:] = np.float32(0.0)
        for h in range(weights.shape[0]):
            scale, row = inverse[h], weights[h][c:end]
            for i in range(end - c):
                value = scale * row[i]
                most[i] = value if value > most[i] else most[i]
        for i in range(end - c):
            into[i] += most[i]


@_compiled(set())
def look_over(
    slot: Any, kv_len: Any, prompt_len: Any, blocks: Any, block: int, limits: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Looks at every row before anything is read or written.

    slot, kv_len, prompt_len [n] and blocks [n, M] int32; limits: places, focus columns, blocks of the cache. Returns
    the largest kv_len of a live row (at least 1), and (row, code) of the first live row that points outside what it is
    read against, or (0, OK).
    """
    places, columns, cache_blocks = limits
    most = 1
    for row in range(slot.size):
        if slot[row] < 0:
            continue
        if slot[row] >= places:
            return most, row, BAD_SLOT
        if kv_len[row] < 1 or kv_len[row] > blocks.shape[1] * block:
            return most, row, BAD_LENGTH
        if prompt_len[row] < 0 or min(prompt_len[row], kv_len[row]) > columns:
            return most, row, BAD_PROMPT
        for i in range((kv_len[row] + block - 1) // block):
            if blocks[row, i] < 0 or blocks[row, i] >= cache_blocks:
                return most, row, BAD_BLOCK
        most = max(most, kv_len[row])
    return most, 0, OK


# What every thread of a team is told about one call: sizes, strides in elements, and addresses of C-contiguous arrays.
# It is about K layers, of which the call does `layers` from `first` on, and n rows: `rows` of them from `begin` on.
Call = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("known", "first", "layers", "n", "begin", "rows"),
            *("heads", "kv_heads", "width", "block", "words", "table", "longest"),
            *("stride_b", "stride_h", "cache_size", "places", "slots", "columns", "depth", "next_score", "next_gram"),
            # int64: the bank's number of each layer and the address of its cache's elements [cache_size], [K]
            *("layer", "caches"),
            # int32: slot, kv_len, prompt_len [n], blocks [n, table]
            *("slot", "kv_len", "prompt_len", "blocks"),
            # float32: queries [K, n, H, D], weights [>= layers * rows, H, longest], inverse [>= layers * rows, H]
            *("queries", "weights", "inverse"),
            # the bank: gram [P, L, H, H], sink [P, L, H], focus [S, columns] float32, layer_rows [P, L] int64
            *("gram", "sink", "focus", "layer_rows"),
        )
    ]
)
_TEAM = types.void(types.CPointer(from_dtype(Call)))


@_compiled({"contract"})
def _score_tasks(call: Any, element: Any) -> None:
    H, D, G = call.heads, call.width, call.heads // call.kv_heads
    pairs = call.layers * call.rows
    slot = carray(pointer(call.slot, np.int32), (call.n,))
    kv_len = carray(pointer(call.kv_len, np.int32), (call.n,))
    blocks = carray(pointer(call.blocks, np.int32), (call.n, call.table))
    caches = carray(pointer(call.caches, np.int64), (call.known,))
    queries = carray(pointer(call.queries, np.float32), (call.known, call.n, H, D))
    weights = carray(pointer(call.weights, np.float32), (pairs, H, call.longest))
    inverse = carray(pointer(call.inverse, np.float32), (pairs, H))
    while True:
        task = take(call.next_score)
        if task >= pairs * call.kv_heads:
            return
        pair, kv_head = task // call.kv_heads, task % call.kv_heads
        k, row, h = call.first + pair // call.rows, call.begin + pair % call.rows, kv_head * G
        if slot[row] >= 0:
            _weights(
                carray(pointer(caches[k], element), (call.cache_size,)),
                kv_head * call.stride_h,
                call.stride_b,
                call.words,
                blocks[row],
                call.block,
                kv_len[row],
                queries[k, row][h : h + G],
                weights[pair][h : h + G],
                inverse[pair][h : h + G],
            )


@_compiled({"contract"})
def _count(
    call: Any,
    row: int,
    at: int,
    width: int,
    layer: Any,
    weights: Any,
    inverse: Any,
    sink: Any,
    strongest: Any,
    focus: Any,
    layer_rows: Any,
) -> None:
    """Adds one row's sinks and focus in all layers of the call, and counts it."""
    for k in range(call.layers):  # one after the other: all add to the same focus
        number, mine = layer[call.first + k], k * call.rows + row - call.begin
        layer_rows[at, number] += 1
        if width > 0:
            for h in range(call.heads):
                sink[at, number, h] += inverse[mine, h] * weights[mine, h, 0]
        if at < call.slots:
            _look(weights[mine], inverse[mine], width, strongest, focus[at])


@_compiled({"contract"})
def _gram_tasks(call: Any) -> None:
    """The Gram of each layer and place, some heads a task; and of each place its sinks, focus and counts, one task.

    A run of rows that share a place is the task of its first row, in order: no two threads add to one number.
    """
    H, P, L = call.heads, call.places, call.depth
    pairs = call.layers * call.rows
    slot = carray(pointer(call.slot, np.int32), (call.n,))
    kv_len = carray(pointer(call.kv_len, np.int32), (call.n,))
    prompt_len = carray(pointer(call.prompt_len, np.int32), (call.n,))
    layer = carray(pointer(call.layer, np.int64), (call.known,))
    weights = carray(pointer(call.weights, np.float32), (pairs, H, call.longest))
    inverse = carray(pointer(call.inverse, np.float32), (pairs, H))
    gram = carray(pointer(call.gram, np.float32), (P, L, H, H))
    sink = carray(pointer(call.sink, np.float32), (P, L, H))
    focus = carray(pointer(call.focus, np.float32), (call.slots, call.columns))
    strongest = np.empty(_FOCUS_COLUMNS, np.float32)
    layer_rows = carray(pointer(call.layer_rows, np.int64), (P, L))
    parts = (H + _GRAM_HEADS - 1) // _GRAM_HEADS
    end = call.begin + call.rows
    while True:
        task = take(call.next_gram)
        if task >= pairs * parts + call.rows:
            return
        counting = task >= pairs * parts
        pair, part = (task - pairs * parts, 0) if counting else (task // parts, task % parts)
        k, i = pair // call.rows, pair % call.rows
        row = call.begin + i
        at = slot[row]
        if at < 0 or (i > 0 and slot[row - 1] == at):
            continue
        while row < end and slot[row] == at:
            width = min(prompt_len[row], kv_len[row])
            if counting:
                _count(call, row, at, width, layer, weights, inverse, sink, strongest, focus, layer_rows)
            else:
                mine = k * call.rows + row - call.begin
                into = gram[at, layer[call.first + k]]
                _multiply_heads(weights[mine], inverse[mine], width, part * _GRAM_HEADS, into)
            row += 1


@functools.cache
def scores_function(dtype: str) -> Any:
    """The C function `void f(Call *)` by which each thread of a team does its share of the softmax weights.

    `dtype` names the numpy type of the caches' elements. Compiled (or loaded from numba's cache) when first asked for;
    the result's `address` is valid as long as the result lives.
    """
    element = np.dtype(dtype).type

    def scores(data: Any) -> None:
        _score_tasks(carray(data, 1)[0], element)

    return _c_function(scores)


@functools.cache
def gram_function() -> Any:
    """The same for the Grams, sinks, focus and row counts; every thread must be done with the scores before."""

    def gram(data: Any) -> None:
        _gram_tasks(carray(data, 1)[0])

    return _c_function(gram)


def _c_function(function: Callable[..., Any]) -> Any:
    try:
        return cfunc(_TEAM, cache=True, nopython=True)(function)
    except RuntimeError:  # nowhere to write a cache
        return cfunc(_TEAM, nopython=True)(function)
