"""A layer balanced by each lever gives what plain expert parallelism gives, and the lever did act: over gloo."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import world
from torch.nn import functional as F

from moeyard.engine.balance import Balancer
from moeyard.engine.guests import GuestRoom
from moeyard.engine.moe import MoELayer
from moeyard.engine.parallel_layer import ParallelLayer, StepContext
from moeyard.kernels.threads import set_threads
from moeyard.scheduler import placement
from moeyard.scheduler.balance.baselines import PLANNERS
from moeyard.scheduler.balance.plan import Plan, Transfer, check, native
from moeyard.scheduler.balance.problem import Rates
from moeyard.scheduler.step_plan import StepPlan

EXPERTS, HIDDEN, WIDTH, CHOICES = 7, 16, 12, 3
TOKENS = {"even": (24, 24, 24, 24), "uneven": (3, 40, 0, 11), "one busy": (60, 0, 0, 0)}
# Computing is slow and links are fast, so that every planner has a reason to act.
RATES = Rates(base_ns=10, expert_ps=1000, row_ps=1_000_000, near_alpha_ns=1, near_fs_per_byte=1)


def gate(x):
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


def weights():
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) / 4
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) / 4
    up_bias, down_bias = torch.randn(EXPERTS, 2 * WIDTH, generator=generator), torch.randn(EXPERTS, HIDDEN)
    return up, down, up_bias, torch.randn(down_bias.shape, generator=generator)


def layer_of(slots, bias):
    """A layer with only these experts."""
    rows = torch.tensor([max(0, expert) for expert in slots], dtype=torch.long)
    up, down, up_bias, down_bias = (tensor[rows].contiguous() for tensor in weights())
    pool = SimpleNamespace(
        spec=SimpleNamespace(has_gate=True, has_bias=bias, num_experts=EXPERTS, top_k=CHOICES),
        num_slots=len(slots),
        up_SND=up,
        down_SDI=down,
        up_bias_SN=up_bias if bias else None,
        down_bias_SD=down_bias if bias else None,
    )
    return MoELayer(SimpleNamespace(_apply_gate=gate), pool)


def inputs(tokens, seed):
    """Most tokens choose expert 0, and some choices are none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    scores[:, 0] += (torch.rand(tokens, generator=generator) < 0.8) * 2
    ids = scores.topk(CHOICES).indices
    ids[torch.rand(tokens, CHOICES, generator=generator) < 0.1] = -1
    return x, ids, torch.rand(tokens, CHOICES, generator=generator)


def wanted(x, ids, mix, bias):
    up, down, up_bias, down_bias = weights()
    out = torch.zeros_like(x)
    for t, k in itertools.product(range(x.shape[0]), range(CHOICES)):
        if (e := int(ids[t, k])) >= 0:
            inner = gate(up[e] @ x[t] + (up_bias[e] if bias else 0))
            out[t] += mix[t, k] * (down[e] @ inner + (down_bias[e] if bias else 0))
    return out


# Levers: each takes expert 0's rows, or some, away from its home.


def others(problem):
    return [p for p in range(problem.ranks) if not problem.holds_PE[p, 0]]


def split(problem, ranks):
    plan = native(problem)
    rows_EP, load, home = plan.rows_EP.copy(), int(problem.loads_E[0]), int(problem.home_E[0])
    ranks = [home, *ranks]
    rows_EP[0] = 0
    rows_EP[0, ranks] = [load * (i + 1) // len(ranks) - load * i // len(ranks) for i in range(len(ranks))]
    return rows_EP, plan.sliced_E.copy(), home


def resplit(problem):
    rows_EP, sliced_E, _ = split(
        problem, [p for p in np.flatnonzero(problem.holds_PE[:, 0]) if p != problem.home_E[0]]
    )
    return Plan("resplit", rows_EP, sliced_E)


def move(problem):
    rows_EP, sliced_E, home = split(problem, others(problem))
    return Plan("move", rows_EP, sliced_E, tuple(Transfer(0, home, p) for p in others(problem)))


def move_on(problem):
    """From each helper to the next."""
    rows_EP, sliced_E, home = split(problem, others(problem))
    way = [home, *others(problem)]
    return Plan("relay", rows_EP, sliced_E, tuple(Transfer(0, a, b) for a, b in itertools.pairwise(way)))


def cut(problem):
    rows_EP, sliced_E, home = split(problem, [])
    group = others(problem)
    if len(group) > 1:
        sliced_E[0], rows_EP[0] = rows_EP[0].sum(), 0
    parts = tuple(Transfer(0, home, p, part, len(group)) for part, p in enumerate(group)) if sliced_E[0] else ()
    return Plan("cut", rows_EP, sliced_E, parts)


def chunked(problem):
    plan = move(problem)
    return Plan("chunked", plan.rows_EP, plan.sliced_E, plan.transfers, chunks=3)


LEVERS = {"resplit": resplit, "move": move, "relay": move_on, "cut": cut, "chunked": chunked}


def every_lever(group):
    set_threads(1)  # the ranks share the cores, and threads that wait for each other would wait for long
    wrong, acted = [], {}
    node_P = [p // 2 for p in range(group.size)]
    for place, bias, tokens in itertools.product(("linear", "replicated"), (False, True), TOKENS):
        slots = placement.slots_needed(EXPERTS, group.size) + (place == "replicated")
        table = (
            placement.linear(EXPERTS, group.size, slots)
            if place == "linear"
            else placement.replicated([50, 3, 9, 1, 0, 30, 2], group.size, slots)
        )
        layer = layer_of(table.slots_PS[group.position], bias)
        room = GuestRoom(EXPERTS * layer.cutter.nbytes(), layer.cutter, group.device)
        tokens_P = TOKENS[tokens][: group.size]
        x, ids, mix = inputs(tokens_P[group.position], seed=group.position)
        right = wanted(x, ids, mix, bias)
        published = {} if bias else {f"by {name}": planner for name, planner in PLANNERS.items()}
        for name, planner in (LEVERS | published).items():
            for degree in (0, 2) if tokens == "uneven" and name in LEVERS else (0,):
                checked = []

                def checking(problem, planner=planner, checked=checked, name=name):
                    plan = planner(problem)
                    check(problem, plan)
                    checked.append(plan)
                    return plan

                balancer = Balancer(group, checking, room, node_P=node_P, rates=RATES)
                context = StepContext(group, None, balancer=balancer)
                parallel = ParallelLayer(context, table, 0, layer)
                context.plan = StepPlan(
                    step=1,
                    tokens_P=tokens_P,
                    dispatcher="all_to_all",
                    degree=degree,
                    table_digest=3,
                    balanced=True,
                )
                for repeat in range(2):  # the second with what the first left behind
                    out = parallel.run(layer, x, ids, mix)
                    if not torch.allclose(out, right, rtol=1e-4, atol=1e-4):
                        wrong.append((place, bias, tokens, name, degree, repeat))
                if len({plan.digest for plan in checked}) != 1:
                    wrong.append((place, bias, tokens, name, degree, "another plan the second time"))
                if name == "chunked" and parallel.degrees != {4: 2}:
                    wrong.append((place, bias, tokens, name, degree, parallel.degrees))
                it, before = balancer.figures, acted.get(name, (0, 0, 0))
                acted[name] = (before[0] + it.split_experts, before[1] + it.transfers, before[2] + it.parts)
    return wrong, acted, group.sent_weight_bytes, group.sent_bytes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_no_lever_changes_the_result_and_each_acts(size):
    results = world.run_world(size, every_lever)
    for wrong, acted, _, _ in results:
        assert not wrong, (len(wrong), wrong[:5])
        assert acted == results[0][1]
    acted = results[0][1]
    splits, transfers, parts = (dict(zip(acted, column, strict=True)) for column in zip(*acted.values(), strict=True))
    assert splits["resplit"] and not transfers["resplit"]
    assert splits["move"] and transfers["move"] and transfers["relay"] and not parts["move"]
    assert transfers["by priced"] and splits["by resplit"] and transfers["by moonep"] and splits["by tempo"] is not None
    assert bool(parts["cut"]) == (size > 2)
    assert not transfers["by native"] and not splits["by native"]
    assert sum(weight_bytes for _, _, weight_bytes, _ in results) > 0
