"""A whole layer of gated experts for few tokens.

Legend: T tokens, D model width, k places of a token's top-k, I expert width, E experts, P = T * k pairs.
"""

import numpy as np
import torch

from .checks import address, check_rows, check_tensor
from .compiled import Part, arguments, call, run, share, workers_for
from .grouped_linear import COLUMNS, ROWS, combine_columns, gate_up_part, row_addresses
from .scalars import get_int32, stack_buffer
from .sort_rows import check_ids, sort_pairs
from .tile import FLOAT32, dot_block, kind_of

_addresses = stack_buffer(2 * ROWS)
_down_arguments = arguments(15)


@Part
def _down_part(part, parts, args):
    """One worker's columns of the down projection and of the weighted sum over each token's experts.

    y: float32 room for COLUMNS columns of `pairs` rows for each worker.
    """
    (dot, kind, h, groups, starts, experts, w, n, k, y, pairs, position, weights, top_k, out) = _down_arguments(args)
    size = 4 if kind == FLOAT32 else 2
    low, high = share(n, part, parts)
    y += part * pairs * 4 * COLUMNS
    h_rows = _addresses()
    for c in range(low, high, COLUMNS):
        columns = min(COLUMNS, high - c)
        for g in range(groups):
            weight = w + (np.int64(get_int32(experts, g)) * n + c) * k * size
            end = np.int64(get_int32(starts, g + 1))
            for first in range(np.int64(get_int32(starts, g)), end, ROWS):
                rows = min(ROWS, end - first)
                row_addresses(h_rows, first, rows, h, k * size, 0)
                place = y + 4 * first * COLUMNS
                call(dot, kind, h_rows, rows, weight, k * size, columns, k, place, COLUMNS)
        combine_columns(
            FLOAT32, kind, y, 4 * COLUMNS, columns, position, weights, pairs // top_k, top_k, out + c * size, n * size
        )


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
    tokens, width = x_TD.shape
    check_rows("x_TD", x_TD, (tokens, width), x_TD.dtype)
    check_ids(ids_TK)
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
    if pairs == 0:
        return out.zero_(), counts.zero_()
    workers = workers_for(min(pairs, experts) * 3 * width * inner * size)
    rows = pairs if slots_E is not None else int((ids_TK >= 0).sum())  # of h: other ranks' experts have none here

    # One block of memory for everything on the way: experts and starts of the groups, token and position of the
    # rows, h, y.
    sizes = (
        4 * experts, 4 * (experts + 1), 4 * pairs, 4 * pairs, rows * inner * size, workers * pairs * 4 * COLUMNS,
    )  # fmt: skip
    room = torch.empty(sum(sizes) + 64 * len(sizes), dtype=torch.uint8)
    places, place = [], room.data_ptr()
    for need in sizes:
        place = (place + 63) // 64 * 64
        places.append(place)
        place += need
    groups, starts, token, position, h, y = places

    found = sort_pairs(
        ids_TK.data_ptr(), int(ids_TK.dtype is torch.int64), pairs, top_k, experts, address(slots_E),
        counts.data_ptr(), groups, starts, token, position,
    )  # fmt: skip
    if found < -pairs:
        raise ValueError(f"slots_E: expert {-1 - pairs - found} has tokens but no slot")
    if found < 0:
        raise ValueError(f"ids_TK: expert {int(ids_TK.flatten()[-1 - found])} is not in -1..{experts - 1}")
    dot = dot_block.address
    run(
        workers, gate_up_part, dot, kind, x_TD.data_ptr(), x_TD.stride(0) * size, token, found, starts, groups,
        gate_up_E2ID.data_ptr(), 0, inner, width, h,
    )  # fmt: skip
    run(
        workers, _down_part, dot, kind, h, found, starts, groups, down_EDI.data_ptr(), width, inner, y, pairs,
        position, weights.data_ptr(), top_k, out.data_ptr(),
    )  # fmt: skip
    return out, counts
