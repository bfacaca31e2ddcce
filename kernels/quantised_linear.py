"""Linear layers of quantised weights over rows grouped by expert: a weight is read from memory once, as it is stored,
and its rows are brought to the tokens' type in the nearest cache just before they are multiplied.

Legend: K inputs, N outputs, R rows sorted by expert, G groups (experts with rows), S slots.
"""

from array import array
from collections.abc import Sequence

import numpy as np
import torch

from .checks import address, check_rows, check_tensor
from .compiled import Part, arguments, call, run, share, workers_for
from .grouped_linear import COLUMNS, ROWS, add_bias, row_addresses, store_row
from .quantised import QuantisedMatrix, QuantisedStack
from .quantised_decode import decode_row
from .scalars import get_int32, get_int64, stack_buffer
from .tile import FLOAT32, dot_block, kind_of

MOST_INPUTS = 16384
"""Of a weight whose rows are brought to the tokens' type four at a time."""
_AT_ONCE = 4
_CACHED = 2**15
"""Bytes of more such rows, which stay in the nearest cache."""
_arguments, _dequantise_arguments = arguments(18), arguments(11)
_addresses, _sums = stack_buffer(2 * ROWS), stack_buffer(ROWS * COLUMNS)
_decoded = stack_buffer(_AT_ONCE * (MOST_INPUTS + 32))


@Part
def _linear_part(part, parts, args):
    """One worker's columns of y = x @ w.T + bias for every group. values, scales, zeros and bias (0: none) are
    addresses of an address for each group.
    """
    (
        dot, form, exponents, kind, x, x_stride, row_index, groups, starts, values, scales, zeros, bias, columns,
        row_scale, n, k, y,
    ) = _arguments(args)  # fmt: skip
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    x_rows, sums, decoded = _addresses(), _sums(), _decoded()
    # A little apart from each other: the dot products then take four rows at a time, whose sums do not wait for each
    # other, instead of following one stream from memory.
    stride = (k * size + 63) // 64 * 64 + 64
    at_once = min(max(_CACHED // stride // _AT_ONCE * _AT_ONCE, _AT_ONCE), COLUMNS)
    for g in range(groups):
        its_values, its_scales = get_int64(values, g), get_int64(scales, g)
        its_zeros = get_int64(zeros, g) if zeros else np.int64(0)
        its_bias = get_int64(bias, g) if bias else np.int64(0)
        end = np.int64(get_int32(starts, g + 1))
        for first in range(np.int64(get_int32(starts, g)), end, ROWS):
            rows = min(ROWS, end - first)
            row_addresses(x_rows, first, rows, x, x_stride, row_index)
            for c in range(low, high, COLUMNS):
                block = min(COLUMNS, high - c)
                for j in range(0, block, at_once):
                    some = min(at_once, block - j)
                    for i in range(some):
                        decode_row(
                            form, exponents, kind, its_values, its_scales, its_zeros, columns, row_scale, k, c + j + i,
                            decoded + i * stride,
                        )  # fmt: skip
                    call(dot, kind, x_rows, rows, decoded, stride, some, k, sums + 4 * j, COLUMNS)
                for r in range(rows):
                    line = sums + 4 * r * COLUMNS
                    if bias:
                        add_bias(kind, line, block, its_bias + c * size)
                    store_row(kind, line, block, y + ((first + r) * n + c) * size)


@Part
def _dequantise_part(part, parts, args):
    """One worker's rows of a matrix."""
    form, exponents, kind, values, scales, zeros, columns, row_scale, n, k, out = _dequantise_arguments(args)
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    for row in range(low, high):
        decode_row(
            form, exponents, kind, values, scales, zeros, columns, row_scale, k, row, out + row * k * size
        )  # fmt: skip


def dequantise(matrix: QuantisedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """`matrix.dequantise`, on the CPU for float32 and bfloat16 by a compiled kernel."""
    if not matrix.values.is_cpu or dtype not in (torch.float32, torch.bfloat16):
        return matrix.dequantise(dtype)
    _check(matrix)
    form, (n, k) = matrix.format, matrix.shape
    out = torch.empty(n, k, dtype=dtype)
    run(
        workers_for(out.nbytes), _dequantise_part, form.kind, int(form.exponents), kind_of(dtype),
        matrix.values.data_ptr(), matrix.scales.data_ptr(), address(matrix.zeros), form.columns or k, form.rows, n, k,
        out.data_ptr(),
    )  # fmt: skip
    return out


def quantised_linear(
    x_TK: torch.Tensor,
    weights: Sequence[QuantisedMatrix] | QuantisedStack,
    starts: torch.Tensor,
    experts_G: torch.Tensor | None,
    biases: Sequence[torch.Tensor] | torch.Tensor | None = None,
    row_index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_RN: rows starts[g] to starts[g + 1] of x times the transpose of a group's weight, plus its bias.

    As `grouped_linear`: with experts_G (int32) weights and biases are of slots, without one for each group. A row's
    result does not depend on the other rows. Raises ValueError for more than `MOST_INPUTS` inputs.
    """
    first = weights[0]
    form, (n, k), dtype = first.format, first.shape, x_TK.dtype
    if k > MOST_INPUTS:
        raise ValueError(f"weights: at most {MOST_INPUTS} inputs, not {k}; dequantise them")
    tables = _tables(weights, experts_G)
    groups = len(tables[0])
    check_rows("x_TK", x_TK, (x_TK.shape[0], k), dtype)
    check_tensor("starts", starts, (groups + 1,), torch.int32)
    bias = _bias_table(biases, experts_G, n, dtype)
    rows = x_TK.shape[0]
    if row_index_R is not None:
        rows = len(row_index_R)
        check_tensor("row_index_R", row_index_R, (rows,), torch.int32)
    y = x_TK.new_empty(rows, n)
    if rows and groups:
        run(
            workers_for(first.values.nbytes * groups), _linear_part, dot_block.address, form.kind, int(form.exponents),
            kind_of(dtype), x_TK.data_ptr(), x_TK.stride(0) * x_TK.element_size(), address(row_index_R), groups,
            starts.data_ptr(), *(table.buffer_info()[0] if table else 0 for table in (*tables, bias)),
            form.columns or k, form.rows, n, k, y.data_ptr(),
        )  # fmt: skip
    return y


def _tables(weights: Sequence[QuantisedMatrix] | QuantisedStack, experts_G: torch.Tensor | None) -> list[array]:
    """Addresses of each group's values, scales and zero points."""
    if isinstance(weights, QuantisedStack):
        assert experts_G is not None
        check_tensor("experts_G", experts_G, (len(experts_G),), torch.int32)
        _check(weights[0])
        return [_places(t, experts_G) for t in (weights.values_S, weights.scales_S, weights.zeros_S)]
    for weight in weights:
        if (weight.format, weight.shape) != (weights[0].format, weights[0].shape):
            raise ValueError("weights: those of all groups must be of one format and shape")
        _check(weight)
    tables = [[address(t) for t in (w.values, w.scales, w.zeros)] for w in weights]
    zeros = [row[2] for row in tables] if weights[0].zeros is not None else []
    return [array("q", [row[0] for row in tables]), array("q", [row[1] for row in tables]), array("q", zeros)]


def _places(stack: torch.Tensor | None, experts_G: torch.Tensor) -> array:
    if stack is None:
        return array("q")
    assert stack.is_contiguous()
    start, step = stack.data_ptr(), stack.stride(0) * stack.element_size()
    return array("q", [start + slot * step for slot in experts_G.tolist()])


def _bias_table(
    biases: Sequence[torch.Tensor] | torch.Tensor | None, experts_G: torch.Tensor | None, n: int, dtype: torch.dtype
) -> array:
    if biases is None:
        return array("q")
    for bias in biases if experts_G is None else biases[:1]:
        check_tensor("biases", bias, (n,), dtype)
    if isinstance(biases, torch.Tensor):
        assert experts_G is not None
        return _places(biases, experts_G)
    return array("q", [bias.data_ptr() for bias in biases])


def _check(matrix: QuantisedMatrix) -> None:
    tensors = matrix.tensors()
    for name, (shape, dtype) in matrix.format.tensors(*matrix.shape).items():
        check_tensor(name, tensors[name], shape, dtype)
