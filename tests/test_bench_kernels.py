"""`moeyard bench kernels`: shapes, figures by hand, and a run of the command on a tiny layer."""

from __future__ import annotations

import argparse
import json

import pytest

from moeyard.bench import kernel_shapes, kernels
from moeyard.bench.kernel_shapes import SHAPES, LayerShape, part_that_fits
from moeyard.bench.kernels import Cell

TINY = LayerShape(name="tiny", experts=8, top_k=2, hidden=32, width=16)
TINY_CLAMPED = LayerShape(name="tiny-clamped", experts=4, top_k=2, hidden=32, width=16, clamped=True)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(argv)


def cell(tokens: int, ours: float, bound: float = 1.0, **theirs: float) -> Cell:
    seconds = {"moeyard": [ours] * 3} | {name: [value] for name, value in theirs.items()}
    return Cell(
        shape=TINY, dtype="float32", threads=1, tokens=tokens, bound_s=bound, seconds=seconds, skipped={}, experts=2.0
    )


def test_a_part_that_fits_has_fewer_experts_and_as_many_rows() -> None:
    deepseek = SHAPES["DeepSeek-V3"]
    assert part_that_fits(deepseek, 2, deepseek.params * 2) == deepseek
    part = part_that_fits(deepseek, 2, deepseek.params * 2 // 7)
    assert (part.experts, part.ranks, part.top_k, part.title) == (32, 8, 8, "DeepSeek-V3 /8")
    oss = SHAPES["gpt-oss-120b"]  # twice in memory: transformers has its weights the other way round
    assert part_that_fits(oss, 2, oss.params * 2).ranks == 2
    with pytest.raises(ValueError, match="--memory"):
        part_that_fits(deepseek, 2, 10**6)


def test_figures_by_hand() -> None:
    cells = [
        cell(1, 2.0, bound=1.0, eager=8.0, grouped_mm=6.0, torch=3.0),  # 3 x transformers, 1.5 x torch
        cell(1, 1.0, bound=0.8, eager=12.0),
        cell(16, 1.0, eager=2.0),
        cell(256, 4.0, eager=4.0, batched_mm=9.0),
        cell(512, 1.0, eager=4.0),
        cell(4, 1.0, torch=0.9),
    ]
    figures = kernels.figures_of(cells, "cpu")
    assert figures == pytest.approx(
        {
            "cpu_worst_ratio": 0.9,
            "cpu_ratio_1": 6.0,  # the geometric mean of 3 and 12
            "cpu_ratio_1_least": 3.0,
            "cpu_ratio_16": 2.0,
            "cpu_ratio_16_least": 2.0,
            "cpu_ratio_256": 2.0,
            "cpu_ratio_256_least": 1.0,
            "cpu_share_1": (0.5 * 0.8) ** 0.5,
            "cpu_share_1_least": 0.5,
        }
    )
    ratios = {name.replace("cpu", "gpu") for name in figures if "share" not in name}
    ratios = {name.replace("cpu", "gpu") for name in figures if "share" not in name}
    assert set(kernels.figures_of(cells, "gpu")) == ratios


def test_the_bound_is_the_larger_of_reading_and_computing() -> None:
    one = cell(1, 1.0)
    one.bound(flops_per_s=1e9, bytes_per_s=1e6)
    assert (one.bound_by, one.bound_s) == ("memory", pytest.approx(2 * 3 * 32 * 16 * 4 / 1e6))
    one.bound(flops_per_s=1e3, bytes_per_s=1e6)
    assert (one.bound_by, one.bound_s) == ("matrix", pytest.approx(2 * 2 * 3 * 32 * 16 / 1e3))


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--tokens", "0"], "--tokens"),
        (["--shapes", "GPT-9"], "--shapes"),
        (["--dtypes", "int3"], "--dtypes"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_a_wrong_option_is_named(argv: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kernels.run(parse("--device", "cpu", *argv))


def test_the_sides_agree_and_every_one_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with both kinds of experts and types: a wrong result of any side would be an error."""
    from dataclasses import asdict

    from moeyard.bench.kernel_sides import KernelSides

    sides = KernelSides()
    sides._device = "cpu"
    for shape, dtype in ((TINY, "bfloat16"), (TINY, "float32"), (TINY_CLAMPED, "float32")):
        limits = sides.layer(asdict(shape), dtype, copies=2, seed=0)
        assert set(limits) == {"few_rows", "panel_rows"}
        for few, panels in ((16, 0), (0, 2**31), (0, 0)):  # each of our ways
            for copy in sides.copies:
                copy.layer.few_rows, copy.layer.panel_rows = few, panels
            answer = sides.cell(9, repeats=1, least_s=0.0, most_s=5.0, gather_limit=2**20)
            assert not answer["skipped"].keys() - {"batched_mm", "eager", "grouped_mm", "torch"}
            assert answer["seconds"]["moeyard"] and 2 <= answer["experts"] <= shape.experts
    assert "batched_mm" in sides.cell(9, repeats=1, least_s=0.0, most_s=5.0, gather_limit=10)["skipped"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    """Twice the memory for one part of two ranks: the table says so."""
    monkeypatch.setattr(kernels, "SHAPES", {"tiny": TINY})
    rates = {"bfloat16": 2e9, "float32": 1e9, "read": 1e9}
    monkeypatch.setattr(kernels, "measure_peaks", lambda machine, args: rates)
    file = tmp_path / "report.json"
    argv = ["--device", "cpu", "--tokens", "1,20", "--dtypes", "float32", "--threads", "1", "--repeats", "1"]
    argv += ["--memory", str(4 * TINY.expert_params * 4), "--json", str(file)]
    assert kernels.run(parse(*argv)) == 0
    text = capsys.readouterr().out
    figures = json.loads(text.strip().splitlines()[-1])["figures"]
    assert {"cpu_worst_ratio", "cpu_ratio_1", "cpu_share_1"} <= figures.keys()
    assert "tiny /2: 4 of 8 experts" in text
    assert len(json.loads(file.read_text())["samples"]["cells"]) == 2


def test_sides_that_were_not_timed_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell(n, 1.0, eager=2.0) for n in (1, 2, 4)]
    for one, why in zip(cells, ("7 times as slow", "12 times as slow", "would copy 3.1 GiB"), strict=True):
        one.skipped["batched_mm"] = why
    kernels._print_notes(cells, ["tiny, 4 tokens"], {})
    out = capsys.readouterr().out
    assert "batched_mm was not timed in 3 of 3 cells: 12 times as slow; would copy 3.1 GiB\n" in out
    assert "left out, longer than --cell-seconds: tiny, 4 tokens" in out


def test_every_shape_is_a_models() -> None:
    assert kernel_shapes.SHAPES["Qwen3-30B-A3B"].params == 128 * 3 * 2048 * 768
