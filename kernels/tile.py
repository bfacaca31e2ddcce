"""Dot products of a few rows of x with a few rows of a weight: the one inner loop of the linear kernels.

A tile holds `rows x columns` vector accumulators while it walks along K once. It is written as LLVM code
because that is the only way from numba to choose the registers and to reach the bfloat16 dot product.

Three kinds of arithmetic, all accumulating in float32:

- FLOAT32;
- BFLOAT16: one 32-bit lane holds two neighbours; a shift and a mask widen them to two float32 vectors;
- BFLOAT16_DOT: the AVX512-BF16 instruction multiplies and adds both neighbours at once. Where the
  processor lacks it, this kind is compiled as BFLOAT16.

The result for a row of x does not depend, to the last bit, on which rows it is computed with: every
tile shape adds in the same order.
"""

import llvmlite.ir as ir
import numpy as np
import torch
from numba import njit, types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from .compiled import Part

FLOAT32, BFLOAT16, BFLOAT16_DOT = 0, 1, 2

_FEATURES = (get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(",")
HAS_BFLOAT16_DOT = "+avx512bf16" in _FEATURES

# Float32 lanes of the accumulators: one register of the widest kind the processor has.
LANES = 16 if "+avx512f" in _FEATURES else 8 if "+avx" in _FEATURES else 4

# How far ahead of the loads weights are fetched into the second-level cache. Tiles of one or two rows wait
# for memory only and the hardware's own prefetch of their single stream is better (25-27 against 20 GB/s
# on one Zen 4 core); with three rows and more the arithmetic in flight hides the next loads from the
# processor, and without this the tile falls from 21 to 10 GB/s. Fetching into the first level halves it.
_PREFETCH_BYTES = 8192

# Rows of x that stay in the first-level cache while the columns of a block go by.
_ROWS = 8

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()


def kind_of(dtype: torch.dtype) -> int:
    """The arithmetic for tensors of this dtype; ValueError if there is none."""
    if dtype is torch.float32:
        return FLOAT32
    if dtype is torch.bfloat16:
        return BFLOAT16_DOT if HAS_BFLOAT16_DOT else BFLOAT16
    raise ValueError(f"dtype {dtype}: the CPU kernels take float32 and bfloat16; use torch's own operators")


def multiply_add(builder, kind, total, x, w):
    """total + x * w, all vectors; x and w are 32-bit lanes as loaded."""
    lanes = ir.VectorType(_I32, LANES)
    floats = ir.VectorType(_F32, LANES)
    if kind == BFLOAT16_DOT:
        # Older spelling of the operands; LLVM's reader turns it into vectors of bfloat.
        name, form = "llvm.x86.avx512bf16.dpbf16ps.512", ir.FunctionType(floats, [floats, lanes, lanes])
        dot = cgutils.get_or_insert_function(builder.module, form, name)
        return builder.call(dot, [total, x, w])
    form = ir.FunctionType(floats, [floats] * 3)
    fma = cgutils.get_or_insert_function(builder.module, form, f"llvm.fmuladd.v{LANES}f32")
    if kind == FLOAT32:
        return builder.call(fma, [builder.bitcast(x, floats), builder.bitcast(w, floats), total])
    half, mask = ir.Constant(lanes, [16] * LANES), ir.Constant(lanes, [0xFFFF0000] * LANES)
    for widen in (lambda v: builder.shl(v, half), lambda v: builder.and_(v, mask)):
        operands = [builder.bitcast(widen(v), floats) for v in (x, w)]
        total = builder.call(fma, [*operands, total])
    return total


def _sum_lanes(builder, vectors):
    """The sum of each vector's lanes, by adding its upper half to its lower until one lane is left.

    Halves of two vectors are put side by side and added together, so eight vectors take little more than one;
    the order in which a vector's own lanes are added is always the same.
    """
    count = len(vectors)
    vectors = vectors + vectors[-1:] * ((1 << (count - 1).bit_length()) - count)
    width = LANES  # lanes that one of the original vectors still has
    while width > 1:
        width //= 2
        lanes = vectors[0].type.count * min(2, len(vectors))
        pairs = [(a, b) for a, b in zip(vectors[::2], vectors[1::2] or vectors, strict=True)]
        lower = [lane for lane in range(lanes) if lane // width % 2 == 0]
        halves = [ir.Constant(ir.VectorType(_I32, lanes // 2), [i + up for i in lower]) for up in (0, width)]
        vectors = [builder.fadd(*(builder.shuffle_vector(a, b, half) for half in halves)) for a, b in pairs]
    lanes = vectors[0].type.count
    return [builder.extract_element(vectors[i // lanes], ir.Constant(_I32, i % lanes)) for i in range(count)]


def _tile(kind: int, rows: int, columns: int):
    """Intrinsic `tile(x, w, stride, k, out, out_stride)`: out[r, c] = sum over k of x[r] * w[c].

    x is the address of `rows` addresses, w of the first weight row; stride is in bytes, out_stride in
    float32 elements.
    """
    form = ir.FunctionType(ir.VoidType(), [_I64] * 6)

    def codegen(context, builder, signature, args):
        name = f"moeyard_tile_{kind}_{rows}_{columns}"
        function = cgutils.get_or_insert_function(builder.module, form, name)
        if function.is_declaration:
            # Out of line: inlined everywhere it would make compilation several times longer.
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            function.attributes.add("nounwind")
            body = ir.IRBuilder(function.append_basic_block())
            _write_tile(body, kind, rows, columns, *function.args)
            body.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, x, w, stride, k, out, out_stride):
        return types.void(*[types.int64] * 6), codegen

    return tile


def _write_tile(builder, kind, rows, columns, x, w, stride, k, out, out_stride):
    size = 4 if kind == FLOAT32 else 2
    step = 4 * LANES
    lanes = ir.VectorType(_I32, LANES)
    floats = ir.VectorType(_F32, LANES)

    def i64(n):
        return ir.Constant(_I64, n)

    def at(address, pointee):
        return builder.inttoptr(address, pointee.as_pointer())

    x = at(x, _I64)
    x_rows = [builder.load(builder.gep(x, [i64(r)])) for r in range(rows)]
    w_rows = [w]
    for _ in range(columns - 1):
        w_rows.append(builder.add(w_rows[-1], stride))
    zero = ir.Constant(floats, [0.0] * LANES)
    total = [[cgutils.alloca_once_value(builder, zero) for _ in w_rows] for _ in x_rows]
    length = builder.mul(k, i64(size))
    whole = builder.and_(length, i64(-step))

    # Rows that follow each other in memory are fetched as one stream, whatever the tile's shape; from
    # other rows the lines asked for are those being loaded, which costs nothing.
    contiguous = builder.icmp_signed("==", stride, length)
    ahead = builder.add(w, builder.select(contiguous, i64(_PREFETCH_BYTES), i64(0)))
    pace = builder.select(contiguous, i64(columns), i64(0))

    def prefetch(offset):
        form = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
        read, second_level, data = (ir.Constant(_I32, n) for n in (0, 2, 1))
        start = builder.add(ahead, builder.mul(offset, pace))
        for line in range(0, columns * step, 64):
            builder.call(fetch, [at(builder.add(start, i64(line)), _I8), read, second_level, data])

    def accumulate(load, offset):
        w_values = [load(row, offset) for row in w_rows]
        for r, row in enumerate(x_rows):
            x_value = load(row, offset)
            for c, w_value in enumerate(w_values):
                new = multiply_add(builder, kind, builder.load(total[r][c]), x_value, w_value)
                builder.store(new, total[r][c])

    def load(row, offset):
        return builder.load(at(builder.add(row, offset), lanes), align=size)

    with cgutils.for_range_slice(builder, i64(0), whole, i64(step), _I64) as (offset, _):
        if rows > 2:
            prefetch(offset)
        accumulate(load, offset)

    count = step // size
    rest = builder.udiv(builder.sub(length, whole), i64(size))
    with builder.if_then(builder.icmp_signed("!=", rest, i64(0)), likely=False):
        elements = ir.VectorType(ir.IntType(8 * size), count)
        index = ir.VectorType(_I32, count)
        none = ir.Constant(index, ir.Undefined)
        filled = builder.insert_element(none, builder.trunc(rest, _I32), ir.Constant(_I32, 0))
        limit = builder.shuffle_vector(filled, none, ir.Constant(index, [0] * count))
        mask = builder.icmp_signed("<", ir.Constant(index, list(range(count))), limit)
        form = ir.FunctionType(elements, [elements.as_pointer(), _I32, mask.type, elements])
        masked = cgutils.get_or_insert_function(builder.module, form, f"llvm.masked.load.v{count}i{8 * size}.p0")
        zeros = ir.Constant(elements, [0] * count)

        def load_rest(row, offset):
            pointer = at(builder.add(row, offset), elements)
            value = builder.call(masked, [pointer, ir.Constant(_I32, size), mask, zeros])
            return builder.bitcast(value, lanes)

        accumulate(load_rest, whole)

    out = at(out, _F32)
    sums = _sum_lanes(builder, [builder.load(value) for row in total for value in row])
    for i, value in enumerate(sums):
        place = builder.add(builder.mul(out_stride, i64(i // columns)), i64(i % columns))
        builder.store(value, builder.gep(out, [place]))


def _shapes(rows: int, columns: int):
    """The tile of one shape for a kind chosen as it runs."""
    float32, bfloat16 = _tile(FLOAT32, rows, columns), _tile(BFLOAT16, rows, columns)
    dot = _tile(BFLOAT16_DOT if HAS_BFLOAT16_DOT else BFLOAT16, rows, columns)

    @njit
    def tile(kind, x, w, stride, k, out, out_stride):
        if kind == FLOAT32:
            float32(x, w, stride, k, out, out_stride)
        elif kind == BFLOAT16:
            bfloat16(x, w, stride, k, out, out_stride)
        else:
            dot(x, w, stride, k, out, out_stride)

    return tile


_1x1, _2x1, _1x4, _2x4, _3x2, _4x2 = (_shapes(*shape) for shape in ((1, 1), (2, 1), (1, 4), (2, 4), (3, 2), (4, 2)))


@njit
def _narrow(kind, x, rows, w, stride, columns, k, out, out_stride):
    """One or two rows at a time."""
    c = 0
    if stride != k * (4 if kind == FLOAT32 else 2):  # no stream to follow: take short rows four at a time
        while columns - c >= 4:
            if rows == 2:
                _2x4(kind, x, w + c * stride, stride, k, out + 4 * c, out_stride)
            else:
                for r in range(rows):
                    _1x4(kind, x + 8 * r, w + c * stride, stride, k, out + 4 * (r * out_stride + c), out_stride)
            c += 4
    while c < columns:
        if rows == 2:
            _2x1(kind, x, w + c * stride, stride, k, out + 4 * c, out_stride)
        else:
            for r in range(rows):
                _1x1(kind, x + 8 * r, w + c * stride, stride, k, out + 4 * (r * out_stride + c), out_stride)
        c += 1


@Part
def dot_block(kind, x, rows, w, stride, columns, k, out, out_stride):
    """out[r, c] = sum over k of x[r, k] * w[c, k], in float32, for any number of rows and columns.

    x: address of `rows` int64 row addresses; w: address of the first of `columns` rows, `stride` bytes
    apart; out: address of float32 values, rows `out_stride` elements apart. Rows are contiguous along k.

    Tiles of four rows by two columns reach the processor's peak and fit 16 registers. Up to eight rows take a
    pair of weight rows from the first-level cache again, more take the whole block from the second-level cache;
    memory is read once.
    """
    if rows <= 2:
        _narrow(kind, x, rows, w, stride, columns, k, out, out_stride)
        return
    pairs = columns // 2
    for first in range(0, rows, _ROWS):
        end = min(first + _ROWS, rows)
        for pair in range(pairs):
            w_pair = w + 2 * pair * stride
            out_pair = out + 8 * pair
            r = first
            while end - r >= 4:
                _4x2(kind, x + 8 * r, w_pair, stride, k, out_pair + 4 * r * out_stride, out_stride)
                r += 4
            if end - r == 3:
                _3x2(kind, x + 8 * r, w_pair, stride, k, out_pair + 4 * r * out_stride, out_stride)
            elif end > r:
                two, out_rest = np.int64(2), out_pair + 4 * r * out_stride
                _narrow(kind, x + 8 * r, end - r, w_pair, stride, two, k, out_rest, out_stride)
    if columns % 2:
        _narrow(kind, x, rows, w + 2 * pairs * stride, stride, np.int64(1), k, out + 8 * pairs, out_stride)
