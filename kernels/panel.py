"""Products of many rows with a panel of a weight: some of its rows, packed so that every load serves several rows of x.

A weight row is contiguous along K, which suits dot products of few rows (`tile`). For many rows a panel of `PANEL`
weight rows is transposed into a buffer that stays in the second-level cache, `[units, PANEL]` of 32 bits: one float32,
or two neighbours of bfloat16. A tile of up to `TILE_ROWS` rows then walks along K once, with one broadcast per row and
one load per vector of columns (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
Packing reads the weight once, so that there is no second copy of it.

Each sum adds along K in order, in one lane: a row's result does not depend, to the last bit, on the other rows.
"""

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import Part
from .scalars import get_int64
from .tile import BFLOAT16, BFLOAT16_DOT, FLOAT32, HAS_BFLOAT16_DOT, LANES, multiply_add

# Accumulators, a row of weights and a broadcast fill the registers: 32 with AVX-512, else 16.
TILE_ROWS, _VECTORS = (6, 4) if LANES == 16 else (6, 2)
PANEL = LANES * _VECTORS
UNITS = 1024
"""Most units of K that a panel holds: 256 KB with AVX-512."""
_WAYS = (FLOAT32, BFLOAT16, BFLOAT16_DOT)
_LINES = PANEL * 4 // 64

_I8, _I32, _I64 = (ir.IntType(n) for n in (8, 32, 64))
_F32 = ir.FloatType()
_LANES_OF = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(_F32, LANES)


def _i64(n):
    return ir.Constant(_I64, n)


def _at(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _function(name: str, count: int, write):
    """Intrinsic that calls a function of `count` int64, whose body `write(builder, *arguments)` is kept out of line."""
    form = ir.FunctionType(ir.VoidType(), [_I64] * count)

    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, form, name)
        if function.is_declaration:
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            function.attributes.add("nounwind")
            body = ir.IRBuilder(function.append_basic_block())
            write(body, *function.args)
            body.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    return codegen


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _transposed(builder, rows):
    """LANES vectors of LANES lanes, transposed."""
    return _transposed_quarters(builder, rows) if LANES == 16 else _transposed_halves(builder, rows)


def _transposed_halves(builder, rows):
    """By interleaving the two halves of the rows as many times as it takes."""
    half = LANES // 2
    low, high = ([lane for i in range(half) for lane in (start + i, LANES + start + i)] for start in (0, half))
    for _ in range(LANES.bit_length() - 1):
        pairs = zip(rows[:half], rows[half:], strict=True)
        rows = [_shuffle(builder, a, b, lanes) for a, b in pairs for lanes in (low, high)]
    return rows


def _transposed_quarters(builder, rows):
    """For 16 lanes, by instructions that stay in quarters of a register or move whole ones, which are the fast ones."""

    def in_quarters(a, b, pattern):
        return _shuffle(builder, a, b, [4 * q + lane % 4 + 16 * (lane // 4) for q in range(4) for lane in pattern])

    def whole_quarters(a, b, first):
        return _shuffle(
            builder, a, b, [16 * v + 4 * (first + 2 * q) + i for v in (0, 1) for q in (0, 1) for i in range(4)]
        )

    # Quarter q of blocks[g][j] is column 4 * q + j of rows 4 * g to 4 * g + 3.
    blocks = []
    for g in range(0, 16, 4):
        low = [in_quarters(rows[g + i], rows[g + i + 1], (0, 4, 1, 5)) for i in (0, 2)]
        high = [in_quarters(rows[g + i], rows[g + i + 1], (2, 6, 3, 7)) for i in (0, 2)]
        blocks.append([in_quarters(*pair, pattern) for pair in (low, high) for pattern in ((0, 1, 4, 5), (2, 3, 6, 7))])
    out = [None] * 16
    for j in range(4):
        for odd in (0, 1):
            left, right = (whole_quarters(blocks[g][j], blocks[g + 1][j], odd) for g in (0, 2))
            for last in (0, 1):
                out[4 * (odd + 2 * last) + j] = whole_quarters(left, right, last)
    return out


def _write_pack(builder, w, stride, columns, units, out):
    """out[u, c] = unit u of weight row c, for c below `columns` and u below `units` rounded up to LANES."""
    index = ir.VectorType(_I32, LANES)
    last = builder.sub(columns, _i64(1))
    whole = builder.and_(units, _i64(-LANES))
    rest = builder.sub(units, whole)
    none = ir.Constant(index, ir.Undefined)
    filled = builder.insert_element(none, builder.trunc(rest, _I32), ir.Constant(_I32, 0))
    limit = builder.shuffle_vector(filled, none, ir.Constant(index, [0] * LANES))
    mask = builder.icmp_signed("<", ir.Constant(index, list(range(LANES))), limit)
    form = ir.FunctionType(_LANES_OF, [_LANES_OF.as_pointer(), _I32, mask.type, _LANES_OF])
    masked = cgutils.get_or_insert_function(builder.module, form, f"llvm.masked.load.v{LANES}i32.p0")
    zeros = ir.Constant(_LANES_OF, [0] * LANES)

    with cgutils.for_range_slice(builder, _i64(0), columns, _i64(LANES), _I64) as (first, _):
        rows = []
        for r in range(LANES):
            column = builder.add(first, _i64(r))
            # Of a narrow last panel the last row stands for those that are not there.
            column = builder.select(builder.icmp_signed("<", column, last), column, last)
            rows.append(builder.add(w, builder.mul(column, stride)))
        place = builder.add(out, builder.mul(first, _i64(4)))

        def put(values, unit, place=place):
            start = builder.add(place, builder.mul(unit, _i64(4 * PANEL)))
            for i, value in enumerate(_transposed(builder, values)):
                builder.store(value, _at(builder, builder.add(start, _i64(4 * PANEL * i)), _LANES_OF), align=64)

        with cgutils.for_range_slice(builder, _i64(0), whole, _i64(LANES), _I64) as (unit, _):
            offset = builder.mul(unit, _i64(4))
            put([builder.load(_at(builder, builder.add(row, offset), _LANES_OF), align=2) for row in rows], unit)
        with builder.if_then(builder.icmp_signed("!=", rest, _i64(0)), likely=False):
            offset = builder.mul(whole, _i64(4))
            pointers = [_at(builder, builder.add(row, offset), _LANES_OF) for row in rows]
            put([builder.call(masked, [p, ir.Constant(_I32, 2), mask, zeros]) for p in pointers], whole)


@intrinsic
def _pack(typingctx, w, stride, columns, units, out):
    return types.void(*[types.int64] * 5), _function("moeyard_pack_panel", 5, _write_pack)


def _rows_tile(kind: int, rows: int):
    """Intrinsic `tile(x, offset, panel, units, out, add, ahead)` for so many rows; see `panel_product`."""

    def write(builder, x, offset, panel, units, out, add, ahead):
        table = _at(builder, x, _I64)
        x_rows = [builder.add(builder.load(builder.gep(table, [_i64(r)])), offset) for r in range(rows)]
        places = [
            [_at(builder, builder.add(out, _i64(4 * (r * PANEL + c * LANES))), _FLOATS) for c in range(_VECTORS)]
            for r in range(rows)
        ]
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        more = builder.icmp_signed("!=", add, _i64(0))
        total = [
            [
                cgutils.alloca_once_value(builder, builder.select(more, builder.load(place, align=64), zero))
                for place in row
            ]
            for row in places
        ]
        form = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
        read, second_level, data = (ir.Constant(_I32, n) for n in (0, 2, 1))
        # Without a place to fetch from, the line asked for is the panel's own, which costs nothing.
        none = builder.icmp_signed("==", ahead, _i64(0))
        ahead = builder.select(none, panel, ahead)
        spread = ir.Constant(_LANES_OF, [0] * LANES)
        empty = ir.Constant(_LANES_OF, ir.Undefined)
        with cgutils.for_range_slice(builder, _i64(0), units, _i64(1), _I64) as (unit, _):
            weights = builder.add(panel, builder.mul(unit, _i64(4 * PANEL)))
            builder.call(
                fetch, [_at(builder, builder.add(ahead, builder.mul(unit, _i64(64))), _I8), read, second_level, data]
            )
            w_values = [
                builder.load(_at(builder, builder.add(weights, _i64(4 * LANES * c)), _LANES_OF), align=64)
                for c in range(_VECTORS)
            ]
            at = builder.mul(unit, _i64(4))
            for r, row in enumerate(x_rows):
                value = builder.load(_at(builder, builder.add(row, at), _I32), align=2)
                value = builder.insert_element(empty, value, ir.Constant(_I32, 0))
                value = builder.shuffle_vector(value, empty, spread)
                for c, w_value in enumerate(w_values):
                    new = multiply_add(builder, kind, builder.load(total[r][c]), value, w_value)
                    builder.store(new, total[r][c])
        for r in range(rows):
            for c in range(_VECTORS):
                builder.store(builder.load(total[r][c]), places[r][c], align=64)

    @intrinsic
    def tile(typingctx, x, offset, panel, units, out, add, ahead):
        return types.void(*[types.int64] * 7), _function(f"moeyard_panel_{kind}_{rows}", 7, write)

    return tile


def _of_kind(rows: int):
    """The tile of so many rows, for a kind chosen as it runs."""
    float32, bfloat16 = _rows_tile(FLOAT32, rows), _rows_tile(BFLOAT16, rows)
    dot = _rows_tile(BFLOAT16_DOT if HAS_BFLOAT16_DOT else BFLOAT16, rows)

    @njit
    def tile(kind, x, offset, panel, units, out, add, ahead):
        if kind == FLOAT32:
            float32(x, offset, panel, units, out, add, ahead)
        elif kind == BFLOAT16:
            bfloat16(x, offset, panel, units, out, add, ahead)
        else:
            dot(x, offset, panel, units, out, add, ahead)

    return tile


_1, _2, _3, _4, _5, _6 = (_of_kind(rows) for rows in range(1, TILE_ROWS + 1))


@Part
def panel_product(kind, x, rows, w, stride, columns, units, panel, out):
    """out[r, c] = sum over K of x[r] * w[c], in float32, for up to PANEL columns; K is `units` of 32 bits.

    x: address of `rows` int64 row addresses; w: address of the first of `columns` rows, `stride` bytes apart; out:
    address of float32 values, rows PANEL elements apart, aligned to 64 bytes. panel: address of a buffer for
    UNITS * PANEL of 32 bits, aligned to 64 bytes; at 64 bytes before it is the address of the weight that will be
    packed next, or 0: it is fetched meanwhile.
    """
    ahead = np.int64(0)
    if units <= UNITS and stride == 4 * units:
        ahead = get_int64(panel - 64, 0)
    blocks = (rows + TILE_ROWS - 1) // TILE_ROWS
    for first in range(0, units, UNITS):
        count = min(np.int64(UNITS), units - first)
        _pack(w + 4 * first, stride, columns, count, panel)
        add = np.int64(first > 0)
        for block in range(blocks):
            low, high = rows * block // blocks, rows * (block + 1) // blocks
            place, these = out + low * 4 * PANEL, x + 8 * low
            fetched = ahead + block * count * 64 if ahead and block < _LINES else np.int64(0)
            size = high - low
            if size == 6:
                _6(kind, these, 4 * first, panel, count, place, add, fetched)
            elif size == 5:
                _5(kind, these, 4 * first, panel, count, place, add, fetched)
            elif size == 4:
                _4(kind, these, 4 * first, panel, count, place, add, fetched)
            elif size == 3:
                _3(kind, these, 4 * first, panel, count, place, add, fetched)
            elif size == 2:
                _2(kind, these, 4 * first, panel, count, place, add, fetched)
            else:
                _1(kind, these, 4 * first, panel, count, place, add, fetched)
