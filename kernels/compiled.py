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
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path

import llvmlite.ir as ir
import numpy as np
import torch
from numba import cfunc, njit, prange, types
from numba.core import config
from numba.extending import intrinsic

log = logging.getLogger(__name__)


def _cache_directory() -> str | None:
    """Where machine code is kept between processes: one directory for each state of the kernels' source.

    numba looks only at the file of the function it caches, not at the files that function calls into, so
    without the digest an upgrade could run machine code of the version before it.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = os.path.join(config.CACHE_DIR or os.path.join(home, "moeyard", "numba"), digest.hexdigest()[:16])
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        log.warning("CPU kernels are compiled anew by each process (set NUMBA_CACHE_DIR to avoid it): %s", error)
        return None
    return path


_DIRECTORY = _cache_directory()


def _compile(compiler: Callable, function: Callable, **options):
    """compiler(**options)(function), its machine code kept where a directory can be written."""
    if _DIRECTORY is None:
        return compiler(**options)(function)
    before, config.CACHE_DIR = config.CACHE_DIR, _DIRECTORY
    try:
        return compiler(cache=True, **options)(function)
    finally:
        config.CACHE_DIR = before


def kernel(function: Callable):
    """A serial entry point for Python: compiled on its first call, run without the GIL."""
    return _compile(njit, function, nogil=True)


class Part:
    """A function compiled on first use into a C function, which others call by its address.

    Its arguments are int64; for work to be shared by `run` they are (part, parts, address of more arguments).
    """

    def __init__(self, function: Callable):
        self._function = function

    @functools.cached_property
    def address(self) -> int:
        signature = types.void(*[types.int64] * self._function.__code__.co_argcount)
        return _compile(functools.partial(cfunc, signature), self._function).address


# numba.set_num_threads, reached by symbol so that machine code which calls it can be cached.
_set_workers = types.ExternalFunction("set_num_threads", types.void(types.int32))


def _call(context, builder, signature, args):
    i64 = ir.IntType(64)
    form = ir.FunctionType(ir.VoidType(), [i64] * (len(args) - 1))
    builder.call(builder.inttoptr(args[0], form.as_pointer()), args[1:])
    return context.get_dummy_value()


@intrinsic
def _call_part(typingctx, address, part, parts, args):
    return types.void(*[types.int64] * 4), _call


@intrinsic
def call(typingctx, address, a, b, c, d, e, f, g, h, i):
    """Call the Part of nine arguments at this address."""
    return types.void(*[types.int64] * 10), _call


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


_launch = _compile(njit, _launch, nogil=True, parallel=True)


def run(workers: int, part: Part, *args: int) -> None:
    """Call part(p, workers, address of args) for every p below workers, in parallel, and wait for all."""
    values = array("q", args)
    _launch(workers, part.address, values.buffer_info()[0])


# Bytes to read below which another worker costs more than it saves: waking one takes about 10 us.
_BYTES_PER_WORKER = 1 << 17


def workers_for(size: int) -> int:
    """Workers to read `size` bytes: at most torch's number of threads, so that one setting rules both."""
    return max(1, min(torch.get_num_threads(), config.NUMBA_NUM_THREADS, size // _BYTES_PER_WORKER))


@njit
def share(n, part, parts):
    """Columns [low, high) of n that one of `parts` workers takes, in units of 8."""
    units = (n + 7) // 8
    return units * part // parts * 8, min(n, units * (part + 1) // parts * 8)
