"""Rows of quantised matrices as float32 or bfloat16, for the compiled kernels.

What a value stands for is worked out in float32 and rounded as `QuantisedMatrix.dequantise` does it, the same to the
bit. A chunk of two registers' values is written as LLVM code: numba's own loops do not find the instruction that rounds
two registers of float32 to one of bfloat16, nor do they keep pairs of 4-bit values in one lane.
"""

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .quantised import FP4, FP8, INT4, INT8
from .scalars import get_float32, get_int8, get_uint8, put_bfloat16, put_float32
from .tile import BFLOAT16, FLOAT32, HAS_BFLOAT16_DOT, LANES

CHUNK = 2 * LANES
"""Values that are decoded at a time."""

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def _constant(like, n):
    """A constant of the type of a value, in all its lanes."""
    kind = like.type
    return ir.Constant(kind, [n] * kind.count) if isinstance(kind, ir.VectorType) else ir.Constant(kind, n)


def _as(like, element):
    return ir.VectorType(element, like.type.count) if isinstance(like.type, ir.VectorType) else element


def _small_float(builder, bits, mantissa, bias, sign):
    """The float32 of floats of few bits in lanes of 32: the sign is bit `sign`, exponent and mantissa are below."""

    def i32(n):
        return _constant(bits, n)

    floats, lanes = _as(bits, _F32), bits.type
    magnitude = builder.and_(bits, i32((1 << sign) - 1))
    moved = builder.shl(magnitude, i32(23 - mantissa))
    normal = builder.bitcast(builder.add(moved, i32((127 - bias) << 23)), floats)
    whole = builder.sitofp(magnitude, floats)
    subnormal = builder.fmul(whole, _constant(whole, 2.0 ** (1 - bias - mantissa)))
    is_small = builder.icmp_unsigned("<", magnitude, i32(1 << mantissa))
    value = builder.select(is_small, subnormal, normal)
    if sign == 7:
        nan = builder.icmp_unsigned("==", magnitude, i32(0x7F))
        value = builder.select(nan, _constant(whole, float("nan")), value)
    negative = builder.shl(builder.and_(bits, i32(1 << sign)), i32(31 - sign))
    return builder.bitcast(builder.or_(builder.bitcast(value, lanes), negative), floats)


@intrinsic
def _e4m3(typingctx, byte):
    """The float32 of an e4m3 byte."""

    def codegen(context, builder, signature, args):
        return _small_float(builder, builder.zext(args[0], _I32), 3, 7, 7)

    return types.float32(types.uint8), codegen


def _nibble(builder, byte, high):
    wide = builder.zext(byte, _as(byte, _I32))
    return builder.lshr(wide, _constant(wide, 4)) if high else builder.and_(wide, _constant(wide, 15))


def _half(high, decode):
    @intrinsic
    def half(typingctx, byte):
        def codegen(context, builder, signature, args):
            return decode(builder, _nibble(builder, args[0], high))

        return types.float32(types.uint8), codegen

    return half


def _e2m1(builder, bits):
    return _small_float(builder, bits, 1, 1, 3)


def _int4(builder, bits):
    return builder.sitofp(bits, _as(bits, _F32))


_e2m1_low, _e2m1_high, _int4_low, _int4_high = (_half(high, f) for f in (_e2m1, _int4) for high in (False, True))


@intrinsic
def _e8m0(typingctx, byte):
    """The power of two of a scale's byte."""

    def codegen(context, builder, signature, args):
        wide = builder.zext(args[0], _I32)
        bits = builder.shl(wide, _constant(wide, 23))
        for byte, special in ((0, 0x00400000), (255, 0x7FC00000)):
            found = builder.icmp_unsigned("==", wide, _constant(wide, byte))
            bits = builder.select(found, _constant(wide, special), bits)
        return builder.bitcast(bits, _F32)

    return types.float32(types.uint8), codegen


def _round(builder, a, b, pairs):
    """Two registers of float32 as one of bfloat16: one after the other, or with `pairs` in turn."""
    one_after_the_other = [*range(CHUNK)]
    in_turn = [lane + LANES * odd for lane in range(LANES) for odd in (0, 1)]
    halves = ir.VectorType(_I16, CHUNK)
    if HAS_BFLOAT16_DOT:
        # Older spelling of the result, as in tile.py.
        name, form = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.FunctionType(halves, [a.type, a.type])
        both = builder.call(cgutils.get_or_insert_function(builder.module, form, name), [b, a])
        return builder.shuffle_vector(both, both, _order(in_turn)) if pairs else both
    rounded = []
    for value in (a, b):
        bits = builder.bitcast(value, ir.VectorType(_I32, LANES))
        odd = builder.and_(builder.lshr(bits, _constant(bits, 16)), _constant(bits, 1))
        up = builder.add(bits, builder.add(odd, _constant(bits, 0x7FFF)))
        nan = builder.fcmp_unordered("uno", value, value)
        up = builder.select(nan, builder.or_(bits, _constant(bits, 0x400000)), up)
        rounded.append(builder.bitcast(up, halves))
    order = in_turn if pairs else one_after_the_other
    return builder.shuffle_vector(*rounded, _order([2 * lane + 1 for lane in order]))


def _order(lanes):
    return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)


def _chunk(form: int, kind: int):
    """Intrinsic that decodes CHUNK values from address `values` on, of one group, to address `out`."""

    def load(builder, base, index):
        vector = ir.VectorType(_I8, LANES)
        pointer = builder.inttoptr(base, vector.as_pointer())
        return builder.load(builder.gep(pointer, [ir.Constant(ir.IntType(64), index)]), align=1)

    def codegen(context, builder, signature, args):
        values, scale, zero, out = args
        packed = form in (INT4, FP4)
        if packed:
            both = load(builder, values, 0)
            decode = _int4 if form == INT4 else _e2m1
            parts = [decode(builder, _nibble(builder, both, high)) for high in (False, True)]
        elif form == INT8:
            wide = [builder.sext(load(builder, values, i), ir.VectorType(_I32, LANES)) for i in (0, 1)]
            parts = [builder.sitofp(part, ir.VectorType(_F32, LANES)) for part in wide]
        else:
            wide = [builder.zext(load(builder, values, i), ir.VectorType(_I32, LANES)) for i in (0, 1)]
            parts = [_small_float(builder, part, 3, 7, 7) for part in wide]

        def splat(value):
            none = ir.Constant(ir.VectorType(_F32, LANES), ir.Undefined)
            one = builder.insert_element(none, value, ir.Constant(_I32, 0))
            return builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))

        if form == INT4:
            parts = [builder.fsub(part, splat(zero)) for part in parts]
        a, b = (builder.fmul(part, splat(scale)) for part in parts)
        if kind == BFLOAT16:
            rounded = _round(builder, a, b, packed)
            builder.store(rounded, builder.inttoptr(out, rounded.type.as_pointer()), align=2)
        else:
            if packed:
                lanes = [lane + LANES * odd for lane in range(LANES) for odd in (0, 1)]
                a, b = (builder.shuffle_vector(a, b, _order(lanes[at : at + LANES])) for at in (0, LANES))
            pointer = builder.inttoptr(out, a.type.as_pointer())
            builder.store(a, pointer, align=4)
            builder.store(b, builder.gep(pointer, [ir.Constant(ir.IntType(64), 1)]), align=4)
        return context.get_dummy_value()

    @intrinsic
    def chunk(typingctx, values, scale, zero, out):
        return types.void(types.int64, types.float32, types.float32, types.int64), codegen

    return chunk


@njit
def _value(form, values, i):
    if form == INT8:
        return np.float32(get_int8(values, i))
    if form == FP8:
        return _e4m3(get_uint8(values, i))
    byte = get_uint8(values, i // 2)
    if form == INT4:
        return _int4_high(byte) if i % 2 else _int4_low(byte)
    return _e2m1_high(byte) if i % 2 else _e2m1_low(byte)


def _row(form: int, kind: int):
    """A row of one kind of values, from address `values` on; `place` is that of its scales and zero points."""
    chunk, per_byte, size = _chunk(form, kind), 2 if form in (INT4, FP4) else 1, 4 if kind == FLOAT32 else 2

    @njit
    def decode(exponents, values, scales, zeros, place, columns, k, out):
        for first in range(0, k, columns):
            count = min(columns, k - first)
            scale = _e8m0(get_uint8(scales, place)) if exponents else get_float32(scales, place)
            zero = np.float32(get_uint8(zeros, place)) if zeros else np.float32(0.0)
            place += 1
            its_values, its_out = values + first // per_byte, out + first * size
            chunks = count // CHUNK
            for c in range(chunks):
                chunk(its_values + c * (CHUNK // per_byte), scale, zero, its_out + c * (CHUNK * size))
            for i in range(chunks * CHUNK, count):
                value = (_value(form, its_values, i) - zero) * scale
                if kind == FLOAT32:
                    put_float32(its_out, i, value)
                else:
                    put_bfloat16(its_out, i, value)

    return decode


_int8_32, _int8_16, _fp8_32, _fp8_16, _int4_32, _int4_16, _fp4_32, _fp4_16 = (
    _row(form, kind) for form in (INT8, FP8, INT4, FP4) for kind in (FLOAT32, BFLOAT16)
)


@njit
def decode_row(form, exponents, kind, values, scales, zeros, columns, row_scale, k, row, out):
    """Row `row` of a matrix of k inputs, as `kind`, at address `out`.

    values, scales, zeros: addresses (zeros may be 0); `columns` inputs and `row_scale` rows share a scale.
    """
    values += row * (k // 2 if form >= INT4 else k)
    place = row // row_scale * ((k + columns - 1) // columns)
    if kind == FLOAT32:
        if form == INT8:
            _int8_32(exponents, values, scales, zeros, place, columns, k, out)
        elif form == FP8:
            _fp8_32(exponents, values, scales, zeros, place, columns, k, out)
        elif form == INT4:
            _int4_32(exponents, values, scales, zeros, place, columns, k, out)
        else:
            _fp4_32(exponents, values, scales, zeros, place, columns, k, out)
    elif form == INT8:
        _int8_16(exponents, values, scales, zeros, place, columns, k, out)
    elif form == FP8:
        _fp8_16(exponents, values, scales, zeros, place, columns, k, out)
    elif form == INT4:
        _int4_16(exponents, values, scales, zeros, place, columns, k, out)
    else:
        _fp4_16(exponents, values, scales, zeros, place, columns, k, out)
