"""The simulated grid of `moeyard bench balance`: its layouts and loads, and what each planner makes of a cell.

No model runs and no clock is read: times are those of the planners' own cost model, with constants of H100-class GPUs.
P: ranks, E: experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..scheduler.balance.baselines import UNCAPPED, Planner
from ..scheduler.balance.eplb import eplb_placement
from ..scheduler.balance.model import price
from ..scheduler.balance.plan import BadPlan, Plan, check
from ..scheduler.balance.problem import Problem
from ..scheduler.placement import linear
from .balance_bound import sharper
from .moe_shapes import Shape
from .routing import Trace, can_deal, dealt, drawn, zipf_weights

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Layout:
    ranks: int
    nodes: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks" + (f", {self.nodes} nodes" if self.nodes > 1 else ", 1 node")


LAYOUTS = (Layout(8, 1), Layout(32, 1), Layout(32, 4), Layout(64, 1), Layout(64, 8))
TOKENS = (128, 1024, 4096, 8192, 32768)


@dataclass(frozen=True)
class Load:
    """How tokens choose: `percent` % of the copies go to the first `hot` experts and all else is even, or by a Zipf
    law whose order of experts moves on by `drift` places each step, or as recorded.
    """

    name: str
    hot: int = 0
    percent: int = 0
    zipf: float = 0.0
    drift: int = 0
    trace: Trace | None = None


LOADS = (
    Load("balanced"),
    *(Load(f"{percent} % in {hot}", hot, percent) for hot in (16, 4) for percent in (15, 30, 50, 80, 95)),
    Load("Zipf", zipf=1.2),
    Load("drifting Zipf", zipf=1.2, drift=2),
)
DRIFT_STEPS = 4
TRACE_LAYERS = 4
PLACEMENTS = ("linear", "eplb")
ON_ONE_COPY = ("native", "llep", "moonep", "ultraep", "priced")
"""Planners that can do something where every expert has one holder, as it is until guests stay."""


@dataclass(frozen=True)
class Cell:
    shape: Shape
    layout: Layout
    tokens: int
    load: Load

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.layout}, {self.tokens} tokens, {self.load.name}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One planner in one cell; means where the cell has several steps."""

    shape: str
    experts: int
    ranks: int
    nodes: int
    tokens: int
    load: str
    placement: str
    planner: str
    ns: int
    vs_plain: float
    """The time of plain expert parallelism, one copy of each expert, by this one's."""
    bound_ns: int
    bound_share: float
    ideal_ns: int
    """All work spread evenly, nothing moved."""
    moved_bytes: int
    transfers: float
    max_over_mean: float
    """Rows that the busiest rank computes (those of a slice group shared) by the mean."""
    fits: bool
    """Whether the plan keeps all rules; published planners may ask for more memory than there is room for."""

    @property
    def cell(self) -> tuple[str, int, int, int, str]:
        return self.shape, self.ranks, self.nodes, self.tokens, self.load


def grid(
    shapes: Sequence[Shape],
    layouts: Sequence[Layout] = LAYOUTS,
    tokens: Sequence[int] = TOKENS,
    loads: Sequence[Load] = LOADS,
    traces: Sequence[Trace] = (),
) -> list[Cell]:
    """All cells that distinct top-k makes possible. A trace has its own number of experts, and the shape's costs."""
    cells = []
    for shape in shapes:
        for layout in layouts:
            for count in tokens:
                for load in loads:
                    if can_deal(shape.experts, shape.top_k, load.hot, load.percent):
                        cells.append(Cell(shape, layout, count, load))
                for trace in traces:
                    if layout.ranks <= trace.experts:
                        like = replace(shape, experts=trace.experts, top_k=trace.top_k or shape.top_k)
                        cells.append(Cell(like, layout, count, Load(trace.name, trace=trace)))
    return cells


@dataclass(frozen=True, eq=False)
class Step:
    rows_PE: Integers
    earlier_E: Integers
    """Loads of another batch with the same habits, for placements that learn."""
    carry: bool
    """Whether it comes after the step before it in the same layer, so that guests are still there."""


def steps(cell: Cell, seed: int) -> Iterator[Step]:
    """The same for one cell and seed, and for one load on one node and on several. Which experts a Zipf law prefers
    depends on the shape and the seed alone, so that cells with more tokens or ranks can be compared.
    """
    shape, load, ranks, tokens = cell.shape, cell.load, cell.layout.ranks, cell.tokens
    text = f"{shape.name} {shape.experts} {ranks} {tokens} {load.name} {seed}"
    rng = _generator(text)
    if load.trace is not None:
        layers = np.unique(np.linspace(0, load.trace.layers - 1, TRACE_LAYERS).astype(int)).tolist()
        for layer in layers:
            now, earlier = (load.trace.rows(layer, ranks, tokens, shape.top_k, rng, start) for start in (0.5, 0.0))
            yield Step(now, earlier.sum(0), False)
    elif load.zipf:
        order_E = _generator(f"{shape.name} {shape.experts} {seed}").permutation(shape.experts)
        moves = [load.drift * i for i in range(DRIFT_STEPS)] if load.drift else [0]
        earlier_E = _zipf(cell, order_E, rng).sum(0)
        for i, moved in enumerate(moves):
            yield Step(_zipf(cell, (order_E + moved) % shape.experts, rng), earlier_E, i > 0)
    else:
        rows_PE = dealt(ranks, tokens, shape.experts, shape.top_k, load.hot, load.percent)
        yield Step(rows_PE, rows_PE.sum(0), False)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _zipf(cell: Cell, order_E: Integers, rng: np.random.Generator) -> Integers:
    weights_E = zipf_weights(cell.shape.experts, cell.load.zipf, order_E)
    return drawn(weights_E, cell.layout.ranks, cell.tokens, cell.shape.top_k, rng)


def problem(cell: Cell, rows_PE: Integers, holds_PE: Integers, home_E: Integers, guests_P: Integers) -> Problem:
    """A step of a cell. A rank has room for as many guests as it has experts of its own, and two more."""
    shape, ranks = cell.shape, cell.layout.ranks
    return Problem(
        rows_PE=rows_PE,
        holds_PE=holds_PE,
        home_E=home_E,
        node_P=np.arange(ranks) * cell.layout.nodes // ranks,
        expert_bytes=shape.expert_bytes,
        room_P=(guest_slots(cell) - guests_P) * shape.expert_bytes,
        most_rows_P=np.full(ranks, max(1, int(rows_PE.sum()))),
        rates=shape.rates,
    )


def guest_slots(cell: Cell) -> int:
    return -(-cell.shape.experts // cell.layout.ranks) + 2


def placed(cell: Cell, placement: str, earlier_E: Integers) -> tuple[Integers, Integers]:
    """(holds_PE, home_E): one copy of each expert in contiguous blocks, or EPLB's replicas for the earlier loads.

    EPLB has an eighth more slots than experts per rank, at least one more.
    """
    experts, ranks = cell.shape.experts, cell.layout.ranks
    if placement == "eplb":
        own = -(-experts // ranks)
        learnt = eplb_placement(earlier_E.tolist(), ranks, own + max(1, own // 8), cell.layout.nodes)
        return learnt.holds_PE, learnt.home_E
    holds_PE = np.zeros((ranks, experts), dtype=np.int64)
    for p, slots in enumerate(np.array(linear(experts, ranks).slots_PS)):
        holds_PE[p, slots[slots >= 0]] = 1
    return holds_PE, holds_PE.argmax(0)


@dataclass
class _Sums:
    ns: int = 0
    bound_ns: int = 0
    ideal_ns: int = 0
    plain_ns: int = 0
    moved_bytes: int = 0
    transfers: int = 0
    max_over_mean: float = 0.0
    fits: bool = True
    steps: int = 0


def simulate(cell: Cell, planners: Mapping[str, Planner], seed: int = 0) -> list[Row]:
    """Every planner in a cell, on both placements.

    Within a placement all plan the same steps from the same state: guests, where they are carried over, are those
    that the priced planner's plans brought and still use. Plain expert parallelism, to which all are compared, is
    the native plan where each expert has one copy.

    Raises BadPlan for a plan that breaks a rule, but for published planners that ask for more room than there is.
    """
    sequence = list(steps(cell, seed))
    sums: dict[tuple[str, str], _Sums] = {}
    plain: list[int] = []
    for placement in PLACEMENTS:
        for i, step in enumerate(sequence):
            if not step.carry:
                holds_PE, home_E = placed(cell, placement, step.earlier_E)
                guests_PE = np.zeros_like(holds_PE)
            task = problem(cell, step.rows_PE, holds_PE | guests_PE, home_E, guests_PE.sum(1))
            plans = {
                name: planner(task)
                for name, planner in planners.items()
                if placement != "linear" or name in ON_ONE_COPY or cell.load.drift
            }
            times = {name: price(task, plan) for name, plan in plans.items()}
            bound_ns, ideal = sharper(task, min(times.values())), ideal_ns(task)
            for name, plan in plans.items():
                ns = times[name]
                if placement == "linear" and name == "native":
                    plain.append(ns)
                if name == "priced":
                    guests_next_PE = kept_guests(cell, task, plan, guests_PE)
                total = sums.setdefault((placement, name), _Sums())
                total.ns += ns
                total.bound_ns += bound_ns
                total.ideal_ns += ideal
                total.plain_ns += plain[i]
                total.moved_bytes += plan.moved_bytes(task)
                total.transfers += len(plan.transfers)
                total.max_over_mean += max_over_mean(plan)
                total.fits &= _fits(f"{cell.name}, {placement}, {name}", task, plan)
                total.steps += 1
            guests_PE = guests_next_PE
    return [
        Row(
            shape=cell.shape.name,
            experts=cell.shape.experts,
            ranks=cell.layout.ranks,
            nodes=cell.layout.nodes,
            tokens=cell.tokens,
            load=cell.load.name,
            placement=placement,
            planner=name,
            ns=total.ns // total.steps,
            vs_plain=total.plain_ns / total.ns,
            bound_ns=total.bound_ns // total.steps,
            bound_share=total.bound_ns / total.ns,
            ideal_ns=total.ideal_ns // total.steps,
            moved_bytes=total.moved_bytes // total.steps,
            transfers=total.transfers / total.steps,
            max_over_mean=total.max_over_mean / total.steps,
            fits=total.fits,
        )
        for (placement, name), total in sums.items()
    ]


def kept_guests(cell: Cell, task: Problem, plan: Plan, guests_PE: Integers) -> Integers:
    """[P, E] guests after a step: whole experts that came or were there and had rows, in half of the room at most.

    Those with most rows stay, of equal ones the lower expert.
    """
    came_PE = guests_PE.copy()
    for transfer in plan.transfers:
        if transfer.parts == 1:
            came_PE[transfer.destination, transfer.expert] = 1
    rows_PE = came_PE * plan.rows_EP.T
    kept_PE = np.zeros_like(guests_PE)
    for p, rows_E in enumerate(rows_PE):
        order = np.argsort(-rows_E, kind="stable")[: guest_slots(cell) // 2]
        kept_PE[p, order[rows_E[order] > 0]] = 1
    return kept_PE


def ideal_ns(task: Problem) -> int:
    """The rows' and the touched experts' time if both could be spread over all ranks without moving anything."""
    rates, loads_E = task.rates, task.loads_E
    work_ps = max(rates.row_ps * int(loads_E.sum()), rates.expert_ps * int((loads_E > 0).sum()))
    return rates.base_ns + -(-work_ps // (task.ranks * 1000))


def max_over_mean(plan: Plan) -> float:
    rows_P = plan.rows_EP.sum(0).astype(np.float64)
    for transfer in plan.transfers:
        if transfer.parts > 1:
            rows_P[transfer.destination] += plan.sliced_E[transfer.expert] / transfer.parts
    return float(rows_P.max() / rows_P.mean()) if rows_P.any() else 1.0


def _fits(name: str, task: Problem, plan: Plan) -> bool:
    """Raises BadPlan when rows are lost or doubled, and for any broken rule of ours."""
    try:
        check(task, plan)
    except BadPlan as error:
        if plan.planner not in UNCAPPED or (plan.rows_EP.sum(1) + plan.sliced_E != task.loads_E).any():
            raise BadPlan(f"{name}: {error}") from error
        return False
    return True
