"""Planners of expert tables: valid for any numbers, even where it counts, sparing with moves."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moeyard.scheduler.moves import plan_moves
from moeyard.scheduler.placement import (
    imbalance,
    incremental,
    keep_slots,
    linear,
    pack,
    rank_loads,
    repair,
    replicated,
    round_robin,
    slots_needed,
)
from moeyard.scheduler.table import ExpertTable

LOADS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 10**12)), min_size=1, max_size=12)
SIZES = (st.integers(1, 20), st.integers(1, 8), st.integers(0, 3))


def zipf(experts: int, seed: int = 0) -> list[int]:
    """Loads as skewed as real routing often is, in no order."""
    loads = [int(100_000 / (1 + e) ** 0.9) for e in range(experts)]
    random.Random(seed).shuffle(loads)
    return loads


def fills(old: ExpertTable, new: ExpertTable) -> int:
    """Slots that get another expert."""
    pairs = zip(old.slots_PS, new.slots_PS, strict=True)
    return sum(b not in (a, -1) for x, y in pairs for a, b in zip(x, y, strict=True))


# Without loads


@given(*SIZES)
@example(60, 8, 0)
@example(3, 8, 0)
def test_linear(experts: int, ranks: int, more: int) -> None:
    table = linear(experts, ranks, slots_needed(experts, ranks, more))
    table.check()
    assert table.slots == -(-experts // ranks) + more
    rows = [table.experts_of(rank) for rank in range(ranks)]
    assert [e for row in rows for e in row] == list(range(experts))
    sizes = [len(row) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@given(*SIZES)
def test_round_robin(experts: int, ranks: int, more: int) -> None:
    table = round_robin(experts, ranks, slots_needed(experts, ranks, more))
    table.check()
    assert all(table.homes(e) == ((e % ranks, e // ranks),) for e in range(experts))


def test_60_experts_on_8_ranks() -> None:
    table = linear(60, 8)
    assert [len(table.experts_of(rank)) for rank in range(8)] == [8, 8, 8, 8, 7, 7, 7, 7]
    assert table.slots_PS[4] == (32, 33, 34, 35, 36, 37, 38, -1)
    assert round_robin(60, 8).slots_PS[7] == (7, 15, 23, 31, 39, 47, 55, -1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0, 2), "experts is 0; it must be at least 1"),
        (lambda: linear(2, 0), "ranks is 0"),
        (lambda: slots_needed(2, 2, -1), "redundant is -1"),
        (lambda: linear(60, 8, 7), "slots is 7; 60 experts on 8 ranks need at least 8 slots on each"),
        (lambda: round_robin(3, 2, 1), "slots is 1"),
        (lambda: replicated([1, 2, 3], 2, 1), "slots is 1"),
        (lambda: replicated([], 2, 1), "experts is 0"),
        (lambda: replicated([1, -1], 2, 1), r"loads_E\[1\] is -1; it must be at least 0"),
        (lambda: replicated([1.5, 1], 2, 1), r"loads_E\[0\] is 1\.5; give a whole number"),  # type: ignore[list-item]
        (lambda: incremental(linear(3, 2), [1, 2], 1), "loads_E has 2 entries.*each of 3 experts"),
        (lambda: incremental(linear(2, 2), [1, 2], -1), "max_moves is -1"),
        (lambda: incremental(ExpertTable(2, ((0,),)), [1, 2], 1), "expert 1 has no home"),
        (lambda: repair(linear(4, 2), 1), "slots is 1"),
        (lambda: repair(linear(4, 2, 3), 2), "slots is 2, but each rank has 3 now"),
        (lambda: rank_loads(linear(2, 2), [1]), "loads_E has 1 entries"),
    ],
)
def test_numbers_that_cannot_work(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# The measure


def test_replicas_share_evenly_and_exactly() -> None:
    table = ExpertTable(3, ((0, 1), (0, 2), (0, -1)))
    assert rank_loads(table, [1, 10, 0]) == (Fraction(31, 3), Fraction(1, 3), Fraction(1, 3))
    assert imbalance(table, [1, 10, 0]) == pytest.approx(31 / 11)
    assert imbalance(table, [0, 0, 0]) == 1.0
    assert imbalance(linear(4, 2), list(np.array([2**62, 2**62, 2**62, 2**62]))) == 1.0, "no overflow"


@given(LOADS, st.integers(1, 6), st.integers(0, 2))
def test_no_load_is_lost(loads: list[int], ranks: int, redundant: int) -> None:
    table = replicated(loads, ranks, slots_needed(len(loads), ranks, redundant))
    assert sum(rank_loads(table, loads)) == sum(loads)
    assert 1 <= imbalance(table, loads) <= ranks


# From loads


@given(LOADS, st.integers(1, 6), st.integers(0, 3))
@example([5, 5, 5, 1], 2, 3)
@example([10, 1, 1, 0], 2, 2)
def test_replicated_is_valid_for_any_loads(loads: list[int], ranks: int, redundant: int) -> None:
    slots = slots_needed(len(loads), ranks, redundant)
    table = replicated(loads, ranks, slots)
    table.check()  # in it: never an expert twice on a rank
    assert (table.ranks, table.slots) == (ranks, slots)
    assert table == replicated(list(np.array(loads)), ranks, slots)
    counts = table.replicas_E
    assert sum(counts) == min(ranks * slots, ranks * len(loads)), "no slot is wasted"
    # No expert could give a replica to another and be the lesser load per replica of the two.
    for a, many in enumerate(counts):
        for b, few in enumerate(counts):
            if many > 1 and few < ranks:
                assert Fraction(loads[a], many - 1) >= Fraction(loads[b], few)


@given(st.data())
def test_pack_places_any_replicas(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 5))
    counts = data.draw(st.lists(st.integers(1, ranks), min_size=1, max_size=9))
    shares = data.draw(st.tuples(*[st.integers(0, 20)] * len(counts)))
    slots = max(slots_needed(sum(counts), ranks), 1)
    rows = pack(shares, counts, ranks, slots)
    assert all(len(row) <= slots and len(set(row)) == len(row) for row in rows)
    placed = [expert for row in rows for expert in row]
    assert [placed.count(expert) for expert in range(len(counts))] == counts


def test_pack_makes_room_for_the_last_replica() -> None:
    """By load alone rank 1 would be full and both replicas of expert 4 be left for rank 0."""
    assert pack([10, 1, 1, 1, 0], [1, 1, 1, 1, 2], 2, 3) == [[0, 4, 1], [2, 3, 4]]


def test_an_expert_has_no_more_replicas_than_ranks() -> None:
    table = replicated([100, 1, 1], 2, 5)
    assert table.replicas_E == (2, 2, 2) and imbalance(table, [100, 1, 1]) == 1.0
    assert table.slots_PS == ((0, 1, 2, -1, -1),) * 2
    assert replicated([5, 1], 1, 4) == linear(2, 1, 4)


def test_the_shape_of_eplbs_example() -> None:
    """12 experts in 16 slots on 8 ranks of 2 slots, one expert clearly the hottest."""
    loads = [95, 130, 44, 60, 101, 170, 35, 7, 70, 52, 188, 90]
    table = replicated(loads, 8, 2)
    table.check()
    assert sum(table.replicas_E) == 16
    assert [e for e, n in enumerate(table.replicas_E) if n > 1] == [1, 4, 5, 10]
    assert imbalance(table, loads) < 1.15 < imbalance(linear(12, 8, 2), loads)


def test_without_spare_slots_it_packs() -> None:
    table = replicated([9, 8, 7, 1, 2, 3], 3, 2)
    assert table.slots_PS == ((0, 3), (1, 4), (2, 5))
    assert imbalance(table, [9, 8, 7, 1, 2, 3]) == 1.0


def test_without_any_load_it_spreads() -> None:
    table = replicated([0] * 6, 4, 2)
    assert [len(table.experts_of(rank)) for rank in range(4)] == [2] * 4
    assert max(table.replicas_E) == 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("experts", "ranks", "slots"), [(60, 8, 8), (60, 8, 9), (128, 8, 18), (256, 32, 9)])
def test_skewed_loads_become_even(experts: int, ranks: int, slots: int, seed: int) -> None:
    loads = zipf(experts, seed)
    before, after = (imbalance(t, loads) for t in (linear(experts, ranks, slots), replicated(loads, ranks, slots)))
    assert after < before
    if ranks * slots > experts + ranks // 2:
        assert after < 1.05


@given(st.data())
def test_keep_slots(data: st.DataObject) -> None:
    loads = data.draw(LOADS)
    ranks = data.draw(st.integers(1, 4))
    slots = slots_needed(len(loads), ranks, 1)
    old, new = linear(len(loads), ranks, slots), replicated(loads, ranks, slots)
    kept = keep_slots(new, old)
    kept.check()
    for rank in range(ranks):
        here, before = set(new.experts_of(rank)), set(old.experts_of(rank))
        assert set(kept.experts_of(rank)) == here
        assert all(kept.slot_of(rank)[e] == old.slot_of(rank)[e] for e in here & before)
    assert fills(old, kept) <= fills(old, new)
    assert keep_slots(old, old) == old


# With a budget


@st.composite
def drifts(draw: st.DrawFn) -> tuple[ExpertTable, list[int]]:
    """A table that was made for some loads, and the loads of another time."""
    loads = draw(LOADS)
    ranks = draw(st.integers(1, 5))
    slots = slots_needed(len(loads), ranks, draw(st.integers(0, 2)))
    table = draw(st.sampled_from([linear(len(loads), ranks, slots), replicated(loads, ranks, slots)]))
    return table, draw(st.permutations(loads))


@given(drifts(), st.integers(0, 6))
def test_incremental_keeps_to_its_budget_and_never_harms(case: tuple[ExpertTable, list[int]], budget: int) -> None:
    table, loads = case
    better = incremental(table, loads, budget)
    better.check()
    assert better == incremental(table, loads, budget)
    assert fills(table, better) <= budget
    assert max(rank_loads(better, loads)) <= max(rank_loads(table, loads))
    assert (better.ranks, better.slots) == (table.ranks, table.slots)
    if budget == 0:
        assert better == table


@given(drifts())
def test_incremental_ends(case: tuple[ExpertTable, list[int]]) -> None:
    table, loads = case
    settled = incremental(table, loads, 1000)
    assert incremental(settled, loads, 1000) == settled


@pytest.mark.parametrize(
    ("table", "loads", "budget", "rows"),
    [
        pytest.param(linear(2, 2, 2), [8, 2], 1, ((0, -1), (1, 0)), id="fills an empty slot"),
        pytest.param(
            ExpertTable(3, ((0, 1), (2, 1))), [8, 2, 0], 1, ((0, 1), (2, 0)), id="replaces a redundant replica"
        ),
        pytest.param(linear(4, 2), [5, 5, 1, 1], 2, ((2, 1), (0, 3)), id="swaps"),
        pytest.param(linear(4, 2), [5, 5, 1, 1], 1, ((0, 1), (2, 3)), id="a swap is two moves"),
        pytest.param(linear(4, 2), [5, 1, 1, 5], 9, ((0, 1), (2, 3)), id="nothing to gain"),
        pytest.param(linear(4, 2, 3), [0, 0, 0, 0], 9, ((0, 1, -1), (2, 3, -1)), id="no load, no move"),
        pytest.param(
            ExpertTable(4, ((0, 1), (2, 1), (3, -1))),
            [6, 6, 0, 0],
            1,
            ((0, 1), (2, 1), (3, 0)),
            id="helps the heaviest rank",
        ),
    ],
)
def test_incremental_examples(table: ExpertTable, loads: list[int], budget: int, rows: tuple) -> None:
    assert incremental(table, loads, budget).slots_PS == rows


def test_incremental_follows_a_drift_with_few_moves() -> None:
    loads = zipf(60)
    table = replicated(loads, 8, 9)
    drawn = random.Random(1)
    drifted = [int(load * drawn.uniform(0.5, 2)) for load in loads]
    fresh = replicated(drifted, 8, 9)
    better = incremental(table, drifted, 8)
    assert imbalance(better, drifted) < 1.06 and imbalance(table, drifted) > 1.2
    assert 4 * sum(map(len, plan_moves(table, better))) < sum(map(len, plan_moves(table, fresh)))


# After a loss


@pytest.mark.parametrize("planner", [linear, round_robin])
@pytest.mark.parametrize("rank", range(8))
def test_repair_after_the_loss_of_each_rank(planner, rank: int) -> None:
    table = planner(60, 8).without_rank(rank)
    whole = repair(table)
    whole.check()
    assert whole.slots == 9, "60 experts on 7 ranks"
    padded = table.with_slots(9)
    assert fills(padded, whole) == len(table.missing)
    for before, after in zip(padded.slots_PS, whole.slots_PS, strict=True):
        assert all(a in (b, -1) for a, b in zip(before, after, strict=True)), "what is in place stays"
    sizes = [len(whole.experts_of(r)) for r in range(7)]
    assert max(sizes) - min(sizes) <= 1


@given(LOADS, st.integers(2, 5), st.integers(0, 3), st.data())
def test_repair_is_minimal(loads: list[int], ranks: int, redundant: int, data: st.DataObject) -> None:
    table = replicated(loads, ranks, slots_needed(len(loads), ranks, redundant))
    lost = table.without_rank(data.draw(st.integers(0, ranks - 1)))
    whole = repair(lost)
    whole.check()
    assert fills(lost.with_slots(whole.slots), whole) == len(lost.missing)
    assert whole.slots == lost.slots or whole.ranks * (whole.slots - 1) < sum(whole.replicas_E)
    assert all(a <= b for a, b in zip(lost.replicas_E, whole.replicas_E, strict=True)), "no replica is dropped"

    least = max(lost.slots, slots_needed(len(loads), ranks - 1))
    tight = repair(lost, least)
    tight.check()
    assert tight.slots <= least
    dropped = sum(lost.replicas_E) + len(lost.missing) - sum(tight.replicas_E)
    room = lost.ranks * least - sum(lost.replicas_E)
    assert dropped == max(0, len(lost.missing) - room), "replicas are dropped only where nothing else helps"


def test_repair_takes_the_place_of_a_replica_at_the_limit() -> None:
    table = ExpertTable(4, ((0, 1), (1, 2), (1, 2)))
    assert repair(table, 2).slots_PS == ((0, 3), (1, 2), (1, 2))
    assert repair(table, 3).slots_PS == ((0, 1, 3), (1, 2, -1), (1, 2, -1))
    assert repair(table) == repair(table, 3) == repair(table, 9)


def test_repair_of_a_whole_table_changes_nothing() -> None:
    table = ExpertTable(2, ((0, -1), (1, -1)), ((0, 0), (1, 0)))
    assert repair(table) == table == repair(table, 4)


def test_planners_keep_the_host_homes() -> None:
    table = ExpertTable(2, ((0, -1), (1, -1)), ((0, 0), (1, 0)))
    assert incremental(table, [9, 1], 1).hosts_E == table.hosts_E
    assert repair(table.without_rank(1)).hosts_E == ((0, 0), (-1, -1))
