"""The tiles of a routing against a loop over its pairs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.kernels.tile_list import count_tiles, listed_tiles, most_tiles, route_tiles


def wanted(ids, experts, rows, slots=None):
    """(counts, pair of each row, row of each pair, [(slot, first row, rows)]) of a routing."""
    pairs = [e if 0 <= e < experts and (slots is None or slots[e] >= 0) else -1 for row in ids for e in row]
    order = [p for e in range(experts) for p, expert in enumerate(pairs) if expert == e]
    counts = [pairs.count(e) for e in range(experts)]
    tiles, start = [], 0
    for e, count in enumerate(counts):
        for done in range(0, count, rows):
            tiles.append((e if slots is None else slots[e], start + done, min(rows, count - done)))
        start += count
    position = [order.index(p) if p in order else -1 for p in range(len(pairs))]
    return counts, order, position, tiles


def check(routed, ids, experts, rows, slots=None):
    counts, order, position, tiles = wanted(ids, experts, rows, slots)
    assert routed.counts_E.tolist() == counts and routed.counts_E.dtype == torch.int64
    assert routed.pair_R[: len(order)].tolist() == order
    assert sorted(routed.pair_R.tolist()) == list(range(sum(map(len, ids))))
    assert routed.position_TK.flatten().tolist() == position
    assert routed.position_TK.shape == (len(ids), len(ids[0]))
    made = routed.tiles
    length = most_tiles(rows, experts, routed.pair_R.shape[0])
    assert made.rows == rows and made.length == length >= len(tiles)
    for tensor in (made.slot_M, made.first_M, made.count_M, routed.pair_R, routed.position_TK):
        assert tensor.dtype == torch.int32
    found = list(zip(made.slot_M.tolist(), made.first_M.tolist(), made.count_M.tolist(), strict=True))
    assert found == tiles + [(0, 0, 0)] * (length - len(tiles))


ROUTINGS = {
    "spread": [[0, 3], [5, 1], [2, 4], [3, 0]],
    "all to one": [[2, 2]] * 9,
    "none": [[-1, -1], [-1, -1]],
    "some": [[-1, 4], [1, -1], [4, 1]],
    "not here": [[6, 2], [99, -7]],
    "one": [[5]],
}


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, rows):
    ids = ROUTINGS[routing]
    check(route_tiles(torch.tensor(ids), 6, rows), ids, 6, rows)
    slots = [7, -1, 2, 0, 31, 2]
    check(route_tiles(torch.tensor(ids, dtype=torch.int32), 6, rows, torch.tensor(slots)), ids, 6, rows, slots)


@given(data=st.data())
@settings(max_examples=100)
def test_any_routing(data):
    experts = data.draw(st.integers(1, 9))
    tokens, top_k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    rows = data.draw(st.sampled_from([1, 2, 4, 16]))
    row = st.lists(st.integers(-1, experts), min_size=top_k, max_size=top_k)
    ids = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
    slots = data.draw(st.none() | st.lists(st.integers(-1, 20), min_size=experts, max_size=experts))
    slot_E = None if slots is None else torch.tensor(slots)
    check(route_tiles(torch.tensor(ids), experts, rows, slot_E), ids, experts, rows, slots)


@pytest.mark.parametrize("rows", [1, 2, 4, 16])
def test_the_bound_is_met_by_some_routing_and_passed_by_none(rows):
    for experts in range(1, 4):
        for pairs in range(1, 12):
            most = 0
            for counts in torch.cartesian_prod(*[torch.arange(pairs + 1)] * experts).view(-1, experts).tolist():
                if sum(counts) == pairs:
                    most = max(most, sum(-(-count // rows) for count in counts))
            assert most == most_tiles(rows, experts, pairs)


def test_rows_that_lie_by_expert():
    """As in a buffer with room for 10 rows of each expert."""
    tiles = count_tiles(torch.tensor([5, 0, 10, 1], dtype=torch.int32), 4, 40, first_E=torch.arange(4) * 10)
    found = list(zip(tiles.slot_M.tolist(), tiles.first_M.tolist(), tiles.count_M.tolist(), strict=True))
    real = [(0, 0, 4), (0, 4, 1), (2, 20, 4), (2, 24, 4), (2, 28, 2), (3, 30, 1)]
    assert found == real + [(0, 0, 0)] * (most_tiles(4, 4, 40) - len(real))


@given(data=st.data())
@settings(max_examples=30)
def test_groups_that_the_host_knows(data):
    counts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    slots = data.draw(st.lists(st.integers(0, 30), min_size=len(counts), max_size=len(counts)))
    rows = data.draw(st.sampled_from([1, 4, 16]))
    made = listed_tiles([0, *itertools.accumulate(counts)], slots, rows, torch.device("cpu"))
    same = count_tiles(torch.tensor(counts), rows, sum(counts), slot_E=torch.tensor(slots))
    for name in ("slot_M", "first_M", "count_M"):
        found, wanted = getattr(made, name).tolist(), getattr(same, name).tolist()
        real = int((same.count_M > 0).sum())
        assert found == wanted[:real]


def test_no_tokens():
    routed = route_tiles(torch.zeros(0, 2, dtype=torch.int64), 3, 16)
    assert routed.tiles.length == 0 and routed.counts_E.tolist() == [0, 0, 0]
    assert routed.position_TK.shape == (0, 2)


def test_refusals():
    ids = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="ids_TK: a matrix"):
        route_tiles(ids[0], 3, 16)
    with pytest.raises(ValueError, match="rows: 12 is not a power of two"):
        route_tiles(ids, 3, 12)
    with pytest.raises(ValueError, match="slot_E: 3 slots"):
        route_tiles(ids, 3, 16, torch.zeros(2, dtype=torch.int64))
