"""The published speed-ups of least-loaded expert parallelism (LLEP, arXiv 2601.17111), and the cost model's.

They are of one layer's forward on 8 H200: the authors' program with LLEP against the authors' program without. The
grid's machine is better than that program, so each is modelled twice: with the grid's constants, and with what the
program adds: no overlap of rows' way with computing, a loop over experts, and a planner that reads counts one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..scheduler.balance import llep
from ..scheduler.balance.model import price
from ..scheduler.balance.plan import native
from ..scheduler.balance.problem import Rates
from .balance_grid import Cell, Layout, Load, placed, problem, steps
from .moe_shapes import NEAR, Shape

PLANNING_NS = 37_000
"""Of the authors' planner for each expert: two reads of a number from the GPU, which wait for it, and Python. Fitted to
the numbers below, like LOOP_NS; both are what such steps usually take."""
LOOP_NS = 80_000
"""Of the authors' expert loop for each expert of a rank: about ten small kernels, launched one by one. Fitted."""
RANKS = 8
BF16 = 642e12
"""Operations per second, as in the grid."""


def _layer(name: str, experts: int, top_k: int, hidden: int, width: int) -> Shape:
    """In bfloat16, which is what the authors ran for every model."""
    row_ps = round(6 * hidden * width / BF16 * 1e12)
    return Shape(name=name, experts=experts, top_k=top_k, hidden=hidden, width=width, weight_bytes=2, row_ps=row_ps)


GPT_OSS = _layer("gpt-oss-120b", 128, 4, 2880, 2880)
DEEPSEEK = _layer("DeepSeek-V3", 256, 8, 7168, 2048)
KIMI = _layer("Kimi-K2", 384, 8, 7168, 2048)
SMALL = _layer("N=128 K=4 H=2048", 128, 4, 2048, 2048)
"""The layer of the paper's first figure; its sweep over tokens (figure 6) fits only this one."""

BALANCED = {GPT_OSS.name: 1.07, DEEPSEEK.name: 0.92, KIMI.name: 1.03, SMALL.name: 1.0}
"""Published for balanced routing, where no plan is made: what the rest of the program's two ways differ by."""


@dataclass(frozen=True)
class Published:
    shape: Shape
    tokens: int
    """Per GPU."""
    hot: int
    percent: int
    speedup: float


def _rows(shape: Shape, tokens: int, hot: int, *speedups: float) -> list[Published]:
    return [Published(shape, tokens, hot, *pair) for pair in zip((30, 50, 80, 95), speedups, strict=False)]


# Figures 4, 1 and 6. What distinct top-k makes impossible is left out: one hot expert, and with top-8 four experts
# for more than half of the copies. The authors wrote one expert into several places of a token there.
TABLE = (
    *_rows(GPT_OSS, 32768, 16, 1.73, 2.85, 4.37, 5.19),
    *_rows(GPT_OSS, 32768, 4, 2.09, 3.05, 4.47, 5.22),
    *_rows(DEEPSEEK, 16384, 16, 1.69, 2.65, 3.83, 4.59),
    *_rows(DEEPSEEK, 16384, 4, 1.76, 2.83),
    *_rows(KIMI, 16384, 16, 1.80, 2.73, 4.01, 4.83),
    *_rows(KIMI, 16384, 4, 1.94, 2.85),
    *_rows(SMALL, 32768, 16, 1.5, 2.3, 3.7, 4.3),
    *_rows(SMALL, 4096, 4, 0.66, 0.89, 1.15, 1.29),
    *_rows(SMALL, 8192, 4, 0.99, 1.33, 1.84, 2.09),
    *_rows(SMALL, 16384, 4, 1.39, 2.00, 2.78, 3.23),
    *_rows(SMALL, 32768, 4, 1.81, 2.64, 3.78, 4.29),
    *_rows(SMALL, 65536, 4, 2.24, 3.18, 4.73, 5.46),
)


@dataclass(frozen=True)
class Modelled:
    """LLEP's speed-up by the cost model, on the grid's machine and in the authors' program."""

    on_the_grid: float
    as_run: float


def modelled(entry: Published) -> Modelled:
    shape, tokens = entry.shape, entry.tokens
    return Modelled(
        on_the_grid=_speedup(entry, shape.rates),
        as_run=_speedup(entry, _as_run(shape, tokens)),
    )


def _as_run(shape: Shape, tokens: int) -> Rates:
    """The authors' program: rows go both ways in bfloat16, one for each expert of a token, before and after the
    computing; what LLEP costs without any skew is in the published balanced column.
    """
    row_ps = shape.row_ps + round(4 * shape.hidden / NEAR * 1e12)
    base_ns = shape.rates.base_ns + LOOP_NS * shape.experts // RANKS
    balanced_ns = base_ns + tokens * shape.top_k * row_ps // 1000
    plan_ns = PLANNING_NS * shape.experts + round(balanced_ns * (1 / BALANCED[shape.name] - 1))
    return replace(shape.rates, base_ns=base_ns, row_ps=row_ps, wire_ps=0, plan_ns=plan_ns)


def _speedup(entry: Published, rates: Rates) -> float:
    cell = Cell(entry.shape, Layout(RANKS, 1), entry.tokens, Load("published", entry.hot, entry.percent))
    (step,) = steps(cell, 0)
    holds_PE, home_E = placed(cell, "linear", step.earlier_E)
    task = replace(problem(cell, step.rows_PE, holds_PE, home_E, np.zeros(RANKS, dtype=np.int64)), rates=rates)
    return price(task, native(task)) / price(task, llep.plan(task))
