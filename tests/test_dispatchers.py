"""Dispatchers of several ranks against the one of a single rank, in worlds of 1 to 4 ranks over gloo."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import world

from moeyard.engine.all_gather import AllGatherDispatcher
from moeyard.engine.all_to_all import AllToAllDispatcher
from moeyard.engine.dispatch import LocalDispatcher, Note, PlanMismatch
from moeyard.engine.row_format import RowFormat
from moeyard.scheduler import placement
from moeyard.scheduler.assignment import nearest_homes
from moeyard.scheduler.row_budget import RowBudget
from moeyard.scheduler.step_plan import StepPlan
from moeyard.scheduler.table import ExpertTable

EXPERTS, HIDDEN, CHOICES = 7, 12, 3
DISPATCHERS = {"all_gather": AllGatherDispatcher, "all_to_all": AllToAllDispatcher}
# Tokens of each rank, cut to the world's size; none anywhere is one of them.
TOKENS = {
    "even": (5, 5, 5, 5),
    "uneven": (1, 9, 0, 3),
    "one busy": (17, 0, 0, 0),
    "none": (0, 0, 0, 0),
    "first idle": (0, 2, 30, 1),
}
ROUTINGS = ("random", "one expert", "variable k", "nothing")
LOADS = [  # tokens and routing: each of both at least once
    ("even", "random"),
    ("uneven", "variable k"),
    ("uneven", "one expert"),
    ("one busy", "random"),
    ("one busy", "nothing"),
    ("none", "random"),
    ("first idle", "variable k"),
    ("first idle", "one expert"),
]
PLACEMENTS = ("linear", "round_robin", "replicated", "full")


def table_of(name, ranks):
    if name == "linear":
        return placement.linear(EXPERTS, ranks)
    if name == "round_robin":
        return placement.round_robin(EXPERTS, ranks, placement.slots_needed(EXPERTS, ranks) + 2)
    if name == "replicated":
        return placement.replicated([50, 3, 9, 1, 0, 30, 2], ranks, placement.slots_needed(EXPERTS, ranks) + 1)
    return ExpertTable.from_lists(EXPERTS, [range(EXPERTS)] * ranks)  # everything everywhere


def inputs(tokens, routing, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOICES).indices
    if routing == "one expert":
        ids[:] = -1
        ids[:, 1] = 4
    elif routing == "variable k":
        ids[torch.rand(tokens, CHOICES, generator=generator) < 0.5] = -1
    elif routing == "nothing":
        ids[:] = -1
    return x, ids, torch.rand(tokens, CHOICES, generator=generator)


def experts_of(x, weights_of_expert, expert):
    return torch.tanh(x @ weights_of_expert[expert])


def wanted(x, ids, weights, matrices):
    """A loop over tokens and choices."""
    out = torch.zeros_like(x)
    for t, k in itertools.product(range(x.shape[0]), range(CHOICES)):
        if ids[t, k] >= 0:
            out[t] += weights[t, k] * experts_of(x[t], matrices, ids[t, k])
    return out


def by_contract(dispatcher, x, ids, weights, plan, expert_of_slot, matrices):
    """`dispatch`, the experts on rows sorted by slot, `combine`."""
    rows, counts, state = dispatcher.dispatch(x, ids, weights, plan)
    assert rows.shape[0] == int(counts.sum())
    ends = counts.cumsum(0).tolist()
    parts = [
        experts_of(rows[end - count : end], matrices, expert_of_slot[slot])
        for slot, (end, count) in enumerate(zip(ends, counts.tolist(), strict=True))
        if count
    ]
    return dispatcher.combine(torch.cat(parts) if parts else rows, state)


def in_chunks(dispatcher, x, ids, weights, plan, expert_of_slot, matrices, note_bytes=0):
    """As the layer does: the next chunk is sent before this one is computed."""
    local, group = LocalDispatcher(dispatcher.num_slots), dispatcher.group
    note, heard = None, []
    if note_bytes:
        note = Note(mine_N=noted(group.position, note_bytes), heard=heard.append)
    chunks = dispatcher.cut(x, ids, weights, plan, note)
    chunks[0].send()
    for i, chunk in enumerate(chunks):
        if i + 1 < len(chunks):
            chunks[i + 1].send()
        arrived = chunk.arrive()
        if note is not None:
            (notes_PN,) = heard  # once, before anything is computed
            assert torch.equal(notes_PN, torch.stack([noted(position, note_bytes) for position in range(group.size)]))
        chunk.give_back(
            by_contract(local, arrived.x_RD, arrived.slots_RK, arrived.weights_RK, plan, expert_of_slot, matrices)
        )
    out = torch.zeros_like(x)
    for chunk in chunks:
        chunk.add_to(out)
    return out, len(chunks)


def noted(position, nbytes):
    """What a rank tells the others."""
    return (torch.arange(nbytes) * 7 + 31 * position).to(torch.uint8)


def every_combination(group):
    """All cases in one world, since starting one takes seconds; what went wrong, by case."""
    matrices = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)) / HIDDEN**0.5
    wrong, cases = [], 0
    for case in itertools.product(DISPATCHERS, PLACEMENTS, LOADS, (1, 2, 4, 8)):
        name, place, (tokens, routing), degree = case
        table = table_of(place, group.size)
        tokens_P = TOKENS[tokens][: group.size]
        x, ids, weights = inputs(tokens_P[group.position], routing, seed=group.position)
        plan = StepPlan(step=1, tokens_P=tokens_P, dispatcher=name, degree=degree, table_digest=3)
        dispatcher = DISPATCHERS[name](group, table)
        expert_of_slot = table.slots_PS[group.position]
        right = wanted(x, ids, weights, matrices)
        outs = []
        if degree == 1:
            outs.append(by_contract(dispatcher, x, ids, weights, plan, expert_of_slot, matrices))
        if any(tokens_P):
            # Of one row of a token in the all-gather, a part of one, and several
            note_bytes = {1: 0, 2: 8, 4: RowFormat(HIDDEN, CHOICES, x.dtype).nbytes, 8: 200}[degree]
            out, count = in_chunks(dispatcher, x, ids, weights, plan, expert_of_slot, matrices, note_bytes)
            outs.append(out)
            if name == "all_to_all" and count != degree:
                wrong.append((*case, f"{count} chunks"))
        for out in outs:
            if out.shape != right.shape or not torch.allclose(out, right, rtol=1e-5, atol=1e-5):
                wrong.append((*case, "another result"))
        if name == "all_to_all" and dispatcher.sent_rows != dispatcher.least_rows:
            wrong.append((*case, "more rows than needed"))
        cases += 1
    return wrong, cases


def with_little_memory(group):
    """Chunks, and the rows and bytes of the largest one that came here, for budgets from much to hardly any."""
    matrices = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)) / HIDDEN**0.5
    table = table_of("linear", group.size)
    said = []
    for room in (10**6, 40, 20, 6, 1):
        budget = RowBudget(bytes_P=(room * 16,) * group.size, row_bytes=10, pair_bytes=2, most_pairs=CHOICES)
        tokens_P = (64, 40, 9)[: group.size]
        x, ids, weights = inputs(tokens_P[group.position], "one expert", seed=group.position)
        plan = StepPlan(step=1, tokens_P=tokens_P, dispatcher="all_to_all", degree=1, table_digest=3)
        dispatcher = AllToAllDispatcher(group, table, budget=lambda budget=budget: budget)
        if room == 1:
            with pytest.raises(ValueError, match="max_batched_tokens"):
                dispatcher.cut(x, ids, weights, plan)
            continue
        chunks = dispatcher.cut(x, ids, weights, plan)
        most = max(sum(chunk._receives) for chunk in chunks)
        out, count = in_chunks(dispatcher, x, ids, weights, plan, table.slots_PS[group.position], matrices)
        right = torch.allclose(out, wanted(x, ids, weights, matrices), rtol=1e-5, atol=1e-5)
        said.append((count, most, most * (10 + 2) <= room * 16, right))
    return said


def test_a_rank_that_gets_every_token_takes_as_many_at_once_as_it_has_memory_for():
    ranks = world.run_world(3, with_little_memory)
    assert all(fits and right for said in ranks for _, _, fits, right in said)
    counts = [[count for count, *_ in said] for said in ranks]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] == 1 and counts[0] == sorted(counts[0]) and counts[0][-1] > 8
    assert any(most for said in ranks for _, most, _, _ in said)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_dispatcher_placement_and_degree_gives_the_specifications_result(ranks):
    for wrong, cases in world.run_world(ranks, every_combination):
        assert not wrong
        assert cases == len(DISPATCHERS) * len(PLACEMENTS) * len(LOADS) * 4


def sent_figures(group):
    """Rows and bytes that a rank sends for known routings."""
    table = placement.linear(4, 2)
    dispatcher = AllToAllDispatcher(group, table)
    x = torch.randn(4, 1024)
    # Both experts of a token on one rank are one row; experts on both ranks one row for the other.
    ids = torch.tensor([[0, 1], [2, 3], [0, 2], [-1, 3]])
    plan = StepPlan(step=1, tokens_P=(4, 4), dispatcher="all_to_all", degree=1, table_digest=0)
    (chunk,) = dispatcher.cut(x, ids, torch.ones(4, 2), plan)
    before = group.sent_bytes
    chunk.send()
    arrived = chunk.arrive()
    chunk.give_back(arrived.x_RD.contiguous())
    chunk.add_to(torch.zeros(4, 1024))
    return dispatcher.sent_rows, dispatcher.least_rows, group.sent_bytes - before, arrived.x_RD.shape[0]


def test_each_token_goes_once_to_each_rank_that_needs_it():
    (first, second) = world.run_world(2, sent_figures)
    assert first[:2] == (3, 3) and second[:2] == (2, 2)
    assert first[3] == 2 + 2 and second[3] == 3 + 3
    for rows_out, _, nbytes, rows_in in (first, second):
        own = {3: 2, 2: 3}[rows_out]
        least = (rows_out + rows_in - own) * 1024 * 4
        assert least <= nbytes < 1.01 * least


def other_plan(group):
    dispatcher = AllToAllDispatcher(group, placement.linear(4, 2))
    plan = StepPlan(step=1, tokens_P=(1, 1), dispatcher="all_to_all", degree=1, table_digest=group.position)
    try:
        dispatcher.cut(torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), plan)
    except PlanMismatch as error:
        return str(error)


def test_ranks_with_different_plans_say_so():
    texts = world.run_world(2, other_plan)
    assert all("different plans" in text for text in texts)
    assert "rank 1" in texts[0] and "rank 0" in texts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [1, 3, 48])
@pytest.mark.parametrize("choices", [1, 3, 8])
def test_rows_survive_packing(dtype, hidden, choices):
    form = RowFormat(hidden, choices, dtype)
    x = torch.randn(5, hidden).to(dtype)
    slots, weights = torch.randint(-1, 300, (5, choices)), torch.rand(5, choices)
    packed = form.pack(x, slots, weights)
    assert packed.shape == (5, form.nbytes)
    again = form.unpack(packed)
    assert torch.equal(again.x_RD, x) and torch.equal(again.slots_RK, slots)
    assert torch.equal(again.weights_RK, weights)
    assert form.unpack(form.pack(x[:0], slots[:0], weights[:0])).x_RD.shape == (0, hidden)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("place", PLACEMENTS)
def test_nearest_homes(ranks, place):
    table = table_of(place, ranks)
    rank_PE, slot_PE = nearest_homes(table)
    for source, expert in np.ndindex(ranks, EXPERTS):
        home = (int(rank_PE[source, expert]), int(slot_PE[source, expert]))
        assert home in table.homes(expert)
        if source in dict(table.homes(expert)):
            assert home[0] == source


def test_the_copies_of_an_expert_are_used_in_turn():
    table = ExpertTable.from_lists(3, [[0, -1], [0, 1], [2, 1], [-1, -1]])
    rank_PE, _ = nearest_homes(table)
    assert rank_PE[:, 0].tolist() == [0, 1, 0, 1]
    assert rank_PE[:, 1].tolist() == [1, 1, 2, 2]


def test_the_plan_has_a_digest_of_everything_in_it():
    plan = StepPlan(step=1, tokens_P=(1, 2), dispatcher="all_to_all", degree=1, table_digest=5)
    others = [
        dataclasses.replace(plan, **change)
        for change in (
            {"step": 2},
            {"tokens_P": (2, 1)},
            {"dispatcher": "all_gather"},
            {"degree": 2},
            {"table_digest": 6},
        )
    ]
    assert len({p.digest for p in [plan, *others]}) == 6
    assert all(0 <= p.digest < 2**31 for p in others)
