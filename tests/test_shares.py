"""Shares: every row once, as the plan says, near first; the order in which they are taken is a permutation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.balance.plan import Plan, check
from moeyard.scheduler.balance.problem import Problem, Rates
from moeyard.scheduler.balance.shares import mixing_step, own_shares


def problem_of(rows_PE, holds_PE, nodes) -> Problem:
    ranks = len(rows_PE)
    holds = np.array(holds_PE)
    return Problem(
        rows_PE=np.array(rows_PE),
        holds_PE=holds,
        home_E=holds.argmax(0),
        node_P=np.array(nodes),
        expert_bytes=8,
        room_P=np.full(ranks, 1000),
        most_rows_P=np.full(ranks, 10**6),
        rates=Rates(base_ns=1, expert_ps=1, row_ps=1),
    )


def test_a_worked_example():
    # Expert 0 is on all ranks, with 2 rows of each source. Ranks 0 and 1 are one node.
    problem = problem_of([[2], [2], [2]], [[1], [1], [1]], [0, 0, 1])
    plan = Plan("x", np.array([[4, 0, 2]]), np.array([0]))
    check(problem, plan)
    assert [own_shares(problem, plan, p).tolist() for p in range(3)] == [
        [[2, 0, 0, 0]],
        [[2, 0, 0, 0]],  # to the rank of its node
        [[0, 0, 2, 0]],
    ]


@st.composite
def cases(draw):
    ranks = draw(st.integers(1, 5))
    experts = draw(st.integers(1, 6))
    rows = draw(
        st.lists(st.lists(st.integers(0, 9), min_size=experts, max_size=experts), min_size=ranks, max_size=ranks)
    )
    nodes = sorted(draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    nodes = [sorted(set(nodes)).index(n) for n in nodes]
    loads = np.array(rows).sum(0)
    shares = np.zeros((experts, ranks + 1), dtype=np.int64)
    for e in range(experts):
        for _ in range(loads[e]):
            shares[e, draw(st.integers(0, ranks))] += 1
    return problem_of(rows, np.ones((ranks, experts)), nodes), Plan("x", shares[:, :-1], shares[:, -1])


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_row_goes_once_where_the_plan_says(case):
    problem, plan = case
    shares = np.stack([own_shares(problem, plan, p) for p in range(problem.ranks)])
    assert (shares >= 0).all()
    assert (shares.sum(2) == problem.rows_PE).all()
    assert (shares.sum(0)[:, :-1] == plan.rows_EP).all()
    assert (shares.sum(0)[:, -1] == plan.sliced_E).all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_what_can_stay_stays(case):
    problem, plan = case
    for p in range(problem.ranks):
        stays = own_shares(problem, plan, p)[:, p]
        assert (stays == np.minimum(problem.rows_PE[p], plan.rows_EP[:, p])).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 10, 97, 1000, 4096])
def test_the_order_visits_every_place_once_and_spreads(rows):
    step = mixing_step(rows)
    order = [(i * step) % rows for i in range(rows)]
    assert sorted(order) == list(range(rows))
    if rows >= 1000:  # the first eighth has its share of each half
        low = sum(place < rows // 2 for place in order[: rows // 8])
        assert abs(low - rows // 16) <= rows // 64
