"""Linear layers over rows grouped by expert, for many rows per expert: `grouped_linear` with the arithmetic of `panel`.

Legend: K inputs, N outputs, I expert width, G groups (experts with rows).
"""

import numpy as np
import torch
from numba import njit

from .compiled import Part, arguments, call, share
from .grouped_linear import Way, add_bias, grouped_linear, row_addresses, store_row
from .panel import PANEL, UNITS, panel_product
from .scalars import get_float32, get_int32, get_int64, put_float32, put_int64, silu, stack_buffer
from .tile import FLOAT32

ROWS = 384
"""Rows between two packings of a weight: what they give for a panel's columns stays in the second-level cache."""
_RESULTS = ROWS * PANEL * 4
_ROOM = 64 + UNITS * PANEL * 4 + 2 * _RESULTS

_addresses = stack_buffer(2 * ROWS)
_many_arguments = arguments(14)


@njit
def _own_room(room, part):
    """Addresses of this worker's panel and of its two blocks of results."""
    panel = (room + 63) // 64 * 64 + part * _ROOM + 64
    results = panel + UNITS * PANEL * 4
    return panel, results, results + _RESULTS


@Part
def many_linear_part(part, parts, args):
    """As `linear_part`. product: address of panel_product."""
    (product, kind, x, x_stride, row_index, groups, starts, experts, w, bias, n, k, y, room) = _many_arguments(args)
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    panel, results, _ = _own_room(room, part)
    x_rows = _addresses()
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
            for c in range(low, high, PANEL):
                columns = min(PANEL, high - c)
                following = np.int64(0)
                if c + PANEL < high:
                    following = weight + (c + PANEL) * k * size
                elif first + ROWS >= end and g + 1 < groups:
                    if experts:
                        following = w + np.int64(get_int32(experts, g + 1)) * n * k * size
                    else:
                        following = get_int64(w, g + 1)
                    following += low * k * size
                put_int64(panel - 64, 0, following)
                w_rows, units = weight + c * k * size, k * size // 4
                call(product, kind, x_rows, rows, w_rows, k * size, columns, units, panel, results)
                for r in range(rows):
                    values = results + 4 * r * PANEL
                    if bias:
                        add_bias(kind, values, columns, its_bias + c * size)
                    store_row(kind, values, columns, y + ((first + r) * n + c) * size)


@Part
def many_gate_up_part(part, parts, args):
    """As `gate_up_part`. product: address of panel_product."""
    (product, kind, x, x_stride, row_index, groups, starts, experts, w, _, n, k, h, room) = _many_arguments(args)
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    panel, gate, up = _own_room(room, part)
    x_rows = _addresses()
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
            for c in range(low, high, PANEL):
                columns = min(PANEL, high - c)
                w_gate, w_up, units = gates + c * k * size, ups + c * k * size, k * size // 4
                put_int64(panel - 64, 0, w_up)
                call(product, kind, x_rows, rows, w_gate, k * size, columns, units, panel, gate)
                following = np.int64(0)
                if c + PANEL < high:
                    following = w_gate + PANEL * k * size
                elif first + ROWS >= end and g + 1 < groups:
                    if experts:
                        following = w + np.int64(get_int32(experts, g + 1)) * 2 * n * k * size
                    else:
                        following = get_int64(w, 2 * g + 2)
                    following += low * k * size
                put_int64(panel - 64, 0, following)
                call(product, kind, x_rows, rows, w_up, k * size, columns, units, panel, up)
                for r in range(rows):
                    values, factors = gate + 4 * r * PANEL, up + 4 * r * PANEL
                    for i in range(columns):
                        put_float32(values, i, silu(get_float32(values, i)) * get_float32(factors, i))
                    store_row(kind, values, columns, h + ((first + r) * n + c) * size)


MANY_ROWS = Way(linear=many_linear_part, gate_up=many_gate_up_part, product=panel_product, room=_ROOM, unit=4)
"""For `grouped_linear` and `grouped_gate_up_silu`."""


def fits(weight_NK: torch.Tensor) -> bool:
    """Whether the kernels take this weight: float32 or bfloat16 whose rows are whole numbers of 32 bits."""
    whole = weight_NK.shape[-1] * weight_NK.element_size() % MANY_ROWS.unit == 0
    return whole and weight_NK.dtype in (torch.float32, torch.bfloat16)


def many_linear(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, row_index_R: torch.Tensor | None = None
) -> torch.Tensor:
    """x[row_index] @ weight.T + bias for one weight."""
    rows = x_TK.shape[0] if row_index_R is None else len(row_index_R)
    starts = torch.tensor([0, rows], dtype=torch.int32)
    biases = None if bias_N is None else [bias_N]
    return grouped_linear(x_TK, [weight_NK], starts, None, biases, row_index_R, MANY_ROWS)
