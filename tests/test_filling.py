"""Shared experts' tokens that idle ranks compute: the rules on any problem, and cases worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from balance_problems import RATES, problem_of, problems, same, zipf_loads
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.balance.baselines import BASELINES
from moeyard.scheduler.balance.filling import with_moves
from moeyard.scheduler.balance.model import bound, price, rank_times, rates_array, routed_work
from moeyard.scheduler.balance.plan import BadPlan, Plan, SharedMove, check, native
from moeyard.scheduler.balance.priced import plan
from moeyard.scheduler.balance.problem import Problem, Rates

NS = 1000
SIMPLE = Rates(base_ns=10, expert_ps=0, row_ps=NS, shared_ps=2 * NS)
"""A row takes 1 ns, a token's shared experts 2. Without room for guests and replicas nothing else can be done."""


def task(loads: list[int], tokens: list[int], rates: Rates = SIMPLE, **options: object) -> Problem:
    """An expert for each rank."""
    made = problem_of(loads, len(tokens), rates=rates, **{"room": 0, **options})  # type: ignore[arg-type]
    return replace(made, tokens_P=np.array(tokens))


@st.composite
def with_shared(draw: st.DrawFn) -> Problem:
    problem = draw(problems(most_ranks=6, most_experts=16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens_P = rng.integers(draw(st.sampled_from([1, 5, 3_000])), size=problem.ranks)
    if draw(st.booleans()):
        tokens_P[rng.integers(problem.ranks, size=problem.ranks // 2)] = 0
    rates = replace(
        problem.rates,
        shared_ps=draw(st.sampled_from([0, 100, 90_000])),
        shared_wire_ps=draw(st.sampled_from([0, 30, 100, 40_000])),
        shared_ns=draw(st.sampled_from([0, 7, 10_000])),
    )
    return replace(problem, tokens_P=tokens_P, rates=rates)


def moved(made: Plan) -> list[tuple[int, int, int]]:
    return [(m.source, m.destination, m.tokens) for m in made.shared]


# Rules


@settings(max_examples=200, deadline=None)
@given(problem=with_shared())
def test_any_problem(problem: Problem) -> None:
    made = plan(problem)
    check(problem, made)
    assert made.modelled_ns == price(problem, made)
    assert made.native_ns == price(problem, native(problem)) >= made.modelled_ns
    assert made.is_native == (made.modelled_ns == made.native_ns)
    assert bound(problem) <= made.modelled_ns
    again = plan(replace(problem, rows_PE=problem.rows_PE[::-1]))  # who brings the rows does not matter
    assert same(made, again) and made.digest == again.digest


@settings(max_examples=100, deadline=None)
@given(problem=with_shared())
def test_never_slower_than_without_moves(problem: Problem) -> None:
    made = plan(problem)
    without = plan(replace(problem, tokens_P=np.zeros(problem.ranks, dtype=np.int64)))
    assert made.modelled_ns <= min(price(problem, without), price(problem, replace(made, shared=())))


@settings(max_examples=100, deadline=None)
@given(problem=with_shared())
def test_the_bound_holds_for_every_planner(problem: Problem) -> None:
    least = bound(problem)
    for planner in BASELINES.values():
        assert least <= price(problem, planner(problem))


@settings(max_examples=100, deadline=None)
@given(problem=with_shared())
def test_no_shared_experts_no_change(problem: Problem) -> None:
    """Neither without their cost nor without tokens: the plan is the one of a model that has none."""
    none = replace(problem, tokens_P=np.zeros(problem.ranks, dtype=np.int64))
    for it in (none, replace(problem, rates=replace(problem.rates, shared_ps=0))):
        made = plan(it)
        assert not made.shared and same(made, plan(replace(none, rates=it.rates)))


@settings(max_examples=100, deadline=None)
@given(problem=with_shared(), data=st.data())
def test_the_moves_are_as_good_as_any(problem: Problem, data: st.DataObject) -> None:
    """No other choice of who computes how many is faster by more than the bisection's thousandth and a token."""
    rates = replace(problem.rates, base_ns=0, shared_ns=0)  # a rank without any work has no base: it is left out
    problem = replace(problem, rates=rates)
    start = native(problem)
    slowest = max(rank_times(problem, with_moves(problem, start, routed_work(problem, start))))
    source = data.draw(st.integers(0, problem.ranks - 1))
    helpers = [p for p in range(problem.ranks) if p != source]
    left, moves = int(problem.tokens_P[source]), []
    for p in helpers:
        tokens = data.draw(st.integers(0, min(left, int(problem.most_rows_P[p]))))  # it has memory for no more
        left -= tokens
        moves += [SharedMove(source, p, tokens)] if tokens else []
    other = max(rank_times(problem, replace(start, shared=tuple(moves))))
    assert slowest <= other * 1.001 + (rates.shared_ps + rates.shared_wire_ps) / NS + 1


def test_rates_of_shared_experts_are_not_the_searchs() -> None:
    assert rates_array(SIMPLE).tolist() == rates_array(replace(SIMPLE, shared_ps=0)).tolist()
    assert len(rates_array(SIMPLE)) == 11


# Cases


def test_idle_ranks_fill() -> None:
    """400 ns and 200 against 200: rank 0 gives away 100 tokens, and both end after 400."""
    problem = task([400, 0], [100, 100])
    made = plan(problem)
    assert moved(made) == [(0, 1, 100)] and not made.is_native and made.at_home
    assert (made.native_ns, made.modelled_ns) == (610, 410) and rank_times(problem, made) == [410, 410]
    assert not made.transfers and np.array_equal(made.rows_EP, native(problem).rows_EP)


def test_no_more_than_is_needed_and_to_whoever_is_early() -> None:
    made = plan(task([300, 100, 100, 0], [200, 0, 100, 0]))
    # 700, 100, 300 and 0: 275 on average; the last 300 of rank 0 are its rows'.
    assert made.modelled_ns == 310 and moved(made) == [(0, 1, 100), (0, 3, 100)]


def test_the_way_counts_at_both_ends() -> None:
    problem = task([300, 0], [100, 0], replace(SIMPLE, shared_wire_ps=NS))
    made = plan(problem)  # 500 - 1 a token against 3 a token
    assert moved(made) == [(0, 1, 100)] and rank_times(problem, made) == [410, 310]
    nothing = replace(problem, rates=replace(problem.rates, shared_wire_ps=2 * NS))
    assert plan(nothing).is_native


@pytest.mark.parametrize(("cost", "moves"), [(99, True), (100, False)])
def test_what_moving_costs_altogether(cost: int, moves: bool) -> None:
    made = plan(task([0, 0], [100, 0], replace(SIMPLE, shared_ns=cost, plan_ns=10**6)))
    assert bool(made.shared) == moves and made.is_native != moves


def test_one_rank_and_no_tokens() -> None:
    assert plan(task([10], [100])).is_native
    assert plan(task([10, 0], [0, 0])).is_native


def test_neighbours_of_the_node_come_first() -> None:
    made = plan(task([0, 0, 0, 0], [0, 0, 100, 0], ranks_per_node=2))
    assert moved(made) == [(2, 0, 25), (2, 1, 25), (2, 3, 25)]
    made = plan(task([100, 100, 0, 0], [0, 0, 100, 0], ranks_per_node=2))
    assert moved(made) == [(2, 3, 50)]


def test_guests_that_come_late_leave_time_for_shared_tokens() -> None:
    """Rank 1 waits 300 ns for its guest: it computes shared tokens meanwhile."""
    rates = replace(SIMPLE, near_alpha_ns=300)
    problem = task([1000, 0], [100, 0], rates, room=1, expert_bytes=1)
    made = plan(problem)
    assert made.transfers and moved(made) == [(0, 1, 100)]
    assert price(problem, made) == 660 and price(problem, replace(made, shared=())) == 860


@pytest.mark.parametrize("loads", [zipf_loads(64, 8 * 4096 * 4), [2048] * 64])
def test_close_to_the_bound_where_tokens_are_uneven(loads: list[int]) -> None:
    """Rows move by weights, as far as that is worth it, and shared tokens level the rest."""
    rates = replace(RATES, shared_ps=2 * RATES.row_ps, shared_wire_ps=RATES.row_ps // 4, shared_ns=20_000)
    tokens_P = np.array([20_000, 6_000, 3_000, 2_000, 1_000, 700, 68, 0])
    problem = replace(problem_of(loads, 8, rates=rates), tokens_P=tokens_P)
    made, without = plan(problem), plan(replace(problem, rates=replace(rates, shared_wire_ps=rates.shared_ps)))
    check(problem, made)
    assert made.shared and not without.shared
    assert made.modelled_ns <= 1.15 * bound(problem) < without.modelled_ns


def test_rows_that_do_not_fit_are_not_sent() -> None:
    problem = task([0, 0], [100, 0], most_rows=20)
    assert moved(plan(problem)) == [(0, 1, 20)]


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ((SharedMove(0, 1, 11),), "rank 0 has 10 shared tokens; 11 planned to go elsewhere"),
        ((SharedMove(0, 1, 0),), "a move of no shared tokens"),
        ((SharedMove(0, 1, 1), SharedMove(1, 2, 1)), "rank 1 gives shared tokens away and gets some"),
        ((SharedMove(0, 2, 1), SharedMove(0, 1, 1)), "not in order, each once"),
        ((SharedMove(0, 1, 1), SharedMove(0, 1, 1)), "not in order, each once"),
    ],
)
def test_bad_moves(moves: tuple[SharedMove, ...], message: str) -> None:
    problem = task([1, 1, 1], [10, 10, 10])
    check(problem, replace(native(problem), shared=(SharedMove(0, 1, 5), SharedMove(0, 2, 5))))
    with pytest.raises(BadPlan, match=message):
        check(problem, replace(native(problem), shared=moves))


def test_moves_are_part_of_the_digest() -> None:
    problem = task([1, 1], [10, 10])
    digests = {replace(native(problem), shared=moves).digest for moves in ((), (SharedMove(0, 1, 1),))}
    assert len(digests) == 2


def test_tokens_of_each_rank_are_checked() -> None:
    with pytest.raises(ValueError, match="tokens_P has shape"):
        task([1, 1], [10, 10]).__class__(**{**vars(task([1, 1], [10, 10])), "tokens_P": np.ones(3)})
