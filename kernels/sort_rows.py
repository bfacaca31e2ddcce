"""Sorting the (token, expert) pairs of a step by expert.

Legend: T tokens, K places of a token's top-k, E experts, R rows sorted by expert, G groups (experts with rows).
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .checks import check_tensor
from .compiled import kernel
from .scalars import get_int32, get_int64, put_int32, put_int64


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


@kernel
def sort_pairs(ids, wide, pairs, top_k, experts, slots, counts, groups, starts, token, position):
    """Counting sort of ids (int64 if wide, else int32); every array is an address.

    Writes counts [experts] int64 and, int32, groups [experts], starts [experts + 1], token [pairs],
    position [pairs]; with slots (int32 [experts], or 0), groups are slots instead of experts. Returns the number
    of groups, -1 - p if the id at place p is not in -1..experts-1, or -1 - pairs - e if expert e has no slot.
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
        expert = get_int32(groups, g)
        put_int64(counts, expert, rows)
        if slots:
            slot = get_int32(slots, expert)
            if slot < 0:
                return -1 - pairs - expert
            put_int32(groups, g, slot)
    return found


def check_ids(ids_TK: torch.Tensor) -> None:
    """A contiguous CPU matrix of int32 or int64."""
    if ids_TK.ndim != 2:
        raise ValueError(f"ids_TK: a matrix is needed, not {list(ids_TK.shape)}")
    check_tensor("ids_TK", ids_TK, ids_TK.shape, torch.int32 if ids_TK.dtype is torch.int32 else torch.int64)


@kernel
def _place_in_order(ids, wide, pairs, order, count, experts, ranks, out):
    """out [pairs] int32: the place of each id in order [count], -1 for one that is not there; int32 ranks [experts]."""
    for e in range(experts):
        put_int32(ranks, e, -1)
    for i in range(count):
        put_int32(ranks, np.int64(get_int32(order, i)), i)
    for p in range(pairs):
        e = get_int64(ids, p) if wide else np.int64(get_int32(ids, p))
        if e < -1 or e >= experts:
            return -1 - p
        put_int32(out, p, get_int32(ranks, e) if e >= 0 else -1)
    return 0


def sort_rows_in(order: Sequence[int], ids_TK: torch.Tensor, experts: int) -> SortedRows:
    """As `sort_rows`, by the place that experts have in `order`, which is also their number in what is returned."""
    ids_TK = ids_TK.contiguous()
    check_ids(ids_TK)
    pairs, room = ids_TK.numel(), array("i", order)
    ranks, places_TK = torch.empty(experts, dtype=torch.int32), torch.empty(ids_TK.shape, dtype=torch.int32)
    found = _place_in_order(
        ids_TK.data_ptr(), int(ids_TK.dtype is torch.int64), pairs, room.buffer_info()[0], len(room), experts,
        ranks.data_ptr(), places_TK.data_ptr(),
    )  # fmt: skip
    if found < 0:
        raise ValueError(f"ids_TK: expert {int(ids_TK.flatten()[-1 - found])} is not in -1..{experts - 1}")
    return sort_rows(places_TK, len(room))


def sort_rows(ids_TK: torch.Tensor, experts: int) -> SortedRows:
    """Sort the pairs of ids_TK (int32 or int64; -1 for none) by expert. ValueError for an id outside -1..experts-1."""
    check_ids(ids_TK)
    pairs = ids_TK.numel()
    counts = torch.empty(experts, dtype=torch.int64)
    groups = torch.empty(experts, dtype=torch.int32)
    starts = torch.empty(experts + 1, dtype=torch.int32)
    token = torch.empty(pairs, dtype=torch.int32)
    position = torch.empty(ids_TK.shape, dtype=torch.int32)
    found = sort_pairs(
        ids_TK.data_ptr(), int(ids_TK.dtype is torch.int64), pairs, ids_TK.shape[1], experts, 0,
        *(t.data_ptr() for t in (counts, groups, starts, token, position)),
    )  # fmt: skip
    if found < 0:
        raise ValueError(f"ids_TK: expert {int(ids_TK.flatten()[-1 - found])} is not in -1..{experts - 1}")
    starts = starts[: found + 1]
    return SortedRows(
        counts_E=counts, experts_G=groups[:found], starts=starts, token_R=token[: int(starts[-1])], position_TK=position
    )
