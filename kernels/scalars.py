"""What the CPU kernels do to single numbers: reading and writing memory by address, and float32 functions.

Loops over these vectorise.
"""

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def _getter(bits: int, numba_type):
    @intrinsic
    def get(typingctx, base, i):
        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            value = builder.load(builder.gep(pointer, [args[1]]), align=bits // 8)
            return builder.bitcast(value, context.get_value_type(signature.return_type))

        return numba_type(types.int64, types.int64), codegen

    return get


def _setter(bits: int, numba_type):
    @intrinsic
    def put(typingctx, base, i, value):
        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            value = builder.bitcast(args[2], ir.IntType(bits))
            builder.store(value, builder.gep(pointer, [args[1]]), align=bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), codegen

    return put


# get(base, i) and put(base, i, value): element i of the array at address base. numba's own arrays would add
# reference counts and tests for negative indices, and make compilation three times as long.
get_float32, put_float32 = _getter(32, types.float32), _setter(32, types.float32)
get_int32, put_int32 = _getter(32, types.int32), _setter(32, types.int32)
get_int64, put_int64 = _getter(64, types.int64), _setter(64, types.int64)
get_int8, get_uint8 = _getter(8, types.int8), _getter(8, types.uint8)
_get_uint16, _put_uint16 = _getter(16, types.uint16), _setter(16, types.uint16)


@intrinsic
def _round(typingctx, value):
    """bfloat16 bits of a float32, to nearest even; a NaN stays a (quiet) NaN."""

    def codegen(context, builder, signature, args):
        def const(n):
            return ir.Constant(ir.IntType(32), n)

        bits = builder.bitcast(args[0], ir.IntType(32))
        odd = builder.and_(builder.lshr(bits, const(16)), const(1))
        rounded = builder.add(bits, builder.add(odd, const(0x7FFF)))
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        quiet = builder.or_(bits, const(0x400000))
        return builder.trunc(builder.lshr(builder.select(nan, quiet, rounded), const(16)), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def _widen(typingctx, bits):
    """The float32 value of bfloat16 bits."""

    def codegen(context, builder, signature, args):
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), codegen


def stack_buffer(count: int):
    """Intrinsic that gives the address of `count` float32 values which live as long as the calling function."""

    @intrinsic
    def buffer(typingctx):
        def codegen(context, builder, signature, args):
            with builder.goto_entry_block():  # not cgutils.alloca_once, which stores zeros one by one
                block = builder.alloca(ir.FloatType(), size=count)
                block.align = 64
            return builder.ptrtoint(block, ir.IntType(64))

        return types.int64(), codegen

    return buffer


@intrinsic
def float32_from(typingctx, bits):
    """The float32 whose bits are the low half of an int64."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), codegen


@njit
def get_bfloat16(base, i):
    return _widen(_get_uint16(base, i))


@njit
def put_bfloat16(base, i, value):
    _put_uint16(base, i, _round(value))


@intrinsic
def _exp2_int(typingctx, value):
    """(n, 2**n) in float32 for the value's integer part n, within -126..127."""

    def codegen(context, builder, signature, args):
        i32, f32 = ir.IntType(32), ir.FloatType()
        number = builder.fcmp_ordered("ord", args[0], args[0])  # converting NaN would be undefined
        n = builder.fptosi(builder.select(number, args[0], ir.Constant(f32, 0.0)), i32)
        power = builder.shl(builder.add(n, ir.Constant(i32, 127)), ir.Constant(i32, 23))
        return context.make_tuple(builder, signature.return_type, [builder.sitofp(n, f32), builder.bitcast(power, f32)])

    return types.UniTuple(types.float32, 2)(types.float32), codegen


@intrinsic
def larger(typingctx, a, b):
    """The larger of two float32, taking neither for NaN, so that a loop of it vectorises."""

    def codegen(context, builder, signature, args):
        form = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        maximum = cgutils.get_or_insert_function(builder.module, form, "llvm.maxnum.f32")
        return builder.call(maximum, args, fastmath=["nnan", "nsz"])

    return types.float32(types.float32, types.float32), codegen


@njit(fastmath={"contract"})
def exp(x):
    """e**x in float32 for x <= 0, within 2 ulp; below -87 the smallest normal number. Vectorises."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    n, power = _exp2_int(x * np.float32(1.4426950408889634) - np.float32(0.5))
    f = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(0.5)
    return (p * f * f + f + np.float32(1.0)) * power


@njit
def tanh(x):
    e = exp(np.float32(-2.0) * abs(x))
    t = (np.float32(1.0) - e) / (np.float32(1.0) + e)
    return t if x >= 0 else -t


@njit
def silu(x):
    e = exp(-abs(x))
    return x * ((np.float32(1.0) if x >= 0 else e) / (np.float32(1.0) + e))
