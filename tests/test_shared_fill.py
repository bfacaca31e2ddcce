"""Other ranks compute shared experts for this one's tokens: the results are the same, and they did compute them."""

import dataclasses

import pytest
import tiny
import torch
import world
from test_balanced_layer import EXPERTS, HIDDEN, TOKENS, inputs, layer_of, move, wanted
from test_parity import prompts
from test_ranks import check_tokens, facts_of, make_engine, run_until_done, submit
from torch import nn

from moeyard.engine.balance import Balancer
from moeyard.engine.guests import GuestRoom
from moeyard.engine.overlap import Overlap
from moeyard.engine.parallel_layer import ParallelLayer, StepContext
from moeyard.kernels.threads import set_threads
from moeyard.scheduler import placement
from moeyard.scheduler.balance import priced
from moeyard.scheduler.balance.plan import SharedMove, check, native
from moeyard.scheduler.balance.problem import Rates
from moeyard.scheduler.step_plan import StepPlan

# Shared experts are slow and moving tokens is not.
RATES = Rates(base_ns=1, expert_ps=0, row_ps=1_000_000, shared_ps=5_000_000, shared_wire_ps=1_000, shared_ns=2_000)
ENGINES = dataclasses.replace(RATES, near_alpha_ns=10**9, plan_ns=10_000)
"""Single tokens are not worth a plan; prompts are, but no weights' way."""


class Block(nn.Module):
    """Routed experts and shared ones beside them, called after those or `first`, as models have them: their input has
    three dimensions, or two.
    """

    def __init__(self, layer, first):
        super().__init__()
        self.layer = layer
        self.first = first
        torch.manual_seed(3)
        self.shared_experts = nn.Sequential(nn.Linear(HIDDEN, 20), nn.SiLU(), nn.Linear(20, HIDDEN))

    def forward(self, x_1TD, ids, mix):
        if self.first:
            shared_TD = self.shared_experts(x_1TD[0])
            return (self.layer(x_1TD[0], ids, mix) + shared_TD)[None]
        routed = self.layer(x_1TD[0], ids, mix)
        return routed[None] + self.shared_experts(x_1TD)


def given_away(problem):
    """Half of the most tokens that a rank has, to all other ranks alike."""
    source = int(problem.tokens_P.argmax())
    each = int(problem.tokens_P[source]) // 2 // max(1, problem.ranks - 1)
    others = [p for p in range(problem.ranks) if p != source]
    return tuple(SharedMove(source, p, each) for p in others) if each else ()


PLANNERS = {
    "nothing else": lambda problem: dataclasses.replace(native(problem), shared=given_away(problem)),
    "guests too": lambda problem: dataclasses.replace(move(problem), shared=given_away(problem)),
    "all of them": lambda problem: dataclasses.replace(
        native(problem), shared=(SharedMove(0, 1, int(problem.tokens_P[0])),)
    ),
    "priced": priced.plan,
    "none": native,
}


def shared_moves(group, first):
    """For each planner what was wrong, tokens moved, and those that this rank's shared experts computed."""
    set_threads(1)
    table = placement.linear(EXPERTS, group.size)
    layer = layer_of(table.slots_PS[group.position], bias=False)
    block = Block(layer, first)
    room = GuestRoom(EXPERTS * layer.cutter.nbytes(), layer.cutter, group.device)
    layer.slot_E = torch.zeros(EXPERTS, dtype=torch.long)
    layer.overlap = Overlap(block, block.shared_experts)
    x, ids, mix = inputs(4, seed=9)
    block(x[None], ids, mix)
    layer.overlap.settle()
    assert layer.overlap.enabled and layer.overlap.deferred == first
    assert layer.overlap.row == (HIDDEN, torch.float32)
    plain, computed = layer.overlap._original, []
    layer.overlap._original = lambda x: computed.append(x.numel() // HIDDEN) or plain(x)
    wrong, facts = [], {}
    for tokens, degree in (("even", 0), ("uneven", 0), ("uneven", 2), ("one busy", 0)):
        tokens_P = TOKENS[tokens][: group.size]
        x, ids, mix = inputs(tokens_P[group.position], seed=group.position)
        routed = wanted(x, ids, mix, False)
        right = routed + plain(x) if len(x) else routed
        for name, planner in PLANNERS.items():

            def checked(problem, planner=planner):
                plan = planner(problem)
                check(problem, plan)
                return plan

            balancer = Balancer(group, checked, room, node_P=[0] * group.size, rates=RATES, keep=False)
            context = StepContext(group, None, balancer=balancer)
            layer.parallel = ParallelLayer(context, table, 0, layer)
            layer.parallel.moves_shared = True
            context.plan = StepPlan(
                step=1, tokens_P=tokens_P, dispatcher="all_to_all", degree=degree, table_digest=3, balanced=True
            )
            for repeat in range(2):
                computed.clear()
                early = layer.overlap.early_runs
                # Without tokens the layer is called alone, as by `Parallel.take_part`.
                out = block(x[None], ids, mix)[0] if len(x) else layer(x, ids, mix)
                if not torch.allclose(out, right, rtol=1e-4, atol=1e-4):
                    wrong.append((name, tokens, degree, repeat))
                if layer.overlap.early_runs - early != bool(tokens_P[group.position]):
                    wrong.append((name, tokens, degree, repeat, "not once"))
            facts[name, tokens, degree] = (balancer.figures.shared_rows // 2, sum(computed), balancer.figures.transfers)
    return wrong, facts


@pytest.mark.parametrize(("size", "first"), [(2, False), (3, True)])
def test_moves_of_shared_tokens(size, first):
    results = world.run_world(size, shared_moves, first)
    for case in results[0][1]:
        name, tokens, _ = case
        tokens_P = TOKENS[tokens][:size]
        moved, _, transfers = results[0][1][case]
        computed_P = [facts[case][1] for _, facts in results]
        assert all(facts[case][0] == moved for _, facts in results) and sum(computed_P) == sum(tokens_P)
        if name == "none":
            assert moved == 0 and computed_P == list(tokens_P)
        elif name == "all of them":
            assert moved == tokens_P[0] and computed_P[0] == 0
        elif name != "priced":
            assert moved == max(tokens_P) // 2 // (size - 1) * (size - 1) > 0
        elif tokens != "even":
            assert moved > 0 and max(computed_P) < max(tokens_P)
        assert bool(transfers) or name != "guests too"
    for wrong, _ in results:
        assert not wrong, wrong


# Engines

MODELS = {"deepseek_v3": True, "qwen2_moe": True, "qwen3_moe": False}
"""Whether they have shared experts. Those of Qwen2-MoE are called first, and go through a gate of each token."""
SIZE, NEW_TOKENS = 2, 6


def engines(group, paths, by_rank):
    facts = []
    for path in paths:
        group = world.next_group(group)
        engine = make_engine(group, path)
        parallel = engine._parallel
        measured = parallel._context.constants.shared
        balancer = parallel._context.balancer
        own_rates, balancer.rates = balancer.rates, ENGINES
        parallel._choices.clear()
        out = submit(engine, by_rank[group.position], NEW_TOKENS)
        plans = run_until_done(engine, out)
        more = {**facts_of(engine), "plans": plans, "measured": measured, "rates": own_rates}
        more["movable"] = [[layer.parallel.moves_shared for layer in engine._experts.layers]]
        if path == paths[0]:  # one rank whose shared experts others could not compute is enough
            if group.position == 1:
                engine._experts.layers[-1].overlap.row = None
            group = world.next_group(group)
            engine.join(group)
            more["movable"].append([layer.parallel.moves_shared for layer in engine._experts.layers])
        facts.append((list(out.values()), more))
        engine.close()
    group.close()
    return facts


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return [tiny.save(name, tmp_path_factory.mktemp(name)) for name in MODELS]


def test_engines_give_the_same_tokens_and_moved_some(paths):
    by_rank = [prompts(131, 3, longest=60, seed=4), []]  # the second rank only takes part
    results = world.run_world(SIZE, engines, paths, by_rank)
    for index, (name, movable) in enumerate(MODELS.items()):
        of_model = [facts[index] for facts in results]
        check_tokens(paths[index], by_rank, of_model, NEW_TOKENS)
        (_, first), (_, second) = of_model
        assert any(plan.balanced for plan in first["plans"]), name
        assert bool(first["stats"].balance_shared_rows) == movable, name
        assert first["measured"] == second["measured"] and bool(first["measured"].ps_per_row) == movable
        assert all(first["movable"][0]) == any(first["movable"][0]) == movable
        assert index or first["movable"][1] == second["movable"][1] == [True] * (len(first["movable"][0]) - 1) + [False]
        rates = first["rates"]
        assert rates == second["rates"]
        assert bool(rates.shared_ps) == bool(rates.shared_wire_ps) == bool(rates.shared_ns) == movable
