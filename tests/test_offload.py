"""The engine with a part of its experts in memory: the same tokens and logits, figures that say so, errors by name."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from test_parity import generate, prompts, reference

from moeyard.engine import expert_files, moe, offload_plan
from moeyard.engine.checkpoint import Checkpoint
from moeyard.engine.config import RESIDENCY, EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.messages import Stats, Submit
from moeyard.engine.next_use import NextUse
from moeyard.engine.params import SamplingParams
from moeyard.engine.predict.base import Predictor
from moeyard.engine.predict.choose import Chosen
from moeyard.launch.metrics import Metrics
from moeyard.launch.plan import run as show_plan
from moeyard.scheduler.cost import NO_LIMIT, LinkCost
from moeyard.scheduler.offload_cost import DiskCost
from moeyard.scheduler.residency.slots import Context

MANY = {
    "qwen3_moe": {"num_experts": 32},
    "deepseek_v3": {"n_routed_experts": 32, "num_hidden_layers": 4},
    "gpt_oss": {"num_local_experts": 32},
}
OPTIONS = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_memory": "8MiB", "block_size": 8, "progress": False}
OPTIONS |= {"max_num_seqs": 8, "max_batched_tokens": 48}
NEW_TOKENS = 10


@pytest.fixture(scope="module", params=MANY)
def case(request, tmp_path_factory):
    """A checkpoint of 32 experts per layer, and what transformers makes of some prompts."""
    path = tiny.save(request.param, tmp_path_factory.mktemp(request.param), **MANY[request.param])
    ids = prompts(131, 8, longest=40)
    return SimpleNamespace(name=request.param, path=path, ids=ids, expected=reference(path, ids, NEW_TOKENS))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = tiny.save("qwen3_moe", tmp_path_factory.mktemp("qwen"), num_experts=32)
    ids = prompts(131, 8, longest=40)
    return SimpleNamespace(name="qwen3_moe", path=path, ids=ids, expected=reference(path, ids, NEW_TOKENS))


@pytest.fixture
def make():
    engines = []

    def made(path, memory, **options):
        engines.append(Engine(EngineConfig(model=str(path), expert_memory=memory, **{**OPTIONS, **options})))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


@pytest.fixture(autouse=True)
def alike(monkeypatch):
    """Starts compute alike without measuring."""
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: 4)
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    monkeypatch.setattr(offload_plan, "disk_constants", lambda files, progress: SimpleNamespace(values=disk))


def one_per_layer(engine):
    return str(sum(layer.pool.reader.nbytes for layer in engine._experts.layers))


def logits_of(engine, ids):
    """Of all steps that `generate` takes, and its tokens."""
    seen, run = [], engine._run_batch
    engine._run_batch = lambda *batch: seen.append(run(*batch)) or seen[-1]
    return generate(engine, ids, NEW_TOKENS), seen


def test_tokens_and_logits_do_not_depend_on_the_budget(case, make):
    whole = make(case.path, None)
    tokens, wanted = logits_of(whole, case.ids)
    assert tokens == case.expected
    most = len(whole._experts.layers) * 32
    hits = []
    for memory in ("100%", "50%", "25%", "6.3%", one_per_layer(whole)):
        engine = make(case.path, memory)
        tokens, found = logits_of(engine, case.ids)
        assert tokens == case.expected
        assert len(found) == len(wanted)
        if memory == "100%":
            assert engine._offload is None
        elif hits or engine._experts.layers[0].swiglu:
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), memory
        else:  # torch's own activations differ in the last bit by how many rows they get at once
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            wanted = found
        if engine._offload is None:
            continue
        store = engine._offload.store
        assert 0 < store.size.places < most
        assert store.most_used <= store.size.nbytes
        assert store.figures.resident_bytes <= store.size.slots * store.size.expert
        assert store.figures.misses > 0
        hits.append(store.figures.hits)
    assert hits == sorted(hits, reverse=True)
    assert hits[0] > hits[-2] > 0


@pytest.fixture(scope="module")
def trained(qwen, tmp_path_factory):
    """A predictor of next use, fitted on the routing of the test's own prompts."""
    engine = Engine(EngineConfig(model=str(qwen.path), **OPTIONS))
    recorder = engine.record_routing()
    generate(engine, qwen.ids, NEW_TOKENS)
    topk = recorder.take()
    engine.close()
    path = tmp_path_factory.mktemp("trained") / "next_use.npz"
    fingerprint = Checkpoint(qwen.path).fingerprint
    NextUse.fit(topk, np.array([0]), 32, digest=fingerprint).save(str(path))
    return str(path)


@pytest.mark.parametrize("residency", RESIDENCY)
@pytest.mark.parametrize("memory", ["25%", "6.3%"])
def test_every_policy_gives_the_same_tokens_and_counts_as_its_replay(residency, memory, qwen, make, trained):
    options = {"predictor": trained} if residency in ("auto", "predicted") else {}
    engine = make(qwen.path, memory, residency=residency, **options)
    assert engine._offload.plan.residency == ("predicted" if options else residency)
    store, events = engine._offload.store, []
    visit = store.visit
    store.visit = lambda layer, need, s: (events.append((store.step, layer, need, s.copy())), visit(layer, need, s))[1]
    assert generate(engine, qwen.ids, NEW_TOKENS) == qwen.expected
    twin = engine._offload.plan.policy()
    assert type(twin) is type(store._policy)
    decisions = [twin.step(at, experts, Context(step=step, scores_LE=s)) for step, at, experts, s in events]
    stats = engine.stats(with_experts=False)
    assert stats.expert_hits == sum(len(d.hits) for d in decisions)
    assert stats.expert_misses == sum(len(d.misses) for d in decisions) > 0
    assert stats.expert_admitted_bytes == store.size.expert * sum(len(d.admitted) for d in decisions) > 0
    # float32 is stored and kept
    wasted = stats.expert_ahead_bytes - stats.expert_ahead_used_bytes
    assert stats.expert_read_bytes == store.size.expert * stats.expert_misses + wasted
    assert stats.expert_resident_bytes == store.size.expert * int(twin.resident_LE.sum())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("few_rows", [0, 1000])
def test_other_types_and_both_kernels_do_not_depend_on_the_budget_either(dtype, few_rows, qwen, make, monkeypatch):
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: few_rows)
    ids = qwen.ids[:4]
    (first, wanted), (second, found) = [
        logits_of(make(qwen.path, memory, dtype=dtype), ids) for memory in ("60%", "10%")
    ]
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_memory_is_what_was_asked_for(qwen, make):
    engine = make(qwen.path, "25%")
    layers = engine._experts.layers
    size, budget = engine._offload.plan.size, engine.info["expert_bytes"] // 4
    assert size.nbytes <= budget < size.nbytes + size.expert
    assert engine.info["own_expert_bytes"] == size.nbytes
    assert {layer.pool.up_SND.data_ptr() for layer in layers} == {layers[0].pool.up_SND.data_ptr()}
    assert layers[0].pool.nbytes == size.places * size.expert
    assert sum(buffer.nbytes for buffer in engine._offload.source._readers._free) == size.reading


@pytest.mark.parametrize("kernel", ["swiglu", "few", "many", "panels"])
@pytest.mark.parametrize("shard", ["5GB", "1MB"])
def test_experts_are_read_into_their_places(kernel, shard, make, tmp_path, monkeypatch):
    """Where buffers would take more than the blocks around them. A shard may end within an expert."""
    path = tiny.save("qwen3_moe", tmp_path, num_experts=16, moe_intermediate_size=256, max_shard_size=shard)
    ids = prompts(131, 3, longest=20)
    expected = reference(path, ids, NEW_TOKENS)

    def few_rows_of(layer, progress):
        layer.panel_rows = NO_LIMIT if kernel == "panels" else 0
        return 0 if kernel in ("many", "panels") else 1000

    monkeypatch.setattr(moe, "few_rows_of", few_rows_of)
    engine = make(path, "25%")
    plan, source = engine._offload.plan, engine._offload.source
    assert plan.in_place and plan.size.reading == 0 < plan.size.around
    monkeypatch.setattr(expert_files.ExpertFiles, "copy", None)
    for layer in engine._experts.layers:
        layer.swiglu = kernel in ("swiglu", "panels")
        assert layer.panels_always == (kernel == "panels")
    tokens, found = logits_of(engine, ids)
    assert tokens == expected
    memory = layer.pool.memory
    assert memory.nbytes == plan.size.nbytes <= engine.info["expert_bytes"] // 4
    begin, end = memory.data_B.data_ptr(), memory.data_B.data_ptr() + memory.nbytes
    blocks = {place: source.weights(place).up_PND for place in range(plan.size.places)}
    assert all(begin <= block.data_ptr() < end for up_PND in blocks.values() for block in up_PND if block.numel())
    assert (2 in map(len, blocks.values())) == (shard != "5GB")
    wanted = logits_of(make(path, None), ids)[1]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) or kernel == "few"


SCRIPT = """
import json, sys
from pathlib import Path
from moeyard.engine import moe, offload_plan
from moeyard.engine.checkpoint import Checkpoint
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.messages import Submit
from moeyard.engine.next_use import NextUse
from moeyard.engine.params import SamplingParams
from moeyard.engine.predict.base import Predictor
from moeyard.engine.predict.choose import Chosen
from moeyard.kernels.warm_up import warm_up

warm_up()
moe.few_rows_of = lambda layer, progress: 16

def status(name):
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(name) + 1]) * 1024

before = status("VmRSS:")
engine = Engine(EngineConfig(model=sys.argv[1], expert_memory="20%", **json.loads(sys.argv[2])))
params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True).to_dict()
for i in range(1):
    engine.submit(Submit(request_id=str(i), prompt_ids=list(range(i, 40 + i)), params=params))
while engine.has_work:
    engine.step()
stats = engine.stats(False)
print(json.dumps({"before": before, "peak": status("VmHWM:"), "kv": engine.info["kv_bytes"],
    "dense": engine.info["dense_bytes"], "all": engine.info["expert_bytes"], "experts": engine.info["own_expert_bytes"],
    "read": stats.expert_read_bytes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_system_sees_no_more_memory_than_that(tmp_path):
    size = {"hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512, "num_hidden_layers": 4}
    path = tiny.save("qwen3_moe", tmp_path / "model", num_experts=16, **size)
    command = [sys.executable, "-P", "-c", SCRIPT, str(path), json.dumps(OPTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["read"] > seen["all"] / 2 > 90 * 2**20
    slack = 48 * 2**20  # of the interpreter, PyTorch, and what they load while serving
    assert seen["peak"] - seen["before"] <= seen["dense"] + seen["experts"] + seen["kv"] + slack, seen
    assert seen["experts"] <= seen["all"] / 5


def test_figures_reach_the_metrics(qwen, make):
    engine = make(qwen.path, "25%")
    generate(engine, qwen.ids[:2], 3)
    stats, metrics = engine.stats(with_experts=False), Metrics()
    metrics.on_stats(stats)
    text = metrics.render().decode()
    for name, value in (
        ("hits_total", stats.expert_hits),
        ("misses_total", stats.expert_misses),
        ("bytes_read_total", stats.expert_read_bytes),
        ("bytes_admitted_total", stats.expert_admitted_bytes),
        ("resident_bytes", stats.expert_resident_bytes),
    ):
        assert value > 0
        (line,) = [line for line in text.splitlines() if line.startswith(f"moeyard:moe_expert_{name} ")]
        assert float(line.split()[1]) == value
    assert Stats().expert_misses == 0


# Predictors


class Adversary(Predictor):
    """Says of every expert that it will not be needed, and of those that are not that they are."""

    name = "adversary"

    def __init__(self, layers, experts):
        self.rng = np.random.default_rng(0)
        self.shape = (layers, experts)
        self.last = np.zeros(self.shape, np.float32)

    def routed(self, layer, ids_TK):
        self.last[layer] = 1
        self.last[layer, ids_TK[ids_TK >= 0]] = -1

    def upcoming(self, layer):
        return self.rng.random(self.shape[1]).astype(np.float32)

    def future(self):
        return self.last


@pytest.mark.parametrize("memory", ["50%", "25%", "6.3%"])
def test_wrong_predictions_change_no_token(memory, qwen, make, monkeypatch):
    monkeypatch.setattr(
        offload_plan, "predictors_for", lambda option, digest, *shape: Chosen(trained=[Adversary(*shape)])
    )
    engine = make(qwen.path, memory)
    assert generate(engine, qwen.ids, NEW_TOKENS) == qwen.expected
    stats, size = engine.stats(with_experts=False), engine._offload.plan.size
    assert engine._offload.plan.residency == "predicted"
    assert engine._offload.store.most_used <= size.nbytes
    if size.ahead:
        assert stats.expert_ahead_bytes > stats.expert_ahead_used_bytes > 0  # it did read ahead, mostly in vain
    else:
        assert not stats.expert_ahead_bytes


class Prophet(Predictor):
    """Knows a recording of what is run."""

    name = "prophet"

    def __init__(self, topk_TLK, experts):
        self.topk, self.experts, self.at, self.rows = topk_TLK, experts, 0, 0

    def begin_step(self, rows):
        self.at, self.rows = self.at + self.rows, sum(len(row.token_ids) for row in rows)

    def upcoming(self, layer):
        chance = np.zeros(self.experts, np.float32)
        chance[np.unique(self.topk[self.at : self.at + self.rows, layer])] = 1
        return chance


def test_who_knows_the_future_reads_all_of_it_ahead_and_nothing_in_vain(qwen, make, monkeypatch):
    known = make(qwen.path, "100%")
    recorder = known.record_routing()
    generate(known, qwen.ids[:1], NEW_TOKENS)
    prophet = Prophet(recorder.take(), 32)
    monkeypatch.setattr(offload_plan, "predictors_for", lambda *_: Chosen(others=[prophet]))
    engine = make(qwen.path, "25%", residency="default")
    assert generate(engine, qwen.ids[:1], NEW_TOKENS) == qwen.expected[:1]
    stats = engine.stats(with_experts=False)
    assert stats.expert_ahead_bytes == stats.expert_ahead_used_bytes > 0
    layers_run = stats.steps * len(engine._experts.layers)
    assert stats.expert_ahead > 0.7 * layers_run * engine._offload.plan.size.ahead  # nearly all there was room for
    assert prophet.at + prophet.rows == len(prophet.topk)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "another"}, "made for the model another, not"),
        ({"shape": (2, 32)}, "for 2 layers of 32 experts, the model has 3 of 32"),
        ({"file": b"nonsense"}, "this is no predictor of next use"),
    ],
)
def test_a_predictor_of_another_model_is_an_error(change, message, qwen, make, tmp_path):
    path = tmp_path / "p.npz"
    layers, experts = change.get("shape", (3, 32))
    topk = np.zeros((4, layers, 2), np.int16)
    digest = change.get("digest", Checkpoint(qwen.path).fingerprint)
    NextUse.fit(topk, np.array([0]), experts, digest=digest).save(str(path))
    if "file" in change:
        path.write_bytes(change["file"])
    with pytest.raises(ValueError, match=message):
        make(qwen.path, "25%", predictor=str(path))


# Errors


def submit(engine, name, prompt):
    options = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True).to_dict()
    engine.submit(Submit(request_id=name, prompt_ids=prompt, params=options))


def finish(engine):
    """What each request ended with."""
    ends = {}
    while engine.has_work:
        ends |= {d.request_id: d for d in engine.step() if d.finish_reason}
    return ends


def replace(file):
    new = file.with_suffix(".new")
    new.write_bytes(file.read_bytes())
    new.replace(file)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.rename(file.with_suffix(".away")), "is no longer there"),
        (lambda file: os.truncate(file, 20000), "was changed since its header was read|ends at byte"),
        (replace, "was replaced by another file"),
        (lambda file: os.utime(file, ns=(1, 1)), "was changed since its header was read"),
    ],
)
def test_a_file_that_is_not_what_it_was_ends_the_requests_by_name(harm, words, make, tmp_path):
    path = tiny.save("qwen3_moe", tmp_path / "model", num_experts=32)
    engine = make(path, "10%")
    submit(engine, "before", [1, 2, 3])
    assert finish(engine)["before"].finish_reason == "length"
    harm(path / "model.safetensors")
    for names in ("ab", "cd"):
        for name in names:
            submit(engine, name, [4, 5, 6, 7])
        ends = finish(engine)
        assert ends.keys() == set(names)
        for end in ends.values():
            assert end.finish_reason == "error"
            assert end.token_ids == []
            assert "of MoE layer" in end.error
            assert any(word in end.error for word in words.split("|"))
    engine._scheduler.check_integrity()


def test_after_an_error_the_next_request_gets_the_right_tokens(qwen, make, monkeypatch):
    engine = make(qwen.path, "25%")
    files, calls = engine._offload.source._files, []
    pread = files._pread
    monkeypatch.setattr(files, "_pread", lambda *a: 0 if calls.append(1) or len(calls) % 40 == 0 else pread(*a))
    failed = 0
    for i, prompt in enumerate(qwen.ids):
        submit(engine, str(i), prompt)
        failed += finish(engine)[str(i)].finish_reason == "error"
    assert failed
    monkeypatch.setattr(files, "_pread", pread)
    assert generate(engine, qwen.ids, NEW_TOKENS) == qwen.expected


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"residency": "lru"}, "^residency is lru, which changes nothing while all experts are in memory"),
        ({"predictor": "none"}, "^predictor is none, which changes nothing while all experts are in memory"),
        ({"expert_memory": "1GiB", "residency": "predicted", "predictor": "none"}, "^residency is predicted and pred"),
        ({"expert_memory": "many"}, "^expert_memory: cannot read 'many' as a size"),
        ({"expert_memory": "120%"}, "^expert_memory is 120%"),
        (
            {"expert_memory": "1GiB", "guest_memory": "1MiB"},
            "^guest_memory is 1MiB, and with expert_memory .* leave one",
        ),
        ({"expert_memory": "1GiB", "move_bytes": "1MiB"}, "^move_bytes is 1MiB, and with expert_memory .* leave one"),
        ({"expert_memory": "1GiB", "balance": "llep"}, "^balance llep moves weights, and with expert_memory .* priced"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(**options)
    EngineConfig(expert_memory="1GiB", residency="lru", ep=1)
    EngineConfig(expert_memory="1GiB", balance="resplit", ep=2)
    EngineConfig(expert_memory="1GiB", residency="predicted", predictor="a.npz", ep=2)


def test_too_little_is_an_error_with_the_remedy(qwen, make, capsys):
    with pytest.raises(ValueError, match=r"^expert_memory gives 8 KiB, and one expert of 13.5 KiB .* to as much$"):
        make(qwen.path, "8KiB")


def test_plan_shows_what_fits(qwen, capsys):
    config = EngineConfig(model=str(qwen.path), **{**OPTIONS, "expert_memory": "25%"})
    assert show_plan(config) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  expert memory")]
    assert "18 of 96 experts stay, 3 at a time pass through, in 3 layers" in line
