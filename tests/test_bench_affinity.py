"""`moeyard bench affinity`: its routing, the simulation against one worked out by hand, and the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from moeyard.__main__ import main
from moeyard.bench.affinity_steps import BATCHINGS, Machine, Tally, mixed, simulate, synthetic
from moeyard.bench.token_trace import TokenTrace, read_token_trace

SMALL = ("--requests", "4,8", "--tokens", "8", "--rounds", "1")
MACHINE = Machine(expert_bytes=1000, read_fs_per_byte=10**6, step_ns=500)


def two_kinds(tokens: int = 6) -> np.ndarray:
    """[4, T, 1, 2] requests that need experts 0 and 1 or 2 and 3 all along, in turn."""
    return np.array([[[[0, 1]]] * tokens, [[[2, 3]]] * tokens] * 2)


def run(batching: str, most: int = 2, slots: int = 0, requests: np.ndarray | None = None) -> Tally:
    return simulate(two_kinds() if requests is None else requests, 4, slots, MACHINE, most, batching)


def test_by_hand() -> None:
    """Nothing is resident: a step reads all experts in order, and those of one kind when they are chosen."""
    plain, known = run("in-order"), run("known")
    assert (plain.steps, plain.tokens, plain.distinct, plain.missed, plain.chosen) == (12, 24, 48, 48, 0)
    assert (known.steps, known.tokens, known.distinct, known.missed) == (12, 24, 24, 24)
    assert known.chosen >= 1
    assert plain.ns == 12 * 500 + 48 * 1000 and known.ns == 12 * 500 + 24 * 1000
    together = run("in-order", most=4)
    assert (together.steps, together.missed, max(together.waits)) == (6, 24, 0)


def test_recent_learns_from_the_first_tokens() -> None:
    """The first step knows nothing. From then on the past says all."""
    recent = run("recent")
    assert recent.distinct < 48 and recent.chosen >= 1
    assert recent.distinct <= 4 * 3 + 2 * (recent.steps - 3)


def test_slots_keep_what_is_used() -> None:
    assert run("in-order", slots=4).missed == 4
    assert run("known", slots=4).missed == 4


@pytest.mark.parametrize("batching", BATCHINGS)
def test_every_token_is_served_once(batching: str) -> None:
    trace = synthetic(3, 16, 2, sequences=8, tokens=12, seed=1)
    requests = mixed(trace, 6, 12, np.random.default_rng(0))
    tally = simulate(requests, 16, 4, MACHINE, 4, batching)
    assert tally.tokens == len(tally.waits) == 72 and tally.missed <= tally.distinct
    assert tally.ns == 500 * tally.steps + 1000 * tally.missed
    assert max(tally.waits) <= 2
    assert tally == simulate(requests, 16, 4, MACHINE, 4, batching)


def test_synthetic_routing_has_domains_and_stays_near() -> None:
    trace = synthetic(2, 32, 4, sequences=8, tokens=50, seed=0)
    assert trace.topk_TLK.shape == (400, 2, 4) and trace.experts <= 32
    assert (np.diff(np.sort(trace.topk_TLK, axis=2), axis=2) > 0).all(), "different experts of a token"
    again = synthetic(2, 32, 4, sequences=8, tokens=50, seed=0)
    assert (trace.topk_TLK == again.topk_TLK).all()
    one = trace.topk_TLK[:50, 0]
    kept = np.mean([len({*a} & {*b}) for a, b in zip(one[:-1].tolist(), one[1:].tolist(), strict=True)]) / 4
    assert 0.45 < kept < 0.85
    counts_DE = [np.bincount(trace.of([name]).topk_TLK[:, 0].ravel(), minlength=32) for name in trace.domains]
    assert len({int(counts_E.argmax()) for counts_E in counts_DE}) > 1


def test_requests_are_of_all_domains_in_turn() -> None:
    trace = synthetic(1, 8, 2, sequences=12, tokens=5, seed=0)
    trace = TokenTrace(trace.topk_TLK, trace.start_S, np.repeat([0, 1, 2], 4), ("a", "b", "c"))
    sequences = {
        trace.topk_TLK[s : s + 5].tobytes(): int(d) for s, d in zip(trace.start_S, trace.domain_S, strict=True)
    }
    chosen = mixed(trace, 6, 5, np.random.default_rng(0)).astype(trace.topk_TLK.dtype)
    assert [sequences[request.tobytes()] for request in chosen] == [0, 1, 2] * 2
    with pytest.raises(ValueError, match="has 12 sequences of at least 5"):
        mixed(trace, 13, 5, np.random.default_rng(0))


# The command


def test_the_command_reports_its_figures(tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    assert main(["bench", "affinity", *SMALL, "--json", str(path)]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    figures = report["figures"]
    for number in (4, 8):
        assert 0 < figures[f"distinct_experts_ratio_{number}_known"] < 1
        assert figures[f"tokens_ratio_{number}_together"] > 1
        assert figures[f"most_waits_{number}"] <= 2
    samples = json.loads(path.read_text())["samples"]
    assert samples["8"]["known"]["tokens"] == samples["8"]["in-order"]["tokens"] == 64


def test_a_trace_runs_by_the_command(tmp_path: Path, capsys) -> None:
    trace = synthetic(2, 8, 2, sequences=4, tokens=9, seed=0)
    np.savez(tmp_path / "t.npz", topk=trace.topk_TLK, seq_start=trace.start_S)
    argv = [
        "bench",
        "affinity",
        "--trace",
        str(tmp_path / "t.npz"),
        "--requests",
        "4",
        "--tokens",
        "9",
        "--rounds",
        "1",
    ]
    assert main([*argv, "--ways", "greedy", "--step-tokens", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 layers of 8 experts, 2 of them resident" in out
    # One token in a step shares with nobody: there is nothing to choose.
    assert json.loads(out.strip().splitlines()[-1])["figures"]["distinct_experts_ratio_4_known"] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--requests", "0"], "--requests is '0'"),
        (["--requests", "x"], "--requests is 'x'"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--step-tokens", "0"], "--step-tokens is 0"),
        (["--resident", "1.5"], "--resident is 1.5"),
        (["--resident", "nan"], "--resident is nan"),
        (["--ways", "best"], "--ways has 'best'"),
        (["--bandwidth", "0"], "--bandwidth"),
        (["--expert-bytes", "much"], "--expert-bytes"),
        (["--trace", "missing.npz"], "--trace missing.npz"),
    ],
)
def test_bad_options_are_one_line(options: list[str], says: str, capsys) -> None:
    assert main(["bench", "affinity", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1


@pytest.mark.skipif("MOEYARD_TOKEN_TRACE" not in os.environ, reason="MOEYARD_TOKEN_TRACE names no recorded routing")
def test_recorded_routing_shares_more_when_it_is_known() -> None:
    trace = read_token_trace(os.environ["MOEYARD_TOKEN_TRACE"])
    requests = mixed(trace, 16, 40, np.random.default_rng(0))
    tallies = {name: simulate(requests, trace.experts, trace.experts // 4, MACHINE, 8, name) for name in BATCHINGS}
    assert tallies["known"].distinct < tallies["recent"].distinct < tallies["in-order"].distinct
