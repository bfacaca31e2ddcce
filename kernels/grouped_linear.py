"""Linear layers over rows grouped by expert, for few rows per expert: each weight is read from memory once.

Legend: T tokens, K inputs, k places of a token's top-k, N outputs, I expert width, E experts held by a
weight, R rows sorted by expert, G groups (experts with rows), `starts` the row each group starts at.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit, prange

from .compiled import (
    address,
    get_bfloat16,
    get_float32,
    get_int32,
    get_int64,
    kernel,
    put_bfloat16,
    put_float32,
    put_int32,
    put_int64,
    serial_kernel,
    set_workers,
    share,
    silu,
    stack_buffer,
    workers_for,
)
from .tile import FLOAT32, dot_block, kind_of

# Columns worked on between two visits to the float32 scratch, and rows of it: 32 KB, which stays in the
# nearest caches.
COLUMNS = 64
ROWS = 128
_scratch = stack_buffer(ROWS * COLUMNS)
_addresses = stack_buffer(2 * ROWS)
_one_group = stack_buffer(3)


@dataclass(frozen=True, kw_only=True)
class SortedRows:
    """Pairs (token, place in its top-k) sorted by expert, stable: within an expert they keep their order.

    counts_E int64: rows of each expert; experts_G int32: experts with rows, ascending; starts int32 [G+1]:
    first row of each group, then R; token_R int32: the token of each row; position_TK int32: the row of each
    pair, -1 for none.
    """

    counts_E: torch.Tensor
    experts_G: torch.Tensor
    starts: torch.Tensor
    token_R: torch.Tensor
    position_TK: torch.Tensor


@njit
def sort_pairs(ids, wide, pairs, top_k, experts, counts, groups, starts, token, position):
    """Counting sort of ids (int64 if wide, else int32); every array is an address.

    Writes counts [experts] int64 and, int32, groups [experts], starts [experts + 1], token [pairs],
    position [pairs]. Returns the number of groups, or -1 - p if the id at place p is not in -1..experts-1.
    """
    for e in range(experts):
        put_int64(counts, e, 0)
    for p in range(pairs):
        e = get_int64(ids, p) if wide else np.int64(get_int32(ids, p))
        if e < -1 or e >= experts:
            return -1 - p
        if e >= 0:
            put_int64(counts, e, get_int64(counts, e) + 1)
    found, row = 0, 0
    for e in range(experts):
        count = get_int64(counts, e)
        if count:
            put_int32(groups, found, e)
            put_int32(starts, found, row)
            found += 1
            put_int64(counts, e, row)  # where the expert's next row goes, until the pairs are placed
            row += count
    put_int32(starts, found, row)
    for p in range(pairs):
        e = get_int64(ids, p) if wide else np.int64(get_int32(ids, p))
        if e < 0:
            put_int32(position, p, -1)
        else:
            row = get_int64(counts, e)
            put_int32(position, p, row)
            put_int32(token, row, p // top_k)
            put_int64(counts, e, row + 1)
    for g in range(found):
        rows = get_int32(starts, g + 1) - get_int32(starts, g)
        put_int64(counts, get_int32(groups, g), rows)
    return found


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
def _add_bias(kind, values, n, bias):
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


@njit
def linear_part(part, parts, kind, x, x_stride, row_index, groups, starts, experts, w, bias, n, k, y):
    """One worker's columns of y = x @ w.T + bias for every group; x_stride in bytes."""
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    x_rows, scratch = _addresses(), _scratch()
    for g in range(groups):
        expert = np.int64(get_int32(experts, g))
        weight = w + expert * n * k * size
        end = np.int64(get_int32(starts, g + 1))
        for first in range(np.int64(get_int32(starts, g)), end, ROWS):
            rows = min(ROWS, end - first)
            row_addresses(x_rows, first, rows, x, x_stride, row_index)
            for c in range(low, high, COLUMNS):
                columns = min(COLUMNS, high - c)
                w_rows = weight + c * k * size
                dot_block(kind, x_rows, rows, w_rows, k * size, columns, k, scratch, np.int64(COLUMNS))
                for r in range(rows):
                    values = scratch + 4 * r * COLUMNS
                    if bias:
                        _add_bias(kind, values, columns, bias + (expert * n + c) * size)
                    store_row(kind, values, columns, y + ((first + r) * n + c) * size)


@njit
def gate_up_part(part, parts, kind, x, x_stride, row_index, groups, starts, experts, w, n, k, h):
    """One worker's columns of h = silu(x @ gate.T) * (x @ up.T); gate is the first n rows of w, up the next n."""
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    x_rows, gate, up = _addresses(), _scratch(), _scratch()
    for g in range(groups):
        weight = w + np.int64(get_int32(experts, g)) * 2 * n * k * size
        end = np.int64(get_int32(starts, g + 1))
        for first in range(np.int64(get_int32(starts, g)), end, ROWS):
            rows = min(ROWS, end - first)
            row_addresses(x_rows, first, rows, x, x_stride, row_index)
            for c in range(low, high, COLUMNS):
                columns = min(COLUMNS, high - c)
                w_gate, w_up = weight + c * k * size, weight + (n + c) * k * size
                dot_block(kind, x_rows, rows, w_gate, k * size, columns, k, gate, np.int64(COLUMNS))
                dot_block(kind, x_rows, rows, w_up, k * size, columns, k, up, np.int64(COLUMNS))
                for r in range(rows):
                    values, ups = gate + 4 * r * COLUMNS, up + 4 * r * COLUMNS
                    for i in range(columns):
                        put_float32(values, i, silu(get_float32(values, i)) * get_float32(ups, i))
                    store_row(kind, values, columns, h + ((first + r) * n + c) * size)


@kernel
def run_grouped(workers, kind, gated, rows, x, x_stride, row_index, groups, starts, experts, w, bias, n, k, y):
    """All groups. With starts 0 there is one, of all rows."""
    if not starts:
        starts = _one_group()
        experts = starts + 8
        put_int32(starts, 0, np.int32(0))
        put_int32(starts, 1, np.int32(rows))
        put_int32(experts, 0, np.int32(0))
    set_workers(workers)
    for p in prange(workers):
        part = np.int64(p)
        if gated:
            gate_up_part(part, workers, kind, x, x_stride, row_index, groups, starts, experts, w, n, k, y)
        else:
            linear_part(part, workers, kind, x, x_stride, row_index, groups, starts, experts, w, bias, n, k, y)


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


@njit
def _combine_part(part, parts, kind, y, position, weights, tokens, top_k, n, out):
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    for c in range(low, high, COLUMNS):
        combine_columns(
            kind, kind, y + c * size, n * size, min(COLUMNS, high - c), position, weights, tokens, top_k,
            out + c * size, n * size,
        )  # fmt: skip


@kernel
def run_combine(workers, kind, y, position, weights, tokens, top_k, n, out):
    set_workers(workers)
    for p in prange(workers):
        _combine_part(np.int64(p), workers, kind, y, position, weights, tokens, top_k, n, out)


@serial_kernel
def run_sort(ids, wide, pairs, top_k, experts, counts, groups, starts, token, position):
    return sort_pairs(ids, wide, pairs, top_k, experts, counts, groups, starts, token, position)


def check_rows(name: str, x: torch.Tensor) -> None:
    """A matrix in CPU memory whose rows are contiguous."""
    if not x.is_cpu or x.ndim != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"{name}: a CPU matrix with contiguous rows is needed, not {describe(x)}")


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A contiguous CPU tensor of this shape and dtype."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{name}: a contiguous CPU tensor {list(shape)} of {dtype} is needed, not {describe(tensor)}")


def describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} with strides {list(tensor.stride())}, {tensor.dtype} on {tensor.device}"


def check_pairs(ids_TK: torch.Tensor) -> None:
    if ids_TK.ndim != 2 or ids_TK.dtype not in (torch.int32, torch.int64) or not ids_TK.is_contiguous():
        raise ValueError(f"ids_TK: a contiguous int32 or int64 matrix is needed, not {describe(ids_TK)}")


def sort_rows(ids_TK: torch.Tensor, experts: int) -> SortedRows:
    """Sort the pairs of ids_TK (int32 or int64; -1 for none) by expert. ValueError for an id outside -1..experts-1."""
    check_pairs(ids_TK)
    pairs = ids_TK.numel()
    counts = torch.empty(experts, dtype=torch.int64)
    groups = torch.empty(experts, dtype=torch.int32)
    starts = torch.empty(experts + 1, dtype=torch.int32)
    token = torch.empty(pairs, dtype=torch.int32)
    position = torch.empty(ids_TK.shape, dtype=torch.int32)
    found = run_sort(
        ids_TK.data_ptr(), int(ids_TK.dtype is torch.int64), pairs, ids_TK.shape[1], experts,
        *(t.data_ptr() for t in (counts, groups, starts, token, position)),
    )  # fmt: skip
    if found < 0:
        raise ValueError(f"ids_TK: expert {int(ids_TK.flatten()[-1 - found])} is not in -1..{experts - 1}")
    starts = starts[: found + 1]
    return SortedRows(
        counts_E=counts, experts_G=groups[:found], starts=starts, token_R=token[: int(starts[-1])], position_TK=position
    )


def _run(x, weight, n, gated, bias, starts, experts, row_index):
    """Shared by the two grouped layers: checks that both need, then the kernel."""
    kind = kind_of(x.dtype)
    check_rows("x_TK", x)
    for name, index in (("starts", starts), ("experts_G", experts), ("row_index_R", row_index)):
        if index is not None and (index.ndim != 1 or index.dtype is not torch.int32 or not index.is_contiguous()):
            raise ValueError(f"{name}: a contiguous int32 vector is needed, not {describe(index)}")
    if len(starts) != len(experts) + 1:
        raise ValueError(f"starts: {len(experts) + 1} values are needed for {len(experts)} groups, not {len(starts)}")
    rows = x.shape[0] if row_index is None else len(row_index)
    y = x.new_empty(rows, n)
    if rows == 0 or len(experts) == 0:
        return y
    size = x.element_size()
    run_grouped(
        workers_for(weight[0].numel() * size * len(experts)), kind, gated, rows, x.data_ptr(), x.stride(0) * size,
        address(row_index), len(experts), starts.data_ptr(), experts.data_ptr(), weight.data_ptr(), address(bias), n,
        x.shape[1], y.data_ptr(),
    )  # fmt: skip
    return y


def grouped_linear(
    x_TK: torch.Tensor,
    weight_ENK: torch.Tensor,
    starts: torch.Tensor,
    experts_G: torch.Tensor,
    bias_EN: torch.Tensor | None = None,
    row_index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_RN: rows starts[g]..starts[g+1] of x times the transpose of weight[experts[g]], plus its bias.

    float32 or bfloat16 on the CPU, accumulated in float32. starts [G+1] and experts_G are int32; experts may
    be in any order and need not follow each other. With row_index_R (int32), row r of the result is computed
    from x[row_index[r]], so a token's row is not copied per expert.
    """
    experts, n = weight_ENK.shape[:2]
    check_tensor("weight_ENK", weight_ENK, (experts, n, x_TK.shape[-1]), x_TK.dtype)
    if bias_EN is not None:
        check_tensor("bias_EN", bias_EN, (experts, n), x_TK.dtype)
    return _run(x_TK, weight_ENK, n, 0, bias_EN, starts, experts_G, row_index_R)


def grouped_gate_up_silu(
    x_TK: torch.Tensor,
    weight_E2IK: torch.Tensor,
    starts: torch.Tensor,
    experts_G: torch.Tensor,
    row_index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """h_RI = silu(gate) * up, where gate and up are the two halves of grouped_linear's result (gate rows first)."""
    experts, two_n = weight_E2IK.shape[:2]
    check_tensor("weight_E2IK", weight_E2IK, (experts, two_n, x_TK.shape[-1]), x_TK.dtype)
    if two_n % 2:
        raise ValueError(f"weight_E2IK: gate and up rows must be as many, but there are {two_n} rows in all")
    return _run(x_TK, weight_E2IK, two_n // 2, 1, None, starts, experts_G, row_index_R)


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
    workers = workers_for(position_TK.numel() * n * y_RN.element_size())
    run_combine(
        workers, kind, y_RN.data_ptr(), position_TK.data_ptr(), weights.data_ptr(), tokens, top_k, n, out.data_ptr()
    )
    return out
