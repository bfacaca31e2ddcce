"""Weights that set out before a layer's counts are known, over gloo: they are under way when the counts are exchanged,
the rows go by the exact counts, and nothing that comes out changes.
"""

import dataclasses
import math

import numpy as np
import pytest
import tiny
import world
from test_balanced_layer import EXPERTS, RATES, Steps, random_plan, spread
from test_parity import prompts, reference
from test_ranks import facts_of, make_engine, run_until_done, submit

from moeyard.engine.dispatch import PlanMismatch
from moeyard.engine.group import RankLost
from moeyard.scheduler import placement
from moeyard.scheduler.balance.early import EarlyPlans
from moeyard.scheduler.balance.plan import check
from moeyard.scheduler.balance.problem import Rates

SIZE, NEW_TOKENS = 3, 5
TEXTS = prompts(131, 5, longest=60, seed=3)
FAST = Rates(base_ns=1, expert_ps=2_000_000, row_ps=1_000_000, near_alpha_ns=8_000, plan_ns=10)


class Always(EarlyPlans):
    """Moves set out early as soon as there are counts to plan them from."""

    pays = True


def force(balancer):
    for layer in balancer.layers.values():
        layer._early.plans.__class__ = Always


class Watched(Steps):
    """Notes each layer's plan, whether weights were under way at its first exchange, and the rows in own slots."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        force(self.balancer)
        self.made, self.moving = [], []
        plan, exchange = self.balancer.plan, self.group.all_gather_counts

        def planning(layer, *args):
            problem, made = plan(layer, *args)
            check(problem, made)
            self.made.append(made)
            return problem, made

        def exchanging(counts_N):
            if (index := self.group.progress.layer) >= 0:
                self.moving.append(self.balancer.layers[index].moving)
            return exchange(counts_N)

        self.balancer.plan, self.group.all_gather_counts = planning, exchanging

    def layer_run(self, planner, index):
        """A balanced layer; whether weights were under way before its counts, its plan, and rows that are wrong."""
        self.moving.clear()
        _, computed = self.run(planner, index)
        here, plan = self.group.position, self.made[-1]
        own_E = self.balancer.layers[index]._slot_PE[here] >= 0
        wrong = 0 if plan.is_native else computed - int(plan.rows_EP[own_E, here].sum())
        return self.moving[0], plan, wrong


def early_steps(group):
    """Two layers, whose expert 0 is spread in each step."""
    steps = Watched(
        group, placement.linear(EXPERTS, group.size), slots=2, layers=2, rates=RATES, keep=False, early=True
    )
    facts = []
    for _ in range(4):
        for index in range(2):
            moving, plan, wrong_rows = steps.layer_run(spread(0), index)
            facts.append((moving, wrong_rows, plan.digest, plan.transfers, plan.is_native, plan.rows_EP.tolist()))
    gaps = [(layer._early.gap_us, layer._early.plans.gap_ns) for layer in steps.balancer.layers.values()]
    return facts, gaps, steps.wrong, steps.balancer.figures.early, group.sent_weight_bytes


@pytest.fixture(scope="module")
def ranks():
    made = world.World(SIZE)
    yield made
    made.close()


def test_weights_are_under_way_before_the_counts_and_rows_go_by_them(ranks):
    results = ranks.run(early_steps)
    first = results[0][0]
    for facts, gaps, wrong, early, _ in results:
        assert not wrong and early == 2 * 3  # all but the first step's
        assert [row[1] for row in facts] == [0] * 8
        assert [row[2:] for row in facts] == [row[2:] for row in first]
        assert [row[0] for row in facts] == [False, False] + [True] * 6
        assert all(gap_us > 0 for gap_us, _ in gaps)
        assert [gap_ns for _, gap_ns in gaps] == [gap_ns for _, gap_ns in results[0][1]]
    assert all(len(row[3]) == SIZE - 1 for row in first) and sum(not row[4] for row in first) > 5
    assert len({tuple(map(tuple, row[5])) for row in first}) == len(first)  # the counts were others in each
    assert sum(result[4] for result in results) > 0


def random_steps(group, seed):
    """Layers that share few slots, guests that stay, and steps that are not balanced in between."""
    rng = np.random.default_rng(seed)
    table = placement.replicated([50, 3, 9, 1, 0, 30, 2], group.size, placement.slots_needed(EXPERTS, group.size) + 1)
    steps = Watched(group, table, slots=3, layers=2, window=4, early=True)
    wasted = useful = wrong_rows = 0
    for step in range(40):
        if step == 20:
            steps.layers[0].use(table)  # as after experts have moved
        balanced = rng.integers(4) > 0
        for index in range(2):
            if not balanced:
                steps.run(None, index)
                continue
            moving, plan, wrong = steps.layer_run(random_plan(rng), index)
            wrong_rows += abs(wrong)
            wasted += moving and plan.is_native
            useful += moving and not plan.is_native
    figures = dataclasses.asdict(steps.balancer.figures) | {"plan_ns": 0}
    return steps.wrong, wrong_rows, (wasted, useful), steps.held, figures


def test_any_early_plans_give_the_same_result(ranks):
    results = ranks.run(random_steps, 3)
    for wrong, wrong_rows, _, *facts in results:
        assert not wrong and not wrong_rows
        assert facts == list(results[0][3:])
    assert all(sum(counts) for counts in zip(*(result[2] for result in results), strict=True))
    figures = results[0][-1]
    names = ("transfers", "guest_hits", "guests_kept", "guests_evicted", "early")
    assert all(figures[name] for name in names)


def disagreeing(group):
    """Rank 1 alone takes it that early moves pay."""
    steps = Steps(group, placement.linear(EXPERTS, group.size), slots=2, rates=RATES, keep=False, early=True)
    steps.run(spread(0))
    if group.position == 1:
        force(steps.balancer)
    with pytest.raises(PlanMismatch):
        steps.run(spread(0))


def test_ranks_that_decide_otherwise_are_an_error(ranks):
    ranks.run(disagreeing)


# Whole engines


def broken_while_moving(engine, out):
    """Steps until the group breaks, as attention ends, when weights are on their way to a layer's guests; the engine
    goes on in another group.
    """
    group, balancer = engine._parallel.group, engine._parallel._context.balancer
    exchange = group.all_gather_counts

    def breaking(counts_N):
        if group.progress.layer >= 0 and balancer.layers[group.progress.layer]._newcomers is not None:
            raise RankLost(group.progress, TimeoutError("a test"))
        return exchange(counts_N)

    group.all_gather_counts = breaking
    with pytest.raises(RankLost):
        run_until_done(engine, out)
    group = world.next_group(group)
    engine.join(group)
    return group


def engines(group, path, by_rank):
    facts = {}
    for name in ("in time", "early", "broken"):
        group = world.next_group(group)
        engine = make_engine(group, path, balance="auto", guest_memory="14KiB", max_batched_tokens=24, max_num_seqs=8)
        out = submit(engine, by_rank[group.position], NEW_TOKENS)

        def prepare(engine=engine, name=name):
            balancer = engine._parallel._context.balancer
            balancer.rates = FAST
            engine._parallel._choices.clear()
            if name != "in time":
                force(balancer)
            else:
                for layer in balancer.layers.values():
                    layer._early.plans.saved_ns = -math.inf

        prepare()
        if name == "broken":
            group = broken_while_moving(engine, out)
            prepare()
        run_until_done(engine, out, wake=2)
        facts[name] = (list(out.values()), facts_of(engine)["stats"])
        engine.close()
    group.close()
    return facts


def test_engines_answer_alike(ranks, tmp_path):
    path = tiny.save("qwen3_moe", tmp_path, num_experts=8)
    wanted = reference(path, TEXTS, NEW_TOKENS)
    results = ranks.run(engines, path, [TEXTS[:3], [], TEXTS[3:]])
    for name in ("in time", "early", "broken"):
        assert [tokens for facts in results for tokens in facts[name][0]] == wanted, name
    early, in_time = results[0]["early"][1], results[0]["in time"][1]
    assert in_time.balance_transfers > 0 and in_time.balance_early == 0
    assert early.balance_early > 0 and early.balance_transfers > 0 and early.balance_acted > 0
    assert results[0]["broken"][1].balance_early > 0
