"""`moeyard analyze`: what it records against transformers' own router, the command end to end, the modelled times."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from moeyard.__main__ import main
from moeyard.bench import analyze
from moeyard.bench.line_chart import Chart, line_charts, nice
from moeyard.bench.offload_speed import verdict
from moeyard.bench.record import record
from moeyard.bench.token_trace import ModelFacts, TokenTrace, read_token_trace, write_token_trace
from moeyard.engine import constants
from moeyard.engine.config import EngineConfig
from moeyard.engine.recorder import RoutingRecorder
from moeyard.engine.resolve import EMBEDDED
from moeyard.kernels.environment import ENVIRONMENT
from moeyard.launch import machine
from moeyard.scheduler.locality import hit_rate, segment_groups, segment_hit_rate
from moeyard.scheduler.offload_cost import Machine, Need, Speed, speed
from moeyard.scheduler.residency.policies import LRU
from moeyard.scheduler.residency.replay import replay
from moeyard.scheduler.residency.slots import Budget

OPTIONS = ("--dtype", "float32", "--device", "cpu", "--threads", "1", "--kv-memory", "4MiB", "--no-progress")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No second of measuring, and no environment left behind."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setattr(machine, "read_rate", lambda device: 1e10)
    monkeypatch.setattr("moeyard.engine.measure_disk.CASE_S", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "code.py").write_text("def main(argv):\n    for name in argv:\n        print(name)\n" * 12)
    (folder / "prose.txt").write_text(
        "The module provides classes for lists. It raises an error if none is there.\n" * 9
    )
    return [str(folder / "code.py"), str(folder / "prose.txt")]


def test_what_is_recorded_is_what_the_router_chose(texts):
    """Prefill in several chunks, and decode: every token's experts, in the order of the router's weights."""
    from transformers import AutoModelForCausalLM

    options = {"kv_memory": "4MiB", "max_batched_tokens": 24, "max_num_seqs": 1, "progress": False}
    config = EngineConfig(device="cpu", dtype="float32", threads=1, **options)
    made = record(config, texts, tokens=90, length=50, generate=7)
    trace = made.trace
    assert trace.model.experts == trace.experts == 32 and trace.layers == 8 and trace.digest
    lengths = [int(n) for n in trace.end_S - trace.start_S]
    assert lengths == [57, 47, 57, 47] and trace.domain_S.tolist() == [0, 0, 1, 1]
    assert made.generated_T.sum() == 4 * 7 and made.generated_T[50:57].all() and not made.generated_T[:50].any()
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    for start, end in zip(trace.start_S, trace.end_S, strict=True):
        ids = torch.from_numpy(made.token_T[start:end].astype(np.int64))[None]
        with torch.inference_mode():
            logits_L = model(ids, output_router_logits=True).router_logits
        for layer, logits_TE in enumerate(logits_L):
            want = logits_TE.topk(4, dim=-1).indices.numpy()
            np.testing.assert_array_equal(trace.topk_TLK[start:end, layer], want)


def test_the_recorder_orders_by_weight_and_fills_up():
    recorder = RoutingRecorder([2, 3])
    for ids, weights in (([[4, 1]], [[0.2, 0.8]]), ([[0, -1], [2, 3]], [[0.1, 0.9], [0.5, 0.5]])):
        recorder(0, torch.tensor(ids), torch.tensor(weights))
        recorder(1, torch.tensor([[5, 6, 7]] * len(ids)), torch.tensor([[0.1, 0.2, 0.7]] * len(ids)))
    found = recorder.take()
    assert found[:, 0].tolist() == [[1, 4, -1], [0, -1, -1], [2, 3, -1]] and found[0, 1].tolist() == [7, 6, 5]
    assert recorder.take().shape == (0, 2, 3)


def test_the_command(texts, tmp_path, capsys):
    trace_path, picture, figures = tmp_path / "t.npz", tmp_path / "p.svg", tmp_path / "f.json"
    keep = ("--trace", str(trace_path), "--picture", str(picture), "--json", str(figures), "--jobs", "1")
    keep += ("--max-batched-tokens", "64")
    argv = ("--text", *texts, "--tokens", "100", "--sequence-tokens", "70", "--residents", "0.25,0.5", *keep)
    assert main(["analyze", *argv, *OPTIONS]) == 0
    out = capsys.readouterr().out
    trace = read_token_trace(str(trace_path))
    assert len(trace.topk_TLK) == 200 and trace.domains == tuple(texts) and trace.start_S.tolist() == [0, 70, 100, 170]
    with np.load(trace_path) as file:
        assert file["token_ids"].shape == file["generated"].shape == (200,) and not file["generated"].any()
    assert "200 tokens in 4 sequences; 8 MoE layers of 32 experts, 4 of them" in out
    assert "the disk, measured" in out and "no offloading on this machine" in out
    found = json.loads(figures.read_text())["figures"]
    groups = segment_groups(trace.topk_TLK, trace.start_S, 32, 16)
    assert groups is not None and found["srp_16"] == pytest.approx(groups.f1, rel=1e-4) and "srp_128" not in found
    want = segment_hit_rate(trace.topk_TLK, trace.start_S, 32, 64, 8)
    assert found["sch_8_2"] == pytest.approx(want, rel=1e-4)
    want = hit_rate(trace.topk_TLK, trace.start_S, 32, 96, "lru")
    assert found["hit_rate_lru_3"] == pytest.approx(want, rel=1e-4)
    assert found["tokens_per_s_25"] <= found["tokens_per_s_50"] <= found["tokens_per_s_100"]
    assert 0 < found["missed_50"] < found["missed_25"] < 32
    assert "Experts kept quantised" in out and 0 < found["error_int8"] < found["error_fp8"] < found["error_int4"] < 0.3
    assert ET.parse(picture).getroot().tag.endswith("svg")

    # `plan` goes by it
    (kept,) = constants.find("routing", digest=trace.digest)
    assert kept.values.tokens == 200 and kept.values.shares == (0.25, 0.5, 1.0)
    assert kept.values.default[0] == pytest.approx(found["missed_25"], rel=1e-4)
    assert main(["plan", "--expert-memory", "25%", "--max-model-len", "64", *OPTIONS]) == 0
    assert "at most as in this model's routing of 200 tokens" in capsys.readouterr().out

    # the same from the file, and with a bandwidth at which nothing can hide
    again = ("--from-trace", str(trace_path), "--jobs", "1", "--device", "cpu")
    assert main(["analyze", *again]) == 0
    other = capsys.readouterr().out
    assert "expected speed is left out" in other and other.split("\n\n")[:4] == out.split("\n\n")[:4]
    assert main(["analyze", *again, "--bandwidth", "1MB", "--residents", "0.25,0.5", "--tokens", "150"]) == 0
    slow = capsys.readouterr().out
    assert "150 tokens in 3 sequences" in slow and "(given)" in slow and "this model needs no offloading" in slow
    assert "with 9 MiB of experts (25 %) it runs at" in slow

    # and every policy of the replay can read it
    assert main(["bench", "replay", "--trace", str(trace_path), "--policies", "lru", "--jobs", "1"]) == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "give --text"),
        (("--text", "/missing.txt"), "--text /missing.txt: No such file"),
        (("--text", "x", "--tokens", "0"), "--tokens is 0"),
        (("--text", "x", "--picture", "/missing/p.svg"), "its directory does not exist"),
        (("--text", "x", "--expert-bytes", "1MB"), "--expert-bytes is for --from-trace"),
        (("--text", "x", "--residents", "2"), "--residents is '2'"),
        (("--text", "x", "--bandwidth", "0"), "--bandwidth is 0"),
        (("--text", "x", "--bandwidth", "fast"), "--bandwidth: cannot read"),
        (("--from-trace", "/missing.npz"), "No such file"),
        (("--from-trace", "x", "--generate", "3"), "--generate is of no use with --from-trace"),
        (("--from-trace", "x", "--trace", "y"), "--trace is of no use with --from-trace"),
        (("--from-trace", "x", "--dtype", "float32"), "--dtype is of no use with --from-trace"),
        (("--from-trace", "x", "model"), "--model is of no use with --from-trace"),
        (("--text", "x", "--generate", "4000"), "leaves no room for text"),
    ],
)
def test_mistakes_are_one_line(argv, says, capsys):
    assert main(["analyze", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_texts_that_are_none(tmp_path, capsys):
    for content, says in ((b"\xff\xfe\xff", "not UTF-8"), (b"", "no tokens")):
        (tmp_path / "x").write_bytes(content)
        assert main(["analyze", "--text", str(tmp_path / "x")]) == 2
        assert says in capsys.readouterr().err


def test_lengths_that_no_sequence_has_are_left_out():
    rng = np.random.default_rng(0)
    trace = TokenTrace(rng.integers(0, 4, (12, 2, 1)), np.array([0, 6]), np.zeros(2, dtype=np.int64), ("",))
    found = analyze.measure(trace)
    assert found.groups[4] is not None and found.groups[8] is None
    assert {length for length, _ in found.segment_hits} == {4} and ("lru", 3) in found.hits


def test_facts_of_the_model_survive_in_the_file(tmp_path):
    facts = ModelFacts(name="m", experts=9, expert_bytes=5, dense_bytes=7)
    trace = TokenTrace(np.zeros((3, 1, 1), np.int16), np.array([0, 2]), np.array([1, 0]), ("a", "b"), "d", facts)
    write_token_trace(str(tmp_path / "x"), trace)
    found = read_token_trace(str(tmp_path / "x"))
    assert (found.model, found.experts, found.digest) == (facts, 9, "d") and found.of({"b"}).model == facts
    with pytest.raises(ValueError, match="--trace"):
        write_token_trace(str(tmp_path / "no" / "x"), trace)


def test_a_replay_counts_only_what_comes_after_its_warm_up():
    rng = np.random.default_rng(1)
    topk = np.array([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(40)])
    whole, begin, rest = (
        replay(LRU(Budget(layers=3, experts=8, slots=9)), part, warm_up=warm_up)
        for part, warm_up in ((topk, 0), (topk[:25], 0), (topk, 25))
    )
    assert rest.steps == 15
    for name in ("hits", "misses", "copies"):
        assert getattr(rest, name) == getattr(whole, name) - getattr(begin, name)
    assert rest.used <= rest.copies


# Modelled times

NEED = Need(dense_bytes=100, expert_bytes=10, active=20, experts=100)


def rows_of(here: Machine, *misses: float) -> list[Speed]:
    budgets = zip((0.1, 0.4), (10, 40), misses, strict=True)
    rows = [speed(NEED, here, share=s, slots=n, misses=m, lru=m, least=m) for s, n, m in budgets]
    return [*rows, speed(NEED, here, share=1.0, slots=100, misses=0, lru=0, least=0)]


def test_speeds_are_the_larger_and_the_sum_of_both_times():
    here = Machine(bandwidth=50, memory=300, free=10**9)
    row = speed(NEED, here, share=0.1, slots=10, misses=10, lru=10, least=10)
    assert (row.read_s, row.compute_s, row.resident_bytes) == (2, 1, 100)
    assert (row.overlapped, row.serial) == (1 / 2, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("free", "misses", "says"),
    [
        (1100, (9, 4), ("needs no offloading", "down to about 340 B of experts (34 %); with 100 B", "0.556 tokens/s")),
        (1100, (5, 4), ("needs no offloading", "100 B of experts (10 %), the smallest")),
        (600, (9, 4), ("this model suits offloading", "Give it about 340 B of experts (34 %)", "up to 1 tokens/s")),
        (580, (9, 6), ("does not suit offloading", "about 500 B of experts (50 %)", "0.962 tokens/s", "96%")),
        (441, (9, 4), ("this model suits offloading",)),
        (430, (9, 4), ("does not suit offloading", "all that fits, 330 B of experts (33 %)")),
        (150, (9, 4), ("not even the smallest budget of the table fits, 100 B",)),
    ],
)
def test_the_verdict_compares_times(free, misses, says):
    here = Machine(bandwidth=50, memory=300, free=free)
    text = verdict(rows_of(here, *misses), NEED, here)
    assert all(words in text for words in says), text


def test_charts_have_a_point_for_each_number():
    chart = Chart(title="a < b", note="", columns=["1", "2", "3"], lines={"x": [0.1, None, 0.4], "y": [1, 2, 3]})
    root = ET.fromstring(line_charts("t", [chart, chart]))
    assert sum(element.tag.endswith("circle") for element in root.iter()) == 10
    assert (nice(0.0), nice(3.2), nice(10), nice(0.07)) == (1, 5, 10, 0.1)
