"""The work list of the grouped GEMMs, made on the device: which rows of which expert make a tile.

Nothing waits for the device: the list's length is a bound that follows from the number of pairs alone.

T: tokens, K: places of a token's top-k, E: experts, R: rows sorted by expert, at most T * K, M: tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Up to `rows` consecutive rows of one expert each, int32: where its weights are, the first row, and how many.

    Tiles behind the last one have 0 rows. Tiles of an expert follow each other, and experts are in order.
    """

    rows: int
    slot_M: torch.Tensor
    first_M: torch.Tensor
    count_M: torch.Tensor

    @property
    def length(self) -> int:
        return self.slot_M.shape[0]


@dataclass(frozen=True, kw_only=True)
class RoutedTiles:
    """The tiles of a step's routing.

    counts_E int64: rows of each expert; pair_R int32 [T * K]: the pair (token * K + place) of each row, anything behind
    the last row; position_TK int32: the row of each pair, -1 for none. The sort is stable: within an expert rows are in
    the order of tokens.
    """

    tiles: Tiles
    counts_E: torch.Tensor
    pair_R: torch.Tensor
    position_TK: torch.Tensor


def most_tiles(rows: int, experts: int, pairs: int) -> int:
    """The most tiles that so many pairs can make: every expert with rows has at most one tile that is not full."""
    active = min(experts, pairs)
    return active + (pairs - active) // rows


def route_tiles(ids_TK: torch.Tensor, experts: int, rows: int, slot_E: torch.Tensor | None = None) -> RoutedTiles:
    """Sorts the pairs of ids_TK (int32 or int64) by expert and cuts each expert's rows into tiles of `rows`.

    An id that is not in 0..experts-1 is none; callers use -1. With slot_E (int32 or int64) expert e's weights are in
    slot slot_E[e], and experts of slot -1 are left out; else in slot e.
    """
    check_routing(ids_TK, experts, rows, slot_E)
    flat_P = ids_TK.reshape(-1).long()
    pairs, device = flat_P.shape[0], flat_P.device
    there_P = (flat_P >= 0) & (flat_P < experts)
    if slot_E is not None:
        there_P &= slot_E[flat_P.clamp(0, experts - 1)] >= 0
    expert_P = torch.where(there_P, flat_P, experts)
    pair_R = torch.argsort(expert_P.int(), stable=True)
    # bincount would wait for the device to learn its result's size.
    counts_E = flat_P.new_zeros(experts + 1).scatter_add_(0, expert_P, torch.ones_like(flat_P))[:experts]
    position_P = torch.empty(pairs, dtype=torch.int32, device=device)
    position_P[pair_R] = torch.arange(pairs, dtype=torch.int32, device=device)
    position_P.masked_fill_(~there_P, -1)
    return RoutedTiles(
        tiles=count_tiles(counts_E, rows, pairs, slot_E=slot_E),
        counts_E=counts_E,
        pair_R=pair_R.int(),
        position_TK=position_P.view(ids_TK.shape),
    )


def count_tiles(
    counts_E: torch.Tensor,
    rows: int,
    most_rows: int,
    *,
    first_E: torch.Tensor | None = None,
    slot_E: torch.Tensor | None = None,
) -> Tiles:
    """The tiles of experts with counts_E rows each, at most `most_rows` together.

    With first_E expert e's rows begin at first_E[e], as in an expert-major buffer; else one expert's rows follow
    another's. With slot_E as `route_tiles` says; an expert of slot -1 must have no rows.
    """
    check_rows_of_tiles(rows)
    experts, device = counts_E.shape[0], counts_E.device
    counts_E = counts_E.long()
    if first_E is None:
        first_E = counts_E.cumsum(0) - counts_E
    tiles_E = (counts_E + rows - 1) // rows
    ends_E = tiles_E.cumsum(0)
    number_M = torch.arange(most_tiles(rows, experts, most_rows), device=device)
    expert_M = torch.searchsorted(ends_E, number_M, right=True)
    there_M = expert_M < experts
    expert_M = expert_M.clamp_(max=experts - 1)
    done_M = (number_M - ends_E[expert_M] + tiles_E[expert_M]) * rows
    count_M = (counts_E[expert_M] - done_M).clamp_(max=rows)
    slot_M = expert_M if slot_E is None else slot_E[expert_M]
    return Tiles(
        rows=rows,
        slot_M=slot_M.masked_fill(~there_M, 0).int(),
        first_M=(first_E[expert_M] + done_M).masked_fill_(~there_M, 0).int(),
        count_M=count_M.masked_fill_(~there_M, 0).int(),
    )


def listed_tiles(starts: Sequence[int], slots: Sequence[int], rows: int, device: torch.device) -> Tiles:
    """The tiles of groups whose rows are known to the host: group g has rows starts[g] to starts[g + 1] and its weights
    in slots[g]. One copy to the device, for which the host does not wait.
    """
    check_rows_of_tiles(rows)
    tiles = [
        (slot, first, min(rows, end - first))
        for slot, start, end in zip(slots, starts[:-1], starts[1:], strict=True)
        for first in range(start, end, rows)
    ]
    listed = torch.tensor(tiles, dtype=torch.int32).view(-1, 3).t().contiguous()
    if device.type == "cuda":
        listed = listed.pin_memory().to(device, non_blocking=True)
    slot_M, first_M, count_M = listed
    return Tiles(rows=rows, slot_M=slot_M, first_M=first_M, count_M=count_M)


def check_routing(ids_TK: torch.Tensor, experts: int, rows: int, slot_E: torch.Tensor | None) -> None:
    """ValueError for a routing that is not as `route_tiles` says."""
    if ids_TK.ndim != 2:
        raise ValueError(f"ids_TK: a matrix is needed, not {list(ids_TK.shape)}")
    if slot_E is not None and slot_E.shape != (experts,):
        raise ValueError(f"slot_E: {experts} slots are needed, one for each expert, not {list(slot_E.shape)}")
    check_rows_of_tiles(rows)


def check_rows_of_tiles(rows: int) -> None:
    """ValueError for tiles of a height that Triton has not."""
    if rows < 1 or rows & (rows - 1):
        raise ValueError(f"rows: {rows} is not a power of two")
