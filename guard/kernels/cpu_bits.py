"""What the CPU kernel's loops say to the machine below Python's numbers: bits of 16-bit floats, addresses, a counter.

Each is a numba intrinsic of a few LLVM instructions that vectorise. numba's cache of compiled loops watches the file of
the loops only (`cpu_loops`): whoever changes an instruction here must touch that file too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_F32, _I32 = ir.FloatType(), ir.IntType(32)

# 1.5 * 2**23: added to a float32 of moderate size, it leaves the nearest integer in the low bits of the mantissa.
ROUND = np.float32(12582912.0)


@intrinsic
def widen(context: Any, bits: Any) -> Any:
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
def first(context: Any, pair: Any) -> Any:
    """The bfloat16 in the low half of a pair, as float32."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(args[0], ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint32), generate


@intrinsic
def second(context: Any, pair: Any) -> Any:
    """The bfloat16 in the high half of a pair, as float32."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(args[0], ir.Constant(_I32, 0xFFFF0000)), _F32)

    return types.float32(types.uint32), generate


@intrinsic
def power_of_rounded(context: Any, rounded: Any) -> Any:
    """2**k for a float32 that holds ROUND + k, -126 <= k <= 127."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        shifted = builder.shl(builder.bitcast(args[0], _I32), ir.Constant(_I32, 23))
        return builder.bitcast(builder.add(shifted, ir.Constant(_I32, 0x3F800000)), _F32)

    return types.float32(types.float32), generate


@intrinsic
def pointer(context: Any, address: Any, dtype: Any) -> Any:
    """An address as a pointer to elements of `dtype`."""

    def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], target.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), generate


@intrinsic
def take(context: Any, counter: Any) -> Any:
    """The number of the next task: each is handed out once, whichever thread asks."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate
