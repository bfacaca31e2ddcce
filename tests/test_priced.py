"""The priced planner: its rules on any problem, and one instance made for each lever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from balance_problems import RATES, hot_loads, linear_homes, problem_of, problems, same, zipf_loads
from hypothesis import given, settings

from moeyard.bench.balance_grid import LOADS, Cell, Layout, placed, steps
from moeyard.bench.balance_grid import problem as problem_in
from moeyard.bench.moe_shapes import SHAPES
from moeyard.scheduler.balance import bound as bound_module
from moeyard.scheduler.balance import compiled, moving, moving_state, prices, search
from moeyard.scheduler.balance.baselines import BASELINES
from moeyard.scheduler.balance.model import arrivals, bound, price, rates_array
from moeyard.scheduler.balance.plan import Plan, check, native
from moeyard.scheduler.balance.priced import plan
from moeyard.scheduler.balance.problem import Problem, Rates

EXPERT = 10_000
NS = 1_000_000
SIMPLE = Rates(base_ns=1_000, expert_ps=0, row_ps=NS, near_alpha_ns=0, near_fs_per_byte=NS, far_fs_per_byte=NS)
"""A row takes 1 us, a weight transfer 10."""


def task(loads: list[int], ranks: int, **options: object) -> Problem:
    return problem_of(loads, ranks, **{"rates": SIMPLE, "expert_bytes": EXPERT, **options})  # type: ignore[arg-type]


def sent(made: Plan) -> list[tuple[int, int, int, int]]:
    return [(t.expert, t.source, t.destination, t.parts) for t in made.transfers]


# Rules


@settings(max_examples=400, deadline=None)
@given(problem=problems())
def test_any_problem(problem: Problem) -> None:
    made = plan(problem)
    check(problem, made)
    assert made.modelled_ns == price(problem, made)
    assert made.native_ns == price(problem, native(problem)) >= made.modelled_ns
    assert made.is_native == (made.modelled_ns == made.native_ns)
    assert same(made, plan(problem))
    if made.is_native:
        assert same(made, native(problem))


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_it_is_the_same_whoever_brings_the_rows(problem: Problem) -> None:
    assert same(plan(problem), plan(replace(problem, rows_PE=problem.rows_PE[::-1])))


@settings(max_examples=150, deadline=None)
@given(problem=problems(most_ranks=4, most_experts=12))
def test_never_below_the_bound(problem: Problem) -> None:
    assert bound(problem) <= plan(problem).modelled_ns


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_the_compiled_price_is_the_models(problem: Problem) -> None:
    """Of plans that others made, too: transfers in any order, several to a rank, chunks."""
    for planner in BASELINES.values():
        made = planner(problem)
        rows = np.zeros((len(made.transfers) + 1, prices.COLUMNS), dtype=np.int64)
        for i, t in enumerate(made.transfers):
            of_guest = made.rows_EP[t.expert, t.destination] if t.parts == 1 else made.sliced_E[t.expert]
            rows[i, :6] = (t.expert, t.source, t.destination, t.part, t.parts, of_guest)
        rates, count = rates_array(problem.rates), len(made.transfers)
        prices.arrive(rates, problem.expert_bytes, problem.node_P, problem.holds_PE, rows, count)
        assert rows[:count, prices.T_ARRIVAL].tolist() == arrivals(problem, made)
        held_EP = np.where(problem.holds_PE.T > 0, made.rows_EP, 0)
        ns = prices.worst_ns(
            rates, held_EP.sum(0), (held_EP > 0).sum(0), rows, count, made.chunks, np.zeros(problem.ranks, np.int64)
        )
        assert ns == price(problem, made) - (0 if made.is_native else problem.rates.plan_ns)


def test_nothing_to_do() -> None:
    for problem in (task([0] * 8, 4), task([5, 9, 1], 1), task([10] * 8, 4)):
        made = plan(problem)
        assert made.is_native and not made.transfers
        assert made.modelled_ns == made.native_ns


# Levers


def test_a_copy_that_is_there_already_costs_nothing() -> None:
    made = plan(task([100, 0], 2, holds_PE=[[1, 0], [1, 1]], home_E=[0, 1]))
    assert made.rows_EP.tolist() == [[50, 50], [0, 0]] and not made.transfers


def test_streaming_keeps_experts_whole() -> None:
    """Few rows: to split an expert would stream its weights twice."""
    rates = replace(SIMPLE, expert_ps=100_000 * 1000)
    held = np.zeros((2, 4), dtype=int)
    held[0], held[1, 2:] = 1, 1
    made = plan(task([3, 3, 3, 3], 2, holds_PE=held, home_E=[0, 0, 0, 0], rates=rates))
    assert made.rows_EP.tolist() == [[3, 0], [3, 0], [0, 3], [0, 3]]


def test_whole_experts_move() -> None:
    made = plan(task([100, 100, 0, 0], 2))
    assert [parts for *_, parts in sent(made)] == [1] and made.transfers[0].destination == 1
    assert made.modelled_ns <= 107_000  # 200 + 10 us of transfer, halved, and the base


def test_slices_when_one_transfer_is_too_long() -> None:
    """The weights take as long as half of the work; in quarters the helpers begin earlier and still share the rows."""
    problem = task([200] + [0] * 4, 5, expert_bytes=100_000)
    made = plan(problem)
    assert {parts for *_, parts in sent(made)} > {1} or {parts for *_, parts in sent(made)} == {4}
    assert made.sliced_E[0] > 0
    whole = [t for t in made.transfers if t.parts == 1]
    assert len(whole) <= 1
    assert made.modelled_ns < 160_000


def test_no_more_parts_than_an_expert_can_be_cut_into() -> None:
    problem = task([200] + [0] * 4, 5, expert_bytes=100_000)
    assert max(t.parts for t in plan(problem).transfers) == 4
    for most in (1, 2, 5):
        made = plan(replace(problem, most_parts=most))
        check(problem, made)
        assert max((t.parts for t in made.transfers), default=1) <= most
    with pytest.raises(ValueError, match="most_parts is 0"):
        replace(problem, most_parts=0)


def test_slices_do_not_pay_when_the_rows_way_is_what_takes_time() -> None:
    made = plan(task([200] + [0] * 4, 5, expert_bytes=20_000, rates=replace(SIMPLE, wire_ps=NS)))
    assert made.transfers and not made.sliced_E.any()


def test_ranks_pass_on_what_they_got() -> None:
    made = plan(task([3200] + [0] * 15, 16, expert_bytes=100_000, rates=replace(SIMPLE, wire_ps=NS)))
    sources = {source for _, source, _, _ in sent(made)}
    assert len(sources) > 4
    assert made.modelled_ns < 3200_000 / 16 + 4 * 100_000 + 1_000


def test_helpers_give_away_work_of_their_own_first() -> None:
    """All ranks have much to do: helpers of hot experts send own ones on while those are on their way."""
    cell = Cell(SHAPES["gpt-oss-120b"], Layout(64, 1), 1024, next(load for load in LOADS if load.name == "15 % in 4"))
    (step,) = steps(cell, 0)
    holds_PE, home_E = placed(cell, "linear", step.earlier_E)
    problem = problem_in(cell, step.rows_PE, holds_PE, home_E, np.zeros(64, dtype=np.int64))
    made = plan(problem)
    helpers = {t.destination for t in made.transfers if t.expert < 4}
    assert len({t.source for t in made.transfers} & helpers) > 4
    assert made.modelled_ns < 0.94 * 426_000  # what is best where helpers keep what they have


def test_between_nodes_weights_cross_once() -> None:
    """The way between nodes takes five times as long: one rank of the other node fetches, and passes on."""
    rates = replace(SIMPLE, near_fs_per_byte=NS // 10, far_fs_per_byte=5 * NS, wire_ps=NS)
    made = plan(task([800] + [0] * 7, 8, ranks_per_node=4, rates=rates))
    across = [(s, d) for _, s, d, _ in sent(made) if s // 4 != d // 4]
    inside = [(s, d) for _, s, d, _ in sent(made) if s // 4 == d // 4 == 1]
    assert len(across) == 1 and len(inside) == 3


def test_any_holder_is_a_source() -> None:
    held = np.zeros((6, 6), dtype=int)
    held[np.arange(6), np.arange(6)] = 1
    held[1, 0] = 1
    made = plan(task([1200, 0, 0, 0, 0, 0], 6, holds_PE=held, home_E=list(range(6)), expert_bytes=100_000))
    assert {0, 1} <= {source for _, source, _, _ in sent(made)}


def test_several_hot_ranks_share_the_helpers() -> None:
    made = plan(task([100, 100, 100, 100, 0, 0, 0, 0], 4))
    assert {source for _, source, _, _ in sent(made)} == {0, 1}
    assert {t.destination for t in made.transfers} == {2, 3}


def test_no_room_no_guests() -> None:
    problem = task([100, 100, 0, 0], 2, room=EXPERT - 1)
    made = plan(problem)
    assert all(t.parts > 1 for t in made.transfers)
    assert plan(replace(problem, room_P=np.zeros(2, dtype=int))).is_native


def test_no_chunks_when_rows_can_go_elsewhere() -> None:
    """Native would cut the tokens in two: every chunk streams the weights and pays the base again."""
    problem = task([100, 0], 2, most_rows=60, rates=replace(SIMPLE, base_ns=50_000, expert_ps=20_000_000))
    assert native(problem).chunks == 2
    made = plan(problem)
    assert made.chunks == 1
    assert plan(replace(problem, room_P=np.zeros(2, dtype=int))).chunks == 2  # the last resort


def test_what_a_plan_costs_counts() -> None:
    problem = task([100, 100, 0, 0], 2)
    gain = plan(problem).native_ns - plan(problem).modelled_ns
    for cost, kept in ((gain * 9 // 10, False), (gain, True)):
        assert plan(replace(problem, rates=replace(SIMPLE, plan_ns=cost))).is_native == kept


def test_what_hides_transfers_counts() -> None:
    """Weights that take longer than the work do not move, unless something else goes on meanwhile."""
    problem = task([100, 0], 2, expert_bytes=110_000)
    assert plan(problem).is_native
    assert not plan(replace(problem, rates=replace(SIMPLE, hidden_ns=100_000))).is_native


def test_a_hot_expert_larger_than_everything_else() -> None:
    problem = task([100_000] + [10] * 15, 8)
    made = plan(problem)
    check(problem, made)
    assert made.modelled_ns < 100_150_000 / 8 * 1.01


def test_the_search_ends_in_steps_that_are_counted() -> None:
    """384 experts, 64 ranks, all of them hot: the plan is the same on every machine, however slow it is."""
    loads = zipf_loads(384, 64 * 4096 * 8)
    problem = problem_of(loads, 64, ranks_per_node=8, rates=replace(RATES, wire_ps=25_600))
    made = plan(problem)
    check(problem, made)
    assert same(made, plan(problem)) and made.modelled_ns < made.native_ns // 4


# Cases of the literature (research on balancing: published planners' defects)


@pytest.mark.parametrize(
    ("experts", "ranks", "loads"),
    [
        (256, 32, zipf_loads(256, 32 * 128 * 8)),
        (256, 32, zipf_loads(256, 32 * 4096 * 8)),
        (128, 8, hot_loads(128, 8 * 128 * 4, 0.3, 4)),
        (128, 8, zipf_loads(128, 8 * 128 * 4)),
        (128, 8, hot_loads(128, 8 * 32768 * 4, 0.8, 4)),
        (256, 32, hot_loads(256, 32 * 32768 * 8, 0.5, 4)),
    ],
)
def test_not_behind_any_published_planner(experts: int, ranks: int, loads: list[int]) -> None:
    """Where LLEP's least chunk leaves eight times the mean, and where UltraEP's steps are too coarse."""
    problem = problem_of(loads, ranks, rates=replace(RATES, wire_ps=25_600), room=(experts // ranks + 2) * 49_800_000)
    made = plan(problem)
    check(problem, made)
    assert made.modelled_ns <= 1.01 * min(price(problem, planner(problem)) for planner in BASELINES.values())


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_close_to_the_bound_where_steps_are_long(nodes: int, share: float) -> None:
    loads = hot_loads(256, 32 * 32768 * 8, share, 16)
    problem = problem_of(loads, 32, ranks_per_node=32 // nodes, rates=replace(RATES, wire_ps=25_600))
    assert bound(problem) >= 0.9 * plan(problem).modelled_ns


def test_even_loads_with_few_rows_stay_at_home() -> None:
    """Every rank streams the same: nothing can be gained, and the bound says so."""
    problem = problem_of([4] * 128, 8)
    made = plan(problem)
    assert made.is_native and bound(problem) == made.modelled_ns


def test_homes_anywhere() -> None:
    home_E = linear_homes(40, 8)[np.random.default_rng(0).permutation(40)]
    problem = task([1000] * 4 + [10] * 36, 8, home_E=home_E)
    check(problem, plan(problem))


def test_all_that_have_an_expert_send_its_parts() -> None:
    """Two ranks hold the hot expert, and a transfer takes a third of its work: half of the parts come from each."""
    held = np.zeros((8, 8), dtype=int)
    held[np.arange(8), np.arange(8)] = 1
    held[1, 0] = 1
    made = plan(task([1200] + [0] * 7, 8, holds_PE=held, home_E=list(range(8)), expert_bytes=400_000))
    parts = [source for _, source, _, parts in sent(made) if parts > 1]
    assert set(parts) == {0, 1}


def test_streamed_experts_are_spread_like_a_matching() -> None:
    """Each rank has two experts of its own and rank 3 one; that rank 0's third can go there takes a chain of moves."""
    rates = replace(SIMPLE, expert_ps=100_000 * 1000)
    held = np.zeros((4, 10), dtype=int)
    for rank in range(4):
        held[rank, 2 * rank : 2 * rank + 2] = 1
    held[3, 7] = 0
    held[0, 7:10] = 1  # 7, 8, 9: rank 0 has five
    held[1, 7] = 1
    held[2, 8] = held[1, 8] = 1
    held[3, 9] = held[2, 9] = 1
    home_E = [0, 0, 1, 1, 2, 2, 3, 0, 0, 0]
    made = plan(task([1] * 10, 4, holds_PE=held, home_E=home_E, rates=rates, room=0))
    assert sorted((made.rows_EP > 0).sum(0)) == [2, 2, 3, 3]


def test_machine_code_is_kept_by_a_digest_of_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    before = compiled.digest(tmp_path)
    (tmp_path / "b.py").write_text("3")
    assert compiled.digest(tmp_path) != before
    here = compiled.digest(Path(compiled.__file__).parent)
    for function in (search.search, moving.attempt, bound_module.least_ns):
        assert here in str(function.stats.cache_path)


# Choices that are weighed by numbers like chance


def test_mixed_numbers_are_near_to_one_and_the_same_everywhere() -> None:
    found = [int(moving_state.mixed(np.int64(23), np.int64(i), np.int64(7), np.int64(400))) for i in range(1000)]
    assert min(found) < 700 and max(found) > 1350 and all(624 <= it <= 1424 for it in found)
    assert abs(sum(found) / 1000 - 1024) < 30
    assert {int(moving_state.mixed(np.int64(0), np.int64(i), np.int64(7), np.int64(400))) for i in range(9)} == {1024}


def test_another_turn_finds_what_the_first_misses() -> None:
    """Four hot experts on one node of eight; without the second turn the plan takes 368.6 us."""
    cell = Cell(SHAPES["DeepSeek-V3"], Layout(64, 8), 128, next(load for load in LOADS if load.name == "30 % in 4"))
    (step,) = steps(cell, 0)
    holds_PE, home_E = placed(cell, "linear", step.earlier_E)
    made = plan(problem_in(cell, step.rows_PE, holds_PE, home_E, np.zeros(64, dtype=np.int64)))
    assert made.modelled_ns < 360_000
