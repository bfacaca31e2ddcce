"""What `moeyard bench balance --simulate` makes of its rows: figures, tables, CSV and picture."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import published
from .balance_grid import LOADS, Layout, Row
from .heat_map import Line, Panel, Section, heat_map
from .report import table

WORST = 5
"""Cells that are shown of each kind."""


def figures(
    rows: Sequence[Row], entries: Sequence[tuple[published.Published, published.Modelled]] = ()
) -> dict[str, float]:
    """The worst of each kind over all cells and both placements.

    `worst_vs_best_baseline`: priced by the best other planner, the largest. `worst_vs_native`, `worst_vs_llep`: the
    native plan's and LLEP's time on the same placement by priced's, the smallest; `worst_vs_plain_eplb`: the same of
    native with one copy of each expert and priced on EPLB's placement, which can be the worse one to start from.
    `bound_share_min`: bound by priced. `ideal_share_32k_min`: evenly spread work by priced, from 32K tokens per rank
    on one node. `speedup_mean`: geometric, of priced over plain expert parallelism with one copy of each expert.
    `published_error`: how far the model of the authors' program is from the published LLEP column.
    """
    priced = [row for row in rows if row.planner == "priced"]
    best = best_rivals(rows)

    def worst_against(planner: str) -> float:
        times = {(row.cell, row.placement): row.ns for row in rows if row.planner == planner}
        return min(times[row.cell, row.placement] / row.ns for row in priced)

    found: dict[str, float] = {
        "cells": len({row.cell for row in rows}),
        "worst_vs_best_baseline": max(row.ns / best[row.cell, row.placement].ns for row in priced),
        "worst_vs_native": worst_against("native"),
        "worst_vs_plain_eplb": min(row.vs_plain for row in priced if row.placement == "eplb"),
        "worst_vs_llep": worst_against("llep"),
        "bound_share_min": min(row.bound_share for row in priced),
        "speedup_mean": statistics.geometric_mean([row.vs_plain for row in priced if row.placement == "linear"]),
    }
    large = [row.ideal_ns / row.ns for row in priced if row.tokens >= 32768 and row.nodes == 1]
    if large:
        found["ideal_share_32k_min"] = min(large)
    if entries:
        found["published_error"] = max(abs(model.as_run / entry.speedup - 1) for entry, model in entries)
    return found


def best_rivals(rows: Iterable[Row]) -> dict[tuple[Any, str], Row]:
    """The fastest planner but ours of each (cell, placement), the first of equal ones."""
    best: dict[tuple[Any, str], Row] = {}
    for row in rows:
        key = row.cell, row.placement
        if row.planner != "priced" and (key not in best or row.ns < best[key].ns):
            best[key] = row
    return best


def summary(rows: Sequence[Row]) -> str:
    """A line for each planner and placement: its speed-up over plain expert parallelism."""
    lines = []
    for placement in dict.fromkeys(row.placement for row in rows):
        for name in dict.fromkeys(row.planner for row in rows if row.placement == placement):
            own = [row for row in rows if row.planner == name and row.placement == placement]
            speed = [row.vs_plain for row in own]
            lines.append(
                [
                    f"{placement:<6}  {name}",
                    f"{statistics.geometric_mean(speed):.2f}",
                    f"{min(speed):.2f}",
                    f"{max(speed):.1f}",
                    f"{min(row.bound_share for row in own):.0%}",
                    f"{statistics.mean(row.moved_bytes for row in own) / 1e6:.0f}",
                    str(sum(not row.fits for row in own)),
                ]
            )
    header = ["speed-up over plain EP", "mean", "least", "most", "bound/time", "MB moved", "over room"]
    return f"{len({row.cell for row in rows})} cells\n" + table(header, lines)


def worst_cells(rows: Sequence[Row]) -> str:
    """The cells where priced does worst: by the best rival, by the bound, by doing nothing."""
    best = best_rivals(rows)
    kinds: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("best rival's time / priced's", lambda row: best[row.cell, row.placement].ns / row.ns),
        ("bound / priced", lambda row: row.bound_share),
        ("plain EP / priced", lambda row: row.vs_plain),
    )
    lines = []
    for title, value in kinds:
        for row in sorted((row for row in rows if row.planner == "priced"), key=value)[:WORST]:
            rival = best[row.cell, row.placement].planner
            where = f"{row.shape}, {Layout(row.ranks, row.nodes)}, {_count(row.tokens)} tokens, {row.load}"
            lines.append([title, f"{value(row):.3f}", where, row.placement, rival])
    return table(["worst cells", "ratio", "cell", "placement", "best rival"], lines)


def published_table(entries: Sequence[tuple[published.Published, published.Modelled]]) -> str:
    lines = [
        [
            entry.shape.name,
            str(entry.tokens),
            f"{entry.percent} % in {entry.hot}",
            f"{entry.speedup:.2f}",
            f"{model.as_run:.2f}",
            f"{model.as_run / entry.speedup - 1:+.0%}",
            f"{model.on_the_grid:.2f}",
        ]
        for entry, model in entries
    ]
    header = ["LLEP over EP, 8 GPUs", "tokens", "load", "published", "modelled", "off by", "on the grid's machine"]
    return table(header, lines)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row) | {"fits": int(row.fits)}
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in values.items()})


def picture(rows: Sequence[Row]) -> str:
    """The heat map: priced against plain expert parallelism, and against the best other planner of each cell."""
    best = best_rivals(rows)
    plain: dict[Any, float] = {}
    rival: dict[Any, float] = {}
    for row in rows:
        if row.planner == "priced":
            if row.placement == "linear":
                plain[row.cell] = row.vs_plain
            ratio = best[row.cell, row.placement].ns / row.ns
            rival[row.cell] = min(ratio, rival.get(row.cell, ratio))
    title = "How much faster the priced planner is, by the cost model"
    return heat_map(
        title,
        [
            _section(
                "Plain expert parallelism / priced",
                "Time of one MoE layer; one copy of each expert; columns: tokens per rank",
                plain,
                8.0,
            ),
            _section(
                "Best other planner / priced",
                "The best of all published planners in each cell; the worse of two placements",
                rival,
                2.0,
            ),
        ],
    )


def _section(title: str, note: str, values: Mapping[Any, float], top: float) -> Section:
    """A line of panels for each number of ranks, a panel for each shape."""
    shapes = list(dict.fromkeys(shape for shape, *_ in values))
    layouts = sorted({Layout(ranks, nodes) for _, ranks, nodes, _, _ in values})
    tokens = sorted({count for _, _, _, count, _ in values})
    loads = {load: None for *_, load in values}
    lines = [
        Line(
            str(layout),
            [
                Panel(
                    shape,
                    {
                        (load, _count(count)): value
                        for (name, ranks, nodes, count, load), value in values.items()
                        if (name, ranks, nodes) == (shape, layout.ranks, layout.nodes)
                    },
                )
                for shape in shapes
            ],
        )
        for layout in layouts
    ]
    order = [load.name for load in LOADS if load.name in loads]
    return Section(
        title, note, [*order, *(load for load in loads if load not in order)], [*map(_count, tokens)], lines, top
    )


def _count(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
