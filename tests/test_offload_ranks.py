"""Several ranks, each with a part of its experts in memory: the same tokens, wherever an expert is and goes."""

import dataclasses
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import world
from test_offload import Prophet
from test_parity import prompts, reference
from test_ranks import facts_of, make_engine, run_until_done, shared_out, submit

from moeyard.engine import measure_disk, offload_plan
from moeyard.engine.config import EngineConfig
from moeyard.engine.group import RankLost
from moeyard.engine.messages import Placed
from moeyard.engine.predict.choose import Chosen
from moeyard.engine.predict.next_use import LiveNextUse
from moeyard.launch import machine
from moeyard.launch.plan import run as show_plan
from moeyard.launch.totals import Totals
from moeyard.scheduler import placement
from moeyard.scheduler.cost import FREE, Constants, ExpertCost, LinkCost
from moeyard.scheduler.offload_cost import DiskCost
from moeyard.scheduler.table import EMPTY

MANY = {
    "qwen3_moe": {"num_experts": 32},
    "deepseek_v3": {"n_routed_experts": 20, "num_hidden_layers": 4},
    "gpt_oss": {"num_local_experts": 16},
}
OPTIONS = {"max_num_seqs": 8, "max_batched_tokens": 48, "block_size": 8}
COPIES = {"redundant_experts": 3, "expert_placement": "replicated", "placement": "loads.json"}
NEW_TOKENS = 8
CONSTANTS = Constants(FREE, FREE, FREE, FREE, ExpertCost(0, 10, 10**8))
"""Rows are dear and all else is free: whatever can be balanced is."""


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


def four(*args, **options):
    return 4


def disk_constants(*args, **options):
    """Four reads in flight, measured nowhere."""
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    return SimpleNamespace(values=disk)


def constants(*args, **options):
    return CONSTANTS


def make(group, path, loads=None, **options):
    """An engine whose starts compute alike without measuring."""
    from moeyard.engine import measure, moe

    moe.few_rows_of = four
    measure.measure = constants
    offload_plan.disk_constants = disk_constants
    return make_engine(group, path, loads, **{**OPTIONS, **options})


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


def generate(group, path, by_rank, options, budgets, orders=(), loads=None):
    """Each rank runs its own prompts, once for each budget: answers and facts.

    `orders` are (step, version, tables) for all ranks.
    """
    results = []
    for memory in budgets:
        engine = make(group, path, loads, expert_memory=memory, **options)
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
        ("gpt_oss", 3, COPIES | {"residency": "lru"}, ["40%"]),
        ("gpt_oss", 2, COPIES | {"balance": "resplit", "chunks": "2"}, ["40%"]),
        ("deepseek_v3", 2, COPIES | {"balance": "priced", "dispatcher": "all_to_all"}, ["40%"]),
        ("gpt_oss", 2, {}, ["40%"]),
        ("qwen3_moe", 3, {"dispatcher": "all_gather", "expert_placement": "round_robin"}, ["30%"]),
    ],
)
def test_greedy_tokens_are_those_of_transformers(checkpoints, wanted, worlds, architecture, ranks, options, budgets):
    path = checkpoints(architecture)
    texts, expected = wanted(architecture)
    by_rank = shared_out(texts, ranks)
    answers = shared_out(expected, ranks)
    given = [one_per_layer(path, 3) if memory == "one" else memory for memory in budgets]
    layers, experts = (3, 20) if architecture == "deepseek_v3" else (4, 16)
    loads = [list(range(experts)) for _ in range(layers)] if "placement" in options else None
    results = worlds[ranks].run(generate, path, by_rank, options, given, (), loads)
    hits = []
    for turn in range(len(budgets)):
        for rank in range(ranks):
            out, facts = results[rank][turn]
            assert out == answers[rank]
            assert facts["plans"] == results[0][turn][1]["plans"]
            check_reads(facts, rank)
            copies = [sum(map(len, rows)) - len({e for row in rows for e in row}) for rows in facts["tables"]]
            assert (min(copies) > 0) == (loads is not None)
            # A step is one number to the store, also where this rank has no tokens, and in all chunks of a layer.
            assert len({step for step, _, _ in facts["events"]}) <= len(facts["plans"]) == facts["step"] + 1
            chunks = int(options.get("chunks", 1))
            assert chunks in facts["degrees"]
            visits = [(step, layer) for step, layer, _ in facts["events"]]
            assert (max(map(visits.count, visits)) > 1) == (chunks > 1)
            stats = facts["stats"]
            assert (results[0][turn][1]["stats"].balance_split_experts > 0) == ("balance" in options)
            assert stats.balance_transfers == stats.moved_bytes == facts["guest_bytes"] == 0
        hits.append(sum(results[rank][turn][1]["stats"].expert_hits for rank in range(ranks)))
    assert hits == sorted(hits, reverse=True)


def test_room_for_all_of_a_ranks_experts_is_as_without_the_option(checkpoints, wanted, worlds):
    texts, expected = wanted("qwen3_moe")
    results = worlds[2].run(generate, checkpoints("qwen3_moe"), shared_out(texts, 2), {}, ["100%"])
    for ((out, facts),), answers in zip(results, shared_out(expected, 2), strict=True):
        assert out == answers
        assert "size" not in facts and facts["stats"].expert_misses == 0
        assert facts["slots"] == [16] * 3 and facts["guest_bytes"] > 0


def told(stats):
    """What the front end makes of all ranks' reports."""
    totals = Totals()
    for rank, one in enumerate(stats):
        totals.take(rank, one)
    return totals.total


def turned(experts, slots):
    """No expert stays on its rank."""
    table = placement.linear(experts, 2, slots)
    return table.with_rows(reversed(table.slots_PS))


def test_a_new_placement_moves_no_weights(checkpoints, wanted, worlds):
    path = checkpoints("qwen3_moe")
    texts, expected = wanted("qwen3_moe")
    by_rank, answers = shared_out(texts, 2), shared_out(expected, 2)
    goal = [turned(32, 16).to_lists()] * 3
    results = worlds[2].run(generate, path, by_rank, {}, ["40%"], [(4, 1, goal)])
    for rank, ((out, facts),) in enumerate(results):
        assert out == answers[rank]
        assert facts["tables"] == goal and facts["own"] == [rows[rank] for rows in goal]
        before = placement.linear(32, 2, 16).slots_PS[rank]
        used = [expert for _, _, experts in facts["events"] for expert in experts]
        where = [expert in before for expert in used]
        assert where == sorted(where, reverse=True) and True in where and False in where  # first these, then those
        assert facts["stats"].moved_bytes == 0
        assert facts["most_used"] <= facts["size"].nbytes
    assert [type(report) for report in results[0][0][1]["reports"]] == [Placed]
    assert results[0][0][1]["reports"][0].moved == 0
    total = told([facts["stats"] for ((_, facts),) in results])
    for name in ("expert_hits", "expert_misses", "expert_read_bytes", "expert_resident_bytes"):
        values = [getattr(facts["stats"], name) for ((_, facts),) in results]
        assert getattr(total, name) == sum(values) and min(values) > 0


def in_host_memory(group, path, by_rank, tables):
    """Each rank with a host tier, as on a GPU: who is there, and who was read from files after the start."""
    from moeyard.engine import engine as engine_module

    plan_offload = engine_module.plan_offload
    engine_module.plan_offload = lambda *args: dataclasses.replace(plan_offload(*args), host_bytes=2**30)
    try:
        engine = make(group, path, expert_memory="40%")
    finally:
        engine_module.plan_offload = plan_offload
    source, read = engine._offload.source, []
    read_piece = source._files.read_piece
    source._files.read_piece = lambda *args: read.append(args[:2]) or read_piece(*args)
    out = submit(engine, by_rank[group.position], NEW_TOKENS)
    run_until_done(engine, out, before_step=lambda step: engine.place(1, tables) if step == 4 else None)
    here = {(layer, expert) for layer in range(3) for expert in range(32) if (layer, expert) in source.host}
    engine.close()
    return list(out.values()), here, set(read)


def test_a_host_tier_has_the_ranks_own_experts(checkpoints, wanted, worlds):
    path = checkpoints("qwen3_moe")
    texts, expected = wanted("qwen3_moe")
    by_rank, answers = shared_out(texts, 2), shared_out(expected, 2)
    results = worlds[2].run(in_host_memory, path, by_rank, [turned(32, 16).to_lists()] * 3)
    for rank, (out, here, read) in enumerate(results):
        assert out == answers[rank]
        assert here == {(layer, e) for layer in range(3) for e in placement.linear(32, 2, 16).slots_PS[rank]}
        assert read and not read & here  # those that came by the new placement


def lose_two(group, path, texts):
    """Rank 2 ends its process in a layer, then rank 1: what rank 0 answers, and its tables on the way."""
    engine = make(group, path, expert_memory="40%", redundant_experts=1)
    out = submit(engine, texts if not group.rank else [], NEW_TOKENS)
    events, tables, had = watch(engine), [engine._parallel.tables], []
    layer = engine._experts.layers[1]
    run, last = layer.run_own, {2: 4, 1: 6}.get(group.rank)

    def last_words(*args, **options):
        if group.progress.step == last:
            os._exit(1)
        return run(*args, **options)

    layer.run_own = last_words
    for members in ([0, 1], [0]):
        with pytest.raises(RankLost):
            run_until_done(engine, out)
        had.append(sum(map(len, out.values())))
        group = world.next_group(group, members)
        events.clear()
        assert engine.join(group) == engine._parallel.tables
        assert not events  # nothing is read before it is needed
        tables.append(engine._parallel.tables)
    run_until_done(engine, out)
    facts = {**offload_facts(engine), "passed": tables, "had": had, "events": events}
    engine.close()
    group.close()
    return list(out.values()), facts


def test_the_others_take_over_the_experts_of_a_lost_rank(checkpoints, wanted):
    path = checkpoints("gpt_oss")
    texts, expected = wanted("gpt_oss")
    (out, facts), *_ = world.run_world(3, lose_two, path, texts, leavers=[1, 2])
    assert out == expected
    assert 0 < facts["had"][0] < facts["had"][1] < sum(map(len, expected))
    assert [len(tables[0]) for tables in facts["passed"]] == [3, 2, 1]
    for tables in facts["passed"]:
        assert all({e for row in rows for e in row} - {EMPTY} == set(range(16)) for rows in tables)
    check_reads(facts, 0)
    # What rank 0 had at the start was less, and the memory is the same.
    assert {e for _, _, experts in facts["events"] for e in experts} - set(facts["passed"][0][0][0])


# Predictors


def trained_on(topk_TLK, path):
    from moeyard.engine.checkpoint import Checkpoint
    from moeyard.engine.next_use import NextUse

    made = NextUse.fit(topk_TLK, np.array([0]), 32, digest=Checkpoint(path).fingerprint)
    return made.with_next_token(topk_TLK, np.array([0]))


def foresee(group, path, by_rank, options):
    """Each rank that has prompts knows, from a run with all experts in memory, how its tokens will route, and has a
    predictor of next use; the others have none. Answers and facts, without and with that.
    """
    known = make(group, path)
    mine = by_rank[group.position]
    recorder = known.record_routing()
    run_until_done(known, submit(known, mine, NEW_TOKENS))
    topk = recorder.take() if mine else None
    known.close()
    chosen = Chosen()
    if topk is not None:
        chosen = Chosen(trained=[LiveNextUse(trained_on(topk, path))], others=[Prophet(topk, 32)])
    results, predictors_for = [], offload_plan.predictors_for
    for predictor in ("none", "auto"):
        group.progress.step, group.epoch = 0, group.epoch + 1
        try:
            offload_plan.predictors_for = lambda option, *args: chosen if option == "auto" else Chosen()
            engine = make(group, path, expert_memory="60%", predictor=predictor, **options)
        finally:
            offload_plan.predictors_for = predictors_for
        store, kept = engine._offload.store, []
        visit = store.visit

        def watched(layer, experts, scores, store=store, kept=kept, visit=visit):
            kept.append(scores[layer, experts].tolist())
            return visit(layer, experts, scores)

        store.visit = watched
        out = submit(engine, mine, NEW_TOKENS)
        run_until_done(engine, out)
        facts = {**offload_facts(engine), "residency": engine._offload.plan.residency, "scores": kept}
        results.append((list(out.values()), facts))
        engine.close()
    return results


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_experts_are_read_ahead_for_the_tokens_of_all_ranks(checkpoints, wanted, worlds, dispatcher):
    texts, expected = wanted("qwen3_moe")
    options = {"dispatcher": dispatcher}
    results = worlds[2].run(foresee, checkpoints("qwen3_moe"), shared_out(texts, 2), options)
    for (without, with_them), answers in zip(results, shared_out(expected, 2), strict=True):
        assert without[0] == with_them[0] == answers
        assert without[1]["stats"].expert_ahead_bytes == 0 and not without[1]["stats"].predictors
        stats, size = with_them[1]["stats"], with_them[1]["size"]
        assert stats.expert_ahead_used_bytes > 0.8 * stats.expert_ahead_bytes
        assert stats.expert_ahead * size.expert == stats.expert_ahead_used_bytes > 0  # of those that were missing
        assert with_them[1]["most_used"] <= size.nbytes
    # All requests are rank 0's: what rank 1 read ahead, and what it kept, was by rank 0's word.
    (_, first), (_, second) = (with_them for _, with_them in results)
    assert (first["residency"], second["residency"]) == ("predicted", "default")
    assert any(score for scores in second["scores"] for score in scores) and not second["stats"].predictors
    heard = sum(measured[-3] for measured in first["stats"].predictors.values())
    ahead = [facts["stats"].expert_ahead_bytes for facts in (first, second)]
    assert min(ahead) > 0 and heard > 0.8 * sum(ahead)  # of late


# Reads that fail


def until_done(engine, texts, wake):
    """What each request of these prompts ends with, and its tokens."""
    ids = submit(engine, texts, NEW_TOKENS)
    ends = {}
    engine.wake(wake)
    while engine.has_work:
        for delta in engine.step():
            ids[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                ends[delta.request_id] = delta
    assert ends.keys() == ids.keys()
    engine._scheduler.check_integrity()
    return list(ends.values()), list(ids.values())


def cut_short(engine):
    """One read in twenty finds the file shorter than it was."""
    files, calls = engine._offload.source._files, []
    pread = files._pread
    files._pread = lambda *args: 0 if calls.append(1) or len(calls) % 20 == 0 else pread(*args)
    return lambda: setattr(files, "_pread", pread)


def blocked(engine):
    """The disk says nothing until it is let."""
    files, gate = engine._offload.source._files, threading.Event()
    pread = files._pread
    files._pread = lambda *args: gate.wait() and pread(*args)
    engine._offload.store.timeout_s = 0.3

    def undo():
        files._pread = pread
        gate.set()
        engine._offload.store.timeout_s = 60

    return undo


def no_time(engine):
    """The others would not wait for more than the first of a layer's reads."""
    reads = engine._parallel._context.reads
    begin = reads.begin_layer
    reads.begin_layer = lambda: setattr(reads, "_deadline", 0.0)
    return lambda: setattr(reads, "begin_layer", begin)


HARMS = {"cut short": cut_short, "blocked": blocked, "no time": no_time}


def fail_on_one(group, path, texts, harms, options):
    """Rank 0 has requests; the disk of rank 1 fails, in one way after the other, and is well in between."""
    engine = make(group, path, **{"expert_memory": "25%"} | options)
    wake, said = 0, []
    mine = texts if not group.rank else []
    for harm in harms:
        undo = HARMS[harm](engine) if group.rank else lambda: None
        for _ in range(2):
            wake += 1
            said.append((harm, until_done(engine, mine, wake)[0]))
            group.all_gather_ints([0])
        undo()
        wake += 1
        said.append(("", until_done(engine, mine, wake)))
        group.all_gather_ints([0])
    ahead = engine.stats(with_experts=False).expert_ahead_bytes
    engine.close()
    return said, ahead


@pytest.mark.parametrize(
    "options",
    [{"dispatcher": "all_to_all", "chunks": "2"}, {"dispatcher": "all_gather", "expert_memory": "50%"}],
)
def test_a_read_that_fails_on_one_rank_ends_the_requests_of_that_step(checkpoints, wanted, worlds, options):
    path = checkpoints("qwen3_moe")
    texts, expected = wanted("qwen3_moe")
    (said, _), (nothing, ahead) = worlds[2].run(fail_on_one, path, texts, list(HARMS), options)
    assert (ahead > 0) == ("expert_memory" in options)  # with room for it, rank 1 reads ahead what rank 0 predicts
    words = {
        "cut short": "ends at byte",
        "blocked": "was not read within|did not end within",
        "no time": "other ranks wait",
    }
    for harm, ends in said:
        if not harm:
            ends, ids = ends
            assert [end.finish_reason for end in ends] == ["length"] * len(texts) and ids == expected
            continue
        failed = [end for end in ends if end.error]
        assert failed and all(end.finish_reason == "error" for end in failed)
        for end in failed:
            assert end.error.startswith("rank 1: ")
            assert any(word in end.error for word in words[harm].split("|")), end.error
    assert all(ends in ([], ([], [])) for _, ends in nothing)


def serve_and_remove(group, path, by_rank):
    """Both ranks have requests when their checkpoint is taken away."""
    engine = make(group, path, expert_memory="25%")
    ends = []
    for wake, harm in ((1, False), (2, True), (3, False)):
        if harm and group.rank:
            file = Path(path) / "model.safetensors"
            file.rename(file.with_suffix(".away"))
        group.all_gather_ints([0])
        ends.append(until_done(engine, by_rank[group.position], wake)[0])
        group.all_gather_ints([0])
    engine.close()
    return ends


def test_a_file_that_is_removed_while_serving_ends_the_requests_of_all_ranks(worlds, tmp_path):
    path = tiny.save("qwen3_moe", tmp_path / "model", **MANY["qwen3_moe"])
    texts = prompts(131, 4, longest=20, seed=9)
    for well, *ill in worlds[2].run(serve_and_remove, path, [texts[:2], texts[2:]]):
        assert [end.finish_reason for end in well] == ["length"] * 2
        for end in (end for ends in ill for end in ends):
            assert end.finish_reason == "error" and not end.token_ids
            assert "model.safetensors is no longer there" in end.error


# Options


def test_each_rank_gets_its_share(checkpoints, capsys, monkeypatch):
    monkeypatch.setattr(machine, "read_rate", lambda device: 1e9)
    monkeypatch.setattr(offload_plan, "disk_constants", disk_constants)
    monkeypatch.setattr(measure_disk, "CASE_S", 0.0)
    path = checkpoints("qwen3_moe")
    base = {"model": str(path), "dtype": "float32", "device": "cpu", "kv_memory": "1MiB", "expert_memory": "25%"}
    lines = {}
    for ranks in (1, 2, 3):
        assert show_plan(EngineConfig(ep=ranks, **base)) == 0
        (lines[ranks],) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  expert memory")]
    assert "of 96 experts stay" in lines[1]
    assert "of the 48 that a rank has stay" in lines[2]
    assert "of the 33 that a rank has stay" in lines[3]
    sizes = [float(line.split()[2]) for line in lines.values()]  # all in KiB
    assert sizes == pytest.approx([324, 162, 111], abs=13.5)  # a quarter of 13.5 KiB for each, in whole experts
