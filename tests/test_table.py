"""The expert table: what it answers, what it refuses, and that it survives every trip."""

from __future__ import annotations

import json

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.scheduler.table import ExpertTable

# Expert 1 on both ranks, one empty slot.
TABLE = ExpertTable(3, ((1, 0), (-1, 1)), ((0, 0), (1, 4), (-1, -1)))
FULL = ExpertTable(3, ((1, 0, -1), (-1, 1, 2)), ((0, 0), (1, 4), (-1, -1)))


@st.composite
def tables(draw: st.DrawFn, min_ranks: int = 1) -> ExpertTable:
    """Any table: experts may be missing or on a rank twice."""
    experts, ranks, slots = draw(st.integers(1, 6)), draw(st.integers(min_ranks, 4)), draw(st.integers(0, 4))
    row = st.tuples(*[st.integers(-1, experts - 1)] * slots)
    home = st.one_of(st.just((-1, -1)), st.tuples(st.integers(0, ranks - 1), st.integers(0, 9)))
    hosts = draw(st.one_of(st.none(), st.tuples(*[home] * experts)))
    return ExpertTable(experts, draw(st.tuples(*[row] * ranks)), hosts)


def test_what_it_answers() -> None:
    assert (FULL.ranks, FULL.slots) == (2, 3)
    assert [FULL.homes(e) for e in range(3)] == [((0, 1),), ((0, 0), (1, 1)), ((1, 2),)]
    assert FULL.replicas_E == (1, 2, 1)
    assert FULL.missing == () and TABLE.missing == (2,)
    assert [FULL.experts_of(r) for r in (0, 1)] == [(1, 0), (1, 2)]
    assert [FULL.slot_of(r) for r in (0, 1)] == [[1, 0, -1], [-1, 1, 2]]
    FULL.check()
    TABLE.check(complete=False)


@given(tables())
def test_every_view_says_the_same(table: ExpertTable) -> None:
    seen = {(r, s): e for r, row in enumerate(table.slots_PS) for s, e in enumerate(row) if e >= 0}
    homes = {home: e for e in range(table.experts) for home in table.homes(e)}
    assert homes == seen
    assert sum(table.replicas_E) == len(seen)
    assert set(table.missing) == set(range(table.experts)) - set(seen.values())
    for rank in range(table.ranks):
        assert table.experts_of(rank) == tuple(e for (r, _), e in sorted(seen.items()) if r == rank)
        for expert, slot in enumerate(table.slot_of(rank)):
            assert seen[rank, slot] == expert if slot >= 0 else expert not in table.experts_of(rank)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (ExpertTable(0, ((),)), "experts is 0"),
        (ExpertTable(1, ()), "slots_PS is empty"),
        (ExpertTable(2, ((0, 1), (0,))), "rank 1 has 1 slots and rank 0 has 2"),
        (ExpertTable(2, ((0, 1), (2, -1))), "rank 1, slot 0 has expert 2; ids are -1 .* and 0 to 1"),
        (ExpertTable(2, ((0, -2),)), "rank 0, slot 1 has expert -2"),
        (ExpertTable(2, ((0, 1, 0),)), "rank 0 has expert 0 in slot 0 and in slot 2"),
        (ExpertTable(4, ((0, -1), (2, -1))), r"expert 1 has no home \(2 in all\)"),
        (ExpertTable(1, ((0,),), ()), "hosts_E has 0 entries"),
        (ExpertTable(1, ((0,),), ((1, 0),)), r"expert 0 has the host home \(1, 0\).*rank from 0 to 0"),
        (ExpertTable(1, ((0,),), ((0, -1),)), "expert 0 has the host home"),
    ],
)
def test_check_refuses(table: ExpertTable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table.check()


@given(tables())
def test_lists_come_back(table: ExpertTable) -> None:
    lists = [table.to_lists(), table.hosts_E and list(map(list, table.hosts_E))]
    for trip in (lambda x: json.loads(json.dumps(x)), lambda x: msgpack.unpackb(msgpack.packb(x))):
        rows, hosts = trip(lists)
        back = ExpertTable.from_lists(table.experts, rows, hosts)
        assert back == table and hash(back) == hash(table) and back.digest() == table.digest()


def test_from_lists_gives_plain_integers_and_takes_nothing_else() -> None:
    assert FULL.hosts_E is not None
    rows, hosts = (list(map(list, np.array(a))) for a in (FULL.to_lists(), FULL.hosts_E))
    table = ExpertTable.from_lists(3, rows, hosts)
    assert table == FULL and table.digest() == FULL.digest()
    assert all(type(expert) is int for row in table.slots_PS for expert in row)
    with pytest.raises(ValueError, match=r"rank 1, slot 0 is 0\.5; give an integer"):
        ExpertTable.from_lists(1, [[0], [0.5]])
    with pytest.raises(ValueError, match="rank 0, slot 1 is None"):
        ExpertTable.from_lists(1, [[0, None]])
    with pytest.raises(ValueError, match="expert 0 has the host home"):
        ExpertTable.from_lists(1, [[0]], [[0]])


@given(tables(min_ranks=2), st.data())
def test_a_rank_goes(table: ExpertTable, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, table.ranks - 1))
    less = table.without_rank(rank)
    assert less.slots_PS == table.slots_PS[:rank] + table.slots_PS[rank + 1 :]
    if table.hosts_E is None:
        assert less.hosts_E is None
    else:
        numbers = [number for number in range(table.ranks) if number != rank]  # before, of those that are left
        assert less.hosts_E == tuple(
            (-1, -1) if host not in numbers else (numbers.index(host), offset) for host, offset in table.hosts_E
        )


def test_host_homes_are_renumbered_with_the_ranks() -> None:
    table = ExpertTable(4, ((0,), (1,), (2,)), ((0, 5), (1, 6), (2, 7), (-1, -1)))
    assert table.without_rank(1).hosts_E == ((0, 5), (-1, -1), (1, 7), (-1, -1))


@given(tables(), st.integers(0, 3))
def test_more_slots_are_empty(table: ExpertTable, more: int) -> None:
    padded = table.with_slots(table.slots + more)
    assert padded.slots == table.slots + more
    assert [padded.homes(e) for e in range(table.experts)] == [table.homes(e) for e in range(table.experts)]


def test_the_digest_is_the_same_everywhere() -> None:
    assert FULL.digest() == 6316221351134201066  # whatever the machine and the hash seed
    assert 0 <= FULL.digest() < 2**63


def test_the_digest_sees_every_part() -> None:
    others = [
        ExpertTable(4, FULL.slots_PS, FULL.hosts_E),
        ExpertTable(3, FULL.slots_PS[::-1], FULL.hosts_E),
        ExpertTable(3, FULL.slots_PS, None),
        ExpertTable(3, FULL.slots_PS, ((0, 0), (1, 5), (-1, -1))),
        FULL.with_slots(4),
    ]
    assert len({table.digest() for table in [FULL, *others]}) == 1 + len(others)
