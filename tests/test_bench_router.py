"""`moeyard bench router`: its workloads, the simulation against one that is worked out by hand, and the command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from moeyard.__main__ import main
from moeyard.bench import router as bench
from moeyard.bench.router import Prompt, read_trace, scale_arrivals, simulate, synthetic, unbounded_hit_share
from moeyard.scheduler.replicas import DualMap, LeastLoaded, RoundRobin

SMALL = ("--requests", "300", "--ranks", "3")


def prompt(arrival_s: float, tokens: int, *keys: int) -> Prompt:
    return Prompt(arrival_s=arrival_s, tokens=tokens, keys=keys)


def run(policy, prompts: list[Prompt], ranks: int = 1, cache_blocks: int = 100, **options) -> bench.Result:
    options = {"block_size": 10, "ttft_target_s": 5.0, "budget_tokens": 50} | options
    return simulate(policy(range(ranks), **options), prompts, 10.0, cache_blocks)


# Workloads


def write(path: Path, **arrays) -> str:
    np.savez(path, **{name: np.array(value) for name, value in arrays.items()})  # type: ignore[arg-type]
    return str(path)


def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.npz",
        arrival_s=[12.0, 10.0, 11.0],
        input_len=[1024, 1025, 100],
        hash_ids=[0, 1, 0, 2, 3, 4],
        hash_start=[0, 2, 5, 6],
    )
    assert read_trace(path) == [prompt(0.0, 1025, 0, 2), prompt(1.0, 100), prompt(2.0, 1024, 0, 1)]


def test_without_hash_ids_nothing_is_shared_and_it_says_so(tmp_path: Path, capsys) -> None:
    prompts = read_trace(write(tmp_path / "t.npz", arrival_s=[0.0, 1.0], input_len=[2048, 1024]))
    assert [len(p.keys) for p in prompts] == [4, 2] and not set(prompts[0].keys) & set(prompts[1].keys)
    assert "every prompt counts as new" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"input_len": [1, 2]}, "no array 'arrival_s'"),
        ({"arrival_s": [0.0, 1.0]}, "no array 'input_len'"),
        ({"arrival_s": [0.0, 1.0], "input_len": [1, 2, 3]}, "equal length"),
        ({"arrival_s": [0.0], "input_len": [1]}, "at least 2"),
        ({"arrival_s": [0.0, 1.0], "input_len": [1, 0]}, "at least one token"),
        ({"arrival_s": [0.0, np.nan], "input_len": [1, 1]}, "at different times"),
        ({"arrival_s": [1.0, 1.0], "input_len": [1, 1]}, "at different times"),
        ({"arrival_s": [0.0, 1.0], "input_len": [1, 1], "hash_ids": [1]}, "no array 'hash_start'"),
        ({"arrival_s": [0.0, 1.0], "input_len": [1, 1], "hash_ids": [1], "hash_start": [0, 9]}, "hash_start"),
        ({"arrival_s": [0.0, 1.0], "input_len": [1, 1], "hash_ids": [1], "hash_start": [-1, 0]}, "hash_start"),
        ({"arrival_s": ["a", "b"], "input_len": [1, 1]}, "could not convert"),
    ],
)
def test_what_is_not_a_trace_is_refused(tmp_path: Path, arrays: dict, says: str) -> None:
    path = write(tmp_path / "t.npz", **arrays)
    with pytest.raises(ValueError, match=says) as error:
        read_trace(path)
    assert "--trace" in str(error.value)


def test_the_synthetic_trace_is_of_growing_conversations() -> None:
    prompts = synthetic(2000, 3)
    assert prompts == synthetic(2000, 3) != synthetic(2000, 4)
    arrivals = [p.arrival_s for p in prompts]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0.0
    assert all(len(p.keys) == p.tokens // bench.SYNTHETIC_BLOCK for p in prompts)
    assert 0.6 < unbounded_hit_share(prompts, bench.SYNTHETIC_BLOCK) < 0.95
    parent: dict[int, int] = {}  # a key stands for all that is before it, so it always follows the same one
    for p in prompts:
        for before, key in zip((-1, *p.keys), p.keys, strict=False):
            assert parent.setdefault(key, before) == before


def test_arrivals_are_scaled_to_the_load() -> None:
    prompts = scale_arrivals([prompt(0.0, 100), prompt(1.0, 200, 5), prompt(4.0, 100)], 10.0)
    assert prompts == [prompt(0.0, 100), prompt(10.0, 200, 5), prompt(40.0, 100)]


# Simulation


def test_one_rank_does_one_prompt_after_the_other() -> None:
    prompts = [prompt(0.0, 20, 1, 2), prompt(1.0, 30, 1, 2, 3), prompt(9.0, 25, 7, 8)]
    result = run(RoundRobin, prompts)
    # 2 s; then two cached blocks and 10 tokens, 1 s; then 2.5 s.
    assert result.ttft_s == pytest.approx([2.0, 2.0, 2.5])
    assert (result.hit_tokens, result.prompt_tokens) == (20, 75)
    assert result.busy_s == pytest.approx([5.5])


def test_the_cache_is_bounded_and_forgets_the_oldest() -> None:
    prompts = [prompt(10.0 * i, 21, *keys) for i, keys in enumerate([(1, 2), (3, 4), (1, 2), (5, 6), (3, 4)])]
    assert run(RoundRobin, prompts, cache_blocks=4).hit_tokens == 20
    assert run(RoundRobin, prompts, cache_blocks=6).hit_tokens == 40
    whole = [prompt(10.0 * i, 20, 1, 2) for i in range(2)]
    assert run(RoundRobin, whole).hit_tokens == 10  # one token is always computed


@pytest.mark.parametrize("policy", [DualMap, RoundRobin, LeastLoaded])
def test_every_request_gets_its_first_token(policy) -> None:
    prompts = scale_arrivals(synthetic(400, 1), 40.0)
    ticks: list[int] = []
    router = policy(range(4), block_size=64, ttft_target_s=5.0, budget_tokens=100)
    result = simulate(router, prompts, 10.0, 50, lambda: ticks.append(1))
    assert len(ticks) == 400 and all(t > 0 for t in result.ttft_s)
    assert result.prompt_tokens == sum(p.tokens for p in prompts)
    assert sum(result.busy_s) == pytest.approx((result.prompt_tokens - result.hit_tokens) / 10)
    assert result == simulate(policy(range(4), block_size=64, ttft_target_s=5.0, budget_tokens=100), prompts, 10.0, 50)


def test_dualmap_reuses_more_and_is_not_slower() -> None:
    prompts = scale_arrivals(synthetic(1500, 0), 0.9 * 8 * 10_000)
    results = {}
    for name, policy in bench.POLICIES.items():
        router = policy(range(8), block_size=64, ttft_target_s=5.0, budget_tokens=8192, cache_blocks=4000)
        results[name] = simulate(router, prompts, 10_000.0, 4000)
    figures, rows = bench.summary(results, 5.0)
    assert figures["hit_share_dualmap"] > 1.5 * figures["hit_share_round_robin"]
    assert figures["ttft_p99_dualmap"] < figures["ttft_p99_least_loaded"] < figures["ttft_p99_round_robin"]
    assert figures["within_target_dualmap"] >= figures["within_target_least_loaded"]
    assert all(len(row) == 4 for row in rows)


# The command


def test_the_command_reports_its_figures(tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    assert main(["bench", "router", *SMALL, "--json", str(path)]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    figures = report["figures"]
    for policy in ("dualmap", "round_robin", "least_loaded"):
        assert 0 < figures[f"hit_share_{policy}"] <= figures["hit_share_bound"] < 1
        assert 0 < figures[f"ttft_p50_{policy}"] <= figures[f"ttft_p99_{policy}"]
        assert 0 < figures[f"within_target_{policy}"] <= 1
    samples = json.loads(path.read_text())["samples"]
    assert len(samples["dualmap"]["ttft_s"]) == 300 and len(samples["dualmap"]["busy_s"]) == 3


def test_a_trace_runs_by_the_command(tmp_path: Path, capsys) -> None:
    trace = write(tmp_path / "t.npz", arrival_s=np.arange(50.0), input_len=[700] * 50)
    assert main(["bench", "router", "--trace", trace]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["figures"]["hit_share_dualmap"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ranks", "0"], "--ranks is 0"),
        (["--load", "nan"], "--load is nan"),
        (["--ttft-target", "-1"], "--ttft-target is -1"),
        (["--requests", "1"], "--requests is 1"),
        (["--cache-tokens", "100"], "--cache-tokens is 100"),
        (["--seed", "-1"], "--seed is -1"),
        (["--trace", "missing.npz"], "--trace missing.npz"),
        (["--trace", __file__], "give an .npz file"),
        (["--trace", "t.npz", "--seed", "1"], "--seed"),
    ],
)
def test_bad_options_are_one_line(options: list[str], says: str, capsys) -> None:
    assert main(["bench", "router", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1


def test_the_options_have_defaults() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args([])
    assert (args.ranks, args.load, args.trace) == (8, 0.8, None)
