"""`moeyard bench kernels`: one MoE layer's experts in turns with every other implementation that is installed here.

On the shapes of known models, for one token to thousands: milliseconds, the share of what the machine's memory and
arithmetic allow, and the ratio to the others. Weights are rotated past the caches, the routing is random.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, cast

from . import report
from .engines import LOAD_TIMEOUT_S, measure_peaks
from .kernel_shapes import SHAPES, LayerShape, part_that_fits
from .kernel_sides import OURS, THEIRS, TORCH
from .turns import Side, child_environment

TOKENS = tuple(2**i for i in range(14))
QUICK = {"tokens": "1,16,256", "dtypes": "bfloat16", "shapes": "bench,Qwen3-30B-A3B,OLMoE", "threads": "1"}
DECODE_SHAPE = "Qwen3-30B-A3B"
"""Whose shares of the roofline are the figures on a GPU."""
ROTATED_BYTES = 2**30
"""Of a layer's copies together, so that no cache has what is needed next."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", metavar="NAMES", help=f"some of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--tokens", metavar="N,N", help="(default: the powers of two from 1 to 8192)")
    parser.add_argument("--dtypes", metavar="NAMES", help="(default: float32,bfloat16; on a GPU bfloat16)")
    parser.add_argument("--threads", metavar="N,N", help="CPU threads (default: 1 and 2, if there are two cores)")
    parser.add_argument("--quick", action="store_true", help="few cells: " + ", ".join(map(" ".join, QUICK.items())))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each side per cell (default: 7)")
    parser.add_argument(
        "--memory", metavar="SIZE", help="for one layer's weights; else a part of it (default: a third of what is free)"
    )
    parser.add_argument(
        "--cell-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="cells in which one call takes longer at the matrix rate are left out, and said so (default: 20)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and routing (default: 0)")
    parser.add_argument("--matrix", type=int, default=2048, help="side of the roofline's matrices (default: 2048)")
    parser.add_argument("--read-mib", type=int, default=1024, help="buffer of the roofline's reads (default: 1024)")
    parser.add_argument("--json", metavar="FILE", help="write figures and raw samples here too")


@dataclass(kw_only=True)
class Cell:
    """One layer, type, number of threads and of tokens; `seconds` per call of each side."""

    shape: LayerShape
    dtype: str
    threads: int
    tokens: int
    bound_s: float = 0.0
    bound_by: str = ""
    seconds: dict[str, list[float]]
    skipped: dict[str, str]
    experts: float

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    @property
    def share(self) -> float:
        """Of the roofline."""
        return self.bound_s / self.median(OURS)

    def ratio(self, sides: tuple[str, ...]) -> float:
        """How many times as long as ours the fastest of these takes; 0.0 where none of them ran."""
        return min((self.median(name) for name in sides if name in self.seconds), default=0.0) / self.median(OURS)

    def bound(self, flops_per_s: float, bytes_per_s: float) -> None:
        """Reading the weights of the experts that were touched, or the arithmetic of all rows."""
        itemsize = 4 if self.dtype == "float32" else 2
        memory = self.experts * self.shape.expert_params * itemsize / bytes_per_s
        matrix = 2 * self.tokens * self.shape.top_k * self.shape.expert_params / flops_per_s
        self.bound_s, self.bound_by = max((memory, "memory"), (matrix, "matrix"))


def run(args: argparse.Namespace) -> int:
    import psutil
    import torch
    from tqdm import tqdm

    from ..engine.config import parse_size
    from ..kernels.environment import ENVIRONMENT, usable_cores

    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda and torch finds no GPU; leave it out or choose cpu")
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; it must be at least 1")
    cores = usable_cores()
    tokens = _numbers("--tokens", args.tokens or ",".join(map(str, TOKENS)))
    default_threads = str(cores) if device == "cuda" else "1,2" if cores > 1 else "1"
    threads = _numbers("--threads", args.threads or default_threads)
    dtypes = _names("--dtypes", args.dtypes or ("bfloat16" if device == "cuda" else "float32,bfloat16"), _DTYPES)
    names = _names("--shapes", args.shapes or ",".join(SHAPES), SHAPES)
    memory = parse_size(args.memory, "--memory") if args.memory else _free(device) // 3
    cells: list[Cell] = []
    left_out: list[str] = []
    rates: dict[int, dict[str, float]] = {}
    limits: dict[str, Any] = {}
    with tqdm(total=len(tokens) * len(threads) * len(dtypes) * len(names), unit="cell", disable=None) as bar:
        for count in threads:
            machine = cast(Any, SimpleNamespace(device=device, threads=count, overlay=dict(ENVIRONMENT)))
            bar.set_description(f"{count} threads: the machine's rates")
            rates[count] = measure_peaks(machine, args)
            with ExitStack() as stack:
                environment = child_environment(count, ENVIRONMENT)
                side = stack.enter_context(Side("kernels", environment, module="kernel_sides"))
                side.call("start", what="compiling kernels", timeout=LOAD_TIMEOUT_S, device=device, threads=count)
                for dtype in dtypes:
                    for name in names:
                        shape = part_that_fits(SHAPES[name], 4 if dtype == "float32" else 2, memory)
                        bar.set_description(f"{shape.title}, {dtype}, {count} threads: making weights")
                        limits[f"{shape.title} {dtype} {count}"] = _make(side, shape, dtype, args.seed, memory)
                        for number in tokens:
                            bar.set_description(f"{shape.title}, {dtype}, {count} threads, {number} tokens")
                            flops = 2 * number * shape.top_k * shape.expert_params
                            if flops / rates[count][dtype] > args.cell_seconds:
                                left_out.append(f"{shape.title}, {dtype}, {count} threads, {number} tokens")
                            else:
                                gather_limit = min(2**31, psutil.virtual_memory().available // 4)
                                cells.append(_cell(side, shape, dtype, count, number, args.repeats, gather_limit))
                            bar.update()
            after = measure_peaks(machine, args)  # the rates are the best of the start and the end
            rates[count] = {key: max(rate, after[key]) for key, rate in rates[count].items()}
    for cell in cells:
        cell.bound(rates[cell.threads][cell.dtype], rates[cell.threads]["read"])
    print_cells(cells)
    _print_notes(cells, left_out, rates)
    samples = {
        "cells": [{**asdict(cell), "shape": asdict(cell.shape)} for cell in cells],
        "rows per expert": limits,
        "left_out": left_out,
        "rates": {str(count): of_threads for count, of_threads in rates.items()},
    }
    report.emit("kernels", figures_of(cells, "gpu" if device == "cuda" else "cpu"), samples, args.json)
    return 0


_DTYPES = {"float32": 4, "bfloat16": 2}


def _make(side: Side, shape: LayerShape, dtype: str, seed: int, memory: int) -> dict[str, Any]:
    nbytes = shape.params * _DTYPES[dtype] * (2 if shape.clamped else 1)
    copies = max(1, min(-(-ROTATED_BYTES // nbytes), memory // nbytes))
    return side.call(
        "layer",
        what=f"making {shape.title}",
        timeout=LOAD_TIMEOUT_S,
        shape=asdict(shape),
        dtype=dtype,
        copies=copies,
        seed=seed,
    )


def _cell(
    side: Side, shape: LayerShape, dtype: str, threads: int, tokens: int, repeats: int, gather_limit: int
) -> Cell:
    answer = side.call(
        "cell",
        what=f"{shape.title}, {dtype}, {tokens} tokens",
        timeout=LOAD_TIMEOUT_S,
        tokens=tokens,
        repeats=repeats,
        least_s=0.6,
        most_s=20.0,
        gather_limit=gather_limit,
    )
    return Cell(shape=shape, dtype=dtype, threads=threads, tokens=tokens, **answer)


def _free(device: str) -> int:
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ValueError(f"{option} is {text!r}; give different numbers from 1 on, for example 1,16,256")
    return numbers


def _names(option: str, text: str, known: Any) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names


def figures_of(cells: list[Cell], kind: str) -> dict[str, float]:
    """Ratios are means of their cells' (geometric ones), `_least` the least cell's; `worst_ratio` is the least of all
    cells against the best of all the others."""
    figures: dict[str, float] = {}

    def add(name: str, values: list[float]) -> None:
        if values := [value for value in values if value > 0]:
            figures[f"{kind}_{name}"] = math.exp(statistics.fmean(map(math.log, values)))
            figures[f"{kind}_{name}_least"] = min(values)

    ratios = [ratio for cell in cells if (ratio := cell.ratio((*THEIRS, TORCH))) > 0]
    if ratios:
        figures[f"{kind}_worst_ratio"] = min(ratios)
    for name, chosen in (
        ("1", [cell for cell in cells if cell.tokens == 1]),
        ("16", [cell for cell in cells if cell.tokens == 16]),
        ("256", [cell for cell in cells if cell.tokens >= 256]),
    ):
        add(f"ratio_{name}", [cell.ratio(THEIRS) for cell in chosen])
    if kind == "cpu":
        add("share_1", [cell.share for cell in cells if cell.tokens == 1])
    else:
        named = [cell for cell in cells if cell.shape.name == DECODE_SHAPE]
        add("share_decode", [cell.share for cell in named if cell.tokens <= 128])
        add("share_prefill", [cell.share for cell in named if cell.tokens == TOKENS[-1]])
    return figures


def print_cells(cells: list[Cell]) -> None:
    sides = (TORCH, *THEIRS)
    rows = []
    for cell in cells:
        row = [f"{cell.shape.title}, {cell.dtype}, {cell.threads} threads", str(cell.tokens)]
        row += [_ms(cell.median(OURS)), f"{_ms(cell.bound_s)} {cell.bound_by}", f"{cell.share:.0%}"]
        row += [_ms(cell.median(name)) if name in cell.seconds else "" for name in sides]
        row += [f"{ratio:.2f} x" if (ratio := cell.ratio(chosen)) else "" for chosen in (THEIRS, (*THEIRS, TORCH))]
        rows.append(row)
    header = ["ms per call, median", "tokens", OURS, "bound", "share", *sides, "best of transformers", "best of all"]
    print(report.table(header, rows))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _print_notes(cells: list[Cell], left_out: list[str], rates: dict[int, dict[str, float]]) -> None:
    print()
    for count, of_threads in rates.items():
        print(
            f"this machine, {count} threads: {of_threads['bfloat16'] / 1e9:.0f} GFLOP/s bf16,"
            f" {of_threads['float32'] / 1e9:.0f} f32, reads {of_threads['read'] / 1e9:.1f} GB/s"
        )
    for shape in {cell.shape.title: cell.shape for cell in cells}.values():
        if shape.ranks > 1:
            print(
                f"{shape.title}: {shape.experts} of {shape.experts * shape.ranks} experts, one of {shape.ranks} ranks'"
                " part, with the rows of the whole layer: all do not fit into --memory"
            )
    for name in (TORCH, *THEIRS):
        whys = [cell.skipped[name] for cell in cells if name in cell.skipped]
        if whys:
            print(f"{name} was not timed in {len(whys)} of {len(cells)} cells: {_examples(whys)}")
    for what in left_out:
        print(f"left out, longer than --cell-seconds: {what}")


def _examples(whys: list[str]) -> str:
    """One for each kind of reason: those that differ in numbers only are of a kind."""
    kinds = {re.sub(r"[\d.]+", "#", why): why for why in whys}
    return "; ".join(kinds.values())
