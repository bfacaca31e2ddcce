"""Rows of quantised matrices as float32 or bfloat16, for the compiled kernels.

Loops over these vectorise. What a value stands for is worked out in float32, as `QuantisedMatrix.dequantise` does, and
is the same to the bit.
"""

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from .quantised import FP8, INT4, INT8
from .scalars import get_float32, get_int8, get_uint8, put_bfloat16, put_float32
from .tile import FLOAT32

_I32, _F32 = ir.IntType(32), ir.FloatType()


def _i32(n):
    return ir.Constant(_I32, n)


def _small_float(builder, bits, mantissa, bias, sign):
    """The float32 of a float of few bits in an i32: its sign is bit `sign`, its exponent and mantissa those below."""
    magnitude = builder.and_(bits, _i32((1 << sign) - 1))
    moved = builder.shl(magnitude, _i32(23 - mantissa))
    normal = builder.bitcast(builder.add(moved, _i32((127 - bias) << 23)), _F32)
    least = ir.Constant(_F32, 2.0 ** (1 - bias - mantissa))
    subnormal = builder.fmul(builder.uitofp(magnitude, _F32), least)
    is_small = builder.icmp_unsigned("<", magnitude, _i32(1 << mantissa))
    value = builder.bitcast(builder.select(is_small, subnormal, normal), _I32)
    negative = builder.shl(builder.and_(bits, _i32(1 << sign)), _i32(31 - sign))
    return builder.bitcast(builder.or_(value, negative), _F32), magnitude


@intrinsic
def _e4m3(typingctx, byte):
    """The float32 of an e4m3 byte."""

    def codegen(context, builder, signature, args):
        value, magnitude = _small_float(builder, builder.zext(args[0], _I32), 3, 7, 7)
        nan = builder.icmp_unsigned("==", magnitude, _i32(0x7F))
        return builder.select(nan, ir.Constant(_F32, float("nan")), value)

    return types.float32(types.uint8), codegen


def _nibble(builder, byte, high):
    wide = builder.zext(byte, _I32)
    return builder.lshr(wide, _i32(4)) if high else builder.and_(wide, _i32(15))


def _half(high, decode):
    @intrinsic
    def half(typingctx, byte):
        def codegen(context, builder, signature, args):
            return decode(builder, _nibble(builder, args[0], high))

        return types.float32(types.uint8), codegen

    return half


def _e2m1(builder, bits):
    return _small_float(builder, bits, 1, 1, 3)[0]


_e2m1_low, _e2m1_high = _half(False, _e2m1), _half(True, _e2m1)
_int4_low, _int4_high = (_half(high, lambda builder, bits: builder.uitofp(bits, _F32)) for high in (False, True))


@intrinsic
def _e8m0(typingctx, byte):
    """The power of two of a scale's byte."""

    def codegen(context, builder, signature, args):
        wide = builder.zext(args[0], _I32)
        bits = builder.shl(wide, _i32(23))
        bits = builder.select(builder.icmp_unsigned("==", wide, _i32(0)), _i32(0x00400000), bits)
        bits = builder.select(builder.icmp_unsigned("==", wide, _i32(255)), _i32(0x7FC00000), bits)
        return builder.bitcast(bits, _F32)

    return types.float32(types.uint8), codegen


@njit
def _put_group(form, kind, values, count, scale, zero, out):
    """`count` values from address `values` on, all of one group, written to `out`."""
    if form == INT8:
        if kind == FLOAT32:
            for i in range(count):
                put_float32(out, i, np.float32(get_int8(values, i)) * scale)
        else:
            for i in range(count):
                put_bfloat16(out, i, np.float32(get_int8(values, i)) * scale)
    elif form == FP8:
        if kind == FLOAT32:
            for i in range(count):
                put_float32(out, i, _e4m3(get_uint8(values, i)) * scale)
        else:
            for i in range(count):
                put_bfloat16(out, i, _e4m3(get_uint8(values, i)) * scale)
    elif form == INT4:
        if kind == FLOAT32:
            for i in range(count // 2):
                byte = get_uint8(values, i)
                put_float32(out, 2 * i, (_int4_low(byte) - zero) * scale)
                put_float32(out, 2 * i + 1, (_int4_high(byte) - zero) * scale)
        else:
            for i in range(count // 2):
                byte = get_uint8(values, i)
                put_bfloat16(out, 2 * i, (_int4_low(byte) - zero) * scale)
                put_bfloat16(out, 2 * i + 1, (_int4_high(byte) - zero) * scale)
    elif kind == FLOAT32:
        for i in range(count // 2):
            byte = get_uint8(values, i)
            put_float32(out, 2 * i, _e2m1_low(byte) * scale)
            put_float32(out, 2 * i + 1, _e2m1_high(byte) * scale)
    else:
        for i in range(count // 2):
            byte = get_uint8(values, i)
            put_bfloat16(out, 2 * i, _e2m1_low(byte) * scale)
            put_bfloat16(out, 2 * i + 1, _e2m1_high(byte) * scale)


@njit
def decode_row(form, exponents, kind, values, scales, zeros, columns, row_scale, k, row, out):
    """Row `row` of a matrix of k inputs, as `kind`, at address `out`.

    values, scales, zeros: addresses (zeros may be 0); `columns` inputs and `row_scale` rows share a scale.
    """
    per_byte = 2 if form >= INT4 else 1
    size = 4 if kind == FLOAT32 else 2
    groups = (k + columns - 1) // columns
    values += row * (k // per_byte)
    place = row // row_scale * groups
    for g in range(groups):
        first = g * columns
        count = min(columns, k - first)
        scale = _e8m0(get_uint8(scales, place + g)) if exponents else get_float32(scales, place + g)
        zero = np.float32(get_uint8(zeros, place + g)) if zeros else np.float32(0.0)
        _put_group(form, kind, values + first // per_byte, count, scale, zero, out + first * size)
