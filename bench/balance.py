"""`moeyard bench balance`: planners against plain expert parallelism.

`--simulate`: every planner in a grid of shapes, machines and loads, by the cost model. The table goes to `--csv`, a
picture of it to `--picture`; the terminal gets a summary and the worst cells. `--ranks N`: layers over real processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..kernels.environment import usable_cores
from ..scheduler.balance.baselines import Planner
from . import balance_ranks, published
from .balance_bound import AVAILABLE
from .balance_grid import LOADS, Cell, Layout, Row, grid, simulate
from .balance_report import figures, picture, published_table, summary, worst_cells, write_csv
from .moe_shapes import SHAPES
from .report import emit
from .routing import Trace, read_trace
from .shapes import SHAPE_OPTIONS, add_shape_options, resolve_model

QUICK_SHAPES = ("gpt-oss-120b", "DeepSeek-V3")
QUICK_LAYOUTS = (Layout(8, 1), Layout(32, 4))
QUICK_TOKENS = (128, 4096, 32768)
QUICK_LOADS = ("balanced", "30 % in 16", "80 % in 16", "50 % in 4", "Zipf", "drifting Zipf")


GRID_OPTIONS = ("shapes", "trace", "quick", "seed", "jobs", "csv", "picture")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint directory for --ranks (default: made here)"
    )
    parser.add_argument("--simulate", action="store_true", help="the grid of shapes, machines and loads, by the model")
    parser.add_argument(
        "--shapes", metavar="NAME,NAME", help=f"of the grid (default: all of {', '.join(SHAPES)}; --quick: two)"
    )
    parser.add_argument(
        "--trace", action="append", default=[], metavar="FILE", help="recorded routing, .npz; can be given repeatedly"
    )
    parser.add_argument("--quick", action="store_true", help="a part of the grid, in seconds")
    parser.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--csv", metavar="FILE", help="write a line for each cell, placement and planner here")
    parser.add_argument("--picture", metavar="FILE", help="write the heat map here, an SVG")
    parser.add_argument("--json", metavar="FILE", help="write figures and all rows here too")
    balance_ranks.add_arguments(parser)
    add_shape_options(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that cannot work."""
    if args.simulate == (args.ranks is not None):
        raise ValueError("give --simulate, for the grid by the model, or --ranks N, for layers over real processes")
    of_ranks = [*balance_ranks.DEFAULTS, "model", "workdir", *SHAPE_OPTIONS]
    for name in of_ranks if args.simulate else GRID_OPTIONS:
        if getattr(args, name, None):
            here, there = ("--simulate", "--ranks") if args.simulate else ("--ranks", "--simulate")
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            raise ValueError(f"{option} is of no use with {here}; leave it out, or give {there}")
    if args.simulate:
        return _simulate(args)
    return balance_ranks.run(args, Path(resolve_model(args)))


def planners() -> dict[str, Planner]:
    """All by name; ours is the last."""
    from ..scheduler.balance import priced
    from ..scheduler.balance.baselines import BASELINES

    return {**BASELINES, "priced": priced.plan}


# The grid


def _simulate(args: argparse.Namespace) -> int:
    seed = 0 if args.seed is None else args.seed
    jobs = usable_cores() if args.jobs is None else args.jobs
    for name, value, least in (("seed", seed, 0), ("jobs", jobs, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    for path in filter(None, (args.csv, args.picture)):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: its directory does not exist; make it, or give another")
    cells = chosen(args.shapes, args.quick, [read_trace(path) for path in args.trace])
    rows: list[Row] = []
    with tqdm(total=len(cells), unit="cell", disable=None, leave=False) as bar:
        for found in simulated(cells, planners(), seed, jobs):
            rows += found
            bar.update()
    if args.csv:
        _write(args.csv, lambda path: write_csv(path, rows))
    if args.picture:
        _write(args.picture, lambda path: path.write_text(picture(rows), encoding="utf-8"))
    entries = [(entry, published.modelled(entry)) for entry in published.TABLE]
    print(summary(rows))
    how = "linear programmes where the planner's own is far off" if AVAILABLE else "the planner's own: scipy is missing"
    print(f"\nbounds are by {how}\n")
    print(worst_cells(rows))
    print()
    print(published_table(entries))
    print()
    samples = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "published": [
            {"layer": e.shape.name, "tokens": e.tokens, "hot": e.hot, "percent": e.percent, "published": e.speedup}
            | dataclasses.asdict(m)
            for e, m in entries
        ],
    }
    emit("balance", figures(rows, entries), samples, args.json)
    return 0


def _write(path: str, write: Callable[[Path], Any]) -> None:
    try:
        write(Path(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a file that can be written") from error


def chosen(names: str | None, quick: bool, traces: Sequence[Trace]) -> list[Cell]:
    """The cells that the options ask for."""
    wanted = names.split(",") if names is not None else list(QUICK_SHAPES if quick else SHAPES)
    unknown = [name for name in wanted if name not in SHAPES]
    if unknown or len(set(wanted)) < len(wanted):
        raise ValueError(f"--shapes is {names!r}; give different ones of {', '.join(SHAPES)}")
    shapes = [SHAPES[name] for name in wanted]
    if not quick:
        return grid(shapes, traces=traces)
    return grid(shapes, QUICK_LAYOUTS, QUICK_TOKENS, [load for load in LOADS if load.name in QUICK_LOADS], traces)


def simulated(cells: Sequence[Cell], known: Mapping[str, Planner], seed: int, jobs: int) -> Iterator[list[Row]]:
    """The rows of each cell, in order, made by `jobs` processes. Several need planners that can be pickled."""
    if jobs == 1:
        for cell in cells:
            yield simulate(cell, known, seed)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the libraries' locks and threads
    with ProcessPoolExecutor(jobs, context, initializer=_enter, initargs=(cells, known, seed)) as pool:
        try:
            yield from pool.map(_cell, range(len(cells)), chunksize=4)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_given: tuple[Sequence[Cell], Mapping[str, Planner], int]


def _enter(cells: Sequence[Cell], known: Mapping[str, Planner], seed: int) -> None:
    """What a process of the pool needs for all cells, sent once: traces are large."""
    global _given
    _given = cells, known, seed


def _cell(index: int) -> list[Row]:
    cells, known, seed = _given
    return simulate(cells[index], known, seed)
