"""Several ranks, each with a part of its experts in memory: the same tokens, wherever an expert is and goes."""

import os
from pathlib import Path

import pytest
import tiny
import world
from test_parity import prompts, reference
from test_ranks import facts_of, make_engine, run_until_done, shared_out, submit

from moeyard.engine.config import EngineConfig
from moeyard.engine.group import RankLost
from moeyard.engine.messages import Placed
from moeyard.launch.plan import run as show_plan
from moeyard.launch.totals import Totals
from moeyard.scheduler import placement
from moeyard.scheduler.cost import FREE, NO_EXPERTS, Constants
from moeyard.scheduler.table import EMPTY

MANY = {
    "qwen3_moe": {"num_experts": 32},
    "deepseek_v3": {"n_routed_experts": 20, "num_hidden_layers": 4},
    "gpt_oss": {"num_local_experts": 16},
}
OPTIONS = {"max_num_seqs": 8, "max_batched_tokens": 48, "block_size": 8}
NEW_TOKENS = 8
CONSTANTS = Constants(FREE, FREE, FREE, FREE, NO_EXPERTS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = tiny.save(architecture, tmp_path_factory.mktemp(architecture), **MANY[architecture])
        return made[architecture]

    return get


@pytest.fixture(scope="module")
def wanted(checkpoints):
    """What transformers answers to the prompts of an architecture, computed once."""
    known = {}

    def get(architecture):
        if architecture not in known:
            texts = prompts(131, 5, longest=40, seed=3)
            known[architecture] = texts, reference(checkpoints(architecture), texts, NEW_TOKENS)
        return known[architecture]

    return get


@pytest.fixture(scope="module")
def worlds():
    made = {size: world.World(size) for size in (2, 3)}
    yield made
    for one in made.values():
        one.close()


def make(group, path, **options):
    """An engine whose starts compute alike without measuring."""
    from moeyard.engine import measure, moe

    moe.few_rows_of = lambda layer, progress: 4
    measure.measure = lambda *args, **options: CONSTANTS
    return make_engine(group, path, **{**OPTIONS, **options})


def offload_facts(engine):
    """Of the engine, its store and what the layers asked of it."""
    facts = facts_of(engine)
    facts["own"] = [list(layer.own.contents) for layer in engine._experts.layers]
    if engine._offload is not None:
        store = engine._offload.store
        facts["size"], facts["most_used"], facts["resident"] = store.size, store.most_used, store.resident
        facts["step"], facts["timeout"] = store.step, store.timeout_s
    return facts


def watch(engine):
    """The events of a store: (step, layer, experts)."""
    store, events = engine._offload.store, []
    visit = store.visit

    def watched(layer, experts, *args):
        events.append((store.step, layer, sorted(experts)))
        return visit(layer, events[-1][2], *args)

    store.visit = watched
    return events


def generate(group, path, by_rank, options, budgets, orders=()):
    """Each rank runs its own prompts, once for each budget: answers and facts.

    `orders` are (step, version, tables) for all ranks.
    """
    results = []
    for memory in budgets:
        engine = make(group, path, expert_memory=memory, **options)
        events = watch(engine) if engine._offload else []
        out = submit(engine, by_rank[group.position], NEW_TOKENS)

        def before_step(step, engine=engine):
            for at, version, tables in orders:
                if at == step:
                    engine.place(version, tables)

        plans = run_until_done(engine, out, before_step=before_step)
        facts = {**offload_facts(engine), "plans": plans, "events": events, "reports": engine.take_reports()}
        results.append((list(out.values()), facts))
        engine.close()
        group.progress.step, group.epoch = 0, group.epoch + 1  # keys at the store are used once
    return results


def check_reads(facts, rank, tables=None):
    """Reads happened, within the budget, of this rank's own experts only."""
    stats, size = facts["stats"], facts["size"]
    assert stats.expert_misses > 0 and stats.expert_read_bytes >= stats.expert_misses * size.expert
    assert facts["most_used"] <= size.nbytes
    assert stats.expert_resident_bytes == len(facts["resident"]) * size.expert <= size.slots * size.expert
    for layer, rows in enumerate(tables or facts["tables"]):
        mine = set(rows[rank]) - {EMPTY}
        used = {expert for _, at, experts in facts["events"] if at == layer for expert in experts}
        assert used and used <= mine
        assert {expert for at, expert in facts["resident"] if at == layer} <= mine


def one_per_layer(path, layers):
    """A budget of one expert for each layer, in bytes."""
    from moeyard.engine.loader import draw

    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu"), path)
    return str(layers * blueprint.footprint.expert + 2 * 4096)


@pytest.mark.parametrize(
    ("architecture", "ranks", "options", "budgets"),
    [
        ("qwen3_moe", 2, {"dispatcher": "all_to_all"}, ["60%", "25%", "one"]),
        ("qwen3_moe", 2, {"dispatcher": "all_gather", "chunks": "4"}, ["25%", "one"]),
        ("deepseek_v3", 3, {"dispatcher": "all_to_all", "chunks": "8"}, ["50%", "one"]),
        ("gpt_oss", 3, {"redundant_experts": 2, "expert_placement": "round_robin", "residency": "lru"}, ["40%"]),
        ("gpt_oss", 2, {"redundant_experts": 3, "balance": "resplit", "chunks": "2"}, ["40%"]),
        ("qwen3_moe", 3, {"dispatcher": "all_gather", "expert_placement": "round_robin"}, ["30%"]),
    ],
)
def test_greedy_tokens_are_those_of_transformers(checkpoints, wanted, worlds, architecture, ranks, options, budgets):
    path = checkpoints(architecture)
    texts, expected = wanted(architecture)
    by_rank = shared_out(texts, ranks)
    answers = shared_out(expected, ranks)
    given = [one_per_layer(path, 3) if memory == "one" else memory for memory in budgets]
    results = worlds[ranks].run(generate, path, by_rank, options, given)
    hits = []
    for turn in range(len(budgets)):
        for rank in range(ranks):
            out, facts = results[rank][turn]
            assert out == answers[rank]
            assert facts["plans"] == results[0][turn][1]["plans"]
            check_reads(facts, rank)
            # A step is one number to the store, also where this rank has no tokens, and in all chunks of a layer.
            assert len({step for step, _, _ in facts["events"]}) <= len(facts["plans"]) == facts["step"] + 1
            chunks = int(options.get("chunks", 1))
            assert chunks in facts["degrees"]
            visits = [(step, layer) for step, layer, _ in facts["events"]]
            assert (max(map(visits.count, visits)) > 1) == (chunks > 1)
        hits.append(sum(results[rank][turn][1]["stats"].expert_hits for rank in range(ranks)))
    assert hits == sorted(hits, reverse=True)
