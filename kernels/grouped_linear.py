"""Linear layers over rows grouped by expert, for few rows per expert: each weight is read from memory once.

Legend: T tokens, K inputs, k places of a token's top-k, N outputs, I expert width, E experts held by a
weight, R rows sorted by expert, G groups (experts with rows), `starts` the row each group starts at.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from .checks import address, check_rows, check_tensor
from .compiled import Part, arguments, call, run, share, workers_for
from .scalars import (
    get_bfloat16,
    get_float32,
    get_int32,
    get_int64,
    put_bfloat16,
    put_float32,
    put_int64,
    silu,
    stack_buffer,
)
from .tile import FLOAT32, dot_block, kind_of

# Columns worked on between two visits to the float32 scratch, and rows of it: 32 KB, which stays in the
# nearest caches.
COLUMNS = 64
ROWS = 128
_scratch = stack_buffer(ROWS * COLUMNS)
_addresses = stack_buffer(2 * ROWS)

_linear_arguments, _combine_arguments = arguments(13), arguments(8)


@njit
def store_row(kind, values, n, out):
    """Write n float32 values to address out, rounded to the tensor's dtype."""
    if kind == FLOAT32:
        for i in range(n):
            put_float32(out, i, get_float32(values, i))
    else:
        for i in range(n):
            put_bfloat16(out, i, get_float32(values, i))


@njit
def add_bias(kind, values, n, bias):
    if kind == FLOAT32:
        for i in range(n):
            put_float32(values, i, get_float32(values, i) + get_float32(bias, i))
    else:
        for i in range(n):
            put_float32(values, i, get_float32(values, i) + get_bfloat16(bias, i))


@njit
def row_addresses(out, first, rows, x, x_stride, row_index):
    """Write the addresses of `rows` rows of x; row_index holds int32 row numbers, or is 0 for rows in order."""
    for r in range(rows):
        put_int64(out, r, x + x_stride * (get_int32(row_index, first + r) if row_index else first + r))


@Part
def linear_part(part, parts, args):
    """One worker's columns of y = x @ w.T + bias for every group; x_stride in bytes. With `experts` 0, w and bias hold
    the address of each group's.
    """
    dot, kind, x, x_stride, row_index, groups, starts, experts, w, bias, n, k, y = _linear_arguments(args)
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    x_rows, scratch = _addresses(), _scratch()
    for g in range(groups):
        if experts:
            expert = np.int64(get_int32(experts, g))
            weight, its_bias = w + expert * n * k * size, bias + expert * n * size
        else:
            weight, its_bias = get_int64(w, g), get_int64(bias, g) if bias else np.int64(0)
        end = np.int64(get_int32(starts, g + 1))
        for first in range(np.int64(get_int32(starts, g)), end, ROWS):
            rows = min(ROWS, end - first)
            row_addresses(x_rows, first, rows, x, x_stride, row_index)
            for c in range(low, high, COLUMNS):
                columns = min(COLUMNS, high - c)
                w_rows = weight + c * k * size
                call(dot, kind, x_rows, rows, w_rows, k * size, columns, k, scratch, COLUMNS)
                for r in range(rows):
                    values = scratch + 4 * r * COLUMNS
                    if bias:
                        add_bias(kind, values, columns, its_bias + c * size)
                    store_row(kind, values, columns, y + ((first + r) * n + c) * size)


@Part
def gate_up_part(part, parts, args):
    """One worker's columns of h = silu(x @ gate.T) * (x @ up.T); gate is the first n rows of w, up the next n. With
    `experts` 0, w holds the addresses of each group's gate and up.
    """
    dot, kind, x, x_stride, row_index, groups, starts, experts, w, _, n, k, h = _linear_arguments(args)
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    x_rows, gate, up = _addresses(), _scratch(), _scratch()
    for g in range(groups):
        if experts:
            gates = w + np.int64(get_int32(experts, g)) * 2 * n * k * size
            ups = gates + n * k * size
        else:
            gates, ups = get_int64(w, 2 * g), get_int64(w, 2 * g + 1)
        end = np.int64(get_int32(starts, g + 1))
        for first in range(np.int64(get_int32(starts, g)), end, ROWS):
            rows = min(ROWS, end - first)
            row_addresses(x_rows, first, rows, x, x_stride, row_index)
            for c in range(low, high, COLUMNS):
                columns = min(COLUMNS, high - c)
                w_gate, w_up = gates + c * k * size, ups + c * k * size
                call(dot, kind, x_rows, rows, w_gate, k * size, columns, k, gate, COLUMNS)
                call(dot, kind, x_rows, rows, w_up, k * size, columns, k, up, COLUMNS)
                for r in range(rows):
                    values, factors = gate + 4 * r * COLUMNS, up + 4 * r * COLUMNS
                    for i in range(columns):
                        put_float32(values, i, silu(get_float32(values, i)) * get_float32(factors, i))
                    store_row(kind, values, columns, h + ((first + r) * n + c) * size)


@njit
def combine_columns(y_kind, out_kind, y, y_stride, columns, position, weights, tokens, top_k, out, out_stride):
    """out[t] = sum over t's top-k places, in their order, of weight * y[row], in float32, for up to 64 columns.

    y and out are the addresses of the first column; strides are in bytes.
    """
    total = _scratch()
    for t in range(tokens):
        for i in range(columns):
            put_float32(total, i, np.float32(0.0))
        for p in range(t * top_k, (t + 1) * top_k):
            row = np.int64(get_int32(position, p))
            if row >= 0:
                weight, values = get_float32(weights, p), y + row * y_stride
                if y_kind == FLOAT32:
                    for i in range(columns):
                        put_float32(total, i, get_float32(total, i) + weight * get_float32(values, i))
                else:
                    for i in range(columns):
                        put_float32(total, i, get_float32(total, i) + weight * get_bfloat16(values, i))
        store_row(out_kind, total, columns, out + t * out_stride)


@Part
def _combine_part(part, parts, args):
    kind, y, position, weights, tokens, top_k, n, out = _combine_arguments(args)
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    for c in range(low, high, COLUMNS):
        columns = min(COLUMNS, high - c)
        y_place, out_place, row = y + c * size, out + c * size, n * size
        combine_columns(kind, kind, y_place, row, columns, position, weights, tokens, top_k, out_place, row)


def _check_stack(name, weight, experts, shape, dtype):
    check_tensor(name, weight, (weight.shape[0], *shape), dtype)
    check_tensor("experts_G", experts, (len(experts),), torch.int32)


def _table_of(tensors):
    return array("q", [tensor.data_ptr() for tensor in tensors])


@dataclass(frozen=True, kw_only=True)
class Way:
    """Kernels for the two grouped layers: `product` is what their parts call, `room` bytes of memory each worker has to
    itself, `unit` the bytes by which K goes.
    """

    linear: Part
    gate_up: Part
    product: Part
    room: int = 0
    unit: int = 1


FEW_ROWS = Way(linear=linear_part, gate_up=gate_up_part, product=dot_block)


def _run(x, n, k, nbytes, way, part, weight, bias, starts, groups, experts, row_index):
    """Shared by the two grouped layers: checks that both need, then the kernel. `nbytes` of a group's weight."""
    check_rows("x_TK", x, (x.shape[0], k), x.dtype)
    check_tensor("starts", starts, (groups + 1,), torch.int32)
    if k * x.element_size() % way.unit:
        raise ValueError(f"x_TK: {k} columns of {x.dtype} are not a whole number of {way.unit} bytes; use FEW_ROWS")
    rows = x.shape[0]
    if row_index is not None:
        rows = len(row_index)
        check_tensor("row_index_R", row_index, (rows,), torch.int32)
    y = x.new_empty(rows, n)
    if rows and groups:
        workers = workers_for(nbytes * groups)
        room = torch.empty(workers * way.room + 63, dtype=torch.uint8) if way.room else None
        run(
            workers, part, way.product.address, kind_of(x.dtype),
            x.data_ptr(), x.stride(0) * x.element_size(), address(row_index), groups, starts.data_ptr(),
            address(experts), weight, bias, n, k, y.data_ptr(), address(room),
        )  # fmt: skip
    return y


def grouped_linear(
    x_TK: torch.Tensor,
    weight_ENK: torch.Tensor | Sequence[torch.Tensor],
    starts: torch.Tensor,
    experts_G: torch.Tensor | None,
    bias_EN: torch.Tensor | Sequence[torch.Tensor] | None = None,
    row_index_R: torch.Tensor | None = None,
    way: Way = FEW_ROWS,
) -> torch.Tensor:
    """y_RN: rows starts[g]..starts[g+1] of x times the transpose of weight[experts[g]], plus its bias.

    float32 or bfloat16 on the CPU, accumulated in float32. starts [G+1] and experts_G are int32; experts may
    be in any order and need not follow each other. Without experts_G weights and biases are lists with a tensor for
    each group, anywhere in memory. With row_index_R (int32), row r of the result is computed from x[row_index[r]], so a
    token's row is not copied per expert. `many_rows.MANY_ROWS` is the way for many rows per expert.
    """
    k, size = x_TK.shape[-1], x_TK.element_size()
    if experts_G is not None:
        assert isinstance(weight_ENK, torch.Tensor) and not isinstance(bias_EN, Sequence)
        n, groups = weight_ENK.shape[1], len(experts_G)
        _check_stack("weight_ENK", weight_ENK, experts_G, (n, k), x_TK.dtype)
        if bias_EN is not None:
            _check_stack("bias_EN", bias_EN, experts_G, (n,), x_TK.dtype)
        weight, bias = weight_ENK.data_ptr(), address(bias_EN)
        return _run(x_TK, n, k, n * k * size, way, way.linear, weight, bias, starts, groups, experts_G, row_index_R)
    n = weight_ENK[0].shape[0]
    for weight_NK in weight_ENK:
        check_tensor("weight_ENK", weight_NK, (n, k), x_TK.dtype)
    for bias_N in bias_EN or ():
        check_tensor("bias_EN", bias_N, (n,), x_TK.dtype)
    weights, biases = _table_of(weight_ENK), _table_of(bias_EN or ())
    tables = weights.buffer_info()[0], biases.buffer_info()[0] if biases else 0
    return _run(x_TK, n, k, n * k * size, way, way.linear, *tables, starts, len(weights), None, row_index_R)


def grouped_gate_up_silu(
    x_TK: torch.Tensor,
    weight_E2IK: torch.Tensor,
    starts: torch.Tensor,
    experts_G: torch.Tensor,
    row_index_R: torch.Tensor | None = None,
    way: Way = FEW_ROWS,
) -> torch.Tensor:
    """h_RI = silu(gate) * up, where gate and up are the two halves of grouped_linear's result (gate rows first)."""
    k, size = x_TK.shape[-1], x_TK.element_size()
    two_n, groups = weight_E2IK.shape[1], len(experts_G)
    if two_n % 2:
        raise ValueError(f"weight_E2IK: gate and up rows must be as many, but there are {two_n} rows in all")
    _check_stack("weight_E2IK", weight_E2IK, experts_G, (two_n, k), x_TK.dtype)
    n, weight = two_n // 2, weight_E2IK.data_ptr()
    return _run(x_TK, n, k, 2 * n * k * size, way, way.gate_up, weight, 0, starts, groups, experts_G, row_index_R)


def combine(y_RN: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """out_TN[t] = sum over k, in that order, of weights[t, k] * y[position[t, k]], skipping positions of -1.

    The sum is in float32; out has y's dtype. position_TK is int32, as sort_rows gives it.
    """
    kind = kind_of(y_RN.dtype)
    tokens, top_k = position_TK.shape
    rows, n = y_RN.shape
    check_tensor("y_RN", y_RN, (rows, n), y_RN.dtype)
    check_tensor("position_TK", position_TK, (tokens, top_k), torch.int32)
    if weights_TK.shape != position_TK.shape:
        raise ValueError(f"weights_TK: {list(position_TK.shape)} weights are needed, not {list(weights_TK.shape)}")
    weights = weights_TK.to(torch.float32).contiguous()
    out = y_RN.new_empty(tokens, n)
    run(
        workers_for(position_TK.numel() * n * y_RN.element_size()), _combine_part, kind, y_RN.data_ptr(),
        position_TK.data_ptr(), weights.data_ptr(), tokens, top_k, n, out.data_ptr(),
    )  # fmt: skip
    return out
