"""`moeyard bench plan`: its problems are layers that a router can bring about, and its figures are there."""

from __future__ import annotations

import json

import pytest

from moeyard.__main__ import main
from moeyard.bench import plan as bench
from moeyard.scheduler.balance.plan import check
from moeyard.scheduler.balance.priced import plan


def test_its_loads_differ_and_their_plans_keep_the_rules() -> None:
    problems = bench.problems(64, 8, 1, "gpt-oss-120b")
    assert len(problems) == len(bench.TOKENS) * (1 + len(bench.HOT) + len(bench.SKEWS))
    transfers = {len(plan(problem).transfers) for problem in problems.values()}
    assert 0 in transfers and len(transfers) > 3
    for problem in problems.values():
        check(problem, plan(problem))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "SIZES", {"64x8": bench.SIZES["64x8"]})
    assert main(["bench", "plan", "--repeats", "1"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bench"] == "plan" and report["figures"]["plan_us_64x8"] > 0


def test_no_repeats() -> None:
    assert main(["bench", "plan", "--repeats", "0"]) == 2
