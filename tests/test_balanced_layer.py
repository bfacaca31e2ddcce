"""A layer balanced by each lever gives what plain expert parallelism gives, and the lever did act: over gloo.

So do guests that stay, and tables for steps without plans.
"""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import world
from torch.nn import functional as F

from moeyard.engine.balance import Balancer
from moeyard.engine.decode_tables import DecodeTables
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
# A guest is worth its place for a step or two.
KEEPING = Rates(base_ns=10, expert_ps=1000, row_ps=1_000_000, near_alpha_ns=20_000)


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
        format=None,
        dtype=up.dtype,
        hidden=HIDDEN,
        width=WIDTH,
        up_SND=up,
        down_SDI=down,
        up=up,
        down=down,
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
    rows_EP, sliced_E, _ = split(problem, [p for p in np.flatnonzero(problem.holds_PE[:, 0]) if p != problem.home_E[0]])
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

                # Guests that stay would make another problem of the second time.
                balancer = Balancer(group, checking, room, node_P=node_P, rates=RATES, keep=False)
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


@pytest.fixture(scope="module")
def worlds():
    """Worlds by size: starting one takes seconds."""
    made = {}

    def get(size):
        if size not in made:
            made[size] = world.World(size)
        return made[size]

    yield get
    for it in made.values():
        it.close()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_no_lever_changes_the_result_and_each_acts(worlds, size):
    results = worlds(size).run(every_lever)
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


# Guests that stay, and tables for steps without plans


class Steps:
    """Layers of one rank that share a balancer, whose plans the test makes, and their steps."""

    def __init__(self, group, table, slots, layers=1, window=3, rates=KEEPING, **options):
        set_threads(1)
        self.group = group
        self.tokens_P = (24, 3, 10, 11)[: group.size]
        self.layer = layer_of(table.slots_PS[group.position], bias=True)
        self.room = GuestRoom(slots * self.layer.cutter.nbytes(), self.layer.cutter, group.device)
        self.planner = native
        self.plans, self.problems = [], []
        options = {"node_P": [0] * group.size, **options}
        self.balancer = Balancer(group, self.make, self.room, rates=rates, **options)
        self.context = StepContext(group, None, balancer=self.balancer)
        self.layers = [ParallelLayer(self.context, table, index, self.layer) for index in range(layers)]
        self.balancer.tables = DecodeTables(self.balancer, CHOICES, window)
        self.steps = 0
        self.wrong = []
        self.computed = 0
        """Rows of experts that this rank had in its own slots."""
        run_local = self.layer.run_local

        def counting(x_RD, slots_RK, weights_RK, pairs):
            self.computed += pairs
            return run_local(x_RD, slots_RK, weights_RK, pairs)

        self.layer.run_local = counting

    def make(self, problem):
        plan = self.planner(problem)
        check(problem, plan)
        self.plans.append(plan)
        self.problems.append(problem)
        return plan

    def run(self, planner=None, index=0, dispatcher="all_to_all", seed=None, tokens_P=None):
        """A layer of a step, balanced if there is a planner."""
        self.steps += 1
        tokens_P = self.tokens_P if tokens_P is None else tokens_P
        self.planner = planner
        plan = StepPlan(
            step=self.steps,
            tokens_P=tokens_P,
            dispatcher=dispatcher,
            degree=1,
            table_digest=0,
            balanced=planner is not None,
        )
        self.balancer.tables.advance(plan)
        self.context.plan = dataclasses.replace(plan, table_digest=self.balancer.tables.digest)
        x, ids, mix = inputs(tokens_P[self.group.position], seed=[self.steps, seed][seed is not None])
        flat = ids[ids >= 0]
        self.layer.counts_E += torch.bincount(flat, minlength=EXPERTS)
        before = self.group.sent_weight_bytes, self.computed
        if index == 0:
            self.balancer.begin(-1, self.context.plan)
        with torch.inference_mode():
            out = self.layers[index].run(self.layer, x, ids, mix)
        if not torch.allclose(out, wanted(x, ids, mix, True), rtol=1e-4, atol=1e-4):
            self.wrong.append(self.steps)
        return self.group.sent_weight_bytes - before[0], self.computed - before[1]

    @property
    def held(self):
        return {index: [(p, e) for p, e, _ in self.balancer.leases.held(index)] for index in range(len(self.layers))}


def spread(expert):
    """All ranks compute a part of its rows; those that do not have it get it, as far as there is room."""

    def plan(problem):
        start = native(problem)
        rows_EP, load, home = start.rows_EP.copy(), int(problem.loads_E[expert]), int(problem.home_E[expert])
        holders = [
            p for p in range(problem.ranks) if problem.holds_PE[p, expert] or problem.room_P[p] >= problem.expert_bytes
        ]
        rows_EP[expert] = 0
        for i, p in enumerate(holders):
            rows_EP[expert, p] = load * (i + 1) // len(holders) - load * i // len(holders)
        transfers = tuple(Transfer(expert, home, p) for p in holders if not problem.holds_PE[p, expert])
        return Plan("spread", rows_EP, start.sliced_E, transfers)

    return plan


def guests_that_stay(group):
    table = placement.linear(EXPERTS, group.size)
    steps = Steps(group, table, slots=3)
    figures = steps.balancer.figures
    facts = {"sent": [], "held": [], "figures": []}

    def note(sent):
        facts["sent"].append(sent[0])
        facts["held"].append(steps.held[0])
        facts["figures"].append((figures.transfers, figures.guest_hits, figures.guests_kept, figures.guests_evicted))

    for _ in range(2):
        note(steps.run(spread(0)))  # comes and stays; is there already
    for _ in range(4):
        note(steps.run(spread(EXPERTS - 1)))  # another load: the old guest's rent adds up
    steps.layers[0].use(table)  # as after experts have moved
    note((0, 0))
    note(steps.run(spread(0)))
    steps.balancer.rates = RATES  # as after a new group was measured
    note((0, 0))
    return facts, steps.wrong


@pytest.mark.parametrize("size", [2, 3])
def test_a_guest_stays_is_used_and_goes_under_another_load(worlds, size):
    results = worlds(size).run(guests_that_stay)
    for facts, wrong in results:
        assert not wrong
        assert facts["held"] == results[0][0]["held"] and facts["figures"] == results[0][0]["figures"]
    sent = [sum(steps) for steps in zip(*(facts["sent"] for facts, _ in results), strict=True)]
    facts = results[0][0]
    first, last = [(p, 0) for p in range(1, size)], [(p, EXPERTS - 1) for p in range(size - 1)]
    assert facts["held"][:2] == [first, first]
    assert sent[0] > 0 and sent[1] == 0
    assert facts["figures"][:2] == [(size - 1, 0, size - 1, 0), (size - 1, size - 1, size - 1, 0)]
    assert facts["held"][2] == sorted(first + last) and sent[2] == sent[0] and sent[3] == sent[4] == 0
    assert facts["held"][5] == last and facts["figures"][5][3] == size - 1
    assert facts["held"][6:] == [[], first, []] and sent[7] == sent[0]


def random_plan(rng):
    """Rows of some experts go anywhere by some lever, as far as there is room; the same on every rank."""

    def plan(problem):
        start = native(problem)
        rows_EP, sliced_E = start.rows_EP.copy(), start.sliced_E.copy()
        room_P = problem.room_P // problem.expert_bytes
        transfers = []
        for expert in rng.permutation(problem.experts)[:3].tolist():
            load = int(problem.loads_E[expert])
            holders = np.flatnonzero(problem.holds_PE[:, expert]).tolist()
            free = [p for p in range(problem.ranks) if p not in holders and room_P[p] > 0]
            way = rng.integers(4)
            if way == 3 and len(free) > 1 and load and problem.most_parts > 1:  # in parts, from any holder
                rows_EP[expert], sliced_E[expert] = 0, load
                source = holders[rng.integers(len(holders))]
                transfers += [Transfer(expert, source, p, part, len(free)) for part, p in enumerate(free)]
                room_P[free] -= 1
                continue
            coming = free if way == 1 else free[:1] if way == 2 else []
            source = holders[rng.integers(len(holders))]
            for p in coming:
                transfers.append(Transfer(expert, source, p))
                source = p if rng.integers(2) else source  # a relay
                room_P[p] -= 1
            ranks = holders + coming
            cuts = np.sort(rng.integers(0, load + 1, len(ranks) - 1)).tolist()
            rows_EP[expert] = 0
            rows_EP[expert, ranks] = np.diff([0, *cuts, load])
        return Plan("random", rows_EP, sliced_E, tuple(transfers))

    return native if rng.integers(5) == 0 else plan


def random_steps(group, seed):
    """Two layers, few slots, steps of all kinds: only what comes out matters."""
    rng = np.random.default_rng(seed)
    slots = placement.slots_needed(EXPERTS, group.size) + 1
    table = placement.replicated([50, 3, 9, 1, 0, 30, 2], group.size, slots)
    steps = Steps(group, table, slots=3, layers=2, window=4)
    most = {0: 0, 1: 0}
    for _ in range(60):
        index = int(rng.integers(2))
        if rng.integers(3):
            steps.run(random_plan(rng), index)
        else:
            steps.run(None, index, ("all_to_all", "all_gather")[rng.integers(2)])
        most = {i: max(most[i], len(held)) for i, held in steps.held.items()}
    return steps.wrong, steps.held, dataclasses.asdict(steps.balancer.figures) | {"plan_ns": 0}, most, len(steps.plans)


@pytest.mark.parametrize("size", [2, 3])
def test_any_plans_guests_and_tables_give_the_same_result(worlds, size):
    results = worlds(size).run(random_steps, size)
    for wrong, *facts in results:
        assert not wrong
        assert tuple(facts) == results[0][1:]
    _, _, figures, most, _ = results[0]
    assert all(most.values())
    names = ("transfers", "guest_hits", "guests_kept", "guests_evicted", "tables")
    assert all(figures[name] for name in names) and bool(figures["parts"]) == (size > 2)


def decode_steps(group):
    slots = placement.slots_needed(EXPERTS, group.size) + 1
    table = placement.replicated([50, 3, 9, 1, 0, 30, 2], group.size, slots)
    tokens_P = (48, *[0] * (group.size - 1))  # all of one rank: by the nearest homes it computes most itself
    facts = {}
    for name, made in (("replicas", table), ("none", placement.linear(EXPERTS, group.size))):
        steps = Steps(group, made, slots=0)
        rows, digests = [], []
        for step in range(12):
            dispatcher = ("all_to_all", "all_gather")[step % 2]
            planner = native if step == 2 else None  # what its tokens choose is not counted
            rows.append(steps.run(planner, dispatcher=dispatcher, seed=5, tokens_P=tokens_P)[1])
            digests.append(steps.balancer.tables.digest)
        steps.layers[0].use(made)
        rows.append(steps.run(seed=5, tokens_P=tokens_P)[1])
        facts[name] = (steps.wrong, rows, digests, steps.balancer.figures.tables)
    return facts


@pytest.mark.parametrize("size", [2, 3])
def test_steps_without_plans_go_by_the_last_windows_table(worlds, size):
    results = worlds(size).run(decode_steps)
    for facts in results:
        for name, (wrong, _, digests, tables) in facts.items():
            assert not wrong and (digests, tables) == results[0][name][2:]
            assert tables == (name == "replicas")
    rows = np.array([facts["replicas"][1] for facts in results])
    # Three steps make a window, then one with plans of its own does not count, and the next ones have the table.
    assert (rows[:, :5] == rows[:, :1]).all() and (rows[:, 5:12] == rows[:, 5:6]).all()
    assert rows[:, 5].max() < rows[:, 0].max() and (rows.sum(0) == rows[:, 0].sum()).all()
    assert (rows[:, 12] == rows[:, 0]).all()  # another expert table: to the nearest homes again
    assert (np.diff([facts["none"][1] for facts in results]) == 0).all()
