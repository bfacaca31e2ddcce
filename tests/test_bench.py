"""The benches: report, shapes, roofline, traffic, client, and a toy run of each command."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.bench import client, engines, latency, report, roofline, serve, shapes, throughput, traffic, turns
from moeyard.bench.sides import Workload
from moeyard.kernels.environment import ENVIRONMENT

TINY = shapes.BenchShape(
    hidden=64, layers=2, experts=8, top_k=2, expert_width=32, vocab=512, heads=4, kv_heads=2, head_dim=16, positions=256
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def checkpoint(workdir: Path) -> Path:
    return shapes.make_checkpoint(TINY, workdir)


def parse(module, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(argv)


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


# report


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_is_numpys(samples: list[float], percent: float) -> None:
    assert report.percentile(samples, percent) == pytest.approx(np.percentile(samples, percent), abs=1e-6)


def test_spread() -> None:
    assert report.spread([3.0, 1.0, 2.0, 10.0]) == report.Spread(median=2.5, low=1.0, high=10.0)
    with pytest.raises(ValueError, match="no samples"):
        report.spread([])


def test_table_aligns_columns() -> None:
    assert report.table(["a", "bb"], [["long", "1"], ["x", "222"]]).splitlines() == [
        "a      bb",
        "----  ---",
        "long    1",
        "x     222",
    ]


def test_emit_prints_one_json_line_and_writes_the_samples(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "bench", "x", "--note", "two words"])
    path = tmp_path / "report.json"
    report.emit("x", {"speed": 1.23456789, "count": 123456789}, {"seconds": [1, 2]}, str(path))
    printed = last_line(capsys.readouterr().out)
    assert set(printed) == {"bench", "figures", "machine", "command"}
    assert printed["figures"] == {"speed": 1.2346, "count": 123456789}
    assert printed["command"] == "moeyard bench x --note 'two words'"
    assert {"cpu", "cores", "memory_bytes", "gpu", "torch", "transformers"} <= set(printed["machine"])
    assert json.loads(path.read_text()) == {**printed, "samples": {"seconds": [1, 2]}}


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", True])
def test_emit_refuses_what_is_not_a_number(value) -> None:
    with pytest.raises(ValueError, match="figure speed"):
        report.emit("x", {"speed": value}, {}, None)


def test_emit_names_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--json"):
        report.emit("x", {}, {}, str(tmp_path / "missing" / "report.json"))


# shapes


def test_the_checkpoint_loads_and_has_the_shape(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen3_moe", 64, 2)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (8, 2, 32)
    assert str(model.dtype) == "torch.bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "Any text: naïve, 漢字, \n\t {}"
    assert len(tokenizer) == config.vocab_size == 512
    assert tokenizer.eos_token_id == config.eos_token_id == 511
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert isinstance(tokenizer.decode(list(range(512))), str)


def test_the_default_vocabulary_has_32000_entries() -> None:
    assert len(shapes.make_tokenizer(32_000)) == 32_000


def test_the_checkpoint_is_kept_and_mended(tmp_path: Path) -> None:
    path = shapes.make_checkpoint(TINY, tmp_path)
    weights = path / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert shapes.make_checkpoint(TINY, tmp_path) == path
    assert weights.stat().st_mtime_ns == made
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not shapes.is_intact(path, TINY)
    shapes.make_checkpoint(TINY, tmp_path)
    assert shapes.is_intact(path, TINY)
    assert [p.name for p in tmp_path.iterdir()] == [TINY.name]


def test_a_made_shape_is_the_same_every_time(checkpoint: Path, tmp_path: Path) -> None:
    again = shapes.make_checkpoint(TINY, tmp_path)
    assert (again / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "field, value", [("hidden", 0), ("top_k", 65), ("kv_heads", 3), ("vocab", 256), ("layers", -1)]
)
def test_a_wrong_shape_is_named(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        shapes.BenchShape(**{field: value})


def test_shape_options_and_a_model_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="--hidden"):
        shapes.resolve_model(parse(throughput, "some/model", "--hidden", "8"))


# roofline


def test_experts_touched_is_the_mean_over_all_routings() -> None:
    experts, top_k, tokens = 5, 2, 3
    choices = list(itertools.combinations(range(experts), top_k))
    counts = [len(set(itertools.chain(*picks))) for picks in itertools.product(choices, repeat=tokens)]
    assert roofline.experts_touched(experts, top_k, tokens) == pytest.approx(sum(counts) / len(counts))
    assert roofline.experts_touched(0, 0, 4) == 0


COST = roofline.ModelCost(
    moe_layers=2,
    experts=4,
    top_k=1,
    expert_params=100,
    dense_params=1000,
    head_params=500,
    embedding_params=500,
    layers=3,
    kv_elements=8,
    query_elements=16,
    itemsize=2,
)
MEMORY_BOUND = roofline.Peaks(flops_per_s=1e12, bytes_per_s=1000.0)
COMPUTE_BOUND = roofline.Peaks(flops_per_s=1000.0, bytes_per_s=1e12)


def test_roofline_by_hand() -> None:
    # Weights: (2 layers x 1 expert x 100 + 1000 + 500) x 2 bytes = 3400; cache: 48 bytes per token, 10 read, 1 written.
    assert roofline.decode_seconds(COST, MEMORY_BOUND, batch=1, context=10) == pytest.approx(3.4 + 0.048 * 11)
    # Two tokens touch 4 x (1 - 0.75^2) = 1.75 of 4 experts.
    assert roofline.decode_seconds(COST, MEMORY_BOUND, batch=2, context=10) == pytest.approx(
        2 * (2 * 1.75 * 100 + 1500) / 1000 + 0.048 * 22
    )
    # Operations: 2 x (1000 + 2 x 100) + head 2 x 500 + attention 4 x 11 pairs x 3 layers x 16.
    assert roofline.decode_seconds(COST, COMPUTE_BOUND, batch=1, context=10) == pytest.approx(5.512)
    # A prompt of 3: 2 x 3 x 1200 + 1000 + 4 x (1 + 2 + 3) x 3 x 16.
    assert roofline.prefill_seconds(COST, COMPUTE_BOUND, batch=1, length=3) == pytest.approx(9.352)
    assert roofline.workload_seconds(COST, COMPUTE_BOUND, batch=1, input_len=3, output_len=3) == pytest.approx(
        9.352
        + roofline.decode_seconds(COST, COMPUTE_BOUND, batch=1, context=3)
        + roofline.decode_seconds(COST, COMPUTE_BOUND, batch=1, context=4)
    )
    assert COST.weight_bytes == 2 * (2 * 4 * 100 + 1000 + 500 + 500)
    assert COST.kv_bytes_per_token == 48


def test_model_cost_counts_the_checkpoint(checkpoint: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig

    cost = roofline.model_cost(AutoConfig.from_pretrained(checkpoint), "bfloat16")
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        elements = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert cost.weight_bytes == 2 * sum(elements.values())
    routed = sum(n for name, n in elements.items() if ".experts." in name)
    assert cost.moe_layers * cost.experts * cost.expert_params == routed
    assert (cost.moe_layers, cost.experts, cost.top_k, cost.expert_params) == (2, 8, 2, 3 * 64 * 32)
    assert (cost.head_params, cost.embedding_params) == (512 * 64, 512 * 64)
    assert cost.kv_bytes_per_token == 2 * 2 * 2 * 2 * 16


def test_a_hybrid_shape_has_full_attention_in_every_fourth_layer(tmp_path: Path) -> None:
    from transformers import AutoConfig

    tiny = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
    linear = {"linear_key_heads": 2, "linear_value_heads": 4, "linear_head_dim": 8, "shared_width": 16}
    path = shapes.make_checkpoint(shapes.HybridShape(**{**tiny, "layers": 4, **linear}), tmp_path)
    cost = roofline.model_cost(AutoConfig.from_pretrained(path), "bfloat16")
    assert (cost.layers, cost.moe_layers) == (1, 4)
    # Convolution over queries, keys and values (2 * 16 + 32 channels, 4 inputs, bfloat16); states in float32.
    assert cost.state_bytes == 3 * (64 * 4 * 2 + 4 * 8 * 8 * 4)
    options = [f"--{name.replace('_', '-')}={tiny[name]}" for name in shapes.SHAPE_OPTIONS]
    made = shapes.resolve_model(parse(throughput, "hybrid", *options, "--workdir", str(tmp_path)))
    assert AutoConfig.from_pretrained(made).model_type == "qwen3_next"


def test_model_cost_counts_a_tied_head_once() -> None:
    from transformers import Qwen3MoeConfig

    def cost(tied: bool) -> roofline.ModelCost:
        config = Qwen3MoeConfig(
            hidden_size=32, num_hidden_layers=1, vocab_size=64, num_experts=4, tie_word_embeddings=tied
        )
        return roofline.model_cost(config, "float32")

    assert cost(False).weight_bytes - cost(True).weight_bytes == 4 * 32 * 64
    assert cost(True).dense_params == cost(False).dense_params


def test_measured_rates_are_positive() -> None:
    import torch

    threads = torch.get_num_threads()
    try:
        rates = roofline.measure(device="cpu", threads=1, matrix=33, read_bytes=4096, repeats=2)
    finally:
        torch.set_num_threads(threads)
    assert set(rates) == {"bfloat16", "float32", "read"}
    assert all(rate > 0 for rate in rates.values())


# turns and throughput


def test_prompts_are_the_same_for_both_sides_and_new_in_every_turn() -> None:
    w = Workload(name="batch", requests=3, input_len=20, output_len=4)
    prompts = turns.make_prompts(w, 100, 0, 1)
    assert prompts == turns.make_prompts(w, 100, 0, 1)
    assert prompts != turns.make_prompts(w, 100, 0, 2)
    assert [len(p) for p in prompts] == [20] * 3
    assert all(0 <= token < 100 for p in prompts for token in p)


def test_equal_leading_share() -> None:
    assert turns.equal_leading_share([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == 6 / 8


def test_a_failing_side_is_named_with_what_it_did(capsys) -> None:
    cases = (("moeyard", "AttributeError"), ("nobody", "the process ended"))
    for name, problem in cases:
        environment = turns.child_environment(1, {})
        with pytest.raises(RuntimeError, match=f"{name}: a test: {problem}"), turns.Side(name, environment) as side:
            side.call("no_such_thing", what="a test", timeout=60)
    assert "KeyError: 'nobody'" in capsys.readouterr().err


class FakeSide:
    """Answers probes with 2 s in an environment with FAST, else 3 s."""

    started: list[FakeSide]

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.environment, self.closed = environment, False
        self.started.append(self)

    def call(self, op: str, **_: object) -> dict:
        seconds = 2.0 if "FAST" in self.environment else 3.0
        return {"seconds": {"eager": seconds, "grouped_mm": 9.0}, "skipped": {}} if op == "probe" else {}

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeSide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.mark.parametrize(
    "choice, overlay, chosen",
    [
        ("same", {"FAST": "1"}, "same"),
        ("plain", {"FAST": "1"}, "plain"),
        ("better", {"FAST": "1"}, "same"),
        ("better", {"OTHER": "1"}, "same"),  # no difference: ours stay
    ],
)
def test_the_environment_of_transformers(choice: str, overlay: dict, chosen: str, monkeypatch) -> None:
    monkeypatch.setattr(FakeSide, "started", [], raising=False)
    monkeypatch.setattr(engines, "Side", FakeSide)
    args = parse(throughput, "--against", "transformers", "--transformers-environment", choice)
    setup = engines.Setup(
        model="m", device="cpu", threads=1, config={}, cost=COST, vocab=9, kv_bytes=1, overlay=overlay
    )
    workloads = throughput.workloads_of(args)
    with contextlib.ExitStack() as stack:
        opponent = engines.start_transformers(stack, setup, args, workloads)
        assert opponent.environment == chosen
        given = set(overlay) & set(FakeSide.started[-1 if choice == "plain" else 0].environment)
        assert given == (set(overlay) if chosen == "same" else set())
        assert [side.closed for side in FakeSide.started] == [side is not opponent.side for side in FakeSide.started]
        assert len(FakeSide.started) == (2 if choice == "better" else 1)
        assert opponent.implementation(workloads[0]) == "eager"


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--requests", "0"], "--requests"),
        (["--output-len", "1"], "--output-len"),
        (["--workloads", "batch,speed"], "speed"),
        (["--workloads", "continuous"], "--against"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_throughput_names_a_wrong_option(argv: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        throughput.workloads_of(parse(throughput, *argv))


def test_the_workloads_of_the_target() -> None:
    both = throughput.workloads_of(parse(throughput, "--against", "transformers"))
    assert [(w.name, w.requests, w.input_len, w.output_len, w.method) for w in both] == [
        ("batch", 16, 64, 128, "generate"),
        ("single", 1, 64, 128, "generate"),
        ("prefill", 1, 1024, 1, "generate"),
        ("continuous", 16, 64, 128, "generate_batch"),
    ]
    assert [w.counted_tokens for w in both] == [2048, 128, 1024, 2048]
    assert [w.name for w in throughput.workloads_of(parse(throughput))] == ["batch", "single", "prefill"]


def toy_options(workdir: Path) -> list[str]:
    shape = ["--hidden", "64", "--layers", "2", "--experts", "8", "--top-k", "2", "--expert-width", "32"]
    return [*shape, "--vocab", "512", "--workdir", str(workdir), "--threads", "1", "--device", "cpu", "--repeats", "1"]


def test_throughput_against_transformers(workdir: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    lengths = ["--requests", "3", "--input-len", "5", "--output-len", "6", "--prefill-len", "20"]
    small = ["--matrix", "64", "--read-mib", "1", "--json", str(path)]
    args = parse(throughput, "--against", "transformers", *lengths, *small, *toy_options(workdir))
    assert throughput.run(args) == 0
    out = capsys.readouterr().out
    figures = last_line(out)["figures"]
    wanted = {"output_ratio_3", "output_ratio_1", "generate_batch_ratio_3", "prefill_ratio_20", "peak_memory_ratio"}
    wanted |= {"roofline_share_3", "roofline_share_1", "roofline_share_prefill"}
    assert wanted <= set(figures)
    assert all(figures[name] > 0 for name in wanted)
    assert figures["equal_leading_share_batch"] > 0.3  # bfloat16 may part ways, not at once
    assert 2 <= figures["experts_touched_3"] <= 6
    assert figures["experts_touched_1"] == 2
    samples = json.loads(path.read_text())["samples"]
    assert [len(samples["seconds"][name]["transformers"]) for name in throughput.WORKLOADS] == [1] * 4
    assert set(samples["experts_probes"]["batch"]["seconds"]) == {"eager", "grouped_mm", "batched_mm"}
    assert "ratio" in out


def test_latency_times() -> None:
    assert latency.times_of([[0.5, 1.0, 2.0]]) == {"ttft": [500.0], "itl": [500.0, 1000.0], "e2e": [2000.0]}
    with pytest.raises(ValueError, match="--batch-sizes"):
        latency.workloads_of(parse(latency, "--batch-sizes", "1,x"))
    assert [w.requests for w in latency.workloads_of(parse(latency, "--batch-sizes", "4,1"))] == [1, 4]


def test_latency_runs(workdir: Path, capsys) -> None:
    args = parse(latency, "--batch-sizes", "1,3", "--input-len", "5", "--output-len", "4", *toy_options(workdir))
    assert latency.run(args) == 0
    figures = last_line(capsys.readouterr().out)["figures"]
    kinds = itertools.product(("ttft", "itl", "e2e"), (50, 90, 99), (1, 3))
    assert set(figures) == {f"{kind}_ms_p{p}_b{batch}" for kind, p, batch in kinds}
    assert all(value > 0 for value in figures.values())


def test_the_engine_gets_what_the_workloads_need(workdir: Path) -> None:
    from moeyard.engine.config import EngineConfig

    args = parse(throughput, "--requests", "3", *toy_options(workdir))
    setup = engines.prepare(args, throughput.workloads_of(args))
    assert setup.overlay == ENVIRONMENT
    config = EngineConfig(**setup.config)
    assert (config.max_num_seqs, config.max_model_len, config.prefix_cache) == (3, 1025, False)
    assert setup.kv_bytes >= 1025 * setup.cost.kv_bytes_per_token
    assert int(config.kv_memory or 0) == setup.kv_bytes
    assert setup.vocab == 512


# traffic


@given(st.integers(1, 50), st.floats(0.1, 100), st.floats(0.2, 5), st.integers(0, 3))
def test_arrivals_rise_from_zero(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = traffic.arrivals(count, rate, burstiness, seed)
    assert len(times) == count and times[0] == 0.0 and times == sorted(times)
    assert times == traffic.arrivals(count, rate, burstiness, seed)


def test_arrivals_have_the_rate_and_the_burstiness() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(traffic.arrivals(20_000, 5.0, burstiness, 0))
        assert np.mean(gaps) == pytest.approx(0.2, rel=0.1)
        assert np.std(gaps) / np.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.1)
    assert traffic.arrivals(3, math.inf, 1.0, 0) == [0.0] * 3
    with pytest.raises(ValueError, match="request_rate"):
        traffic.arrivals(3, 0.0, 1.0, 0)


def test_jsonl_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hi"}\n\n{"prompt": [1, 2], "output_len": 3}\n')
    assert traffic.read_jsonl(str(path), 7) == [
        traffic.Planned(prompt="hi", output_len=7),
        traffic.Planned(prompt=[1, 2], output_len=3),
    ]
    for bad in ('{"text": "hi"}', "[]", '{"prompt": ""}', '{"prompt": [1, "x"]}', '{"prompt": "x", "output_len": 0}'):
        path.write_text('{"prompt": "hi"}\n' + bad)
        with pytest.raises(ValueError, match="line 2"):
            traffic.read_jsonl(str(path), 7)
    with pytest.raises(ValueError, match="--dataset-path"):
        traffic.read_jsonl(str(tmp_path / "missing"), 7)


def test_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, arrival_s=[5.0, 5.5, 9.0], input_len=[3, 4, 5], output_len=[6, 7, 8])
    planned = traffic.read_trace(str(path), 100, 0, 2)
    assert [(p.arrival_s, len(p.prompt), p.output_len) for p in planned] == [(0.0, 3, 6), (0.5, 4, 7)]
    np.savez(path, arrival_s=[5.0])
    with pytest.raises(ValueError, match="input_len"):
        traffic.read_trace(str(path), 100, 0, None)


# client and serve


def test_stream_lines_are_read_by_vllms_definitions() -> None:
    outcome = client.Outcome()
    lines = [
        (": ping", 0.1),
        ("", 0.1),
        ('data: {"choices": [], "usage": null}', 0.2),
        ('data: {"choices": [{"text": ""}]}', 1.0),
        ('data: {"choices": [{"text": "b"}]}', 1.5),
        ('data: {"choices": [{"text": "c"}]}', 3.0),
        ('data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}', 3.1),
    ]
    assert not any(client._take(line, outcome, now) for line, now in lines)
    assert client._take("data: [DONE]", outcome, 3.2)
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.error) == (9, 5, "")
    assert {metric: outcome.milliseconds(metric) for metric in client.METRICS} == {
        "ttft": [1000.0],
        "tpot": [500.0],  # (3 - 1) s / (5 - 1)
        "itl": [500.0, 1500.0],
        "e2el": [3000.0],
    }


def test_an_error_event_ends_the_stream() -> None:
    outcome = client.Outcome()
    assert client._take('data: {"error": {"message": "boom"}}', outcome, 1.0)
    assert "boom" in outcome.error


def test_figures_by_hand() -> None:
    outcomes = [
        client.Outcome(prompt_tokens=10, output_tokens=3, stamps=[1.0, 1.5, 2.0]),
        client.Outcome(prompt_tokens=20, output_tokens=1, stamps=[3.0]),
        client.Outcome(error="HTTP 503"),
    ]
    figures = client.figures_of(outcomes, 4.0, {"ttft": 1500.0, "tpot": 600.0})
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (30, 4)
    assert (figures["request_throughput"], figures["output_throughput"]) == (0.5, 1.0)
    assert figures["total_token_throughput"] == 8.5
    assert figures["request_goodput"] == 0.25
    assert (figures["mean_ttft_ms"], figures["median_ttft_ms"]) == (2000.0, 2000.0)
    assert (figures["mean_tpot_ms"], figures["mean_itl_ms"]) == (500.0, 500.0)
    assert (figures["mean_e2el_ms"], figures["p99_e2el_ms"]) == (2500.0, pytest.approx(2990.0))
    block = client.result_block(figures)
    for name in ("Successful requests:", "Benchmark duration (s):", "Total generated tokens:", "Mean TTFT (ms):"):
        assert name in block
    for name in ("Median TPOT (ms):", "P99 ITL (ms):", "P99 E2EL (ms):", "Request goodput (req/s):"):
        assert name in block


class Stub(BaseHTTPRequestHandler):
    """An OpenAI-like server: streams `max_tokens` chunks; prompts that start with token 13 get 503."""

    bodies: list[dict]
    headers_seen: list[dict]
    root = ""
    gate = threading.Lock()
    running = most = 0

    def do_GET(self) -> None:
        self._json(200, {"data": [{"id": "stub", "root": self.root}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.gate:
            self.bodies.append(body)
            self.headers_seen.append(dict(self.headers))
            type(self).running += 1
            type(self).most = max(self.most, self.running)
        try:
            if body["prompt"][0] == 13:
                self._json(503, {"error": {"message": "queue full"}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self._event(": ping")
            for i in range(body["max_tokens"]):
                self._event("data: " + json.dumps({"choices": [{"index": 0, "text": f" {i}"}]}))
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            self._event("data: " + json.dumps({"choices": [], "usage": usage}))
            self._event("data: [DONE]")
        finally:
            with self.gate:
                type(self).running -= 1

    def _event(self, text: str) -> None:
        self.wfile.write(f"{text}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[tuple[str, type[Stub]]]:
    (tmp_path / "config.json").write_text('{"vocab_size": 50}')
    handler = type("OneStub", (Stub,), {"bodies": [], "headers_seen": [], "root": str(tmp_path)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def test_serve_drives_a_server(stub, tmp_path: Path, capsys, monkeypatch) -> None:
    url, handler = stub
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    path = tmp_path / "report.json"
    sizes = ["--requests", "6", "--input-len", "5", "--output-len", "4", "--max-concurrency", "2"]
    rate = ["--request-rate", "1000", "--burstiness", "0.5", "--goodput", "ttft:1e9", "--json", str(path)]
    assert serve.run(parse(serve, "--url", url + "/", *sizes, *rate)) == 0
    out = capsys.readouterr().out
    figures = last_line(out)["figures"]
    failed = sum(body["prompt"][0] == 13 for body in handler.bodies[1:])
    assert (figures["completed"], figures["failed"]) == (6 - failed, failed)
    assert figures["total_input_tokens"] == 5 * (6 - failed)
    assert figures["total_output_tokens"] == 4 * (6 - failed)
    assert "request_goodput" in figures and "Successful requests:" in out
    assert len(handler.bodies) == 7  # one that is not counted
    assert handler.most <= 2
    body = handler.bodies[-1]
    assert body["stream_options"] == {"include_usage": True} and body["ignore_eos"] and body["stream"]
    assert all(0 <= token < 50 for token in body["prompt"])
    assert handler.bodies[0]["prompt"] == next(
        b["prompt"][::-1] for b in handler.bodies[1:] if b["prompt"][::-1] == handler.bodies[0]["prompt"]
    )
    headers = {name.lower(): value for name, value in handler.headers_seen[-1].items()}
    assert headers["authorization"] == "Bearer secret" and headers["x-request-id"].startswith("bench-")
    assert len(json.loads(path.read_text())["samples"]["requests"]) == 6


def test_serve_counts_failed_requests(stub, tmp_path: Path, capsys) -> None:
    url, _ = stub
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [1, 2]}\n{"prompt": [13, 2]}\n{"prompt": "text"}\n')
    data = ["--dataset", "jsonl", "--dataset-path", str(prompts), "--output-len", "2"]
    assert serve.run(parse(serve, "--url", url, *data)) == 0
    captured = capsys.readouterr()
    figures = last_line(captured.out)["figures"]
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert "1 requests failed: HTTP 503" in captured.err


def test_serve_with_a_trace(stub, tmp_path: Path, capsys) -> None:
    url, handler = stub
    path = tmp_path / "trace.npz"
    np.savez(path, arrival_s=[0.0, 0.01], input_len=[3, 4], output_len=[2, 1])
    assert serve.run(parse(serve, "--url", url, "--dataset", "trace", "--dataset-path", str(path))) == 0
    assert sorted((len(b["prompt"]), b["max_tokens"]) for b in handler.bodies[1:]) == [(3, 2), (4, 1)]
    assert last_line(capsys.readouterr().out)["figures"]["total_output_tokens"] == 3


def test_serve_fails_when_nothing_succeeds(stub, tmp_path: Path) -> None:
    url, _ = stub
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [13, 13]}\n')
    with pytest.raises(RuntimeError, match="503"):
        serve.run(parse(serve, "--url", url, "--dataset", "jsonl", "--dataset-path", str(prompts)))
    with pytest.raises(RuntimeError, match="/v1/models"):
        serve.run(parse(serve, "--url", "http://127.0.0.1:9"))


def test_random_prompts_need_a_vocabulary(stub) -> None:
    url, handler = stub
    handler.root = "somewhere/else"
    with pytest.raises(ValueError, match="--vocab-size"):
        serve.run(parse(serve, "--url", url, "--requests", "1"))
    assert serve.run(parse(serve, "--url", url, "--requests", "1", "--vocab-size", "9", "--output-len", "1")) == 0


def test_a_request_that_takes_too_long_is_a_failure() -> None:
    import httpx

    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def send() -> client.Outcome:
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(never)) as http:
            return await client.complete(http, "m", traffic.Planned(prompt="x", output_len=1), "id", 0.05)

    assert asyncio.run(send()).error == "not finished after 0.05 s"


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--requests", "0"], "--requests"),
        (["model", "--url", "http://x"], "--url"),
        (["--dataset", "jsonl"], "--dataset-path"),
        (["--dataset-path", "x"], "--dataset-path"),
        (["--dataset", "trace", "--dataset-path", "x", "--request-rate", "1"], "--request-rate"),
        (["--burstiness", "2"], "--burstiness"),
        (["--goodput", "speed:3"], "--goodput"),
        (["--goodput", "ttft:fast"], "--goodput"),
    ],
)
def test_serve_names_a_wrong_option(argv: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        serve.check(parse(serve, *argv))


def test_a_server_that_does_not_start_is_told_with_its_words(capsys) -> None:
    args = parse(serve, "--serve-args", "--no-such-option 1", "--start-timeout", "60")
    with pytest.raises(RuntimeError, match="the server ended with code 2"), serve.own_server(args):
        pass
    assert "--no-such-option" in capsys.readouterr().err
