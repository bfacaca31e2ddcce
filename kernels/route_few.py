"""`tile_list.route_tiles` for few pairs on a GPU: one launch of one program instead of a dozen small ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tile_list import RoutedTiles, Tiles, check_routing, most_tiles

_SIZES = (64, 256, 1024)
"""Of pairs: one kernel is compiled for each."""
MOST_PAIRS = _SIZES[-1]
"""One program sorts them in its registers."""


@triton.jit(
    do_not_specialize=["pairs", "experts", "tiles"],
    do_not_specialize_on_alignment=["slot_out", "first_out", "count_out"],
)
def route_few_kernel(
    ids,
    slots,
    counts_out,
    pair_out,
    position_out,
    slot_out,
    first_out,
    count_out,
    pairs,
    experts,
    tiles,
    HAS_SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """PAIRS, EXPERTS (more than there are) and TILES are powers of two."""
    p = tl.arange(0, PAIRS)
    e = tl.load(ids + p, mask=p < pairs, other=-1)
    there = (e >= 0) & (e < experts)
    e = tl.where(there, e, 0).to(tl.int32)
    if HAS_SLOTS:
        there = there & (tl.load(slots + e, mask=there, other=-1) >= 0)
    e = tl.where(there, e, experts)
    # The pair's own number in the low bits makes the sort stable, and puts what is no pair last.
    key = tl.sort(e * PAIRS + p)
    pair = key % PAIRS
    tl.store(pair_out + p, pair, mask=p < pairs)
    tl.store(position_out + pair, tl.where(key // PAIRS < experts, p, -1), mask=pair < pairs)

    number = tl.arange(0, EXPERTS)
    counts = tl.where(number < experts, tl.histogram(e, EXPERTS), 0)
    tl.store(counts_out + number, counts.to(tl.int64), mask=number < experts)
    starts = tl.cumsum(counts, 0) - counts
    tiles_of = (counts + ROWS - 1) // ROWS
    first_tile = tl.cumsum(tiles_of, 0) - tiles_of
    slot = number
    if HAS_SLOTS:
        slot = tl.load(slots + number, mask=number < experts, other=0).to(tl.int32)
    for i in range(0, (PAIRS + ROWS - 1) // ROWS):
        live = i < tiles_of
        tl.store(slot_out + first_tile + i, slot, mask=live)
        tl.store(first_out + first_tile + i, starts + i * ROWS, mask=live)
        tl.store(count_out + first_tile + i, tl.minimum(counts - i * ROWS, ROWS), mask=live)
    m = tl.arange(0, TILES)
    behind = (m >= tl.sum(tiles_of, 0)) & (m < tiles)
    zeros = tl.zeros((TILES,), tl.int32)
    tl.store(slot_out + m, zeros, mask=behind)
    tl.store(first_out + m, zeros, mask=behind)
    tl.store(count_out + m, zeros, mask=behind)


def route_few(ids_TK: torch.Tensor, experts: int, rows: int, slot_E: torch.Tensor | None = None) -> RoutedTiles:
    """What `route_tiles` gives, for 1 to `MOST_PAIRS` pairs; ids are contiguous."""
    check_routing(ids_TK, experts, rows, slot_E)
    pairs, device = ids_TK.numel(), ids_TK.device
    assert 0 < pairs <= MOST_PAIRS and ids_TK.is_contiguous()
    length = most_tiles(rows, experts, pairs)
    size = next(size for size in _SIZES if pairs <= size)
    pair_R = torch.empty(pairs, dtype=torch.int32, device=device)
    position_TK = torch.empty(ids_TK.shape, dtype=torch.int32, device=device)
    counts_E = torch.empty(experts, dtype=torch.int64, device=device)
    slot_M, first_M, count_M = torch.empty(3, length, dtype=torch.int32, device=device)
    route_few_kernel[(1,)](
        ids_TK, slot_E, counts_E, pair_R, position_TK, slot_M, first_M, count_M, pairs, experts, length,
        HAS_SLOTS=slot_E is not None, PAIRS=size, EXPERTS=max(32, triton.next_power_of_2(experts + 1)),
        TILES=triton.next_power_of_2(most_tiles(rows, experts, size)), ROWS=rows, num_warps=8 if size > 256 else 4,
    )  # fmt: skip
    tiles = Tiles(rows=rows, slot_M=slot_M, first_M=first_M, count_M=count_M)
    return RoutedTiles(tiles=tiles, counts_E=counts_E, pair_R=pair_R, position_TK=position_TK)
