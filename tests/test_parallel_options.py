"""What the options about several ranks change, beside no answer; and what `auto` makes of measured times."""

import itertools

import pytest
import tiny
import world
from test_parity import prompts, reference
from test_ranks import facts_of, make_engine, run_until_done, submit

from moeyard.engine.decode_tables import DecodeTables
from moeyard.engine.dispatch import PlanMismatch
from moeyard.engine.group import RankLost
from moeyard.kernels.environment import usable_cores
from moeyard.scheduler import placement
from moeyard.scheduler.balance.problem import Rates
from moeyard.scheduler.cost import Constants, ExpertCost, LinkCost

EXPERTS, RANKS, LAYERS, NEW_TOKENS = 8, 2, 3, 6
TEXTS = prompts(131, 4, longest=40, seed=9)
LOADS = [[90, 1, 1, 1, 1, 1, 1, 1]] * LAYERS
CASES: dict[str, dict] = {
    "all_gather": {"dispatcher": "all_gather", "chunks": "1"},
    "all_to_all": {"dispatcher": "all_to_all", "chunks": "1"},
    "all_gather in 2": {"dispatcher": "all_gather", "chunks": "2"},
    "all_to_all in 8": {"dispatcher": "all_to_all", "chunks": "8"},
    "round_robin": {"expert_placement": "round_robin"},
    "spare slots": {"redundant_experts": 2},
    "replicated": {"expert_placement": "replicated", "placement": "loads.json", "redundant_experts": 1},
    "small moves": {"move_bytes": "1B", "chunks": "1"},
    "large moves": {"move_bytes": "1GiB", "chunks": "1"},
    "balanced": {
        "balance": "ultraep",
        "expert_placement": "replicated",
        "placement": "loads.json",
        "redundant_experts": 1,
        "guest_memory": "1MiB",
    },
    "threads": {"threads": 2},
}
CASES = {name: case for name, case in CASES.items() if case.get("threads", 1) <= usable_cores()}

# Prompts are worth plans of their own, and single tokens are not.
RATES = Rates(base_ns=1, expert_ps=2_000_000, row_ps=1_000_000, near_alpha_ns=3_000, plan_ns=10_000)

BREAK_AT = 5  # steps until the group of `broken_step` breaks


def swapped():
    """Where linear placement's experts go when both ranks change theirs."""
    return [list(reversed(placement.linear(EXPERTS, RANKS).to_lists()))] * LAYERS


def broken_step(group, path, mine):
    """An engine whose group breaks once, in a step's last layer: by then the others have counted its tokens."""
    engine = make_engine(group, path, **CASES["all_to_all"])
    out = submit(engine, mine, NEW_TOKENS)
    last = engine._experts.layers[-1]
    run_local, counted = last.run_local, []

    def break_off(*args):
        counted.append([layer.counts_E.tolist() for layer in engine._experts.layers])
        if len(counted) == BREAK_AT:
            raise RankLost(group.progress, TimeoutError("a test"))
        return run_local(*args)

    last.run_local = break_off
    try:
        run_until_done(engine, out)
    except RankLost:
        taken_back = [layer.counts_E.tolist() for layer in engine._experts.layers]
        engine.join(world.next_group(group))
    run_until_done(engine, out)
    facts = {**facts_of(engine), "out": list(out.values()), "counted": counted[BREAK_AT - 1], "taken_back": taken_back}
    engine.close()
    return engine._parallel.group, facts


def in_a_new_group(engine, mine, answers):
    """The guests that an engine kept, and those it has after it went into another group, where it answers the same."""
    held = []
    for group in (None, world.next_group(engine._parallel.group)):
        if group is not None:
            engine.join(group)
        leases = engine._parallel._context.balancer.leases
        held.append([leases.held(layer) for layer in range(LAYERS)])
    out = submit(engine, mine, NEW_TOKENS)
    run_until_done(engine, out, wake=2)
    assert list(out.values()) == answers
    return group, held


def every_case(group, path, by_rank):
    """An engine for each case, one after the other: starting a rank takes seconds."""
    facts = {}
    for name, options in CASES.items():
        group = world.next_group(group)
        engine = make_engine(group, path, LOADS if "placement" in options else None, **options)
        if "balance" in options:
            balancer = engine._parallel._context.balancer
            balancer.rates = RATES
            balancer.tables = DecodeTables(balancer, engine._parallel._top_k, length=2)
            engine._parallel._choices.clear()
        out = submit(engine, by_rank[group.position], NEW_TOKENS)
        moved = []

        def before_step(step, engine=engine, options=options, moved=moved):
            moved.append(engine._parallel.moved_bytes)
            if step == 1 and "move_bytes" in options:
                engine.place(1, swapped())

        start = engine._parallel.tables
        plans = run_until_done(engine, out, before_step=before_step)
        moved.append(engine._parallel.moved_bytes)
        took = [b - a for a, b in itertools.pairwise(moved) if b > a]
        facts[name] = {**facts_of(engine), "out": list(out.values()), "took": took, "start": start, "plans": plans}
        if "balance" in options:
            group, facts[name]["held"] = in_a_new_group(engine, by_rank[group.position], list(out.values()))
        engine.close()
    group, facts["broken"] = broken_step(world.next_group(group), path, by_rank[group.position])
    group.close()
    return facts


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), num_experts=EXPERTS)


@pytest.fixture(scope="module")
def wanted(path):
    return reference(path, TEXTS, NEW_TOKENS)


@pytest.fixture(scope="module")
def ranks():
    made = world.World(RANKS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def results(ranks, path):
    return ranks.run(every_case, path, [TEXTS[:3], TEXTS[3:]])


@pytest.mark.parametrize("name", CASES)
def test_no_option_changes_the_answers(results, wanted, name):
    assert results[0][name]["out"] + results[1][name]["out"] == wanted
    assert results[0][name]["tables"] == results[1][name]["tables"]


def test_dispatcher(results):
    for facts in results:
        for name, other in (("all_gather", "all_to_all"), ("all_to_all", "all_gather")):
            stats = facts[name]["stats"]
            assert getattr(stats, f"steps_{name}") >= NEW_TOKENS and getattr(stats, f"steps_{other}") == 0
        # One sends every token, padded to the busiest rank's, the other those that have an expert there.
        assert facts["all_to_all"]["stats"].sent_rows == facts["all_to_all"]["stats"].least_rows > 0
        assert facts["all_gather"]["stats"].sent_rows > facts["all_gather"]["stats"].least_rows
    least = [facts["all_to_all"]["stats"].least_rows for facts in results]
    assert least == [facts["all_gather"]["stats"].least_rows for facts in results]  # the router is the same


@pytest.mark.parametrize(
    ("name", "degrees"), [("all_gather", {1}), ("all_to_all", {1}), ("all_gather in 2", {2}), ("all_to_all in 8", {8})]
)
def test_chunks(results, name, degrees):
    assert all(set(facts[name]["degrees"]) == degrees for facts in results)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("all_gather", placement.linear(EXPERTS, RANKS)),
        ("round_robin", placement.round_robin(EXPERTS, RANKS)),
        ("spare slots", placement.linear(EXPERTS, RANKS, 6)),
        ("replicated", placement.replicated(LOADS[0], RANKS, 5)),
    ],
)
def test_placement_and_spare_slots(results, name, table):
    for rank, facts in enumerate(results):
        assert facts[name]["start"] == facts[name]["tables"] == [table.to_lists()] * LAYERS
        assert facts[name]["slots"] == [table.slots] * LAYERS
        assert facts[name]["contents"] == [list(table.slots_PS[rank])] * LAYERS
        assert facts[name]["stats"].moved_bytes == 0
    assert table.replicas_E[0] == (2 if name == "replicated" else 1)


def test_move_bytes(results):
    for facts in results:
        expert = facts["small moves"]["expert_bytes"]
        everything = LAYERS * EXPERTS // RANKS
        assert facts["small moves"]["took"] == [expert] * everything
        assert facts["large moves"]["took"] == [expert * everything]
        for name in ("small moves", "large moves"):
            assert facts[name]["tables"] == swapped() != facts[name]["start"]


def test_balance(results):
    plans, stats = results[0]["balanced"]["plans"], results[0]["balanced"]["stats"]
    assert plans == results[1]["balanced"]["plans"]
    assert {plan.balanced for plan in plans} == {False, True}
    balanced = sum(plan.balanced for plan in plans)
    assert stats.balance_layers == balanced * LAYERS and stats.balance_transfers > 0 and stats.balance_tables > 0
    assert stats.balance_guests_kept > 0
    before, after = results[0]["balanced"]["held"]
    assert any(before) and not any(after) and results[1]["balanced"]["held"] == [before, after]


@pytest.mark.skipif("threads" not in CASES, reason="needs two cores")
def test_threads(results):
    assert all(facts["threads"]["threads"] == 2 and facts["all_gather"]["threads"] == 1 for facts in results)


def test_a_step_that_broke_off_is_counted_once(results, wanted):
    assert results[0]["broken"]["out"] + results[1]["broken"]["out"] == wanted
    for facts in results:
        broken, undisturbed = facts["broken"], facts["all_to_all"]["stats"]
        assert broken["counted"] != broken["taken_back"]
        assert broken["stats"].expert_counts == undisturbed.expert_counts
        assert broken["stats"].prompt_tokens == undisturbed.prompt_tokens


# What `auto` chooses, from times that leave no doubt.

FREE, DEAR = LinkCost(1, 0), LinkCost(10**8, 0)
PER_BYTE = LinkCost(1, 10**9)  # a microsecond: the rows are what costs
NO_EXPERTS, PER_ROW = ExpertCost(1, 0, 0), ExpertCost(1, 0, 10**8)
TIMES = {
    "all_gather": Constants(DEAR, FREE, FREE, DEAR, NO_EXPERTS),
    "all_to_all": Constants(FREE, DEAR, DEAR, FREE, NO_EXPERTS),
    "all_gather in chunks": Constants(DEAR, PER_BYTE, PER_BYTE, DEAR, PER_ROW),
    "all_to_all in chunks": Constants(FREE, DEAR, DEAR, PER_BYTE, PER_ROW),
}


def with_times(group, path, by_rank):
    engine = make_engine(group, path, prefix_cache=False)
    parallel = engine._parallel
    facts = {"measured": parallel._context.constants.to_list()}
    for wake, (name, constants) in enumerate(TIMES.items(), start=1):
        parallel._context.constants = constants
        parallel._choices.clear()
        degrees = engine._experts.layers[0].parallel.degrees
        degrees.clear()
        out = submit(engine, by_rank[group.position], NEW_TOKENS)
        plans = run_until_done(engine, out, wake=wake)
        facts[name] = {"out": list(out.values()), "plans": plans, "degrees": dict(degrees)}
    facts["errors"] = forced_mismatches(engine, by_rank[group.position])
    engine.close()
    return facts


def forced_mismatches(engine, texts):
    """What is raised when rank 1 takes other tables for agreed, and how many answers came after: with the exchange of
    counts at once, without one before the next step."""
    parallel, errors = engine._parallel, []
    for wake, name in enumerate(("all_to_all", "all_gather"), start=10):
        parallel._context.constants = TIMES[name]
        parallel._choices.clear()
        parallel._table_digest += parallel.group.position
        out = submit(engine, texts, NEW_TOKENS)
        try:
            run_until_done(engine, out, wake=wake)
        except PlanMismatch as error:
            errors.append((str(error), max(map(len, out.values()))))
        for request_id in out:
            engine.abort(request_id)
        parallel._digest_tables()
        parallel._last_digest = 0
    return errors


@pytest.fixture(scope="module")
def chosen(path):
    # A world of its own: what this forces must not meet the other cases.
    return world.run_world(RANKS, with_times, path, [TEXTS[:3], TEXTS[3:]])


@pytest.mark.parametrize("name", TIMES)
def test_auto_goes_by_the_times(chosen, wanted, name):
    assert chosen[0][name]["out"] + chosen[1][name]["out"] == wanted
    plans = chosen[0][name]["plans"]
    assert {plan.dispatcher for plan in plans} == {name.partition(" ")[0]}
    assert [plan.digest for plan in plans] == [plan.digest for plan in chosen[1][name]["plans"]]
    degrees = chosen[0][name]["degrees"]
    assert degrees == chosen[1][name]["degrees"]
    if "chunks" in name:
        assert max(degrees) > 1
    else:
        assert set(degrees) == {1}


def test_all_ranks_hold_the_same_measured_times(chosen):
    assert chosen[0]["measured"] == chosen[1]["measured"] and len(chosen[0]["measured"]) == 19


def test_ranks_with_other_tables_stop_by_name(chosen):
    for rank, facts in enumerate(chosen):
        (at_once, answers), (later, _) = facts["errors"]
        assert f"rank {rank} and rank {1 - rank} hold different plans" in at_once and answers == 0
        assert "not at the same plan" in later and "rank 0: " in later and "rank 1: " in later
