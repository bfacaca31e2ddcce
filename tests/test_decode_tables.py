"""Tables for steps without plans: when there are counts to exchange, whose turn it is, and what a table may send where.

What they do to results is in test_balanced_layer, over gloo.
"""

import doctest
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moeyard.engine import decode_tables as module
from moeyard.engine.balance import Balancer
from moeyard.engine.balanced_layer import BalancedLayer
from moeyard.engine.decode_tables import DecodeTables
from moeyard.engine.lookup import Lookup, Lookups
from moeyard.scheduler import placement
from moeyard.scheduler.balance.leases import Evict, Keep
from moeyard.scheduler.balance.plan import native
from moeyard.scheduler.balance.problem import Rates
from moeyard.scheduler.step_plan import StepPlan
from moeyard.scheduler.table import ExpertTable

EXPERTS, RANKS, TOP_K = 4, 2, 2
RATES = Rates(base_ns=0, expert_ps=1000, row_ps=1000, near_alpha_ns=10)
EVERYWHERE = ExpertTable.from_lists(EXPERTS, [range(EXPERTS)] * RANKS)


class Group:
    """Rank 0 of two; rank 1 has no tokens."""

    size, position, device = RANKS, 0, torch.device("cpu")

    def __init__(self):
        self.progress = SimpleNamespace(step_ns=0)
        self.exchanged = []

    def all_gather_counts(self, mine):
        self.exchanged.append(mine[2:].tolist())
        return torch.stack([mine, torch.cat([mine[:2], torch.zeros_like(mine[2:])])])


class Room:
    """Of two experts, without any bytes."""

    slots, expert_bytes = 2, 8

    def copy(self, from_slot, to_slot):
        pass


class Engine:
    def __init__(self, tables, length, rates=RATES):
        self.group = Group()
        self.balancer = Balancer(self.group, native, Room(), node_P=[0] * RANKS, rates=rates)
        self.counts = [torch.zeros(EXPERTS, dtype=torch.long) for _ in tables]
        self.lookups = [Lookups(table, self.group.device) for table in tables]
        cutter = SimpleNamespace(nbytes=lambda: 8, most_parts=1)
        for index, (lookups, table) in enumerate(zip(self.lookups, tables, strict=True)):
            BalancedLayer(self.balancer, index, None, cutter, lookups, table, lambda index=index: self.counts[index])
        self.tables = self.balancer.tables = DecodeTables(self.balancer, TOP_K, length)

    def steps(self, number, rows=(40, 40, 0, 0), balanced=False, step_us=0):
        """The layers that have a table after each step."""
        have = []
        for _ in range(number):
            plan = StepPlan(
                step=0, tokens_P=(40, 0), dispatcher="all_to_all", degree=1, table_digest=0, balanced=balanced
            )
            self.tables.advance(plan)
            for counts in self.counts:
                counts += torch.tensor(rows)
            self.group.progress.step_ns += step_us * 1000
            have.append([index for index, lookups in enumerate(self.lookups) if lookups.published])
        return have


def test_the_worked_example():
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_no_counts_are_exchanged_where_every_expert_has_one_holder():
    engine = Engine([placement.linear(EXPERTS, RANKS)] * 2, length=2)
    assert engine.steps(10) == [[]] * 10 and not engine.group.exchanged


@pytest.mark.parametrize("rates", [Rates(0, 0, 0), Rates(base_ns=9, expert_ps=1, row_ps=1, plan_ns=10**6)])
def test_nor_where_a_table_cannot_pay(rates):
    engine = Engine([EVERYWHERE], length=2, rates=rates)
    assert engine.steps(10) == [[]] * 10 and not engine.group.exchanged


def test_only_layers_with_a_choice_and_steps_without_plans_count():
    engine = Engine([placement.linear(EXPERTS, RANKS), EVERYWHERE], length=3)
    engine.steps(2, (1, 2, 3, 4))
    engine.steps(4, (100, 100, 100, 100), balanced=True)
    engine.steps(2, (1, 2, 3, 4))
    assert engine.group.exchanged == [[3, 6, 9, 12]]
    engine.steps(3, (0, 1, 0, 0))
    assert engine.group.exchanged[1:] == [[1, 4, 3, 4]]


def test_layers_take_turns_one_in_a_window_until_it_is_known_what_a_table_costs(monkeypatch):
    clock = iter(range(0, 10**12, 2_000_000))  # a table takes 2 ms
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: next(clock))
    engine = Engine([EVERYWHERE] * 4, length=8)
    have = engine.steps(60, step_us=50_000)  # so one in two steps is a fiftieth
    first = [have.index(next(h for h in have if index in h)) for index in range(4)]
    # The exchange is after 8 steps, the first table comes before the next step.
    assert first == [9, 17, 19, 21]
    assert len(engine.group.exchanged) == 7 and engine.balancer.figures.tables == 4  # nothing new to say afterwards


def test_rows_of_a_guest_go_home_when_it_leaves_and_follow_it_when_it_moves():
    engine = Engine([placement.linear(EXPERTS, RANKS)], length=2)
    balancer, layer, lookups = engine.balancer, engine.balancer.layers[0], engine.lookups[0]
    balancer.leases.move_ns = 10**6
    balancer.leases.make_room(0, [0, 1])
    assert balancer.leases.record(0, {(1, 0): 50}, [(1, 0, 0)], 1) == [Keep(1, 0, 0, 0, 1)]
    layer.update()
    assert layer.has_choice and layer.number_PE[1].tolist() == [2 + 1, -1, 0, 1]
    engine.steps(4, (80, 1, 0, 0))
    assert lookups.published
    ids = torch.zeros(8, 1, dtype=torch.long)
    rank, slot = lookups.current.find(ids, 0)
    assert set(rank.flatten().tolist()) == {0, 1} and set(slot[rank == 1].tolist()) == {3}
    digest = engine.tables.digest

    balancer._carry_out([Evict(1, 0, 0, 1)])
    assert lookups.current.find(ids, 0)[0].unique().tolist() == [0]
    assert engine.tables.digest != digest and balancer.figures.guests_evicted == 1
    balancer.drop_guests()
    assert not lookups.published and not layer.has_choice


@pytest.mark.parametrize("places", [1, 8])
def test_a_lookup_knows_every_source_expert_and_place(places):
    ranks, experts = 3, 5
    rng = np.random.default_rng(places)
    rank_PEQ = rng.integers(ranks, size=(ranks, experts, places))
    slot_PEQ = rng.integers(100, size=rank_PEQ.shape)
    lookup = Lookup(rank_PEQ, slot_PEQ, torch.device("cpu"))
    ids_PTK = torch.from_numpy(rng.integers(-1, experts, size=(ranks, 21, 2)))
    for first, last in ((0, 21), (0, 10), (10, 21)):
        slots = torch.stack([lookup.slots_at(p, ids_PTK[:, first:last], first) for p in range(ranks)])
        for source in range(ranks):
            rank_TK, slot_TK = lookup.find(ids_PTK[source], source)
            for t in range(first, last):
                for k in range(2):
                    e = int(ids_PTK[source, t, k])
                    there = (rank_PEQ[source, e, t % places], slot_PEQ[source, e, t % places]) if e >= 0 else (-1, -1)
                    assert (rank_TK[t, k], slot_TK[t, k]) == there
                    at = [there[1] if p == there[0] else -1 for p in range(ranks)]
                    assert slots[:, source, t - first, k].tolist() == at
