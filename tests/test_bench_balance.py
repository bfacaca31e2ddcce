"""`moeyard bench balance --simulate`: its grid, a cell worked by hand, the picture, the figures and the command."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from moeyard.__main__ import main
from moeyard.bench import balance, balance_report, published
from moeyard.bench.balance_grid import (
    LAYOUTS,
    LOADS,
    TOKENS,
    Cell,
    Layout,
    Load,
    Row,
    grid,
    guest_slots,
    ideal_ns,
    kept_guests,
    max_over_mean,
    placed,
    problem,
    simulate,
    steps,
)
from moeyard.bench.heat_map import EVEN, LESS, MORE, Line, Panel, Section, colour, heat_map, number
from moeyard.bench.moe_shapes import SHAPES, Shape
from moeyard.bench.routing import Trace
from moeyard.scheduler.balance import eplb, resplit
from moeyard.scheduler.balance.baselines import BASELINES
from moeyard.scheduler.balance.plan import BadPlan, Plan, Transfer, native
from moeyard.scheduler.balance.problem import Problem

TOY = Shape(name="toy", experts=4, top_k=2, hidden=1000, width=100, weight_bytes=2, row_ps=100_000)
TWO = Layout(2, 1)
LOAD = {load.name: load for load in LOADS}


def half(task: Problem) -> Plan:
    """Half of expert 0's rows to the other rank, with its weights."""
    rows_EP = native(task).rows_EP.copy()
    home = int(task.home_E[0])
    rows_EP[0, 1 - home] = rows_EP[0, home] // 2
    rows_EP[0, home] -= rows_EP[0, 1 - home]
    moves = () if task.holds_PE[1 - home, 0] else (Transfer(0, home, 1 - home),)
    return Plan("half", rows_EP, np.zeros(task.experts, dtype=np.int64), moves)


# The grid


@pytest.mark.parametrize(
    ("name", "megabytes", "row_ns", "stream_us"),
    [
        ("gpt-oss-120b", 49.8, 77.5, 14.9),
        ("DeepSeek-V3", 44.0, 94.6, 13.1),
        ("Kimi-K2", 44.0, 94.6, 13.1),
        ("Qwen3-235B", 18.9, 40.5, 5.6),
    ],
)
def test_the_shapes_have_the_constants_that_papers_give(name, megabytes, row_ns, stream_us) -> None:
    shape = SHAPES[name]
    assert shape.expert_bytes / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert shape.rates.row_ps / 1e3 == row_ns
    assert shape.rates.expert_ps / 1e6 == pytest.approx(stream_us, abs=0.05)
    assert shape.rates.wire_ps < shape.rates.row_ps


def test_the_grid_is_the_whole_product_but_for_impossible_cells() -> None:
    cells = grid(list(SHAPES.values()))
    per_place = len(LAYOUTS) * len(TOKENS)
    assert len(cells) == len(set(cells)) == per_place * (len(LOADS) + 3 * (len(LOADS) - 2))
    left_out = {(shape, load.name) for shape in SHAPES for load in LOADS} - {(c.shape.name, c.load.name) for c in cells}
    assert left_out == {
        (shape, load) for shape in ("DeepSeek-V3", "Kimi-K2", "Qwen3-235B") for load in ("80 % in 4", "95 % in 4")
    }


def test_a_trace_brings_its_own_experts() -> None:
    trace = Trace("rec", np.arange(90).reshape(15, 1, 6) % 12, None, 12, 6)
    cells = grid([SHAPES["Kimi-K2"]], tokens=(128,), loads=(), traces=(trace,))
    assert [(c.layout.ranks, c.shape.experts, c.shape.top_k) for c in cells] == [(8, 12, 6)]  # 32 ranks are too many
    assert cells[0].shape.expert_bytes == SHAPES["Kimi-K2"].expert_bytes
    for step in steps(cells[0], 0):
        assert (step.rows_PE.sum(1) == 128 * 6).all()
        assert not step.carry


def test_steps_repeat_and_do_not_depend_on_nodes() -> None:
    for load in ("balanced", "50 % in 4", "Zipf", "drifting Zipf"):
        one = Cell(SHAPES["gpt-oss-120b"], Layout(32, 1), 128, LOAD[load])
        several = dataclasses.replace(one, layout=Layout(32, 4))
        for a, b, c in zip(steps(one, 0), steps(one, 0), steps(several, 0), strict=True):
            assert (a.rows_PE == b.rows_PE).all() and (a.rows_PE == c.rows_PE).all()
            assert (a.earlier_E == b.earlier_E).all()
    first, other = (next(steps(one, seed)).rows_PE for seed in (0, 1))
    assert (first != other).any()


def test_a_drifting_load_moves_on_by_a_few_experts() -> None:
    cell = Cell(SHAPES["gpt-oss-120b"], Layout(8, 1), 1024, LOAD["drifting Zipf"])
    sequence = list(steps(cell, 0))
    assert [step.carry for step in sequence] == [False, True, True, True]
    hottest = [int(step.rows_PE.sum(0).argmax()) for step in sequence]
    assert len(set(hottest)) == 4  # each step has another one
    for before, after in pairwise(sequence):
        loads, then = after.rows_PE.sum(0), before.rows_PE.sum(0)
        assert loads[then.argmax()] == np.sort(loads)[-3]  # the hottest is overtaken by two


def test_the_earlier_batch_has_the_same_habits() -> None:
    cell = Cell(SHAPES["gpt-oss-120b"], Layout(8, 1), 4096, LOAD["Zipf"])
    (step,) = steps(cell, 0)
    now_E = step.rows_PE.sum(0)
    assert (now_E != step.earlier_E).any()
    assert np.corrcoef(now_E, step.earlier_E)[0, 1] > 0.99


@pytest.mark.parametrize("layout", [Layout(8, 1), Layout(32, 4), Layout(64, 8)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_placements(shape: Shape, layout: Layout) -> None:
    cell = Cell(shape, layout, 128, LOAD["Zipf"])
    (step,) = steps(cell, 0)
    own = shape.experts // layout.ranks
    holds_PE, home_E = placed(cell, "linear", step.earlier_E)
    assert (holds_PE.sum(1) == own).all() and (home_E == np.arange(shape.experts) // own).all()
    holds_PE, home_E = placed(cell, "eplb", step.earlier_E)
    assert holds_PE.sum() > shape.experts and holds_PE.sum(1).max() <= own + max(1, own // 8)
    task = problem(cell, step.rows_PE, holds_PE, home_E, np.zeros(layout.ranks, dtype=np.int64))
    assert np.bincount(task.node_P).tolist() == [layout.ranks // layout.nodes] * layout.nodes
    assert (task.room_P == guest_slots(cell) * shape.expert_bytes).all()


# A cell by hand


def test_a_cell_by_hand() -> None:
    """Two ranks, 100 tokens each, top-2 of 4 experts: 200 rows for expert 0, as many as distinct experts allow."""
    cell = Cell(TOY, TWO, 100, Load("all to one", 1, 50))
    rows = simulate(cell, {"native": native, "eplb": eplb.plan, "llep": half, "priced": half})
    by_name = {(row.placement, row.planner): row for row in rows}
    rates = TOY.rates
    assert (TOY.expert_bytes, rates.expert_ps, rates.wire_ps) == (600_000, 179_104, 8_889)
    # Native: rank 0 has experts 0 and 1, 200 and 67 rows (the other 200 dealt to three) of 100 ns.
    (step,) = steps(cell, 0)
    loads = step.rows_PE.sum(0).tolist()
    assert loads[0] == 200 and sorted(loads[1:]) == [66, 67, 67]
    plain = by_name["linear", "native"]
    assert plain.ns == 5_000 + 100 * (200 + loads[1]) and plain.vs_plain == 1.0
    # Half of expert 0 to rank 1, which has 133 rows or so of its own, longer than the transfer takes.
    moved = by_name["linear", "priced"]
    own = 100 * (loads[2] + loads[3])
    assert own > rates.near_alpha_ns + 600_000 * rates.near_fs_per_byte // 10**6
    assert moved.ns == 5_000 + own + 100 * 100 + rates.guest_ns
    assert (moved.moved_bytes, moved.transfers, moved.fits) == (600_000, 1, True)
    assert moved.vs_plain == pytest.approx(plain.ns / moved.ns)
    assert moved.max_over_mean == pytest.approx((loads[2] + loads[3] + 100) / 200)
    assert moved.ideal_ns == 5_000 + 400 * 100 // 2
    assert moved.bound_ns <= moved.ns and moved.bound_share == moved.bound_ns / moved.ns
    assert "eplb" not in {planner for placement, planner in by_name if placement == "linear"}
    # EPLB has a copy of expert 0 on both ranks; nothing needs to move.
    assert by_name["eplb", "eplb"].transfers == 0 and by_name["eplb", "eplb"].ns < plain.ns
    assert by_name["eplb", "priced"].moved_bytes == 0


def test_guests_stay_from_step_to_step() -> None:
    seen: list[int] = []

    def watched(task: Problem) -> Plan:
        seen.append(int(task.holds_PE.sum()))
        assert (task.room_P[task.holds_PE.sum(1) == 2] == guest_slots(cell) * TOY.expert_bytes).all()
        return half(task)

    cell = Cell(TOY, TWO, 100, Load("drifting", zipf=1.2, drift=1))
    rows = simulate(cell, {"native": native, "eplb": eplb.plan, "llep": native, "priced": watched})
    assert seen[:4] == [4, 5, 5, 5]
    moved = next(row for row in rows if row.planner == "priced" and row.placement == "linear")
    assert moved.transfers == 0.25 and moved.moved_bytes == TOY.expert_bytes // 4
    # With guests, planners that only split have something to do on one copy each too.
    assert any(row.planner == "eplb" and row.placement == "linear" for row in rows)


def test_only_guests_with_rows_stay_in_half_of_the_room() -> None:
    cell = Cell(dataclasses.replace(TOY, experts=8), TWO, 8, LOAD["balanced"])  # room for 6
    (step,) = steps(cell, 0)
    holds_PE, home_E = placed(cell, "linear", step.earlier_E)
    task = problem(cell, step.rows_PE, holds_PE, home_E, np.zeros(2, dtype=np.int64))
    rows_EP = native(task).rows_EP.copy()
    for e, rows in ((0, 1), (1, 3), (2, 2), (3, 2)):
        rows_EP[e] -= [rows, -rows]
    plan = Plan("toy", rows_EP, np.zeros(8, dtype=np.int64), tuple(Transfer(e, 0, 1) for e in range(4)))
    none_PE = np.zeros((2, 8), dtype=np.int64)
    kept_PE = kept_guests(cell, task, plan, none_PE)
    assert np.argwhere(kept_PE).tolist() == [[1, 1], [1, 2], [1, 3]]
    assert not kept_guests(cell, task, native(task), kept_PE).any()


def test_rows_of_slices_count_as_the_work_they_are() -> None:
    rows_EP = np.array([[0, 0, 0], [0, 4, 0], [0, 0, 4]])
    plan = Plan("toy", rows_EP, np.array([8, 0, 0]), (Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 2, 1, 2)))
    assert max_over_mean(plan) == 8 / (16 / 3)


def test_a_plan_that_loses_rows_is_named() -> None:
    def loses(task: Problem) -> Plan:
        plan = native(task)
        return dataclasses.replace(plan, rows_EP=plan.rows_EP * 0)

    cell = Cell(TOY, TWO, 100, LOAD["balanced"])
    with pytest.raises(BadPlan, match="toy, 2 ranks, 1 node, 100 tokens, balanced, linear, priced: expert 0 has"):
        simulate(cell, {"native": native, "priced": loses})


def test_the_ideal_is_streaming_for_few_tokens() -> None:
    cell = Cell(SHAPES["gpt-oss-120b"], Layout(8, 1), 128, LOAD["balanced"])
    (step,) = steps(cell, 0)
    holds_PE, home_E = placed(cell, "linear", step.earlier_E)
    task = problem(cell, step.rows_PE, holds_PE, home_E, np.zeros(8, dtype=np.int64))
    assert ideal_ns(task) == pytest.approx(5_000 + 16 * 14_857, rel=1e-3)


# What came of it


def row(planner: str, ns: int, **changes) -> Row:
    base = Row(
        shape="a", experts=8, ranks=8, nodes=1, tokens=32768, load="balanced", placement="linear", planner=planner,
        ns=ns, vs_plain=1000 / ns, bound_ns=450, bound_share=450 / ns, ideal_ns=400, moved_bytes=0, transfers=0,
        max_over_mean=1.0, fits=True,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


ROWS = [
    row("native", 1000),
    row("llep", 480),
    row("priced", 500),
    row("native", 1100, placement="eplb"),
    row("llep", 900, placement="eplb"),
    row("tempo", 1005, placement="eplb"),
    row("priced", 1005, placement="eplb"),
    row("native", 1000, tokens=128, load="b", nodes=2),
    row("llep", 2000, tokens=128, load="b", nodes=2, fits=False),
    row("priced", 1000, tokens=128, load="b", nodes=2, ideal_ns=100),
]


def test_figures_are_the_worst_of_each_kind() -> None:
    entry = published.TABLE[0]
    entries = [(entry, published.Modelled(on_the_grid=9.0, as_run=entry.speedup * 0.9))]
    found = balance_report.figures(ROWS, entries)
    assert found == {
        "cells": 2,
        "worst_vs_best_baseline": 1005 / 900,
        "worst_vs_native": 1.0,
        "worst_vs_plain_eplb": 1000 / 1005,
        "worst_vs_llep": 900 / 1005,
        "bound_share_min": 450 / 1005,
        "speedup_mean": pytest.approx(2**0.5),
        "ideal_share_32k_min": 400 / 1005,
        "published_error": pytest.approx(0.1),
    }


def test_the_best_rival_is_the_first_of_equal_ones() -> None:
    rows = [row("native", 10), row("llep", 10), row("priced", 5)]
    assert [rival.planner for rival in balance_report.best_rivals(rows).values()] == ["native"]


def test_the_summary_and_the_worst_cells() -> None:
    text = balance_report.summary(ROWS)
    assert text.splitlines()[0] == "2 cells"
    assert re.search(r"linear  llep +1.02 +0.50 +2.1 +22% +0 +1$", text, re.MULTILINE)
    worst = balance_report.worst_cells(ROWS).splitlines()
    assert re.match(
        r"best rival's time / priced's +0.896 .*a, 8 ranks, 1 node, 32K tokens, balanced +eplb +llep", worst[2]
    )


def test_the_csv_has_a_line_for_each_row(tmp_path: Path) -> None:
    balance_report.write_csv(tmp_path / "t.csv", ROWS)
    with (tmp_path / "t.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(ROWS)
    assert lines[8] == {
        "shape": "a", "experts": "8", "ranks": "8", "nodes": "2", "tokens": "128", "load": "b", "placement": "linear",
        "planner": "llep", "ns": "2000", "vs_plain": "0.5000", "bound_ns": "450", "bound_share": "0.2250",
        "ideal_ns": "400", "moved_bytes": "0", "transfers": "0", "max_over_mean": "1.0000", "fits": "0",
    }  # fmt: skip


# The picture


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_shows_each_cell_of_both_sections() -> None:
    found = texts(balance_report.picture(ROWS))
    assert found[0] == "Plain expert parallelism / priced"
    second = found.index("Best other planner / priced")
    for line in ("8 ranks, 1 node", "8 ranks, 2 nodes", "128", "32K", "b", "balanced"):
        assert line in found[:second] and line in found[second:]
    assert {"2.00", "1.00"} <= set(found[:second])
    assert {"0.90", "1.00"} <= set(found[second:])  # the worse of 480 / 500 and 900 / 1005


def test_a_heat_map_leaves_missing_cells_empty_and_escapes() -> None:
    section = Section("s < t", "n", ["r"], ["c", "d"], [Line("l", [Panel("p & q", {("r", "c"): 16.0})])], 4.0)
    svg = heat_map("t", [section])
    assert {"s < t", "p & q", "16.0"} <= set(texts(svg))
    assert len(re.findall("<rect", svg)) == 3  # the page, a line of cells, the one that is not 1
    assert "#{:02x}{:02x}{:02x}".format(*MORE) in svg


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_not_a_ratio_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="is not a ratio"):
        heat_map("t", [Section("s", "n", ["r"], ["c"], [Line("l", [Panel("p", {("r", "c"): value})])])])


def test_colours_deepen_with_the_logarithm() -> None:
    assert colour(1.0, 8) == colour(0.995, 8) == EVEN
    assert colour(8, 8) == colour(100, 8) == MORE and colour(1 / 8, 8) == LESS
    reds = [colour(ratio, 8)[0] for ratio in (1.0, 1.02, 1.5, 3, 8)]
    assert reds == sorted(reds, reverse=True) and len(set(reds)) == 5


@pytest.mark.parametrize(("ratio", "text"), [(1, "1.00"), (9.99, "9.99"), (9.996, "10.0"), (99.96, "100")])
def test_numbers_fit_into_cells(ratio: float, text: str) -> None:
    assert number(ratio) == text


# What was published


def test_the_published_speedups_are_reproduced_within_15_percent() -> None:
    for entry in published.TABLE:
        model = published.modelled(entry)
        assert model.as_run == pytest.approx(entry.speedup, rel=0.15), entry
        assert model.on_the_grid > model.as_run


def test_published_entries_are_possible_with_distinct_experts() -> None:
    for entry in published.TABLE:
        assert list(steps(Cell(entry.shape, Layout(8, 1), entry.tokens, Load("", entry.hot, entry.percent)), 0))


# The command


# The priced planner's compiled code has tests of its own; another stands in for it.
PLANNERS = {**BASELINES, "priced": resplit.plan}


def test_the_planners_are_all_published_ones_and_ours() -> None:
    assert list(balance.planners()) == [*BASELINES, "priced"]


@pytest.fixture
def toy_grid(monkeypatch) -> None:
    monkeypatch.setattr(balance, "planners", lambda: PLANNERS)
    monkeypatch.setitem(balance.SHAPES, "toy", dataclasses.replace(TOY, experts=16))
    monkeypatch.setattr(balance, "QUICK_SHAPES", ("toy",))
    monkeypatch.setattr(balance, "QUICK_LAYOUTS", (TWO, Layout(4, 2)))
    monkeypatch.setattr(balance, "QUICK_TOKENS", (64, 512))
    monkeypatch.setattr(balance, "QUICK_LOADS", ("balanced", "50 % in 4", "drifting Zipf"))


def test_the_command(toy_grid, tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "rec.npz", topk=np.arange(300).reshape(50, 2, 3) % 7)
    argv = ["bench", "balance", "--simulate", "--quick", "--jobs", "1", "--trace", str(tmp_path / "rec.npz")]
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "picture", "json")}
    assert main([*argv, *(part for name, path in files.items() for part in (f"--{name}", str(path)))]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["bench"] == "balance" and report["figures"]["cells"] == 2 * 2 * 4
    assert report["figures"]["worst_vs_native"] >= 1 and "ideal_share_32k_min" not in report["figures"]
    assert "LLEP over EP" in out and "linear  priced" in out
    samples = json.loads(files["json"].read_text())["samples"]
    assert {r["load"] for r in samples["rows"]} == {"balanced", "50 % in 4", "drifting Zipf", "rec"}
    assert len(files["csv"].read_text().splitlines()) == len(samples["rows"]) + 1
    assert "rec" in texts(files["picture"].read_text())


def test_processes_give_the_same_rows() -> None:
    cells = [Cell(TOY, TWO, 64, LOAD[load]) for load in ("balanced", "Zipf")]
    assert list(balance.simulated(cells, PLANNERS, 3, 2)) == list(balance.simulated(cells, PLANNERS, 3, 1))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "give --simulate"),
        (["--simulate", "--shapes", "Mixtral"], "--shapes is 'Mixtral'"),
        (["--simulate", "--shapes", "Kimi-K2,Kimi-K2"], "give different ones"),
        (["--simulate", "--jobs", "0"], "--jobs is 0"),
        (["--simulate", "--seed", "-1"], "--seed is -1"),
        (["--simulate", "--csv", "nowhere/x.csv"], "directory does not exist"),
        (["--simulate", "--trace", "missing.npz"], "--trace missing.npz"),
    ],
)
def test_what_cannot_work_is_refused(argv: list[str], says: str, capsys) -> None:
    assert main(["bench", "balance", *argv]) == 2
    assert says in capsys.readouterr().err
