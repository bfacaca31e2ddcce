"""Moving experts between any two tables, in steps: ranks are threads, weights are numbers that name their expert."""

import queue
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine.experts import ExpertPool, load_experts
from moeyard.engine.mover import Mover
from moeyard.engine.progress import Progress
from moeyard.scheduler import placement
from moeyard.scheduler.moves import plan_moves
from moeyard.scheduler.table import EMPTY, ExpertTable

BOUND_S = 20


class FakeReader:
    """A checkpoint whose expert e of layer l is full of 100 * l + e. Notes what was read."""

    def __init__(self, layer, hidden, bias=False):
        shapes = {"gate_up_proj": (4, hidden), "down_proj": (hidden, 2)}
        if bias:
            shapes |= {"gate_up_proj_bias": (4,), "down_proj_bias": (hidden,)}
        self.spec = SimpleNamespace(
            module="layer", parameters=shapes, has_gate=True, has_bias=bias, is_transposed=False
        )
        self.layer, self.shapes, self.reads = layer, shapes, []
        self.nbytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())

    format, transposed, activation_dtype = None, False, torch.float32

    @property
    def parameters(self):
        return tuple(self.shapes)

    def shape(self, parameter):
        return self.shapes[parameter]

    def dtype(self, parameter):
        return torch.float32

    def read(self, expert):
        self.reads.append(expert)
        return {name: torch.full(shape, 100.0 * self.layer + expert) for name, shape in self.shapes.items()}


class FakeGroup:
    """A position of a group whose ranks are threads: what is sent waits in a queue for each pair."""

    def __init__(self, position, queues):
        self.position, self.progress = position, Progress()
        self._queues = queues

    def exchange_flat(self, sends, receives):
        for to, tensor in sends:
            self._queues[self.position, to].put(tensor.clone())
        for source, tensor in receives:
            tensor.copy_(self._queues[source, self.position].get(timeout=BOUND_S))


class Ranks:
    """The movers of all ranks over the same tables; `step` lets each take one step, at the same time."""

    def __init__(self, tables, limit_bytes=0, hidden=(3, 5)):
        self.size = tables[0].ranks
        queues = {(a, b): queue.Queue() for a in range(self.size) for b in range(self.size)}
        self.groups = [FakeGroup(position, queues) for position in range(self.size)]
        self.movers = []
        for position in range(self.size):
            pools = [
                ExpertPool(FakeReader(layer, hidden[layer], bias=layer == 1), table.slots, torch.device("cpu"))
                for layer, table in enumerate(tables)
            ]
            for pool, table in zip(pools, tables, strict=True):
                list(load_experts(pool, table.slots_PS[position]))
                pool.reader.reads.clear()
            self.movers.append(Mover(pools, tables, limit_bytes))

    def aim(self, goals):
        for mover in self.movers:
            mover.aim(goals)

    def step(self, **options):
        """What changed, and the bytes that each rank took in."""
        before = [mover.moved_bytes for mover in self.movers]
        with ThreadPoolExecutor(self.size) as threads:
            pairs = zip(self.movers, self.groups, strict=True)
            jobs = [threads.submit(mover.step, group, **options) for mover, group in pairs]
            changed = [job.result(timeout=BOUND_S) for job in jobs]
        assert all(layers == changed[0] for layers in changed)
        self.check()
        return changed[0], [mover.moved_bytes - b for mover, b in zip(self.movers, before, strict=True)]

    def check(self):
        """All ranks have the same tables, and in their slots what the tables say, each weight of it."""
        for mover, group in zip(self.movers, self.groups, strict=True):
            assert mover.tables == self.movers[0].tables
            assert mover.pending == self.movers[0].pending
            for layer, (pool, table) in enumerate(zip(mover.pools, mover.tables, strict=True)):
                row = list(table.slots_PS[group.position])
                assert pool.contents == row
                for slot, expert in enumerate(row):
                    if expert != EMPTY:
                        assert all(bool((t[slot] == 100 * layer + expert).all()) for t in pool._tensors())


@st.composite
def tables(draw, count, ranks, slots, experts):
    """Tables of one shape with every expert at least once."""
    made = []
    for _ in range(count):
        positions = draw(st.permutations([(rank, slot) for rank in range(ranks) for slot in range(slots)]))
        rows = [[EMPTY] * slots for _ in range(ranks)]
        for expert, (rank, slot) in enumerate(positions[:experts]):
            rows[rank][slot] = expert
        for rank, slot in positions[experts:]:
            free = [e for e in range(experts) if e not in rows[rank]]
            rows[rank][slot] = draw(st.sampled_from([EMPTY, *free]))
        made.append(ExpertTable.from_lists(experts, rows))
    return made


@st.composite
def journeys(draw):
    """Two layers' tables at the start and two goals for them, a limit in bytes, and the step of the second goal."""
    ranks, slots = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = [draw(st.integers(1, ranks * slots)) for _ in range(2)]
    stops = [draw(tables(3, ranks, slots, count)) for count in experts]
    limit = draw(st.sampled_from([0, 1, 84, 200, 1000]))
    return list(zip(*stops, strict=True)), limit, draw(st.integers(0, 5))


@given(journeys())
@settings(max_examples=40, deadline=None)
def test_between_any_tables_with_another_goal_under_way(journey):
    (start, first, second), limit, at = journey
    ranks = Ranks(list(start), limit)
    most = 2 * max(pool.reader.nbytes for pool in ranks.movers[0].pools)  # a swap within one rank
    ranks.aim(list(first))
    steps = 0
    while ranks.movers[0].pending:
        if steps == at:
            ranks.aim(list(second))
        _, took = ranks.step()
        assert max(took) <= max(limit, most)
        steps += 1
        assert steps <= 4 * sum(table.ranks * table.slots for table in start) + 2
    goal = second if at < steps else first
    assert ranks.movers[0].tables == list(goal)
    assert ranks.step() == ([], [0] * ranks.size)
    assert not any(pool.reader.reads for mover in ranks.movers for pool in mover.pools)  # all came from ranks


START = ExpertTable.from_lists(6, [[0, 1], [2, 3], [4, 5]])
TURNED = ExpertTable.from_lists(6, [[4, 5], [0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("experts_per_step", "expected"),
    [
        (0, 4),  # one unit at a time: a cycle of three slots is two swaps, and there are two cycles
        (0.99, 4),
        (1, 4),
        (2, 2),
        (3, 2),
        (4, 1),
    ],
)
def test_the_limit_is_what_a_rank_takes_in_per_step(experts_per_step, expected):
    ranks = Ranks([START], hidden=(3,))
    nbytes = ranks.movers[0].pools[0].reader.nbytes
    for mover in ranks.movers:
        mover.limit_bytes = int(experts_per_step * nbytes)
    assert [len(unit) for unit in plan_moves(START, TURNED)] == [2] * 4
    ranks.aim([TURNED])
    steps = 0
    while ranks.movers[0].pending:
        changed, took = ranks.step()
        assert changed == [0] and max(took) <= max(nbytes, int(experts_per_step * nbytes))
        steps += 1
    assert steps == expected
    assert ranks.movers[0].tables == [TURNED]


def test_without_a_limit_everything_moves_at_once():
    ranks = Ranks([START], hidden=(3,))
    ranks.aim([TURNED])
    ranks.step(unlimited=True)
    assert not ranks.movers[0].pending and ranks.movers[0].tables == [TURNED]


def test_a_goal_that_is_reached_costs_nothing():
    ranks = Ranks([START], hidden=(3,))
    ranks.aim([START])
    assert ranks.movers[0].pending
    assert ranks.step() == ([], [0, 0, 0])
    assert not ranks.movers[0].pending


def test_a_slot_given_up_is_empty_without_a_transfer():
    full = ExpertTable.from_lists(2, [[0, 1], [1, 0]])
    ranks = Ranks([full], hidden=(3,))
    goal = ExpertTable.from_lists(2, [[0, EMPTY], [1, EMPTY]])
    ranks.aim([goal])
    assert ranks.step() == ([0], [0, 0])
    assert [mover.pools[0].contents for mover in ranks.movers] == [[0, EMPTY], [1, EMPTY]]


def test_only_what_no_rank_has_is_read_from_the_checkpoint():
    # Rank 2 of four is gone, and with it the only copies of experts 4 and 5; 0 has another copy.
    left = ExpertTable.from_lists(8, [[0, 1, EMPTY], [2, 3, 0], [4, 5, 0], [6, 7, EMPTY]]).without_rank(2)
    goal = placement.repair(left)
    ranks = Ranks([left], hidden=(3,))
    ranks.aim([goal])
    ranks.step(unlimited=True)
    assert ranks.movers[0].tables == [goal]
    reads = [mover.pools[0].reader.reads for mover in ranks.movers]
    assert sorted(expert for row in reads for expert in row) == [4, 5]
    for rank, row in enumerate(reads):
        assert set(row) <= set(goal.experts_of(rank))


def test_the_time_is_on_record():
    ranks = Ranks([START], hidden=(3,))
    ranks.aim([TURNED])
    ranks.step(unlimited=True)
    assert all(group.progress.totals_ns["move"] > 0 and group.progress.phase == "" for group in ranks.groups)


def test_tables_of_another_shape_are_refused_and_nothing_is_under_way():
    ranks = Ranks([START], hidden=(3,))
    for goal in (placement.linear(6, 3, 3), placement.linear(6, 2), placement.linear(5, 3)):
        with pytest.raises(ValueError, match=r"^(experts|ranks|slots): the old table"):
            ranks.aim([goal])
    assert not ranks.movers[0].pending and ranks.movers[0].tables == [START]
