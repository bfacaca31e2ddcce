"""A whole layer of gated experts for few tokens, in one compiled call.

Legend: T tokens, D model width, k places of a token's top-k, I expert width, E experts, P = T * k pairs.
"""

import numpy as np
import torch
from numba import njit, prange

from .compiled import get_int32, kernel, put_int32, set_workers, share, stack_buffer, workers_for
from .grouped_linear import (
    COLUMNS,
    ROWS,
    check_pairs,
    check_rows,
    check_tensor,
    combine_columns,
    gate_up_part,
    row_addresses,
    sort_pairs,
)
from .tile import FLOAT32, dot_block, kind_of

_addresses = stack_buffer(2 * ROWS)


@njit
def _down_part(part, parts, kind, h, groups, starts, experts, w, n, k, y, position, weights, tokens, top_k, out):
    """One worker's columns of the down projection and the weighted sum. y: float32 room for COLUMNS columns of
    every row, the worker's own."""
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    h_rows = _addresses()
    for c in range(low, high, COLUMNS):
        columns = min(COLUMNS, high - c)
        for g in range(groups):
            weight = w + (np.int64(get_int32(experts, g)) * n + c) * k * size
            end = np.int64(get_int32(starts, g + 1))
            for first in range(np.int64(get_int32(starts, g)), end, ROWS):
                rows = min(ROWS, end - first)
                row_addresses(h_rows, first, rows, h, k * size, np.int64(0))
                place = y + 4 * first * COLUMNS
                dot_block(kind, h_rows, rows, weight, k * size, columns, k, place, np.int64(COLUMNS))
        combine_columns(
            np.int64(FLOAT32), kind, y, np.int64(4 * COLUMNS), columns, position, weights, tokens, top_k,
            out + c * size, n * size,
        )  # fmt: skip


@njit
def _sort(ids, wide, pairs, top_k, experts, slots, counts, groups, starts, token, position):
    """sort_pairs, then experts become slots. -1 - pairs - e if expert e has rows and no slot."""
    found = sort_pairs(ids, wide, pairs, top_k, experts, counts, groups, starts, token, position)
    if slots:
        for g in range(found):
            expert = get_int32(groups, g)
            slot = get_int32(slots, expert)
            if slot < 0:
                return -1 - pairs - expert
            put_int32(groups, g, slot)
    return found


@kernel
def _experts(
    workers, kind, x, x_stride, tokens, top_k, width, ids, wide, weights, experts, slots, gate_up, inner, down,
    counts, groups, starts, token, position, h, y, out,
):  # fmt: skip
    pairs = tokens * top_k
    found = _sort(ids, wide, pairs, top_k, experts, slots, counts, groups, starts, token, position)
    if found < 0:
        return found
    set_workers(workers)
    for p in prange(workers):
        gate_up_part(np.int64(p), workers, kind, x, x_stride, token, found, starts, groups, gate_up, inner, width, h)
    for p in prange(workers):
        part = np.int64(p)
        own = y + part * pairs * 4 * COLUMNS
        _down_part(
            part, workers, kind, h, found, starts, groups, down, width, inner, own, position, weights, tokens,
            top_k, out,
        )  # fmt: skip
    return found


def small_experts(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
    slots_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts down(silu(gate(x)) * up(x)), weighted and summed: returns (out_TD, counts_E).

    float32 or bfloat16 in CPU memory, sums in float32; the middle result h is rounded to x's dtype. ids_TK is
    int32 or int64, -1 for none; gate rows come first in gate_up. Without slots_E, expert e is at index e of both
    weights; with it (int32), at index slots_E[e], -1 for an expert that is not there. counts_E (int64) holds
    the rows of each expert. A token's result does not depend on the other tokens.

    Every expert that is needed is read from memory once, so this is the fast way up to about 16 rows per expert.
    """
    kind = kind_of(x_TD.dtype)
    check_rows("x_TD", x_TD)
    check_pairs(ids_TK)
    tokens, width = x_TD.shape
    held, _, inner = down_EDI.shape
    check_tensor("gate_up_E2ID", gate_up_E2ID, (held, 2 * inner, width), x_TD.dtype)
    check_tensor("down_EDI", down_EDI, (held, width, inner), x_TD.dtype)
    if ids_TK.shape[0] != tokens or weights_TK.shape != ids_TK.shape:
        raise ValueError(
            f"ids_TK {list(ids_TK.shape)} and weights_TK {list(weights_TK.shape)} must have a row for each of the "
            f"{tokens} tokens and be alike"
        )
    experts = held if slots_E is None else len(slots_E)
    if slots_E is not None:
        check_tensor("slots_E", slots_E, (experts,), torch.int32)
    weights = weights_TK.to(torch.float32).contiguous()
    out = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    counts = torch.empty(experts, dtype=torch.int64)
    top_k, pairs, size = ids_TK.shape[1], ids_TK.numel(), x_TD.element_size()
    workers = workers_for(min(pairs, experts) * 3 * width * inner * size)

    # One block of memory for everything the kernel needs on the way.
    parts = (
        4 * experts, 4 * (experts + 1), 4 * pairs, 4 * pairs, pairs * inner * size,
        workers * pairs * 4 * COLUMNS,
    )  # fmt: skip
    room = torch.empty(sum(parts) + 64 * len(parts), dtype=torch.uint8)
    places, place = [], room.data_ptr()
    for part in parts:
        place = (place + 63) // 64 * 64
        places.append(place)
        place += part

    found = _experts(
        workers, kind, x_TD.data_ptr(), x_TD.stride(0) * size, tokens, top_k, width, ids_TK.data_ptr(),
        int(ids_TK.dtype is torch.int64), weights.data_ptr(), experts, 0 if slots_E is None else slots_E.data_ptr(),
        gate_up_E2ID.data_ptr(), inner, down_EDI.data_ptr(), counts.data_ptr(), *places, out.data_ptr(),
    )  # fmt: skip
    if found < -pairs:
        raise ValueError(f"slots_E: expert {-1 - pairs - found} has tokens but no slot")
    if found < 0:
        raise ValueError(f"ids_TK: expert {int(ids_TK.flatten()[-1 - found])} is not in -1..{experts - 1}")
    return out, counts
