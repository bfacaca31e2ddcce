"""From one table to another: no unit may cost an expert its last home, nor end anywhere but at the new table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.scheduler.moves import Transfer, Unit, apply, plan_moves
from moeyard.scheduler.placement import keep_slots, linear, repair, replicated, round_robin
from moeyard.scheduler.table import ExpertTable


@st.composite
def table_of(draw: st.DrawFn, experts: int, ranks: int, slots: int) -> ExpertTable:
    """Any valid table of that shape."""
    positions = draw(st.permutations([(r, s) for r in range(ranks) for s in range(slots)]))
    rows = [[-1] * slots for _ in range(ranks)]
    for index, (rank, slot) in enumerate(positions):
        if index < experts:
            rows[rank][slot] = index
        else:
            rows[rank][slot] = draw(st.sampled_from([-1, *sorted(set(range(experts)) - set(rows[rank]))]))
    return ExpertTable.from_lists(experts, rows)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ExpertTable, ExpertTable]:
    """Two valid tables of one shape, often with no spare slot at all."""
    experts, ranks = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    slots = -(-experts // ranks) + draw(st.integers(0, 2))
    return draw(table_of(experts, ranks, slots)), draw(table_of(experts, ranks, slots))


@st.composite
def losses(draw: st.DrawFn) -> tuple[ExpertTable, ExpertTable]:
    """The old table has lost some of its slots' contents."""
    old, new = draw(pairs())
    lost = draw(st.sets(st.tuples(st.integers(0, old.ranks - 1), st.integers(0, old.slots - 1))))
    rows = [[-1 if (r, s) in lost else e for s, e in enumerate(row)] for r, row in enumerate(old.slots_PS)]
    return ExpertTable.from_lists(old.experts, rows), new


def walk(old: ExpertTable, new: ExpertTable) -> list[Unit]:
    """Does all units, on the table and on a memory that knows only copies; checks all that must hold."""
    units = plan_moves(old, new)
    assert units == plan_moves(old, new)
    memory = {(r, s): e for r, row in enumerate(old.slots_PS) for s, e in enumerate(row)}
    table = old
    settled: set[tuple[int, int]] = set()
    for unit in units:
        assert 1 <= len(unit) <= 2 and len({t.target for t in unit}) == len(unit)
        for t in unit:
            if t.source is None:
                assert t.expert in table.missing
            else:
                assert t.source in table.homes(t.expert)
                assert t.source[0] == t.target[0] or t.target[0] not in [rank for rank, _ in table.homes(t.expert)]
            assert not settled & {t.target}, "a slot that was right is written again"
        read = [t.expert if t.source is None else memory[t.source] for t in unit]
        memory.update((t.target, expert) for t, expert in zip(unit, read, strict=True))

        after = apply(table, unit)
        after.check(complete=False)
        assert set(after.missing) <= set(table.missing)
        for expert in range(old.experts):
            assert all(memory[home] == expert for home in after.homes(expert))
        table = after
        settled |= {t.target for t in unit if t.expert == new.slots_PS[t.target[0]][t.target[1]]}
    for rank, row in enumerate(new.slots_PS):
        for slot, expert in enumerate(row):
            assert expert in (-1, table.slots_PS[rank][slot])
    differ = sum(
        b not in (a, -1) for x, y in zip(old.slots_PS, new.slots_PS, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert differ <= sum(map(len, units)) <= 2 * differ
    assert len(units) <= differ
    return units


@given(pairs())
def test_between_any_two_tables(pair: tuple[ExpertTable, ExpertTable]) -> None:
    walk(*pair)


@given(losses())
def test_with_experts_lost(pair: tuple[ExpertTable, ExpertTable]) -> None:
    old, new = pair
    units = walk(old, new)
    from_checkpoint = [t.expert for unit in units for t in unit if t.source is None]
    assert sorted(from_checkpoint) == list(old.missing), "each lost expert is read from the checkpoint once"


@given(pairs())
def test_nothing_to_do(pair: tuple[ExpertTable, ExpertTable]) -> None:
    assert plan_moves(pair[0], pair[0]) == []


T = ExpertTable.from_lists


@pytest.mark.parametrize(
    ("old", "new", "units"),
    [
        pytest.param(T(2, [[0], [1]]), T(2, [[1], [0]]), [[(0, (0, 0), (1, 0)), (1, (1, 0), (0, 0))]], id="swap"),
        pytest.param(
            T(2, [[0, 1]]), T(2, [[1, 0]]), [[(0, (0, 0), (0, 1)), (1, (0, 1), (0, 0))]], id="swap on one rank"
        ),
        pytest.param(
            T(3, [[0], [1], [2]]),
            T(3, [[2], [0], [1]]),
            [[(0, (0, 0), (1, 0)), (1, (1, 0), (0, 0))], [(1, (0, 0), (2, 0)), (2, (2, 0), (0, 0))]],
            id="a cycle of three is two swaps",
        ),
        pytest.param(T(2, [[0, -1], [1, -1]]), T(2, [[0, -1], [-1, 1]]), [[(1, (1, 0), (1, 1))]], id="emptied slot"),
        pytest.param(T(2, [[0, 1], [0, 1]]), T(2, [[0, 1], [-1, -1]]), [], id="dropping replicas is free"),
        pytest.param(
            T(3, [[0, 1], [2, -1]]),
            T(3, [[2, 1], [0, -1]]),
            [[(0, (0, 0), (1, 0)), (2, (1, 0), (0, 0))]],
            id="no detour over an empty slot",
        ),
        pytest.param(
            T(3, [[0, 1], [2, 1]]),
            T(3, [[0, 2], [1, -1]]),
            [[(2, (1, 0), (0, 1))], [(1, (1, 1), (1, 0))]],
            id="a replica makes room; the source is on the target's rank",
        ),
        pytest.param(
            T(3, [[0, -1], [0, -1], [-1, -1]]),
            T(3, [[0, 2], [0, -1], [1, 0]]),
            [[(2, None, (0, 1))], [(1, None, (2, 0))], [(0, (0, 0), (2, 1))]],
            id="the lost ones first, then from the lowest rank",
        ),
        pytest.param(
            T(2, [[-1], [-1]]), T(2, [[1], [0]]), [[(1, None, (0, 0))], [(0, None, (1, 0))]], id="everything lost"
        ),
        pytest.param(
            T(2, [[1, -1], [-1, -1]]),
            T(2, [[0, 1], [0, -1]]),
            [[(0, None, (1, 0))], [(1, (0, 0), (0, 1))], [(0, (1, 0), (0, 0))]],
            id="a lost one's second replica comes from its first",
        ),
    ],
)
def test_examples(old: ExpertTable, new: ExpertTable, units: list[list[tuple]]) -> None:
    assert walk(old, new) == [tuple(Transfer(*t) for t in unit) for unit in units]


def test_apply_keeps_the_host_homes() -> None:
    table = ExpertTable(2, ((0,), (1,)), ((0, 0), (1, 0)))
    (unit,) = plan_moves(table, table.with_rows([[1], [0]]))
    assert apply(table, unit) == ExpertTable(2, ((1,), (0,)), ((0, 0), (1, 0)))


def test_apply_refuses_a_source_without_the_expert() -> None:
    with pytest.raises(AssertionError, match="not there"):
        apply(linear(2, 2), (Transfer(0, (1, 0), (1, 0)),))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (linear(2, 2, 2), linear(3, 2, 2), "experts: the old table has 2 and the new one 3"),
        (linear(2, 2, 1), linear(2, 1, 2), "ranks: the old table has 2 and the new one 1"),
        (linear(2, 2, 1), linear(2, 2, 2), "slots: the old table has 1 and the new one 2"),
        (linear(2, 2), T(2, [[0], [-1]]), "expert 1 has no home"),
        (T(2, [[0, 0], [1, 1]]), linear(2, 2, 2), "rank 0 has expert 0 in slot 0 and in slot 1"),
    ],
)
def test_tables_that_do_not_fit(old: ExpertTable, new: ExpertTable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_moves(old, new)


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(60, 8, 8), (60, 8, 9), (128, 16, 8), (256, 32, 9)])
def test_real_sizes(experts: int, ranks: int, slots: int) -> None:
    loads = [10_000 // (1 + (7 * e) % experts) for e in range(experts)]
    start, hot = linear(experts, ranks, slots), replicated(loads, ranks, slots)
    walk(start, round_robin(experts, ranks, slots))
    fresh, kept = walk(start, hot), walk(start, keep_slots(hot, start))
    assert sum(map(len, kept)) <= sum(map(len, fresh))


@pytest.mark.parametrize("rank", range(8))
def test_after_the_loss_of_a_rank_only_its_experts_are_read(rank: int) -> None:
    table = linear(60, 8)
    old = table.without_rank(rank)
    new = repair(old)
    units = walk(old.with_slots(new.slots), new)
    assert sorted(t.expert for unit in units for t in unit) == list(table.experts_of(rank))
    assert all(t.source is None for unit in units for t in unit)
