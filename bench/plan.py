"""`moeyard bench plan`: how long the priced planner takes for a layer, on one core.

From a problem's arrays to a finished plan, Python's part included, at four sizes and for loads from even to extreme.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from tqdm import tqdm

from ..scheduler.balance import priced
from ..scheduler.balance.problem import Problem
from ..scheduler.placement import linear
from .moe_shapes import SHAPES
from .report import emit, spread, table
from .routing import dealt, drawn, zipf_weights

SIZES = {
    "64x8": (64, 8, 1, "gpt-oss-120b"),
    "128x8": (128, 8, 1, "gpt-oss-120b"),
    "256x32": (256, 32, 4, "DeepSeek-V3"),
    "384x64": (384, 64, 8, "Kimi-K2"),
}
"""Experts, ranks, nodes, and the shape whose expert it is."""
TOKENS = (512, 4096, 16384)
"""Per rank."""
HOT = ((16, 15), (16, 30), (16, 80), (4, 30))
"""Hot experts, and the percent of the copies that they get."""
SKEWS = (0.5, 0.8, 1.2)
"""Exponents of Zipf's law; with the hot experts and even loads they are the mix."""
REPEATS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, metavar="N", help=f"plans for each load (default: {REPEATS})"
    )
    parser.add_argument("--json", metavar="FILE", help="write figures and samples here too")


def run(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; it must be at least 1")
    samples: dict[str, dict[str, list[float]]] = {}
    bar = tqdm(total=len(SIZES) * len(TOKENS) * (1 + len(HOT) + len(SKEWS)), unit="load", disable=None, leave=False)
    with bar:
        for size, (experts, ranks, nodes, shape) in SIZES.items():
            samples[size] = {}
            for name, problem in problems(experts, ranks, nodes, shape).items():
                samples[size][name] = measured_us(problem, args.repeats)
                bar.update()
    medians = {size: spread([us for of_load in loads.values() for us in of_load]) for size, loads in samples.items()}
    slowest = {size: max(spread(of_load).median for of_load in loads.values()) for size, loads in samples.items()}
    rows = [
        [size.replace("x", " experts, ") + " ranks", f"{all_.median:.0f}", f"{slowest[size]:.0f}"]
        for size, all_ in medians.items()
    ]
    print(table(["microseconds per plan", "median", "slowest load"], rows))
    figures = {f"plan_us_{size}": all_.median for size, all_ in medians.items()}
    figures |= {f"slowest_load_us_{size}": us for size, us in slowest.items()}
    emit("plan", figures, samples, args.json)
    return 0


def problems(experts: int, ranks: int, nodes: int, shape_name: str) -> dict[str, Problem]:
    """One layer's problem for each load of the mix; one copy of each expert, and room for as many guests and two."""
    shape = SHAPES[shape_name]
    holds_PE = np.zeros((ranks, experts), dtype=np.int64)
    for p, slots in enumerate(np.array(linear(experts, ranks).slots_PS)):
        holds_PE[p, slots[slots >= 0]] = 1
    rng = np.random.default_rng(0)
    rows = {}
    for tokens in TOKENS:
        rows[f"{tokens} tokens, even"] = dealt(ranks, tokens, experts, shape.top_k)
        for hot, percent in HOT:
            rows[f"{tokens} tokens, {percent} % in {hot}"] = dealt(ranks, tokens, experts, shape.top_k, hot, percent)
        for skew in SKEWS:
            weights_E = zipf_weights(experts, skew, rng.permutation(experts))
            rows[f"{tokens} tokens, Zipf {skew}"] = drawn(weights_E, ranks, tokens, shape.top_k, rng)
    return {
        name: Problem(
            rows_PE=rows_PE,
            holds_PE=holds_PE,
            home_E=holds_PE.argmax(0),
            node_P=np.arange(ranks) * nodes // ranks,
            expert_bytes=shape.expert_bytes,
            room_P=np.full(ranks, (-(-experts // ranks) + 2) * shape.expert_bytes),
            most_rows_P=np.full(ranks, int(rows_PE.sum())),
            rates=shape.rates,
        )
        for name, rows_PE in rows.items()
    }


def measured_us(problem: Problem, repeats: int) -> list[float]:
    """The first plan, which may compile, is not counted."""
    priced.plan(problem)
    samples = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        priced.plan(problem)
        samples.append((time.perf_counter_ns() - start) / 1000)
    return samples
