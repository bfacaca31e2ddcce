"""Moves before the counts: what may move, how the plan is corrected, and when they are used at all."""

import doctest
from dataclasses import replace

import numpy as np
import pytest
from balance_problems import GPT_OSS_EXPERT, RATES, hot_loads, problem_of, problems, same
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.balance import early as module
from moeyard.scheduler.balance import priced
from moeyard.scheduler.balance.early import (
    MEMORY,
    PLANNING_SHARE,
    EarlyPlans,
    corrected,
    early_plan,
    expected_rows,
)
from moeyard.scheduler.balance.model import arrivals, price
from moeyard.scheduler.balance.plan import check, native, part_bytes

RANKS, EXPERTS, TOKENS = 4, 16, 1024
PLAN_NS = 10_000
GAP_NS = 400_000
TOKENS_P = (TOKENS,) * RANKS


def test_the_worked_example():
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# One plan


@settings(max_examples=150, deadline=None)
@given(problem=problems(), gap_ns=st.sampled_from([0, 40, 10**6]), seed=st.integers(0, 2**32 - 1))
def test_the_rows_follow_the_counts_and_nothing_else_moves(problem, gap_ns, seed):
    rng = np.random.default_rng(seed)
    counts_PE = rng.permutation(problem.rows_PE, axis=int(rng.integers(2))) + rng.integers(
        3, size=problem.rows_PE.shape
    )
    exact = replace(problem, rows_PE=counts_PE)
    early = early_plan(problem, priced.plan, gap_ns)
    assert all(t.parts == 1 and problem.holds_PE[t.source, t.expert] for t in early.transfers)
    assert len({(t.expert, t.destination) for t in early.transfers}) == len(early.transfers)
    plan = corrected(exact, early, priced.plan, gap_ns)
    check(exact, plan)
    assert plan.transfers == early.transfers and not plan.sliced_E.any()
    assert plan.native_ns == price(exact, native(exact))
    hidden_ns = problem.rates.hidden_ns + gap_ns
    hiding = replace(exact, rates=replace(exact.rates, hidden_ns=hidden_ns))
    waited_ns = max([price(hiding, plan), *(ns - hidden_ns for ns in arrivals(exact, plan))])
    assert plan.modelled_ns == waited_ns + problem.rates.plan_ns
    stay = [plan.native_ns, *(ns - hidden_ns for ns in arrivals(exact, plan))]
    assert plan.modelled_ns <= max(stay) + problem.rates.plan_ns  # moved for nothing: the experts stay at their homes
    assert same(plan, corrected(exact, early_plan(problem, priced.plan, gap_ns), priced.plan, gap_ns))


@settings(max_examples=100, deadline=None)
@given(problem=problems(), gap_ns=st.sampled_from([0, 40, 10**6]))
def test_as_expected_the_layer_is_as_fast_as_the_early_plan(problem, gap_ns):
    early = early_plan(problem, priced.plan, gap_ns)
    check(problem, early)
    hidden_ns = problem.rates.hidden_ns + gap_ns
    arrived = [ns - hidden_ns for ns in arrivals(problem, early)]
    hiding = replace(problem, rates=replace(problem.rates, hidden_ns=hidden_ns))
    assert all(ns <= early.modelled_ns for ns in arrived)
    wanted_ns = max([price(hiding, early), *arrived]) + problem.rates.plan_ns
    assert corrected(problem, early, priced.plan, gap_ns).modelled_ns <= wanted_ns


def test_rows_go_to_a_newcomer_in_other_shares_than_planned():
    rates = replace(RATES, plan_ns=PLAN_NS)
    expected = problem_of([600, 600, 0, 0], 2, rates=rates)
    early = early_plan(expected, priced.plan, GAP_NS)
    assert [(t.source, t.destination) for t in early.transfers] == [(0, 1)]
    moved = early.transfers[0].expert
    loads = [200, 200, 0, 200]
    loads[moved] += 1000
    exact = problem_of(loads, 2, rates=rates)
    plan = corrected(exact, early, priced.plan, GAP_NS)
    assert plan.segments(moved)[1][1] not in (0, early.segments(moved)[-1][1])
    assert plan.rows_EP.sum(0).tolist() == pytest.approx([800, 800], abs=50)
    assert plan.modelled_ns < priced.plan(exact).modelled_ns  # which has to wait for the weights
    # Another expert has all the rows, which has not come.
    loads = [0, 0, 0, 0]
    loads[1 - moved] = 1200
    lost = corrected(problem_of(loads, 2, rates=rates), early, priced.plan, GAP_NS)
    assert lost.is_native and lost.transfers == early.transfers and lost.modelled_ns == lost.native_ns + PLAN_NS


def test_weights_that_come_after_the_layer_make_it_longer():
    problem = problem_of([6000, 6000, 0, 0], 2, rates=RATES)
    early = early_plan(problem, priced.plan, 10**6)
    slow = replace(RATES, near_alpha_ns=10**9)
    plan = corrected(problem_of([0, 0, 0, 100], 2, rates=slow), early, priced.plan, 1000)
    assert plan.is_native and plan.modelled_ns > 10**9 - 1000


def test_nobody_passes_on_what_it_got():
    """The priced planner relays when one rank has all that is hot; early, its transfers come from the home."""
    problem = problem_of([600_000, *[10] * 31], 32, rates=RATES)
    assert any(t.source != 0 for t in priced.plan(problem).transfers)
    early = early_plan(problem, priced.plan, 0)
    assert len(early.transfers) > 2 and {t.source for t in early.transfers} == {0}


@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(1, 6))
def test_expected_rows_are_those_of_the_last_step_for_as_many_tokens(seed, ranks):
    rng = np.random.default_rng(seed)
    then_P, now_P = (rng.integers(0, 50, ranks) * rng.integers(0, 2, ranks) for _ in range(2))
    rows_PE = np.stack([rng.multinomial(int(n) * 4, np.ones(5) / 5) for n in then_P])
    expected_PE = expected_rows(rows_PE, then_P.tolist(), now_P.tolist())
    assert (expected_PE >= 0).all()
    wanted_P = now_P * 4 if then_P.any() else now_P * 0
    assert (abs(expected_PE.sum(1) - wanted_P) <= 5).all()
    np.testing.assert_array_equal(expected_rows(rows_PE, then_P, then_P), rows_PE)


# From step to step


class Layer:
    """A layer whose routing the test gives, step by step; its guests never stay."""

    def __init__(self, plan_ns=PLAN_NS, gap_ns=GAP_NS):
        self.rates = replace(RATES, plan_ns=plan_ns)
        self.gap_ns = gap_ns
        self.calls = 0
        self.plans = EarlyPlans(self.planner)

    def planner(self, problem):
        self.calls += 1
        return priced.plan(problem)

    def problem(self, rows_PE):
        even = problem_of([0] * EXPERTS, RANKS, expert_bytes=GPT_OSS_EXPERT, room=2 * GPT_OSS_EXPERT, rates=self.rates)
        return replace(even, rows_PE=rows_PE)

    def step(self, hot):
        """One whose busy experts are those of rank `hot`; whether moves set out early, and the plan."""
        loads = np.roll(hot_loads(EXPERTS, 4 * TOKENS * RANKS, 0.95, 4), hot * EXPERTS // RANKS)
        rows_PE = np.tile(loads // RANKS, (RANKS, 1))
        early = self.plans.begin(TOKENS_P, self.problem)
        problem = self.problem(rows_PE)
        plan = self.plans.plan(problem, self.gap_ns)
        check(problem, plan)
        assert early is None or plan.transfers == early.transfers
        return early is not None, plan


def test_a_layer_with_a_stable_skew_uses_them_and_wins():
    layer = Layer()
    steps = [layer.step(0) for _ in range(60)]
    used = [early for early, _ in steps]
    assert used == [False] * 2 + [True] * 58  # seen, then compared
    in_time, early = steps[0][1], steps[-1][1]
    assert in_time.transfers and early.transfers
    assert early.modelled_ns < in_time.modelled_ns < in_time.native_ns


def test_a_layer_whose_hot_experts_change_in_every_step_does_not():
    layer = Layer()
    assert not any(layer.step(i % RANKS)[0] for i in range(60))


def test_it_goes_back_soon_when_they_begin_to_change_and_comes_again():
    layer = Layer()
    assert [layer.step(0)[0] for _ in range(30)][-1]
    changing = [layer.step(1 + i % 3)[0] for i in range(30)]
    assert sum(changing) <= MEMORY + 2 and not any(changing[MEMORY + 2 :])
    assert [layer.step(0)[0] for _ in range(200)][-1]


@pytest.mark.parametrize(("plan_ns", "gap_ns"), [(PLAN_NS, 0), (10**7, GAP_NS)], ids=["no gap", "planning takes long"])
def test_what_costs_more_than_it_hides_is_not_used(plan_ns, gap_ns):
    layer = Layer(plan_ns, gap_ns)
    assert not any(layer.step(0)[0] for _ in range(60))


@pytest.mark.parametrize("changing", [False, True])
def test_plans_for_comparison_take_a_small_part_of_the_time(changing):
    layer = Layer()
    steps = 300
    plans = [layer.step(i % RANKS if changing else 0) for i in range(steps)]
    followed = sum(2 if early else 1 for early, _ in plans)
    modelled_ns = sum(plan.modelled_ns for _, plan in plans)
    extra_ns = (layer.calls - followed) * PLAN_NS
    assert 0 < extra_ns <= modelled_ns // PLANNING_SHARE + 4 * PLAN_NS


def test_a_layer_that_runs_without_a_beginning_is_planned_in_time():
    layer = Layer()
    for _ in range(5):
        layer.step(0)
    calls, saved_ns = layer.calls, layer.plans.saved_ns
    problem = layer.problem(np.full((RANKS, EXPERTS), 100))
    assert same(layer.plans.plan(problem, 10**9), priced.plan(problem))
    assert layer.calls == calls + 1 and layer.plans.saved_ns == saved_ns


def test_ranks_decide_alike():
    first, second = Layer(), Layer()
    for hot in [0] * 10 + [1, 2, 3, 0] * 5 + [2] * 10:
        (early, plan), (also, other) = first.step(hot), second.step(hot)
        assert early == also and same(plan, other) and plan.digest == other.digest


def test_parts_are_not_moved_early():
    problem = problem_of(hot_loads(EXPERTS, 40_000, 0.9, 1), RANKS, rates=RATES)
    sliced = priced.plan(problem)
    assert any(t.parts > 1 for t in sliced.transfers)
    assert all(t.parts == 1 for t in early_plan(problem, priced.plan, GAP_NS).transfers)
    assert part_bytes(GPT_OSS_EXPERT, 1) == GPT_OSS_EXPERT
