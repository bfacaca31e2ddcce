"""The contract of balancing: what a plan may say, and what the model makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from balance_problems import problem_of, problems
from hypothesis import given, settings

from moeyard.scheduler.balance.baselines import BASELINES
from moeyard.scheduler.balance.model import arrivals, bound, price, priced, rank_times, transfer_ns
from moeyard.scheduler.balance.plan import BadPlan, Plan, Transfer, check, chunks_needed, native, received_rows
from moeyard.scheduler.balance.problem import Problem, Rates

NS = 1_000_000  # femtoseconds

# 8 bytes take 2 + 8 ns in a node and 5 + 16 ns between nodes; an expert and a row take 1 ns each.
ROUND = Rates(
    base_ns=100,
    expert_ps=1_000,
    row_ps=1_000,
    near_alpha_ns=2,
    near_fs_per_byte=NS,
    far_alpha_ns=5,
    far_fs_per_byte=2 * NS,
)


def four_ranks(**changes: object) -> Problem:
    """Expert e on rank e, two nodes, 10 rows for each expert but 40 for expert 0; rank 1 has expert 3 too."""
    problem = problem_of(
        [40, 10, 10, 10],
        4,
        home_E=[0, 1, 2, 3],
        holds_PE=[[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]],
        ranks_per_node=2,
        expert_bytes=8,
        rates=ROUND,
    )
    return replace(problem, **changes)


def plan_of(
    rows: dict[tuple[int, int], int], transfers: tuple[Transfer, ...] = (), sliced: dict[int, int] | None = None
) -> Plan:
    """Native rows of `four_ranks`, changed at (expert, rank)."""
    rows_EP = np.diag([40, 10, 10, 10]).astype(np.int64)
    for (expert, rank), n in rows.items():
        rows_EP[expert, rank] = n
    sliced_E = np.zeros(4, dtype=np.int64)
    for expert, n in (sliced or {}).items():
        sliced_E[expert] = n
    return Plan("test", rows_EP, sliced_E, transfers)


WHOLE = plan_of({(0, 0): 25, (0, 1): 15}, (Transfer(0, 0, 1),))
SLICED = plan_of({(0, 0): 30}, (Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 2, 1, 2)), {0: 10})
RELAYED = plan_of({(0, 0): 25, (0, 3): 15}, (Transfer(0, 0, 2), Transfer(0, 2, 3)))
RESPLIT = plan_of({(3, 1): 4, (3, 3): 6})


# Plans


@pytest.mark.parametrize("plan", [plan_of({}), WHOLE, SLICED, RELAYED, RESPLIT])
def test_good_plans(plan: Plan) -> None:
    check(four_ranks(), plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of({(0, 0): 41, (0, 1): -1}), "rows below 0"),
        (plan_of({}, sliced={0: -1}), "rows below 0"),
        (plan_of({(0, 0): 39}), "expert 0 has 40 rows; 39 planned"),
        (plan_of({(1, 2): 1}), "expert 1 has 10 rows; 11 planned"),
        (plan_of({(0, 0): 39, (0, 1): 1}), "rank 1 is to compute expert 0, which it does not have"),
        (plan_of({}, (Transfer(0, 1, 2),)), "the source does not have the expert"),
        (plan_of({}, (Transfer(0, 2, 3), Transfer(0, 0, 2))), "the source does not have the expert"),
        (plan_of({}, (Transfer(0, 0, 1, 0, 2), Transfer(0, 1, 2, 1, 2)), {0: 0}), "the source does not have"),
        (plan_of({}, (Transfer(3, 3, 1),)), "the destination has the expert already"),
        (plan_of({}, (Transfer(0, 0, 1), Transfer(0, 0, 1))), "the destination has the expert already"),
        (plan_of({}, (Transfer(0, 0, 1, 1, 1),)), "a whole expert is part 0"),
        (plan_of({(0, 0): 30}, (Transfer(0, 0, 1, 0, 2),), {0: 10}), "expert 0: a slice group has every part once"),
        (
            plan_of({(0, 0): 30}, (Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 2, 0, 2)), {0: 10}),
            "a slice group has every part once",
        ),
        (
            plan_of({(0, 0): 30}, (Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 2, 1, 3)), {0: 10}),
            "a slice group has every part once",
        ),
        (plan_of({(0, 0): 30}, (Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 1, 1, 2)), {0: 10}), "two parts on one rank"),
        (plan_of({}, (Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 2, 1, 2))), "parts move for no rows"),
        (
            plan_of({(0, 0): 30}, (Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 2, 1, 2), Transfer(0, 0, 1)), {0: 10}),
            "a part goes where the whole expert is",
        ),
        (plan_of({(0, 0): 30}, sliced={0: 10}), "expert 0 has sliced rows and no parts"),
    ],
)
def test_bad_plans(plan: Plan, message: str) -> None:
    with pytest.raises(BadPlan, match=message):
        check(four_ranks(), plan)


def test_room_for_guests() -> None:
    problem = four_ranks(room_P=[0, 8, 4, 8])
    check(problem, WHOLE)
    check(problem, SLICED)  # half an expert is 4 bytes
    with pytest.raises(BadPlan, match="rank 2 has room for 4 bytes of guests; 8 planned"):
        check(problem, RELAYED)
    with pytest.raises(BadPlan, match="rank 2 has room for 3 bytes of guests; 4 planned"):
        check(four_ranks(room_P=[0, 8, 3, 8]), SLICED)


def test_chunks_are_of_the_fullest_rank() -> None:
    problem = four_ranks(most_rows_P=[20, 10, 19, 10])
    assert native(problem).chunks == 2
    assert chunks_needed(problem, [0, 21, 0, 0]) == 3
    assert received_rows(WHOLE).tolist() == [25, 25, 10, 10]
    assert received_rows(SLICED).tolist() == [30, 20, 20, 10]  # sliced rows go to every rank of the group
    check(problem, replace(SLICED, chunks=2))
    with pytest.raises(BadPlan, match="2 chunks; 3 are needed"):
        check(problem, replace(WHOLE, chunks=2))


def test_a_plan_tells_who_computes() -> None:
    assert WHOLE.segments(0) == [(0, 25), (1, 15)] and WHOLE.group(0) == []
    assert SLICED.segments(0) == [(0, 30)] and SLICED.group(0) == [1, 2]
    assert [p.moved_bytes(four_ranks()) for p in (RESPLIT, WHOLE, SLICED, RELAYED)] == [0, 8, 8, 16]


def test_digest() -> None:
    """Of what is done, and of that all."""
    assert WHOLE.digest == replace(WHOLE, planner="other", modelled_ns=5, native_ns=6, bound_ns=7).digest
    others = (SLICED, RELAYED, RESPLIT, replace(WHOLE, chunks=2), replace(WHOLE, transfers=()), plan_of({}))
    assert len({WHOLE.digest, *(plan.digest for plan in others)}) == 1 + len(others)
    assert all(0 <= plan.digest < 1 << 31 for plan in others)


def test_native_is_every_expert_at_home() -> None:
    plan = native(four_ranks())
    assert plan.rows_EP.tolist() == np.diag([40, 10, 10, 10]).tolist()
    assert plan.is_native and not plan.transfers and not plan.sliced_E.any()


# Problems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"home_E": [0, 1, 2]}, r"home_E has shape \(3,\); it must be \(4,\)"),
        ({"node_P": [0]}, "node_P has shape"),
        ({"room_P": [0, 0, 0, -1]}, "room_P has -1; nothing in it can be below 0"),
        ({"home_E": [1, 1, 2, 3]}, "home_E names a rank that does not hold the expert"),
        ({"most_rows_P": [1, 1, 0, 1]}, "most_rows_P must be at least 1"),
    ],
)
def test_bad_problems(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        four_ranks(**changes)


def test_a_problem_keeps_its_own_integers() -> None:
    problem = four_ranks()
    assert (problem.ranks, problem.experts, problem.loads_E.tolist()) == (4, 4, [40, 10, 10, 10])
    with pytest.raises(ValueError, match="read-only"):
        problem.rows_PE[0, 0] = 1
    with pytest.raises(ValueError, match=r"row_ps is 0\.5; it must be an integer from 0 up"):
        Rates(base_ns=0, expert_ps=0, row_ps=0.5)  # type: ignore[arg-type]


# The model, by hand


def test_times_of_transfers() -> None:
    problem = four_ranks()
    assert [transfer_ns(problem, parts, far=False) for parts in (1, 2, 3, 8)] == [10, 6, 5, 3]
    assert [transfer_ns(problem, parts, far=True) for parts in (1, 2, 3, 8)] == [21, 13, 11, 7]


@pytest.mark.parametrize(
    ("transfers", "expected"),
    [
        ((), []),
        # One rank sends one at a time, and so does one rank receive.
        ((Transfer(0, 0, 1), Transfer(0, 0, 1)), [10, 20]),
        # Both directions at a time.
        ((Transfer(0, 0, 1), Transfer(1, 1, 0)), [10, 10]),
        # The way to another node is the node's, not the rank's: neither waits for the other.
        ((Transfer(0, 0, 1), Transfer(0, 0, 2)), [10, 21]),
        # Two ranks of a node share its bundle, and so do two that receive.
        ((Transfer(0, 0, 2), Transfer(1, 1, 3)), [21, 42]),
        # A relay waits for the weights; parts take less.
        ((Transfer(0, 0, 2), Transfer(0, 2, 3)), [21, 31]),
        ((Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 2, 1, 2)), [6, 13]),
        # Order matters: what waits for a relay keeps its link waiting too.
        ((Transfer(0, 0, 2), Transfer(0, 2, 3), Transfer(2, 2, 3)), [21, 31, 41]),
        ((Transfer(2, 2, 3), Transfer(0, 0, 2), Transfer(0, 2, 3)), [10, 21, 31]),
    ],
)
def test_arrivals(transfers: tuple[Transfer, ...], expected: list[int]) -> None:
    assert arrivals(four_ranks(), plan_of({}, transfers)) == expected


@pytest.mark.parametrize(
    ("plan", "changes", "expected"),
    [
        # A rank takes as long as its rows; 100 is the base.
        (plan_of({}), {}, [140, 110, 110, 110]),
        # Or as long as its experts: two on rank 1.
        (RESPLIT, {"expert_ps": 50_000}, [150, 200, 150, 150]),
        # The guest has come when rank 1 has done its own 10 rows.
        (WHOLE, {}, [125, 125, 110, 110]),
        # It comes 7 ns later; 5 of them are hidden; each guest is a call of its own.
        (WHOLE, {"near_alpha_ns": 9}, [125, 132, 110, 110]),
        (WHOLE, {"near_alpha_ns": 9, "hidden_ns": 5}, [125, 127, 110, 110]),
        (WHOLE, {"guest_ns": 3}, [125, 128, 110, 110]),
        # Half of each of 10 rows after 6 ns, and after 13 ns on the other node.
        (SLICED, {}, [130, 115, 118, 110]),
        # A relay that computes nothing of it has nothing to do for it.
        (RELAYED, {}, [125, 110, 110, 146]),
        # Rows travel whole, also to parts.
        (SLICED, {"wire_ps": 1_000}, [130, 120, 123, 110]),
    ],
)
def test_times_of_ranks(plan: Plan, changes: dict[str, int], expected: list[int]) -> None:
    problem = four_ranks(rates=replace(ROUND, **changes))
    assert rank_times(problem, plan) == expected
    assert price(problem, plan) == max(expected)


def test_chunks_repeat_what_does_not_depend_on_rows() -> None:
    problem = four_ranks(rates=replace(ROUND, expert_ps=15_000, guest_ns=3))
    assert rank_times(problem, replace(plan_of({}), chunks=2)) == [240, 230, 230, 230]
    assert rank_times(problem, replace(WHOLE, chunks=2)) == [230, 200 + 30 + 30 + 6, 230, 230]


def test_only_native_costs_no_planning() -> None:
    problem = four_ranks(rates=replace(ROUND, plan_ns=30))
    assert price(problem, native(problem)) == 140 and price(problem, WHOLE) == 155
    plan = priced(problem, WHOLE)
    assert (plan.modelled_ns, plan.native_ns) == (155, 140) and plan.bound_ns == bound(problem)


@settings(deadline=None)
@given(problems())
def test_no_plan_is_below_the_bound(problem: Problem) -> None:
    for planner in BASELINES.values():
        assert bound(problem) <= price(problem, planner(problem))
