"""Weighted sums of rows: the second inner loop of attention, beside the dot products of tile.py.

A tile keeps a stretch of up to four results in registers while it walks over all rows once.
"""

import llvmlite.ir as ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import Part
from .scalars import get_bfloat16, get_float32, put_float32
from .tile import BFLOAT16, FLOAT32, LANES

_I16, _I32, _I64 = (ir.IntType(n) for n in (16, 32, 64))
_F32 = ir.FloatType()


def _tile(kind: int, results: int):
    """Intrinsic `tile(weights, weights_stride, rows, row, stride, out, out_stride)`: LANES float32 columns, or twice
    as many bfloat16 ones, of out[g] += sum over i of weights[g, i] * row[i].

    `stride` is in bytes, the other strides in float32 elements.
    """
    form = ir.FunctionType(ir.VoidType(), [_I64] * 7)

    def codegen(context, builder, signature, args):
        name = f"moeyard_value_tile_{kind}_{results}"
        function = cgutils.get_or_insert_function(builder.module, form, name)
        if function.is_declaration:
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            function.attributes.add("nounwind")
            body = ir.IRBuilder(function.append_basic_block())
            _write_tile(body, kind, results, *function.args)
            body.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, weights, weights_stride, rows, row, stride, out, out_stride):
        return types.void(*[types.int64] * 7), codegen

    return tile


def _write_tile(builder, kind, results, weights, weights_stride, rows, row, stride, out, out_stride):
    floats = ir.VectorType(_F32, LANES)
    lanes = ir.VectorType(_I32, LANES)
    loaded = floats if kind == FLOAT32 else ir.VectorType(_I16, LANES)
    vectors = 1 if kind == FLOAT32 else 2
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{LANES}f32"
    )

    def i64(n):
        return ir.Constant(_I64, n)

    def element(base, index, pointee):
        return builder.gep(builder.inttoptr(base, pointee.as_pointer()), [index])

    def place(g, v):
        index = builder.add(builder.mul(out_stride, i64(g)), i64(v * LANES))
        return builder.bitcast(element(out, index, _F32), floats.as_pointer())

    total = [
        [cgutils.alloca_once_value(builder, builder.load(place(g, v), align=4)) for v in range(vectors)]
        for g in range(results)
    ]
    with cgutils.for_range(builder, rows) as loop:
        address = builder.add(row, builder.mul(loop.index, stride))
        values = []
        for v in range(vectors):
            value = builder.load(element(address, i64(v), loaded), align=4 // vectors)
            if kind == BFLOAT16:
                wide = builder.shl(builder.zext(value, lanes), ir.Constant(lanes, [16] * LANES))
                value = builder.bitcast(wide, floats)
            values.append(value)
        for g in range(results):
            index = builder.add(builder.mul(weights_stride, i64(g)), loop.index)
            weight = builder.load(element(weights, index, _F32))
            one = builder.insert_element(ir.Constant(floats, ir.Undefined), weight, ir.Constant(_I32, 0))
            splat = builder.shuffle_vector(one, ir.Constant(floats, ir.Undefined), ir.Constant(lanes, [0] * LANES))
            for v, value in enumerate(values):
                builder.store(builder.call(fma, [splat, value, builder.load(total[g][v])]), total[g][v])
    for g in range(results):
        for v in range(vectors):
            builder.store(builder.load(total[g][v]), place(g, v), align=4)


def _shapes(results: int):
    """The tile of one shape for a kind chosen as it runs."""
    float32, bfloat16 = _tile(FLOAT32, results), _tile(BFLOAT16, results)

    @njit
    def tile(kind, weights, weights_stride, rows, row, stride, out, out_stride):
        if kind == FLOAT32:
            float32(weights, weights_stride, rows, row, stride, out, out_stride)
        else:
            bfloat16(weights, weights_stride, rows, row, stride, out, out_stride)

    return tile


_1, _2, _4 = _shapes(1), _shapes(2), _shapes(4)


@njit
def _get(kind, row, i):
    return get_float32(row, i) if kind == FLOAT32 else get_bfloat16(row, i)


@Part
def add_rows(kind, weights, weights_stride, group, rows, row, stride, out, width):
    """out[g] += sum over i of weights[g, i] * row[i], in float32, for `group` results of `width` values.

    weights: address of float32, rows `weights_stride` elements apart; row: address of the first of `rows` rows,
    `stride` bytes apart, float32 or bfloat16 by kind; out: address of float32, contiguous.
    """
    size = 4 if kind == FLOAT32 else 2
    columns = LANES * 4 // size
    g = 0
    while g < group:
        step = 4 if group - g >= 4 else 2 if group - g >= 2 else 1
        w, o = weights + 4 * g * weights_stride, out + 4 * g * width
        for c in range(0, width - columns + 1, columns):
            if step == 4:
                _4(kind, w, weights_stride, rows, row + c * size, stride, o + 4 * c, width)
            elif step == 2:
                _2(kind, w, weights_stride, rows, row + c * size, stride, o + 4 * c, width)
            else:
                _1(kind, w, weights_stride, rows, row + c * size, stride, o + 4 * c, width)
        for c in range(width - width % columns, width):
            for j in range(g, g + step):
                total = get_float32(out, j * width + c)
                for i in range(rows):
                    total += get_float32(weights, j * weights_stride + i) * _get(kind, row + i * stride, c)
                put_float32(out, j * width + c, total)
        g += step
