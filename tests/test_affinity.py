"""Expert-aware batching: what a choice keeps to, against brute force, and that tokens of a kind meet."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.affinity.choice import Choice, choose
from moeyard.scheduler.affinity.ready import Ready, Schedule, cut
from moeyard.scheduler.affinity.ways import WAYS, greedy, resplit


def ready(needs, *, missing=None, passed_over=None, most=2, most_waits=3, step_ns=10, rate=10**6) -> Ready:
    """Experts of each row, as lists of ids or as booleans. A byte takes 1 ns."""
    if not isinstance(needs, np.ndarray):
        needs_RX = np.zeros((len(needs), 1 + max((x for row in needs for x in row), default=0)), dtype=bool)
        for row, experts in enumerate(needs):
            needs_RX[row, list(experts)] = True
        needs = needs_RX
    rows, experts = needs.shape
    return Ready(
        needs_RX=needs,
        missing_bytes_X=np.array([100] * experts if missing is None else missing, dtype=np.int64),
        passed_over_R=np.array([0] * rows if passed_over is None else passed_over, dtype=np.int64),
        most=most,
        most_waits=most_waits,
        read_fs_per_byte=rate,
        step_ns=step_ns,
    )


@st.composite
def problems(draw, most_rows: int = 9) -> Ready:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, experts, kinds = int(rng.integers(0, most_rows + 1)), int(rng.integers(1, 24)), int(rng.integers(1, 4))
    share_KX = rng.random((kinds, experts)) ** 3
    return ready(
        rng.random((rows, experts)) < share_KX[rng.integers(kinds, size=rows)],
        missing=rng.integers(0, 1000, experts) * (rng.random(experts) < 0.7),
        passed_over=rng.integers(0, 5, rows),
        most=int(rng.integers(1, 6)),
        most_waits=int(rng.integers(0, 5)),
        step_ns=int(rng.integers(0, 1000)),
        rate=int(rng.choice([0, 10**3, 10**6])),
    )


def totals(problem: Ready, schedule: Schedule) -> tuple[int, int]:
    """Time of the schedule and the sum of waits, from sets."""
    end, waits = 0, 0
    for step in schedule:
        needed = {x for row in step for x in np.flatnonzero(problem.needs_RX[row]).tolist()}
        read = sum(int(problem.missing_bytes_X[x]) for x in needed)
        end += problem.step_ns + read * problem.read_fs_per_byte // 10**6
        waits += end * len(step)
    return end, waits


# What a choice keeps to


@given(problem=problems())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_each_row_once_and_those_due_first(way: str, problem: Ready) -> None:
    schedule = WAYS[way](problem) if problem.rows else ()
    assert sorted(row for step in schedule for row in step) == list(range(problem.rows))
    assert [len(step) for step in schedule] == [len(step) for step in problem.in_order]
    assert not schedule or set(problem.due) <= set(schedule[0])


@given(problem=problems())
@settings(max_examples=200, deadline=None)
def test_a_choice_is_never_worse_than_the_order_by_the_model(problem: Ready) -> None:
    choice = choose(problem)
    assert (choice.total_ns, choice.waits_ns) == totals(problem, choice.schedule)
    assert (choice.total_in_order_ns, choice.waits_in_order_ns) == totals(problem, problem.in_order)
    saved = choice.total_in_order_ns - choice.total_ns
    assert saved >= 0 and choice.waits_ns - choice.waits_in_order_ns <= problem.rows * saved
    assert choice.way == "in-order" or choice.total_ns < choice.total_in_order_ns
    assert (choice.schedule == problem.in_order) == (choice.way == "in-order")
    assert len(choice.rows) == min(problem.rows, problem.most)
    assert set(problem.due) <= set(choice.rows) or not problem.rows


@given(problem=problems())
@settings(max_examples=50, deadline=None)
def test_the_same_tokens_give_the_same_choice(problem: Ready) -> None:
    again = ready(
        problem.needs_RX.copy(),
        missing=problem.missing_bytes_X.tolist(),
        passed_over=problem.passed_over_R.tolist(),
        most=problem.most,
        most_waits=problem.most_waits,
        step_ns=problem.step_ns,
        rate=problem.read_fs_per_byte,
    )
    assert choose(problem) == choose(again)


def cost(problem: Ready, times: tuple[int, int]) -> int:
    """The waits of these tokens and of all rows' next ones, which come after the whole schedule."""
    return times[1] + problem.rows * times[0]


def best_of_all(problem: Ready) -> int:
    """The least cost over all schedules of two full steps that a choice may take."""
    base = totals(problem, problem.in_order)
    best = cost(problem, base)
    for first in combinations(range(problem.rows), problem.most):
        rest = tuple(row for row in range(problem.rows) if row not in first)
        if set(problem.due) <= set(first):
            times = totals(problem, (first, *cut(rest, problem.most)))
            if times[0] < base[0]:
                best = min(best, cost(problem, times))
    return best


def test_against_all_subsets() -> None:
    """Two steps of 2 to 5 rows: never better than the best, and much of what there is to gain is found."""
    rng = np.random.default_rng(0)
    gained, possible, exact = 0.0, 0.0, 0
    for _ in range(150):
        most = int(rng.integers(2, 6))
        needs = rng.random((2 * most, 16)) < (rng.random((2, 16)) ** 2)[rng.integers(2, size=2 * most)]
        problem = ready(needs, missing=rng.integers(0, 100, 16), most=most)
        choice, best = choose(problem), best_of_all(problem)
        found = cost(problem, (choice.total_ns, choice.waits_ns))
        in_order = cost(problem, (choice.total_in_order_ns, choice.waits_in_order_ns))
        assert best <= found <= in_order
        gained += in_order - found
        possible += in_order - best
        exact += found == best
    assert gained / possible > 0.7 and exact > 50, (gained / possible, exact)


# Tokens of a kind meet


KINDS = [[0, 1, 2], [5, 6, 7], [0, 1, 3], [5, 6, 8]]


@pytest.mark.parametrize("way", WAYS)
def test_two_kinds_of_tokens_are_told_apart(way: str) -> None:
    problem = ready(KINDS)
    assert {frozenset(step) for step in WAYS[way](problem)} == {frozenset({0, 2}), frozenset({1, 3})}
    choice = choose(problem, (way,))
    assert choice.rows == (0, 2) and choice.way == way
    assert (choice.total_in_order_ns, choice.total_ns) == (2 * 10 + 1200, 2 * 10 + 800)


def test_resident_experts_do_not_count() -> None:
    """Rows 0 and 1 share an expert that is missing, 0 and 2 three that are there."""
    needs = [[0, 4, 5, 6], [0, 7, 8, 9], [1, 4, 5, 6], [1, 7, 8, 9]]
    missing = [100, 100, 0, 0, 0, 0, 0, 0, 0, 0]
    for way in (greedy, resplit):
        assert {*map(frozenset, way(ready(needs, missing=missing)))} == {frozenset({0, 1}), frozenset({2, 3})}
        assert {*map(frozenset, way(ready(needs)))} == {frozenset({0, 2}), frozenset({1, 3})}


def test_bytes_count_not_experts() -> None:
    needs = [[0, 1, 2], [1, 2, 8], [0, 7, 9], [7, 8, 9]]
    large = [1000, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert choose(ready(needs)).rows == (0, 1)
    assert set(choose(ready(needs, missing=large)).schedule) == {(0, 2), (1, 3)}


def test_where_all_fit_they_run() -> None:
    choice = choose(ready(KINDS, most=4))
    assert choice.rows == (0, 1, 2, 3) and choice.way == "in-order"


def test_a_saving_that_is_less_than_the_delays_is_left() -> None:
    """The only pair that saves bytes with row 0 is expensive. It saves 200 ns and delays row 1 by 1000."""
    needs = [[0], [1], [0, *range(10, 20)], [1]]
    due = ready(needs, passed_over=[3, 0, 0, 0])
    assert due.due == (0,) and greedy(due)[0] == (0, 1)
    saving = ((0, 2), (1, 3))
    assert totals(due, saving)[0] == totals(due, due.in_order)[0] - 200
    assert totals(due, saving)[1] > totals(due, due.in_order)[1]
    assert resplit(due) == saving and choose(due).way == "in-order"
    assert choose(ready(needs)).rows == (1, 3)  # the other step first, and everybody is better off


def test_nothing_missing_is_nothing_to_choose() -> None:
    assert choose(ready(KINDS, missing=[0] * 9)).way == "in-order"
    assert choose(ready(np.zeros((0, 4), dtype=bool))).rows == ()


@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_no_exchange_of_two_rows_saves_more_bytes_after_a_resplit(problem: Ready) -> None:
    if problem.rows <= problem.most:
        return
    first, second, *_ = resplit(problem)
    read = problem.bytes_of(first) + problem.bytes_of(second)
    for a in set(first) - set(problem.due):
        for b in set(second) - set(problem.due):
            one, two = (*(set(first) - {a}), b), (*(set(second) - {b}), a)
            assert problem.bytes_of(one) + problem.bytes_of(two) >= read


# Nobody starves


@given(rows=st.integers(1, 24), most=st.integers(1, 8), most_waits=st.integers(0, 6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_no_row_is_passed_over_more_often_than_allowed(rows: int, most: int, most_waits: int, seed: int) -> None:
    """Row 0 shares nothing with the others and costs most; all are ready again after they ran."""
    rng = np.random.default_rng(seed)
    waits = np.zeros(rows, dtype=np.int64)
    bound = max(most_waits, -(-rows // most) - 1)
    for _ in range(40):
        needs = np.concatenate([np.zeros((rows, 20), dtype=bool), rng.random((rows, 10)) < 0.4], axis=1)
        needs[0, :20] = True
        choice = choose(ready(needs, passed_over=waits, most=most, most_waits=most_waits))
        ran = list(choice.rows)
        assert (waits[ran].max() if ran else 0) <= bound
        waits += 1
        waits[ran] = 0
        assert waits.max() <= bound


def test_due_rows_are_as_few_as_can_be() -> None:
    needs = [[0]] * 6
    assert ready(needs, passed_over=[0, 1, 2, 3, 0, 0]).due == (3,)
    assert ready(needs, passed_over=[0, 2, 2, 2, 0, 0]).due == (1,)  # the two others fit into the next step
    assert ready(needs, passed_over=[0, 0, 0, 0, 0, 0]).due == ()
    assert ready(needs, passed_over=[3, 3, 3, 0, 0, 0]).due == (0, 1)
    assert ready(needs, most_waits=1).due == (0, 1)  # six rows, three steps, one wait: in order


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"most": 0}, "most is 0"),
        ({"most_waits": -1}, "most_waits is -1"),
        ({"rate": -1}, "read_fs_per_byte is -1"),
        ({"step_ns": -1}, "step_ns is -1"),
        ({"missing": [1] * 8}, "for each expert"),
        ({"passed_over": [0]}, "for each row"),
        ({"missing": [-1] * 9}, "not be negative"),
        ({"passed_over": [-1] * 4}, "not be negative"),
    ],
)
def test_values_that_cannot_be_are_refused(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ready(KINDS, **change)


def test_large_models_do_not_overflow() -> None:
    """64 tokens of 60 layers of 384 experts with 44 MB each, at 100 MB/s."""
    rng = np.random.default_rng(0)
    needs = rng.random((64, 60 * 384)) < 8 / 384
    problem = ready(needs, missing=[44_000_000] * needs.shape[1], most=32, rate=10**7)
    choice: Choice = choose(problem, ("greedy",))
    assert (choice.total_ns, choice.waits_ns) == totals(problem, choice.schedule)
