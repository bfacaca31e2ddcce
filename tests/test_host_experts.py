"""The host tier of the experts, and who computes those that are missing. Here the device is the CPU too, so that all
but the streams is run.
"""

import dataclasses
import logging
import re
import threading
from concurrent.futures import wait
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_offload import MANY, NEW_TOKENS, OPTIONS, finish, logits_of, submit
from test_parity import generate, prompts, reference

from moeyard.engine import engine as engine_module
from moeyard.engine import host_compute, miss_ways, moe, offload_plan
from moeyard.engine.config import EngineConfig, parse_budget
from moeyard.engine.engine import Engine
from moeyard.engine.host_experts import host_budget
from moeyard.engine.step_reads import ReadFailed, StepReads
from moeyard.engine.store_size import share_out
from moeyard.launch.metrics import Metrics
from moeyard.scheduler.cost import ExpertCost, LinkCost
from moeyard.scheduler.misses import MissCosts
from moeyard.scheduler.offload_cost import DiskCost

FREE = ExpertCost(0, 0, 0)
# A copy takes a second: none is made for a layer to come.
SLOW_LINK = MissCosts(expert_bytes=1, copy=LinkCost(0, 10**15), device=FREE, host=FREE, both_ns=0)
SLOW_CPU = dataclasses.replace(SLOW_LINK, host=ExpertCost(10**12, 0, 0))
EVEN = dataclasses.replace(SLOW_LINK, host=ExpertCost(0, 10**9, 0))


@pytest.fixture(scope="module", params=MANY)
def case(request, tmp_path_factory):
    path = tiny.save(request.param, tmp_path_factory.mktemp(request.param), **MANY[request.param])
    ids = prompts(100, 3, longest=20)
    return path, ids, reference(path, ids, NEW_TOKENS)


@pytest.fixture
def make(monkeypatch):
    """An engine whose experts have a host tier of a share of them, and whose misses cost that."""
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: 4)
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    monkeypatch.setattr(offload_plan, "disk_constants", lambda files, progress: SimpleNamespace(values=disk))
    engines, plan_offload = [], engine_module.plan_offload

    def planned(share, misses):
        def plan(config, blueprint):
            found, whole = plan_offload(config, blueprint), blueprint.footprint
            size = share_out(parse_budget(config.expert_memory, whole.experts), whole.expert, 0)  # as on a GPU
            budget = dataclasses.replace(
                found.budget, slots=size.slots, floor=min(found.budget.floor, size.slots // found.budget.layers)
            )
            host_bytes = int(share * whole.experts)
            changes = {"size": size, "budget": budget, "in_place": False, "host_bytes": host_bytes, "misses": misses}
            return dataclasses.replace(found, **changes)

        return plan

    def made(path, share, memory="25%", misses="auto", costs=SLOW_CPU, **options):
        monkeypatch.setattr(engine_module, "plan_offload", planned(share, misses))
        monkeypatch.setattr(miss_ways, "miss_constants", lambda *args, **kwargs: SimpleNamespace(values=costs))
        engines.append(Engine(EngineConfig(model=str(path), expert_memory=memory, **{**OPTIONS, **options})))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.1])
def test_tokens_are_the_same_and_only_the_others_are_read_from_files(share, case, make, monkeypatch, caplog):
    path, ids, expected = case
    with caplog.at_level(logging.INFO, logger="moeyard.host_experts"):
        engine = make(path, share)
    host, files = engine._offload.source.host, engine._offload.source._files
    read, read_piece = [], files.read_piece
    monkeypatch.setattr(files, "read_piece", lambda *args: (read.append(args[:2]), read_piece(*args))[1])
    assert generate(engine, ids, NEW_TOKENS) == expected
    assert engine.stats(with_experts=False).expert_misses > 0
    everyone = {(layer, e) for layer, n in enumerate(files.num_experts_L) for e in range(n)}
    here = {at for at in everyone if at in host}
    assert len(here) == len(everyone) if share > 1 else abs(len(here) - share * len(everyone)) <= 0.05 * len(everyone)
    assert bool(read) == (share < 1) and not here & set(read)
    assert not host.pinned  # there is no driver to ask
    assert f"{len(here)} of {len(everyone)} experts in host memory" in caplog.text


def test_its_memory_is_its_budget(case, make):
    engine = make(case[0], 0.5)
    host, size = engine._offload.source.host, engine._offload.plan.size
    assert host.nbytes <= engine._offload.plan.host_bytes + size.readers * size.expert


@pytest.fixture(scope="module")
def wanted(case):
    """The logits of all steps with all experts in memory."""
    path, ids, _ = case
    engine = Engine(EngineConfig(model=str(path), **OPTIONS))
    for layer in engine._experts.layers:
        layer.few_rows = 4
    _, logits = logits_of(engine, ids)
    engine.close()
    return logits


def check(engine, case, wanted):
    """The right tokens, and the logits of an engine with all experts in memory: to the bit where their activation is
    the kernels' own, as torch's differ in the last bit by how many rows they get at once. What is copied behind the
    layers is there when the next one begins.
    """
    _, ids, expected = case
    store = engine._offload.store
    settle = store._settle_behind
    store._settle_behind = lambda: (wait([held.read for held in store._behind if held.read], 30), settle())
    tokens, logits = logits_of(engine, ids)
    assert tokens == expected
    tolerance = {"rtol": 0, "atol": 0} if engine._experts.layers[0].swiglu else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits, wanted, **tolerance)
    return engine.stats(with_experts=False)


@pytest.mark.parametrize(
    ("memory", "misses", "costs", "on_cpu"),
    [
        ("25%", "auto", SLOW_LINK, True),
        ("25%", "auto", SLOW_CPU, False),
        ("6.3%", "cpu", SLOW_CPU, True),
        ("6.3%", "copy", SLOW_LINK, False),
    ],
)
def test_misses_are_computed_by_the_cpu_or_copied_and_nobody_sees_which(
    memory, misses, costs, on_cpu, case, wanted, make
):
    engine = make(case[0], 1.1, memory, misses=misses, costs=costs, predictor="none", residency="default")
    stats = check(engine, case, wanted)
    ways = {"expert_on_cpu": stats.expert_on_cpu, "expert_copied": stats.expert_copied}
    one, other = ways if on_cpu else reversed(ways)
    assert ways[one] > 0 and ways[other] == 0
    assert ways[one] == stats.expert_misses and not stats.expert_streamed
    assert stats.expert_hits > 0 and stats.expert_admitted_bytes > 0  # they got their slots all the same
    if on_cpu:  # nothing else was copied
        assert (
            stats.expert_read_bytes == stats.expert_admitted_bytes < stats.expert_misses * engine.info["expert_nbytes"]
        )
    text, metrics = "", Metrics()
    metrics.on_stats(stats)
    text = metrics.render().decode()
    assert f"moeyard:moe_{one}_total {float(ways[one])}" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["gpt_oss"], indirect=True)
def test_other_types_give_the_same_bits_too(dtype, case, make):
    path, ids, _ = case
    runs = [logits_of(make(path, 1.1, costs=costs, dtype=dtype), ids[:2]) for costs in (EVEN, SLOW_LINK, SLOW_CPU)]
    for tokens, logits in runs[1:]:
        assert tokens == runs[0][0]
        assert all(torch.equal(a, b) for a, b in zip(logits, runs[0][1], strict=True))


def test_link_and_cpu_share_a_layers_misses(case, wanted, make, monkeypatch):
    engine = make(case[0], 1.1, "6.3%", costs=EVEN, predictor="none", residency="default")
    splits, ways = [], engine._offload.ways
    choose = ways._ways
    monkeypatch.setattr(ways, "_ways", lambda *rows: splits.append(choose(*rows)) or splits[-1])
    stats = check(engine, case, wanted)
    assert stats.expert_on_cpu == sum(len(ways.on_cpu) for ways in splits) > 0
    assert stats.expert_copied == sum(len(ways.copied) for ways in splits) > 0
    assert stats.expert_on_cpu + stats.expert_copied == stats.expert_misses
    both = [ways for ways in splits if ways.on_cpu and ways.copied]
    assert len(both) > len(splits) / 2


@pytest.mark.parametrize("case", ["deepseek_v3"], indirect=True)
def test_what_is_not_in_host_memory_is_read_for_the_device(case, wanted, make):
    engine = make(case[0], 0.5, misses="cpu", predictor="none", residency="default")
    stats = check(engine, case, wanted)
    assert stats.expert_on_cpu > 0 and stats.expert_copied > 0


@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
def test_the_next_layer_streams_in_where_a_batch_touches_most_of_it(case, wanted, make):
    fast_link = dataclasses.replace(SLOW_CPU, copy=LinkCost(0, 1))  # what is begun between two layers is there in time
    engine = make(case[0], 1.1, costs=fast_link, predictor="none", residency="default")
    stats = check(engine, case, wanted)
    assert 0 < stats.expert_streamed == stats.expert_ahead
    assert stats.expert_ahead_used_bytes == stats.expert_streamed * engine.info["expert_nbytes"]
    assert stats.expert_copied + stats.expert_streamed == stats.expert_misses
    slow = make(case[0], 1.1, misses="copy", costs=SLOW_LINK, predictor="none", residency="default")
    assert slow._offload.ways._gap_ns < 10**15 and not check(slow, case, wanted).expert_streamed


@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
def test_an_error_on_the_cpus_thread_is_the_steps(case, make, monkeypatch):
    path, ids, expected = case
    engine = make(path, 1.1, misses="cpu")

    def fails(*args):
        raise RuntimeError("no such instruction")

    with monkeypatch.context() as patched:
        for name in ("few_rows", "many_rows"):
            patched.setattr(host_compute, name, fails)
        submit(engine, "a", ids[0])
        (end,) = finish(engine).values()
    assert end.finish_reason == "error"
    assert re.fullmatch(
        r"experts [\d, ]+ of MoE layer 0 could not be computed by the CPU: no such instruction", end.error
    )
    assert generate(engine, ids, NEW_TOKENS) == expected


def test_of_several_ranks_all_hear_of_it():
    said = {}
    group = SimpleNamespace(
        timeout_s=4, members=(5,), progress=SimpleNamespace(step=7), all_gather_ints=lambda values: [values]
    )
    group.put, group.get_all = said.__setitem__, lambda key, timeout_s: [said[key]]
    reads, x_RD = StepReads(group), torch.ones(2, 3)

    def fails(deadline):
        raise host_compute.CpuExpertsFailed("experts 1 of MoE layer 0 could not be computed by the CPU")

    assert not reads.run(fails, x_RD).any()
    with pytest.raises(ReadFailed, match="rank 5: experts 1 of MoE layer 0 could not be computed"):
        reads.settle()


@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
def test_a_cpu_that_does_not_answer_ends_the_step_by_name(case, make, monkeypatch):
    path, ids, expected = case
    engine = make(path, 1.1, misses="cpu")
    go, few, many = threading.Event(), host_compute.few_rows, host_compute.many_rows
    monkeypatch.setattr(host_compute, "few_rows", lambda *args: go.wait(30) and few(*args))
    monkeypatch.setattr(host_compute, "many_rows", lambda *args: go.wait(30) and many(*args))
    engine._offload.store.timeout_s = 0.05
    submit(engine, "a", ids[0])
    (end,) = finish(engine).values()
    assert re.fullmatch(r"experts [\d, ]+ of MoE layer 0 were not computed by the CPU within 0.05 s", end.error)
    go.set()
    engine._offload.store.timeout_s = 60
    assert generate(engine, ids, NEW_TOKENS) == expected


def test_budgets():
    assert host_budget("50%", 1000) == 500
    assert host_budget("1KiB", 10**9) == 1024
    assert host_budget("1GiB", 1000) == 1000  # all is enough
    assert host_budget(None, 1000) == 1000
    with pytest.raises(ValueError, match=r"host_memory is 900TiB, and .* are free for this rank; ask for less"):
        host_budget("900TiB", 2**60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_memory": "1GiB"}, "host_memory is 1GiB, which changes nothing while all experts are in memory"),
        ({"host_memory": "much", "expert_memory": "25%"}, "host_memory: cannot read 'much' as a size"),
        ({"misses": "cpu"}, "misses is cpu, which changes nothing while all experts are in memory"),
        ({"misses": "gpu", "expert_memory": "25%"}, "misses is 'gpu'; choose one of auto, copy, cpu"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_on_a_cpu_there_is_no_tier_between(case):
    with pytest.raises(ValueError, match="host_memory is 1GiB, and on a CPU that is what --expert-memory sets"):
        Engine(EngineConfig(model=str(case[0]), expert_memory="25%", host_memory="1GiB", **OPTIONS))
    with pytest.raises(ValueError, match="misses is copy, and on a CPU missing experts are read and computed in one"):
        Engine(EngineConfig(model=str(case[0]), expert_memory="25%", misses="copy", **OPTIONS))


@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
def test_a_cpu_that_is_to_compute_needs_experts_in_host_memory(case, make):
    with pytest.raises(
        ValueError, match="misses is cpu, and host memory has room for no expert; give more with --host"
    ):
        make(case[0], 0.0, misses="cpu")
