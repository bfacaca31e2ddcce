"""Tables for decode steps: every entry holds the expert, no table is slower than home, and when a new one comes."""

from __future__ import annotations

import doctest
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
from balance_problems import RATES, linear_homes, problem_of, problems, zipf_loads
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.balance import tempo, window
from moeyard.scheduler.balance.model import rank_times
from moeyard.scheduler.balance.places import PLACES, Places
from moeyard.scheduler.balance.plan import Plan
from moeyard.scheduler.balance.problem import Integers, Problem, Rates
from moeyard.scheduler.balance.window import Window, native_table, split_table, table_ns

no_deadline = settings(deadline=None, max_examples=100)

FEW = Rates(base_ns=0, expert_ps=100_000, row_ps=1_000)
"""An expert takes as long as 100 rows."""


def two_ranks(rows_PE: list[list[int]], **changes: object) -> Problem:
    """Both ranks hold all experts, whose home is rank 0."""
    experts = len(rows_PE[0])
    problem = problem_of([0] * experts, 2, holds_PE=np.ones((2, experts)), rates=FEW)
    return replace(problem, rows_PE=np.array(rows_PE), **changes)


def shares(problem: Problem, table: Integers, expert: int) -> list[int]:
    """Rows (times 8) of an expert on each rank."""
    return [int(((table[:, expert] == p).sum(1) * problem.rows_PE[:, expert]).sum()) for p in range(problem.ranks)]


def test_the_worked_example() -> None:
    result = doctest.testmod(window)
    assert result.attempted and not result.failed


# Any problem


@no_deadline
@given(problems(), st.sampled_from([1, 3, 32]))
def test_every_entry_is_a_holder_and_no_table_is_slower_than_home(problem: Problem, steps: int) -> None:
    table = split_table(problem, steps)
    assert table.shape == (problem.ranks, problem.experts, PLACES)
    assert problem.holds_PE[table, np.arange(problem.experts)[None, :, None]].all()
    home_ns, ns = table_ns(problem, native_table(problem), steps), table_ns(problem, table, steps)
    assert ns <= home_ns
    if home_ns - ns == 0 and problem.rates in (RATES, FEW):  # others may differ by less than a ns
        assert (table == native_table(problem)).all()
    assert (split_table(problem, steps) == table).all()


@no_deadline
@given(problems(), st.sampled_from(["native", "one_by_one", "even_rows"]), st.sampled_from([1, 8]))
def test_the_search_knows_the_time_of_its_table(problem: Problem, seed: str, steps: int) -> None:
    places = Places(problem, steps)
    if seed != "native":
        getattr(places, seed)()
    places.search()
    places.go_home()
    ns = table_ns(problem, places.fill(native_table(problem)), steps)
    assert ns - (problem.rates.base_ns if problem.rows_PE.any() else 0) == -(-places.peak() // (PLACES * steps * 1000))


@no_deadline
@given(problems())
def test_with_one_holder_each_all_are_at_home(problem: Problem) -> None:
    holds_PE = np.zeros_like(problem.holds_PE)
    holds_PE[problem.home_E, np.arange(problem.experts)] = 1
    problem = replace(problem, holds_PE=holds_PE)
    assert (split_table(problem, 4) == native_table(problem)).all()


@no_deadline
@given(problems(most_rows=300), st.integers(0, 2**32 - 1))
def test_the_model_is_that_of_plans(problem: Problem, seed: int) -> None:
    """For one step and sources whose rows divide into places: what `rank_times` says of a plan with these rows."""
    problem = replace(problem, rows_PE=problem.rows_PE * PLACES, rates=replace(problem.rates, plan_ns=0))
    rng = Random(seed)
    table = native_table(problem)
    for e in range(problem.experts):
        ranks = np.flatnonzero(problem.holds_PE[:, e]).tolist()
        for p in range(problem.ranks):
            table[p, e] = [rng.choice(ranks) for _ in range(PLACES)]
    rows_EP = np.array([shares(problem, table, e) for e in range(problem.experts)]) // PLACES
    plan = Plan("test", rows_EP, np.zeros(problem.experts, dtype=np.int64))
    assert table_ns(problem, table, 1) == max(rank_times(problem, plan))


def test_no_ranks_rows_or_experts() -> None:
    for problem in (two_ranks([[0, 0], [0, 0]]), two_ranks([[], []])):
        assert table_ns(problem, split_table(problem, 5), 5) == 0


# What it makes of few and of many rows


def test_replicas_of_many_rows_are_balanced() -> None:
    problem = problem_of([80_000, 800, 800, 800], 4, holds_PE=np.ones((4, 4)), home_E=[0, 1, 2, 3])
    table = split_table(problem, 1)
    loads = np.sum([shares(problem, table, e) for e in range(4)], axis=0)
    assert max(loads) <= 1.05 * sum(loads) / 4


def test_an_expert_of_few_rows_is_not_divided() -> None:
    problem = two_ranks([[40, 30, 20, 10], [40, 30, 20, 10]])
    table = split_table(problem, 1)
    assert all(0 in shares(problem, table, e) for e in range(4))
    assert sorted(shares(problem, table, e)[0] > 0 for e in range(4)) == [False, False, True, True]
    assert table_ns(problem, table, 1) == 200


def test_rows_of_a_window_are_those_of_its_steps() -> None:
    """1,600 rows in one step are worth a second streaming, 100 in each of 16 are not."""
    rows_PE = [[800, 8], [800, 8]]
    assert 0 not in shares(two_ranks(rows_PE), split_table(two_ranks(rows_PE), 1), 0)
    assert 0 in shares(two_ranks(rows_PE), split_table(two_ranks(rows_PE), 16), 0)


def test_an_expert_that_few_steps_touch_is_streamed_in_those_only() -> None:
    problem = two_ranks([[2, 0], [0, 0]])
    assert table_ns(problem, native_table(problem), 1) == 100
    assert table_ns(problem, native_table(problem), 4) == 50


def test_places_go_to_their_own_rank() -> None:
    problem = two_ranks([[1000], [1000]])
    assert split_table(problem, 1).tolist() == [[[0] * PLACES], [[1] * PLACES]]


def test_places_go_to_their_own_node() -> None:
    holds_PE = [[1], [0], [0], [1]]
    problem = problem_of([4000], 4, holds_PE=holds_PE, ranks_per_node=2, rates=FEW)
    assert split_table(problem, 1)[:, 0, 0].tolist() == [0, 0, 3, 3]


def test_ranks_take_turns_in_places() -> None:
    """Also a batch of two tokens has work for both, and not each expert begins with the same rank."""
    table = split_table(two_ranks([[4000, 4000], [0, 0]], holds_PE=np.ones((2, 2))), 1)
    mixed = [e for e in range(2) if len(set(table[0, e].tolist())) > 1]
    for e in mixed:
        assert all(len({table[0, e, i], table[0, e, i + 1]}) == 2 for i in range(0, PLACES, 2))
    one = split_table(two_ranks([[4000], [0]]), 1)
    assert sorted(one[0, 0, :2].tolist()) == sorted(one[0, 0, 2:4].tolist()) == [0, 1]


def test_a_chain_is_found_where_no_single_move_helps() -> None:
    """Rank 0 has two experts, and neither holder of them can take one before it gives its own to rank 3."""
    holds_PE = [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1]]
    problem = problem_of([20, 20, 20, 20], 4, holds_PE=holds_PE, home_E=[0, 0, 1, 2], rates=FEW)
    assert table_ns(problem, native_table(problem), 1) == 200
    assert table_ns(problem, split_table(problem, 1), 1) == 100


# Against others


def small_problems() -> list[tuple[Problem, int]]:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(80):
        ranks, experts, steps = int(rng.integers(2, 5)), int(rng.integers(2, 8)), int(rng.choice([1, 4, 16]))
        home_E = rng.integers(ranks, size=experts)
        holds_PE = rng.random((ranks, experts)) < 0.4
        holds_PE[home_E, np.arange(experts)] = True
        most = int(rng.choice([2, 20, 400, 2000])) * steps
        problem = problem_of([0] * experts, ranks, holds_PE=holds_PE, home_E=home_E, rates=replace(RATES, base_ns=0))
        if holds_PE.sum(0).prod() <= 700:
            found.append((replace(problem, rows_PE=rng.integers(0, most + 1, size=(ranks, experts))), steps))
    return found


def test_small_problems_against_all_assignments_of_whole_experts() -> None:
    cases = small_problems()
    assert len(cases) > 50
    for problem, steps in cases:
        holders = [np.flatnonzero(column) for column in problem.holds_PE.T]
        shape = (problem.ranks, problem.experts, PLACES)
        best = min(
            table_ns(problem, np.broadcast_to(np.array(chosen)[None, :, None], shape), steps)
            for chosen in product(*holders)
        )
        assert table_ns(problem, split_table(problem, steps), steps) <= best


@pytest.mark.parametrize(("experts", "ranks"), [(64, 8), (128, 16)])
@pytest.mark.parametrize("rows", [500, 4_000, 60_000])
def test_as_good_as_tempo(experts: int, ranks: int, rows: int) -> None:
    home_E = linear_homes(experts, ranks)
    holds_PE = np.zeros((ranks, experts))
    holds_PE[home_E, np.arange(experts)] = 1
    loads_E = zipf_loads(experts, rows)
    for i, e in enumerate(np.argsort(loads_E)[-2 * ranks :]):
        holds_PE[(home_E[e] + 1 + i % (ranks - 1)) % ranks, e] = 1
    problem = problem_of(loads_E, ranks, holds_PE=holds_PE, home_E=home_E)
    theirs = max(rank_times(problem, tempo.plan(problem)))
    assert table_ns(problem, split_table(problem, 1), 1) <= 1.01 * theirs


# Windows


def counts(*rows_E: int) -> Integers:
    return np.array([rows_E, rows_E])


def window_of(rows_PE: Integers, steps: int = 4, layers: int = 2) -> Window:
    made = Window(layers, rows_PE.shape[1], rows_PE.shape[0], steps)
    for _ in range(steps):
        made.add(1, rows_PE)
    return made


def test_a_window_is_due_after_its_steps_layer_by_layer() -> None:
    made = Window(2, 1, 2, length=3)
    for _ in range(3):
        assert not made.due(1)
        made.add(1, counts(5))
    assert made.due(1) and not made.due(0)


def test_a_table_is_made_from_the_sum_of_the_counts() -> None:
    problem = two_ranks([[0, 0], [0, 0]])
    made = window_of(counts(900, 300))
    table = made.renew(1, problem)
    assert table is not None and made.version == 1 and made.table(1) is table and made.table(0) is None
    assert (table == split_table(replace(problem, rows_PE=counts(3600, 1200)), 4)).all()
    assert not made.due(1)


def test_no_new_table_for_one_per_cent() -> None:
    problem = two_ranks([[0, 0], [0, 0]])
    made = window_of(counts(1000, 1000))
    first = made.renew(1, problem)
    for expected, rows in (((1, False)), (1000, 1004)), ((2, True), (1000, 2000)):
        for _ in range(4):
            made.add(1, counts(*rows))
        renewed = made.renew(1, problem)
        assert (made.version, renewed is not None) == expected
        assert (made.table(1) is first) != expected[1]


def test_all_at_home_needs_no_table() -> None:
    made = window_of(counts(5, 5))
    assert made.renew(1, two_ranks([[0, 0], [0, 0]], holds_PE=[[1, 1], [0, 0]])) is None
    assert made.table(1) is None and made.version == 0


def test_a_guest_that_goes_is_in_no_table() -> None:
    problem = two_ranks([[0, 0], [0, 0]])
    made = window_of(counts(1000, 1000))
    before = made.renew(1, problem)
    assert before is not None
    away = int(next(e for e in range(2) if (before[:, e] == 1).any()))
    copy = before.copy()
    assert made.withdraw(1, 1, away, home=0) and made.version == 2
    after = made.table(1)
    assert after is not None and (after[:, away] == 0).all() and (after[:, 1 - away] == before[:, 1 - away]).all()
    assert (before == copy).all()  # a reader may still have it
    assert not made.withdraw(1, 1, away, home=0) and not made.withdraw(0, 1, away, home=0) and made.version == 2


def test_a_table_that_names_a_rank_without_the_expert_is_not_renewed_silently() -> None:
    made = window_of(counts(1000, 1000))
    assert made.renew(1, two_ranks([[0, 0], [0, 0]])) is not None
    made.add(1, counts(1000, 1000))
    with pytest.raises(AssertionError, match="withdraw"):
        made.renew(1, two_ranks([[0, 0], [0, 0]], holds_PE=[[1, 1], [0, 0]]))


def test_clearing() -> None:
    made = window_of(counts(1000, 1000))
    made.renew(1, two_ranks([[0, 0], [0, 0]]))
    made.add(1, counts(1, 1))
    made.clear()
    assert made.table(1) is None and made.version == 2 and not made.due(1)
    made.clear()
    assert made.version == 2


def test_equal_counts_make_equal_tables() -> None:
    rng = np.random.default_rng(1)
    problem = problem_of([0] * 16, 4, holds_PE=np.ones((4, 16)), home_E=linear_homes(16, 4))
    first, second = Window(1, 16, 4, 2), Window(1, 16, 4, 2)
    for _ in range(5):
        for _ in range(2):
            rows_PE = rng.integers(0, 500, size=(4, 16))
            first.add(0, rows_PE)
            second.add(0, rows_PE)
        first.renew(0, problem)
        second.renew(0, problem)
        assert first.version == second.version
        one, other = first.table(0), second.table(0)
        assert one is not None and other is not None and (one == other).all()


def test_bad_length() -> None:
    with pytest.raises(ValueError, match="length is 0"):
        Window(1, 1, 1, 0)
