"""Engines of several ranks: the same tokens as one rank's, whatever moves where meanwhile."""

import itertools
import os

import pytest
import tiny
import world
from test_parity import prompts, reference

from moeyard.engine.config import EngineConfig
from moeyard.engine.group import RankLost
from moeyard.engine.messages import Placed, Submit
from moeyard.engine.params import SamplingParams
from moeyard.scheduler import placement
from moeyard.scheduler.table import EMPTY


def make_engine(group, path, loads=None, **options):
    import torch

    from moeyard.engine.engine import Engine
    from moeyard.engine.parallel import Seat

    torch.set_num_threads(1)
    options = {"threads": 1, "kv_memory": "16MiB", "device": group.device.type, **options}
    config = EngineConfig(model=str(path), dtype="float32", progress=False, ep=group.size, **options)
    return Engine(config, Seat(group=group, local_rank=group.position, local_ranks=group.size, loads=loads))


def submit(engine, texts, new_tokens):
    """Queues prompts as requests "0", "1", ...; where their tokens go."""
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True).to_dict()
    for i, prompt in enumerate(texts):
        engine.submit(Submit(request_id=str(i), prompt_ids=prompt, params=params))
    return {str(i): [] for i in range(len(texts))}


def run_until_done(engine, out, wake=1, before_step=lambda step: None):
    """Steps until no rank has work, collecting tokens in `out`; the step's plans."""
    plans = []
    agree = engine._parallel.agree

    def watched(tokens, has_work):
        plan = agree(tokens, has_work)
        if plan is not None:
            plans.append(plan)
        return plan

    engine._parallel.agree = watched
    engine.wake(wake)
    step = 0
    while engine.has_work:
        before_step(step)
        for delta in engine.step():
            assert not delta.error, delta.error
            out[delta.request_id] += delta.token_ids
        step += 1
    engine._parallel.agree = agree
    return plans


def facts_of(engine):
    layers = engine._experts.layers
    return {
        "stats": engine.stats(with_experts=True),
        "degrees": layers[0].parallel.degrees if layers[0].parallel else {},
        "early": sum(layer.overlap.early_runs for layer in layers if layer.overlap),
        "slots": [layer.pool.num_slots for layer in layers],
        "contents": [list(layer.pool.contents) for layer in layers],
        "expert_bytes": layers[0].pool.reader.nbytes,
        "tables": engine._parallel.tables,
        "phases": engine.progress.totals_ns,
        "threads": engine.info["threads"],
        "guest_bytes": engine.info["guest_bytes"],
    }


def run_ranks(group, path, by_rank, new_tokens, options, orders=(), loads=None, room_for_rows=None):
    """Each rank runs its own prompts; its answers and what is known of how they were made.

    `orders[position]` are (own step, version, tables): asked for before that step.
    """
    engine = make_engine(group, path, loads, **options)
    if room_for_rows is not None:
        row = engine._parallel._context.budget
        engine._parallel.share_memory(2 * room_for_rows * (row.row_bytes + row.most_pairs * row.pair_bytes))
    mine = by_rank[group.position]
    out = submit(engine, mine, new_tokens)
    reports, history = [], []

    def before_step(step):
        reports.extend(engine.take_reports())
        pools = [list(layer.pool.contents) for layer in engine._experts.layers]
        history.append((engine._parallel.moved_bytes, engine._parallel.tables, pools))
        for at, version, tables in orders[group.position] if orders else ():
            if at == step:
                engine.place(version, tables)

    plans = run_until_done(engine, out, before_step=before_step)
    reports += engine.take_reports()
    facts = {**facts_of(engine), "reports": reports, "history": history, "plans": plans}
    engine.close()
    return list(out.values()), facts


def shared_out(texts, ranks):
    """Prompts of each rank; the last rank gets none when there are at least two."""
    busy = max(1, ranks - 1)
    return [texts[i::busy] if i < busy else [] for i in range(ranks)]


def check_tokens(path, by_rank, results, new_tokens):
    """Every rank's answers are transformers', and all ranks went by the same plans."""
    texts = [prompt for mine in by_rank for prompt in mine]
    wanted = iter(reference(path, texts, new_tokens))
    for mine, (out, facts) in zip(by_rank, results, strict=True):
        assert out == [next(wanted) for _ in mine]
        assert facts["plans"] == results[0][1]["plans"]
        assert facts["tables"] == results[0][1]["tables"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(architecture, **changes):
        key = (architecture, *changes.items())
        if key not in made:
            made[key] = tiny.save(architecture, tmp_path_factory.mktemp(architecture), **changes)
        return made[key]

    return get


@pytest.fixture(scope="module")
def worlds():
    made = {size: world.World(size) for size in (2, 3)}
    yield made
    for one in made.values():
        one.close()


@pytest.mark.parametrize(
    ("architecture", "ranks", "options"),
    [
        ("qwen3_moe", 2, {"dispatcher": "all_to_all"}),
        ("qwen3_moe", 2, {"dispatcher": "all_gather", "chunks": "4"}),
        ("deepseek_v3", 3, {"dispatcher": "all_to_all", "chunks": "2"}),
        ("gpt_oss", 3, {"redundant_experts": 1, "expert_placement": "round_robin"}),
        ("gpt_oss", 2, {"redundant_experts": 2, "balance": "tempo"}),
        ("qwen3_next", 2, {"dispatcher": "all_to_all"}),
        ("qwen3_5_moe_text", 2, {"dispatcher": "all_gather"}),
    ],
)
def test_greedy_tokens_are_those_of_transformers(checkpoints, worlds, architecture, ranks, options):
    path = checkpoints(architecture)
    by_rank = shared_out(prompts(131, 6, longest=40, seed=3), ranks)
    results = worlds[ranks].run(run_ranks, path, by_rank, 8, options)
    check_tokens(path, by_rank, results, 8)
    for rank, (_, facts) in enumerate(results):
        stats = facts["stats"]
        if options.get("dispatcher"):
            other = {"all_to_all": "all_gather", "all_gather": "all_to_all"}[options["dispatcher"]]
            assert getattr(stats, f"steps_{options['dispatcher']}") > 0 and getattr(stats, f"steps_{other}") == 0
        if chunks := options.get("chunks"):
            assert int(chunks) in facts["degrees"]
        assert stats.sent_bytes > 0 or rank == ranks - 1
        assert all(facts["phases"][name] > 0 for name in ("plan", "dispatch", "experts", "combine", "wait"))
        if architecture == "deepseek_v3" and by_rank[rank]:
            assert facts["early"] > 0 and facts["phases"]["shared"] > 0
    assert all(facts["slots"][0] < 8 for _, facts in results)
    has_room = "balance" not in options and options.get("dispatcher") != "all_gather"
    assert all((facts["guest_bytes"] > 0) == has_room for _, facts in results)


SEVEN = {"num_experts": 7}
LOADS = [[5, 900, 20, 3, 3, 100, 1], [0] * 7, [40, 40, 40, 40, 40, 40, 900]]


def test_seven_experts_on_three_ranks_with_copies_of_the_busiest(checkpoints, worlds):
    path = checkpoints("qwen3_moe", **SEVEN)
    by_rank = shared_out(prompts(131, 4, longest=30, seed=5), 3)
    options = {"expert_placement": "replicated", "placement": "loads.json", "redundant_experts": 1}
    results = worlds[3].run(run_ranks, path, by_rank, 6, options, (), LOADS)
    check_tokens(path, by_rank, results, 6)
    wanted = [placement.replicated(loads, 3, 4) for loads in LOADS]
    assert wanted[0].replicas_E[1] == 3 and wanted[2].replicas_E[6] == 3
    assert sum(wanted[0].replicas_E) > 7
    for rank, (_, facts) in enumerate(results):
        assert facts["tables"] == [table.to_lists() for table in wanted]
        assert facts["slots"] == [4, 4, 4]
        assert facts["contents"] == [list(table.slots_PS[rank]) for table in wanted]


def test_long_prompts_in_parts_beside_many_short_ones_and_a_rank_without_any(checkpoints, worlds):
    path = checkpoints("qwen3_moe")
    texts = prompts(131, 60, longest=150, seed=8)
    long = [prompt for prompt in texts if len(prompt) > 100][:3]
    short = [prompt[:4] for prompt in texts[:8]]
    by_rank = [long, [], short]
    options = {"max_batched_tokens": 48, "max_num_seqs": 8}
    results = worlds[3].run(run_ranks, path, by_rank, 10, options)
    check_tokens(path, by_rank, results, 10)
    plans = results[0][1]["plans"]
    assert max(max(plan.tokens_P) for plan in plans) == 48
    assert all(plan.tokens_P[1] == 0 for plan in plans)
    # Prefill here beside decoding there, then the other way round: the one ends long after the other has begun.
    assert any(plan.tokens_P[0] >= 40 and 0 < plan.tokens_P[2] <= 8 for plan in plans)
    assert sum(plan.tokens_P[0] for plan in plans) == sum(map(len, long)) + 9 * len(long)
    idle = results[1][1]
    assert idle["stats"].steps == 0 and idle["phases"]["experts"] > 0


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_with_little_memory_layers_run_in_more_chunks(checkpoints, worlds, dispatcher):
    path = checkpoints("qwen3_moe")
    by_rank = shared_out(prompts(131, 5, longest=60, seed=4), 3)
    options = {"max_batched_tokens": 48, "max_num_seqs": 8, "dispatcher": dispatcher, "chunks": "1"}
    results = worlds[3].run(run_ranks, path, by_rank, 5, options, (), None, 9)
    check_tokens(path, by_rank, results, 5)
    assert all(max(facts["degrees"]) >= 8 for _, facts in results)


def table_lists(plan, experts=7, ranks=3, slots=4, layers=3):
    return [plan(experts, ranks, slots).to_lists()] * layers


def turned(experts, ranks, slots):
    """Nothing stays where it is."""
    first, *rest = placement.linear(experts, ranks, slots).slots_PS
    return placement.linear(experts, ranks, slots).with_rows([*rest, first])


def with_copies(experts, ranks, slots):
    return placement.replicated([7 - e for e in range(experts)], ranks, slots)


# Own steps at which ranks 0, 1, 2 are told of version 1, and of version 2.
MOVES = {
    "one after the other": ((0, 3, 1), None, "1B"),
    "the second replaces the first under way": ((1, 2, 3), (5, 6, 4), "1B"),
    "both known at once": ((1, 1, 6), (2, 2, 6), "1B"),
    "everything in one step": ((1, 2, 2), None, "1MiB"),
}


@pytest.mark.parametrize(("first", "second", "move_bytes"), MOVES.values(), ids=MOVES)
def test_experts_move_while_requests_run(checkpoints, worlds, first, second, move_bytes):
    path = checkpoints("qwen3_moe", **SEVEN)
    by_rank = shared_out(prompts(131, 4, longest=30, seed=6), 3)
    options = {"redundant_experts": 1, "move_bytes": move_bytes}
    goals = [table_lists(turned), table_lists(with_copies)]
    orders = []
    for rank in range(3):
        told = [(first[rank], 1, goals[0])]
        if second:
            told.append((second[rank], 2, goals[1]))
        orders.append(told)
    results = worlds[3].run(run_ranks, path, by_rank, 30, options, orders)
    check_tokens(path, by_rank, results, 30)
    goal = goals[1] if second else goals[0]
    last = results[0][1]
    # Position 0 alone reports, once, what all have reached; what was replaced under way is never reported.
    assert [type(report) for report in last["reports"]] == [Placed]
    assert last["reports"][0].version == (2 if second else 1)
    assert last["reports"][0].tables == goal
    assert last["reports"][0].moved == last["stats"].moved_bytes > 0
    assert not results[1][1]["reports"] and not results[2][1]["reports"]
    expert, steps = last["expert_bytes"], []
    for rank, (_, facts) in enumerate(results):
        assert facts["tables"] == goal
        moved = [bytes for bytes, _, _ in facts["history"]]
        per_step = [b - a for a, b in itertools.pairwise(moved) if b > a]
        # One unit at a time brings a rank one expert, and two only where they change places on the rank itself.
        assert max(per_step) <= (2 * expert if move_bytes == "1B" else 3 * 4 * expert)
        steps.append(len(per_step))
        for (_, tables, contents), others in zip(facts["history"], results[0][1]["history"], strict=True):
            assert tables == others[1]  # at every step
            assert contents == [rows[rank] for rows in tables]
            assert all(set(range(7)) | {EMPTY} == {EMPTY, *(e for row in rows for e in row)} for rows in tables)
    assert max(steps) > 5 if move_bytes == "1B" else steps == [1, 1, 1]
    if second:
        # Version 1 was never reached, or never begun.
        assert all(tables != goals[0] for _, tables, _ in last["history"])


def leave_in_a_layer(group, path, by_rank, new_tokens, options):
    """Rank 2 ends its process amid a step; the others go on in the next group."""
    engine = make_engine(group, path, **options)
    out = submit(engine, by_rank[group.position], new_tokens)
    step = engine._experts.layers[1].run_local

    def last_words(*args):
        if group.progress.step == 6:
            os._exit(1)
        return step(*args)

    if group.rank == 2:
        engine._experts.layers[1].run_local = last_words
    try:
        run_until_done(engine, out)
    except RankLost as error:
        where = (error.step, error.layer)
    read = []
    for layer in engine._experts.layers:
        layer.pool.reader.read = lambda expert, old=layer.pool.reader.read: read.append(expert) or old(expert)
    had = [len(tokens) for tokens in out.values()]
    before = engine._parallel.tables
    after = engine.join(world.next_group(group, [0, 1]))
    plans = run_until_done(engine, out)
    facts = {**facts_of(engine), "plans": plans, "where": where, "had": had, "before": before, "read": read}
    assert facts["tables"] == after
    engine.close()
    engine._parallel.group.close()
    return list(out.values()), facts


def test_the_others_go_on_without_a_lost_rank(checkpoints):
    path = checkpoints("qwen3_moe", **SEVEN)
    texts = prompts(131, 6, longest=30, seed=7)
    by_rank = [texts[:2], texts[2:4], texts[4:]]
    options = {"dispatcher": "all_to_all", "redundant_experts": 1}
    results = world.run_world(3, leave_in_a_layer, path, by_rank, 12, options, leavers=[2])
    check_tokens(path, by_rank[:2], results[:2], 12)
    for position, (_, facts) in enumerate(results[:2]):
        # Lost amid the answers, at the layer where it went or, where that one was posted already, after it.
        assert facts["where"][0] == 6 and facts["where"][1] >= 1
        assert all(0 < had < 12 for had in facts["had"])
        for before, after in zip(facts["before"], facts["tables"], strict=True):
            assert len(after) == 2 and {e for row in after for e in row} - {EMPTY} == set(range(7))
            assert [e for e in before[position] if e != EMPTY] == after[position][
                : sum(e >= 0 for e in before[position])
            ]
    # Its experts, and only those, were read from the checkpoint, each once.
    lost = [e for rows in results[0][1]["before"] for e in rows[2] if e != EMPTY]
    assert sorted(results[0][1]["read"] + results[1][1]["read"]) == sorted(lost)
