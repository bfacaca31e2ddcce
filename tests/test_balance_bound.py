"""The linear programme's bound against every plan of small problems, and the planners' of larger ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

import numpy as np
import pytest
from balance_problems import GPT_OSS_EXPERT, RATES, problem_of, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.bench import balance_bound, balance_departures
from moeyard.bench.balance_bound import impossible, sharper
from moeyard.bench.balance_grid import LOADS, Cell, Layout, placed, steps
from moeyard.bench.balance_grid import problem as problem_in
from moeyard.bench.moe_shapes import SHAPES
from moeyard.scheduler.balance.baselines import BASELINES
from moeyard.scheduler.balance.model import bound, price
from moeyard.scheduler.balance.plan import BadPlan, Plan, Transfer, check, native
from moeyard.scheduler.balance.priced import plan
from moeyard.scheduler.balance.problem import Integers, Problem, Rates

pytest.importorskip("scipy.optimize")
NS = 1_000_000


SHARP = balance_departures.RESOLUTIONS


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    """Fewer intervals, which must be as true, and are faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance_departures, "RESOLUTIONS", ((1 << 60, (4, 2)),))
        yield


def parted(total: int, places: int) -> Iterator[tuple[int, ...]]:
    if places == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in parted(total - first, places - 1):
            yield (first, *rest)


def transfers_of(problem: Problem, most: int) -> Iterator[tuple[Transfer, ...]]:
    """Every sequence of up to `most` whole experts, relays included, or slice groups, in every order of links."""
    ranks = range(problem.ranks)
    pieces: list[tuple[Transfer, ...]] = []
    for e, p, q in product(range(problem.experts), ranks, ranks):
        if p != q and not problem.holds_PE[q, e]:
            pieces.append((Transfer(e, p, q),))
    for e in range(problem.experts):
        free = [p for p in ranks if not problem.holds_PE[p, e]]
        for parts in range(2, len(free) + 1):
            for group in combinations(free, parts):
                for sources in product(ranks, repeat=parts):
                    pieces.append(tuple(Transfer(e, sources[i], group[i], i, parts) for i in range(parts)))
    yield ()
    for count in range(1, most + 1):
        for chosen in product(pieces, repeat=count):
            yield sum(chosen, ())


def least_ns(problem: Problem, most: int) -> int:
    """The least price of all plans with so few transfers, found by looking at them all."""
    loads = problem.loads_E.tolist()
    best = price(problem, native(problem))
    for transfers in transfers_of(problem, most):
        try:
            check(problem, _plan(problem, transfers, None))
        except BadPlan as error:
            if "parts move for no rows" not in str(error):
                continue
        has_PE = problem.holds_PE.copy()
        for t in transfers:
            has_PE[t.destination, t.expert] |= t.parts == 1
        places = [np.flatnonzero(has_PE[:, e]).tolist() for e in range(problem.experts)]
        sliced = {t.expert for t in transfers if t.parts > 1}
        splits = [list(parted(load, len(places[e]) + (e in sliced))) for e, load in enumerate(loads)]
        for split in product(*splits):
            rows_EP, sliced_E = np.zeros_like(problem.rows_PE.T), np.zeros(problem.experts, dtype=np.int64)
            for e, parts in enumerate(split):
                rows_EP[e, places[e]] = parts[: len(places[e])]
                sliced_E[e] = parts[-1] if e in sliced else 0
            if all(sliced_E[e] for e in sliced):
                best = min(best, price(problem, _plan(problem, transfers, (rows_EP, sliced_E))))
    return best


def _plan(problem: Problem, transfers: tuple[Transfer, ...], rows: tuple[Integers, Integers] | None) -> Plan:
    at_home = native(problem)
    rows_EP, sliced_E = rows or (at_home.rows_EP, at_home.sliced_E)
    return Plan("test", rows_EP, sliced_E, transfers)


@st.composite
def tiny(draw: st.DrawFn, ranks: int, loads: int, experts: int) -> Problem:
    held = draw(st.lists(st.integers(1, (1 << ranks) - 1), min_size=experts, max_size=experts))
    rates = Rates(
        base_ns=draw(st.sampled_from([0, 700])),
        expert_ps=draw(st.sampled_from([0, 400, 1_500, 4_000])) * 1_000,
        row_ps=NS,
        wire_ps=draw(st.sampled_from([0, 400_000, NS, 1_500_000])),
        near_alpha_ns=draw(st.sampled_from([0, 200])),
        near_fs_per_byte=draw(st.sampled_from([0, 100, 1_000, 3_000])) * 1_000,
        far_alpha_ns=draw(st.sampled_from([0, 400])),
        far_fs_per_byte=draw(st.sampled_from([50, 700, 4_000])) * 1_000,
        hidden_ns=draw(st.sampled_from([0, 0, 600])),
        guest_ns=draw(st.sampled_from([0, 100])),
    )
    return problem_of(
        draw(st.lists(st.integers(0, loads), min_size=experts, max_size=experts)),
        ranks,
        holds_PE=np.array([[mask >> p & 1 for mask in held] for p in range(ranks)]),
        expert_bytes=1_000,
        rates=rates,
        ranks_per_node=draw(st.sampled_from([1, ranks])),
    )


def certain(problem: Problem, time_ns: int) -> int:
    """The programme's word alone, wherever it is asked."""
    low, high = -1, time_ns - problem.rates.base_ns
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if impossible(problem, middle) else (low, middle)
    return low + 1 + problem.rates.base_ns


@settings(max_examples=30, deadline=None)
@given(problem=tiny(2, 5, 3))
def test_no_plan_of_two_ranks_is_below_it(problem: Problem) -> None:
    least = least_ns(problem, 2)
    if problem.loads_E.any():
        assert certain(problem, price(problem, native(problem))) <= least
    assert sharper(problem, least) <= least


@settings(max_examples=12, deadline=None)
@given(problem=tiny(3, 3, 2))
def test_no_plan_of_three_ranks_is_below_it(problem: Problem) -> None:
    least = least_ns(problem, 1)
    if problem.loads_E.any():
        assert certain(problem, price(problem, native(problem))) <= least


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_no_planner_is_below_it(problem: Problem) -> None:
    times = [price(problem, planner(problem)) for planner in (*BASELINES.values(), plan)]
    least = sharper(problem, min(times))
    assert bound(problem) <= least <= min(times)


def test_streams_are_whole() -> None:
    """Two ranks with two experts each and one that both hold: somebody streams three, although 2.5 is the mean."""
    rates = Rates(base_ns=0, expert_ps=10 * NS, row_ps=NS, near_fs_per_byte=NS)
    held = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    problem = problem_of([1] * 5, 2, holds_PE=held, rates=rates, expert_bytes=100_000)
    assert impossible(problem, 29_999) and not impossible(problem, 30_000)
    assert 28_500 <= sharper(problem, 30_000) <= 30_000


def test_few_tokens_and_copies_of_hot_experts() -> None:
    """Ranks stream four or five experts whatever they do, and have no time for what a mean over all ranks would ask."""
    cell = Cell(SHAPES["gpt-oss-120b"], Layout(32, 1), 128, next(load for load in LOADS if load.name == "80 % in 4"))
    (step,) = steps(cell, 0)
    holds_PE, home_E = placed(cell, "eplb", step.earlier_E)
    task = problem_in(cell, step.rows_PE, holds_PE, home_E, np.zeros(32, dtype=np.int64))
    time_ns = plan(task).modelled_ns
    assert bound(task) < 0.9 * time_ns and impossible(task, int(0.99 * time_ns) - task.rates.base_ns)
    assert 0.95 * time_ns <= sharper(task, time_ns) <= time_ns  # more is not asked for


def test_experts_leave_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node: a rank's second hot expert has left when two transfers are over, and then little can be done of it.
    Four nodes: four ranks would have to send two experts each, which near links and a bundle cannot do in that time.
    """
    monkeypatch.setattr(balance_departures, "RESOLUTIONS", SHARP)
    for layout, tokens, name, least in (
        (Layout(64, 1), 1024, "50 % in 16", 0.88),
        (Layout(32, 4), 128, "80 % in 16", 0.99),
    ):
        cell = Cell(SHAPES["gpt-oss-120b"], layout, tokens, next(load for load in LOADS if load.name == name))
        (step,) = steps(cell, 0)
        holds_PE, home_E = placed(cell, "linear", step.earlier_E)
        task = problem_in(cell, step.rows_PE, holds_PE, home_E, np.zeros(layout.ranks, dtype=np.int64))
        time_ns = plan(task).modelled_ns
        assert bound(task) < 0.87 * time_ns and impossible(task, int(least * time_ns) - task.rates.base_ns)


def test_it_is_asked_only_where_the_other_bound_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of([400, 300, 200, 100], 2, expert_bytes=GPT_OSS_EXPERT, rates=RATES)
    asked: list[object] = []
    monkeypatch.setattr(balance_bound, "_refuted", asked.append)
    least = bound(problem)
    assert sharper(problem, least * 100 // 96) == least and not asked
    assert sharper(problem, least * 2) == least and asked
    monkeypatch.setattr(balance_bound, "AVAILABLE", False)
    asked.clear()
    assert sharper(problem, least * 2) == least and not asked


def test_what_a_solver_says_is_not_believed() -> None:
    """x <= 1 and x >= 2: right multipliers contradict it, wrong ones do not."""
    at, columns, values = np.array([0, 1]), np.array([0, 0]), np.array([1, -1])
    for limits, expected in (([1, -2], True), ([1, -1], False)):
        programme = balance_bound._Programme(at, columns, values, np.array(limits), np.array([5]))
        assert balance_bound._contradicts(programme, np.array([1.0, 1.0])) == expected
        assert not balance_bound._contradicts(programme, np.array([1.0, 0.0]))
        assert not balance_bound._contradicts(programme, np.array([-1.0, -1.0]))
        assert balance_bound._refuted(programme) == expected
