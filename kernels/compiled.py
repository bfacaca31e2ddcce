"""How the CPU kernels are compiled with numba, and the scalar pieces they share.

A kernel is a serial function `part(part, parts, args)` that does one worker's share of the work; `run` calls it
on every worker. Kernels take plain integers (addresses, sizes, strides) instead of arrays: numba unboxes an
integer in tens of nanoseconds and an array in microseconds, and numpy has no bfloat16. The functions a
model calls check dtypes, shapes and strides first; nothing below them does.

Functions reach each other by address where numba would otherwise compile one copy into each of its callers; it
compiles a parallel loop and all it contains three times over, so there is only one such loop, in `run`.
"""

import functools
import hashlib
import logging
import os
from array import array
from collections.abc import Callable
from pathlib import Path

import llvmlite.ir as ir
import numpy as np
import torch
from numba import cfunc, njit, prange, types
from numba.core import cgutils, config
from numba.extending import intrinsic

log = logging.getLogger(__name__)


def _cache_directory() -> str:
    """One directory for each state of the kernels' source.

    numba looks only at the file of the function it caches, not at the files that function calls into, so
    without the digest an upgrade could run machine code of the version before it.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(config.CACHE_DIR or os.path.join(base, "moeyard", "numba"), digest.hexdigest()[:16])


_DIRECTORY = _cache_directory()


def _cached(compiler: Callable, function: Callable, **options):
    """compiler(function, cache=True), its machine code kept between processes where a directory can be written."""
    before, config.CACHE_DIR = config.CACHE_DIR, _DIRECTORY
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError as error:
        log.warning("kernels are compiled by each process: %s", error)
        return compiler(**options)(function)
    finally:
        config.CACHE_DIR = before


def kernel(function: Callable):
    """A serial entry point for Python: compiled on its first call, run without the GIL."""
    return _cached(njit, function, nogil=True)


class Part:
    """A function compiled on first use into a C function, which others call by its address.

    Its arguments are int64; for work to be shared by `run` they are (part, parts, address of more arguments).
    """

    def __init__(self, function: Callable):
        self._function = function

    @functools.cached_property
    def address(self) -> int:
        signature = types.void(*[types.int64] * self._function.__code__.co_argcount)
        return _cached(functools.partial(cfunc, signature), self._function).address


# numba.set_num_threads, reached by symbol so that machine code which calls it can be cached.
_set_workers = types.ExternalFunction("set_num_threads", types.void(types.int32))


def caller(count: int):
    """Intrinsic `call(address, ...)` of a C function with `count` int64 arguments."""

    def codegen(context, builder, signature, args):
        i64 = ir.IntType(64)
        form = ir.FunctionType(ir.VoidType(), [i64] * count)
        builder.call(builder.inttoptr(args[0], form.as_pointer()), args[1:])
        return context.get_dummy_value()

    @intrinsic
    def call(typingctx, address, *values):
        return types.void(types.int64, *[types.int64] * count), codegen

    return call


_call_part = caller(3)


def arguments(count: int):
    """Intrinsic that reads `count` int64 values from an address into a tuple."""

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, signature, args):
            base = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            values = [builder.load(builder.gep(base, [ir.Constant(ir.IntType(64), i)])) for i in range(count)]
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(types.int64, count)(types.int64), codegen

    return read


def _launch(workers, part, args):
    _set_workers(workers)
    for p in prange(workers):
        _call_part(part, np.int64(p), workers, args)


_launch = _cached(njit, _launch, nogil=True, parallel=True)


def run(workers: int, part: Part, *args: int) -> None:
    """Call part(p, workers, address of args) for every p below workers, in parallel, and wait for all."""
    values = array("q", args)
    _launch(workers, part.address, values.buffer_info()[0])


# Bytes to read below which another worker costs more than it saves: waking one takes about 10 us.
_BYTES_PER_WORKER = 1 << 17


def workers_for(size: int) -> int:
    """Workers to read `size` bytes: at most torch's number of threads, so that one setting rules both."""
    return max(1, min(torch.get_num_threads(), config.NUMBA_NUM_THREADS, size // _BYTES_PER_WORKER))


def address(tensor: torch.Tensor | None) -> int:
    """Address of the first element, 0 for None. The caller keeps the tensor alive."""
    return 0 if tensor is None else tensor.data_ptr()


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


# get(base, i) and put(base, i, value): element i of the array at address base. Numba's own arrays would add
# reference counts and tests for negative indices, and make compilation three times as long.
get_float32, put_float32 = _getter(32, types.float32), _setter(32, types.float32)
get_int32, put_int32 = _getter(32, types.int32), _setter(32, types.int32)
get_int64, put_int64 = _getter(64, types.int64), _setter(64, types.int64)
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


@njit
def share(n, part, parts):
    """Columns [low, high) of n that one of `parts` workers takes, in units of 8."""
    units = (n + 7) // 8
    return units * part // parts * 8, min(n, units * (part + 1) // parts * 8)
