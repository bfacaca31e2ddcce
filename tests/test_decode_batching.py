"""Requests that take turns to decode, in the engine: tokens, who is grouped with whom, and that nobody starves."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from test_parity import generate, prompts, reference

from moeyard.bench.forced_routing import ForcedRouting
from moeyard.engine import moe, offload_plan
from moeyard.engine.config import EngineConfig
from moeyard.engine.decode_batching import ExpertAware
from moeyard.engine.engine import Engine
from moeyard.engine.messages import Submit
from moeyard.engine.params import SamplingParams
from moeyard.engine.predict.base import Predictor, Rows
from moeyard.engine.predict.forecast import Forecast
from moeyard.engine.predict.meter import Meter
from moeyard.launch.metrics import Metrics
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import DiskCost

OPTIONS = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_memory": "8MiB", "block_size": 8, "progress": False}
OPTIONS |= {"max_num_seqs": 8, "max_batched_tokens": 48}
NEW_TOKENS = 10
LAYERS, EXPERTS, TOP_K = 3, 32, 3


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = tiny.save("qwen3_moe", tmp_path_factory.mktemp("qwen"), num_experts=EXPERTS)
    ids = prompts(131, 8, longest=40)
    return SimpleNamespace(path=path, ids=ids, expected=reference(path, ids, NEW_TOKENS))


@pytest.fixture
def make(qwen):
    engines = []

    def made(**options):
        engines.append(Engine(EngineConfig(model=str(qwen.path), **{**OPTIONS, **options})))
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


def decodes(engine):
    """What the next steps decode, as it happens: of each step without a prompt the ids."""
    seen, run = [], engine._run_batch

    def run_batch(batch, rows=()):
        if all(len(row.token_ids) == 1 and row.start for row in rows):
            seen.append([row.request_id for row in rows])
        return run(batch, rows)

    engine._run_batch = run_batch
    return seen


def two_groups(engine, requests=8):
    """Requests that route to experts 0 to 7, and in turn with them others that route to 8 to 15."""
    rng = np.random.default_rng(0)
    tokens = 24
    kinds = [rng.permuted(np.tile(np.arange(8), (tokens, LAYERS, 1)), axis=2)[..., :TOP_K] for _ in range(requests)]
    topk = np.concatenate([ids + 8 * (request % 2) for request, ids in enumerate(kinds)])
    ForcedRouting(engine._model, topk).follow(engine, {str(r): tokens * r for r in range(requests)})
    return [[1, 2, 3, 4]] * requests


# Tokens


@pytest.mark.parametrize("memory", ["25%", "6.3%"])
@pytest.mark.parametrize("batching", ["affinity", "order"])
def test_tokens_do_not_depend_on_who_takes_turns(batching, memory, qwen, make):
    engine = make(expert_memory=memory, max_decode_seqs=3, batching=batching)
    seen = decodes(engine)
    assert generate(engine, qwen.ids, NEW_TOKENS) == qwen.expected
    assert max(map(len, seen)) == 3
    stats = engine.stats(with_experts=False)
    assert stats.decode_chosen > 0 and stats.decode_passed_over > 0
    engine._scheduler.check_integrity()


def test_turns_without_expert_memory(qwen, make):
    engine = make(max_decode_seqs=2)
    seen = decodes(engine)
    assert generate(engine, qwen.ids, NEW_TOKENS) == qwen.expected
    assert max(map(len, seen)) == 2 and engine._picker.longest <= 3


def test_by_default_all_decode(qwen, make):
    engine = make(expert_memory="25%")
    assert engine._picker is None
    generate(engine, qwen.ids, 3)
    assert engine.stats(with_experts=False).decode_chosen == 0


# Who is grouped with whom


def test_those_that_share_missing_experts_decode_together(make):
    def run(batching):
        engine = make(expert_memory="15%", max_decode_seqs=4, batching=batching, residency="lru")
        given = two_groups(engine)
        seen = decodes(engine)
        generate(engine, given, 16)
        stats = engine.stats(with_experts=False)
        mixed = sum(len({int(request) % 2 for request in step}) == 2 for step in seen)
        return stats, mixed / len(seen)

    order, mixed_order = run("order")
    affinity, mixed = run("auto")
    assert mixed_order > 0.8 and mixed < 0.5 * mixed_order
    assert order.decode_regrouped == order.decode_saved_ns == 0
    assert affinity.decode_regrouped > 0 and affinity.decode_saved_ns > 0
    assert affinity.generated_tokens == order.generated_tokens
    assert affinity.expert_misses < 0.9 * order.expert_misses
    assert affinity.expert_hits + affinity.expert_misses < 0.9 * (order.expert_hits + order.expert_misses)


def test_predicted_is_what_is_missing_and_probable(make):
    engine = make(expert_memory="15%", max_decode_seqs=4)
    given = two_groups(engine)
    picker = engine._picker
    assert isinstance(picker, ExpertAware) and picker.read_fs_per_byte == 0  # nothing was measured
    options = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True).to_dict()
    for request, prompt in enumerate(given):
        engine.submit(Submit(request_id=str(request), prompt_ids=prompt, params=options))
    for _ in range(5):
        engine.step()
    assert picker.read_fs_per_byte > 0 and picker.step_ns > 0
    nbytes_LE = np.full((LAYERS, EXPERTS), engine._offload.plan.size.expert)
    for layer, expert in engine._offload.store.resident:
        nbytes_LE[layer, expert] = 0
    assert (picker._missing().reshape(LAYERS, EXPERTS) == nbytes_LE).all()
    for request in engine._scheduler.running:
        needs_LE = picker._needs(request).reshape(LAYERS, EXPERTS)
        low = 8 * (int(request.id) % 2)
        assert (needs_LE.sum(1) == TOP_K).all() and needs_LE[:, low : low + 8].sum() == needs_LE.sum()


class Knows(Predictor):
    """Of some requests."""

    def __init__(self, value, *requests):
        self.value, self.requests, self.told = value, requests, []

    def next_of(self, request_id):
        return np.full((1, 1), self.value, np.float32) if request_id in self.requests else None

    def begin_step(self, rows):
        self.told += rows

    def upcoming(self, layer):
        pytest.fail("only the others are asked")

    def future(self):
        pytest.fail("only the others are asked")


def test_the_first_who_knows_a_request_is_asked_and_those_beside_for_nothing_else():
    silent, first, beside = Predictor(), Knows(0.2, "a"), Knows(0.7, "a", "b")
    first.upcoming, first.future = lambda layer: None, lambda: None
    meters = [Meter(predictor, ns_per_byte=1) for predictor in (silent, first)]
    forecast = Forecast([], meters, 1, 1, least_chance=0.5)
    forecast.beside.append(beside)
    forecast.begin_step([Rows(request_id="a", first=0, token_ids=[1], start=0)])
    assert len(beside.told) == len(first.told) == 1
    assert [forecast.next_of(name) for name in "ab"] == [np.float32(0.2), np.float32(0.7)]
    assert forecast.next_of("c") is None
    assert not forecast.future().any() and not list(forecast.wants(-1))


def test_nobody_starves(make):
    """One of its kind among seven of another, while new requests come."""
    engine = make(expert_memory="15%", max_decode_seqs=2, max_num_seqs=8, residency="lru")
    two_groups(engine, 20)
    options = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True).to_dict()
    names, longest, ended = iter([1, *range(0, 20, 2)]), 0, set()
    for _ in range(400):
        while len(engine._scheduler.running) + len(engine._scheduler.waiting) < 8:
            if (name := next(names, None)) is None:
                break
            engine.submit(Submit(request_id=str(name), prompt_ids=[1, 2, 3], params=options))
        ended |= {delta.request_id for delta in engine.step() if delta.finish_reason}
        longest = max([longest, *(request.passed_over for request in engine._scheduler.running)])
        if not engine.has_work:
            break
    assert len(ended) == 11 and engine._picker.changed > 0
    assert 0 < longest <= engine._picker.longest < 2 * 8 // 2


# Options and metrics


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_decode_seqs": 0}, "^max_decode_seqs is 0; it must be at least 1"),
        ({"max_decode_seqs": 8, "max_num_seqs": 8}, r"^max_decode_seqs \(8\) is not below max_num_seqs \(8\)"),
        ({"batching": "affinity"}, "^batching is affinity, and all requests that run decode .*--max-decode-seqs$"),
        ({"batching": "order"}, "^batching is order, and all requests that run decode .*--max-decode-seqs$"),
        ({"batching": "affinity", "max_decode_seqs": 4}, "expert_memory is not set; .*set --expert-memory$"),
        (
            {"batching": "affinity", "max_decode_seqs": 4, "expert_memory": "1GiB", "predictor": "none"},
            "predictor is none; use --batching order, or leave --predictor out$",
        ),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(**options)


def test_nothing_missing_is_an_error_for_affinity(make):
    options = {"expert_memory": "100%", "max_decode_seqs": 4}
    assert make(**options)._picker is not None
    with pytest.raises(ValueError, match=r"^batching is affinity, and all experts are in memory, .* less than all"):
        make(**options, batching="affinity")


def test_figures_reach_the_metrics(make):
    engine = make(expert_memory="15%", max_decode_seqs=4, residency="lru")
    generate(engine, two_groups(engine), 12)
    stats, metrics = engine.stats(with_experts=False), Metrics()
    metrics.on_stats(stats)
    lines = dict(line.rsplit(" ", 1) for line in metrics.render().decode().splitlines() if line[0] != "#")
    for name, value in (
        ("steps_chosen", stats.decode_chosen),
        ("passed_over", stats.decode_passed_over),
        ("steps_regrouped", stats.decode_regrouped),
        ("saved_seconds", stats.decode_saved_ns * 1e-9),
    ):
        assert float(lines[f"moeyard:decode_{name}_total"]) == pytest.approx(value) and value > 0
