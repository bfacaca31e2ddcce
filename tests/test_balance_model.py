"""The modelled price against cases worked by hand, and the bound against plans found by brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from balance_problems import RATES, hot_loads, problem_of, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.balance import priced
from moeyard.scheduler.balance.baselines import BASELINES
from moeyard.scheduler.balance.model import bound, price, rank_times, rates_array
from moeyard.scheduler.balance.plan import Plan, Transfer, check, native
from moeyard.scheduler.balance.problem import Problem, Rates

NS = 1_000_000
SIMPLE = Rates(base_ns=0, expert_ps=0, row_ps=1_000_000, near_fs_per_byte=NS)
"""A row takes 1 us."""


def test_rates_in_the_order_of_their_fields() -> None:
    rates = Rates(*range(1, 12))
    assert rates_array(rates).tolist() == list(range(1, 12))


def test_guests_wait_for_their_weights_and_for_each_other() -> None:
    problem = problem_of([20, 20, 5], 2, home_E=[0, 0, 1], expert_bytes=10_000, rates=replace(SIMPLE, guest_ns=500))
    plan = Plan(
        "test",
        np.array([[10, 10], [10, 10], [0, 5]]),
        np.zeros(3, dtype=np.int64),
        (Transfer(0, 0, 1), Transfer(1, 0, 1)),
    )
    # Rank 1: own work to 5 us; the first guest comes at 10 and takes 10.5, the second comes at 20 and waits to 20.5.
    assert rank_times(problem, plan) == [20_000, 31_000]
    hidden = replace(problem, rates=replace(problem.rates, hidden_ns=100_000))
    assert rank_times(hidden, plan) == [20_000, 26_000]


def test_a_slice_group_shares_arithmetic_but_not_the_rows_way() -> None:
    transfers = tuple(Transfer(0, 0, 1 + part, part, 2) for part in range(2))
    plan = Plan("test", np.array([[10, 0, 0]]), np.array([10]), transfers)
    for wire_ps, last in ((0, 15_000), (800_000, 18_000)):
        problem = problem_of([20], 3, home_E=[0], expert_bytes=10_000, rates=replace(SIMPLE, wire_ps=wire_ps))
        assert rank_times(problem, plan)[2] == last


# The bound


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 50_001),  # weights in a nanosecond: the mean, and that
        ({"expert_bytes": 10_000}, 55_000),  # T = 100 - (T - 10)
        ({"expert_bytes": 200_000}, 100_000),  # nothing arrives in time
    ],
)
def test_two_ranks_and_one_expert(options: dict, least: int) -> None:
    problem = problem_of([100], 2, home_E=[0], **{"expert_bytes": 1, "rates": SIMPLE, **options})
    assert least * 0.99 <= bound(problem) <= least


def test_streaming_does_not_go_away() -> None:
    """Three ranks stream eight experts each, one has rows: no plan brings their streaming and its rows together."""
    rates = replace(SIMPLE, expert_ps=10_000_000)
    problem = problem_of([30] * 8 + [1] * 24, 4, rates=rates, expert_bytes=1)
    assert bound(problem) == (240_000 + 3 * 80_000) // 4


def test_nothing_to_do_takes_no_time() -> None:
    assert bound(problem_of([0, 0], 2)) == price(problem_of([0, 0], 2), native(problem_of([0, 0], 2))) == 0


@settings(max_examples=60, deadline=None)
@given(
    loads=st.lists(st.integers(0, 40), min_size=2, max_size=3),
    expert_us=st.integers(0, 5),
    transfer_us=st.integers(0, 12),
    wire=st.sampled_from([0, 500_000, NS]),
    per_node=st.sampled_from([1, 3]),
)
def test_no_plan_of_three_ranks_is_below_it(
    loads: list[int], expert_us: int, transfer_us: int, wire: int, per_node: int
) -> None:
    """All experts on rank 0: every set of whole transfers and relays, or slices, with any split in steps of a fifth."""
    rates = Rates(
        base_ns=1_000,
        expert_ps=expert_us * NS,
        row_ps=NS,
        wire_ps=wire,
        near_alpha_ns=500,
        near_fs_per_byte=transfer_us * NS // 10,
        far_alpha_ns=1_000,
        far_fs_per_byte=transfer_us * NS // 5,
        guest_ns=200,
    )
    problem = problem_of(loads, 3, home_E=[0] * len(loads), expert_bytes=10_000, rates=rates, ranks_per_node=per_node)
    least = bound(problem)
    hot = int(np.argmax(loads))
    for ways in (
        (Transfer(hot, 0, 1),),
        (Transfer(hot, 0, 1), Transfer(hot, 0, 2)),
        (Transfer(hot, 0, 1), Transfer(hot, 1, 2)),
        (Transfer(hot, 0, 1, 0, 2), Transfer(hot, 0, 2, 1, 2)),
        *(((Transfer(hot, 0, 1), Transfer(1 - hot, 0, 2)),) if hot < 2 else ()),
    ):
        for fifths in product(range(6), repeat=2):
            if sum(fifths) <= 5:
                assert least <= price(problem, _filled(problem, ways, fifths))


def _filled(problem: Problem, transfers: tuple[Transfer, ...], fifths: tuple[int, ...]) -> Plan:
    """Native but for those fifths of the transferred experts' rows; a slice group gets the first's."""
    plan = native(problem)
    rows_EP, sliced_E = plan.rows_EP.copy(), plan.sliced_E.copy()
    for t, fifth in zip(transfers, fifths, strict=False):
        if t.parts > 1 and t.part:
            continue
        rows = int(problem.loads_E[t.expert]) * fifth // 5
        rows_EP[t.expert, 0] -= rows
        if t.parts > 1:
            sliced_E[t.expert] = rows
        else:
            rows_EP[t.expert, t.destination] += rows
    return Plan("test", rows_EP, sliced_E, transfers)


def test_experts_leave_one_after_the_other() -> None:
    """Four experts of 50 us on one rank, and a transfer takes 60: one leaves in time, and a part of the second."""
    problem = problem_of([50] * 4 + [0] * 4, 2, home_E=[0] * 4 + [1] * 4, rates=SIMPLE, expert_bytes=60_000)
    assert bound(problem) == 135_000


def test_where_copies_are_decides_how_many_experts_a_rank_streams() -> None:
    """Rank 0 alone holds three experts, rank 1 one; a transfer is longer than all the streaming."""
    rates = replace(SIMPLE, row_ps=0, expert_ps=10 * NS)
    problem = problem_of([1] * 4, 2, home_E=[0, 0, 0, 1], rates=rates, expert_bytes=100_000)
    assert bound(problem) == price(problem, native(problem)) == 30_000


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_no_planner_is_below_it(problem: Problem) -> None:
    least = bound(problem)
    for planner in BASELINES.values():
        assert least <= price(problem, planner(problem))


def test_faster_links_never_raise_it() -> None:
    loads = hot_loads(64, 30_000, 0.6, 4)
    slow = bound(problem_of(loads, 8, rates=RATES))
    assert bound(problem_of(loads, 8, rates=replace(RATES, near_fs_per_byte=1_000))) < slow


def test_a_bundle_to_other_nodes_is_one_more_way_out() -> None:
    loads = hot_loads(64, 30_000, 0.6, 4)
    assert bound(problem_of(loads, 8, ranks_per_node=4, rates=RATES)) < bound(problem_of(loads, 8, rates=RATES))


def test_an_expert_with_many_rows_is_streamed_by_several_ranks() -> None:
    """Two ranks hold all: 15 experts of one row, and one whose rows take as long as all the streaming. It is streamed
    twice, by slices or whole, wherever it is.
    """
    rates = replace(SIMPLE, expert_ps=10 * NS)
    held = np.ones((2, 16), dtype=int)
    problem = problem_of([150] + [1] * 15, 2, holds_PE=held, home_E=[0] * 16, rates=rates, expert_bytes=100_000)
    assert bound(problem) >= 85_000


def test_an_expert_cannot_be_streamed_elsewhere_before_it_is_there() -> None:
    """Three experts of 10 us each on rank 0, and a transfer takes 25: it comes too late to save the third stream."""
    rates = replace(SIMPLE, row_ps=0, expert_ps=10 * NS)
    problem = problem_of([1] * 3, 2, home_E=[0, 0, 0], rates=rates, expert_bytes=25_000)
    assert bound(problem) == price(problem, native(problem)) == 30_000


def test_a_part_of_an_expert_may_stay_in_its_node() -> None:
    """Rank 2 has the hot expert. Half of its columns go to rank 3 beside it, only the other half to another node."""
    held = np.array([[0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]])
    problem = problem_of([366, 3138, 4], 4, holds_PE=held, home_E=[3, 2, 0], ranks_per_node=2)
    plan = Plan(
        "test",
        np.array([[0, 0, 0, 366], [0, 0, 1685, 0], [4, 0, 0, 0]]),
        np.array([0, 1453, 0]),
        (Transfer(1, 2, 3, 0, 2), Transfer(1, 2, 1, 1, 2)),
    )
    check(problem, plan)
    assert bound(problem) <= price(problem, plan)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.integers(2, 8),
    experts=st.integers(1, 12),
    nodes=st.integers(1, 3),
    rows=st.integers(50, 60_000),
)
def test_our_planner_is_not_below_it(seed: int, ranks: int, experts: int, nodes: int, rows: int) -> None:
    """Times like those of GPUs, where transfers, rows and streaming all count."""
    rng = np.random.default_rng(seed)
    home_E = rng.integers(ranks, size=experts)
    held = (rng.random((ranks, experts)) < rng.choice([0.0, 0.1, 0.4])).astype(int)
    held[home_E, np.arange(experts)] = 1
    loads = (rng.dirichlet(np.full(experts, rng.choice([0.2, 1.0, 20.0]))) * rows).astype(int).tolist()
    rates = replace(RATES, wire_ps=int(rng.choice([0, 25_600, 60_000])))
    problem = problem_of(loads, ranks, holds_PE=held, home_E=home_E, ranks_per_node=-(-ranks // nodes), rates=rates)
    assert bound(problem) <= priced.plan(problem).modelled_ns
