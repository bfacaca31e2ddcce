"""The modelled time of a plan, and a time below which no plan can be: what all planners are compared by.

The specification of the price in plain Python; `prices` has the same, compiled. P: ranks, E: experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from .plan import Plan, native, part_bytes
from .problem import FS, PS, Integers, Problem, Rates


def _ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def priced(problem: Problem, plan: Plan) -> Plan:
    """The plan with its modelled time, the native one and the bound filled in."""
    return replace(
        plan,
        modelled_ns=price(problem, plan),
        native_ns=price(problem, native(problem)),
        bound_ns=bound(problem),
    )


def price(problem: Problem, plan: Plan) -> int:
    """Nanoseconds until the slowest rank has computed its rows."""
    return cost_ns(problem, plan) + max(rank_times(problem, plan), default=0)


def cost_ns(problem: Problem, plan: Plan) -> int:
    """Nanoseconds that the plan takes by itself, on every rank."""
    return (0 if plan.at_home else problem.rates.plan_ns) + (problem.rates.shared_ns if plan.shared else 0)


def rates_array(rates: Rates) -> Integers:
    """The rates of experts and transfers in the order of their fields, for compiled functions."""
    return np.array([getattr(rates, name) for name in _RATES], dtype=np.int64)


_RATES = tuple(field.name for field in fields(Rates) if not field.name.startswith("shared"))


@dataclass(frozen=True)
class _Guest:
    arrival_ns: int
    work_ps: int


def rank_times(problem: Problem, plan: Plan) -> list[int]:
    """[P] nanoseconds: a rank computes shared experts, then what it holds, then each guest when it has arrived, in
    order of arrival.
    """
    return times_with_shared(problem, plan, routed_work(problem, plan))


def times_with_shared(problem: Problem, plan: Plan, work_P: list[RoutedWork]) -> list[int]:
    """`rank_times` where the plan's routed experts are known to be this work."""
    rates = problem.rates
    computed_P = problem.tokens_P.tolist()
    moved_P = [0] * problem.ranks
    for move in plan.shared:
        computed_P[move.source] -= move.tokens
        computed_P[move.destination] += move.tokens
        moved_P[move.source] += move.tokens
        moved_P[move.destination] += move.tokens
    times = []
    for work, computed, moved in zip(work_P, computed_P, moved_P, strict=True):
        shared_ps = rates.shared_ps * computed + rates.shared_wire_ps * moved
        base_ns = rates.base_ns * plan.chunks if work.busy or shared_ps else 0
        times.append(base_ns + _ceil_div(max(shared_ps + work.ps, work.last_ps), PS))
    return times


@dataclass(frozen=True)
class RoutedWork:
    """One rank's routed experts: whether it has any, their time in one piece (`ps`), and when they end if nothing is
    computed before the guests come (`last_ps`). With other work before them they end at
    `max(other + ps, last_ps)`.
    """

    busy: bool
    ps: int
    last_ps: int


def routed_work(problem: Problem, plan: Plan) -> list[RoutedWork]:
    """[P], without `base_ns`."""
    rates, chunks = problem.rates, plan.chunks
    guests: list[list[_Guest]] = [[] for _ in range(problem.ranks)]
    for transfer, arrival in zip(plan.transfers, arrivals(problem, plan), strict=True):
        e, p = transfer.expert, transfer.destination
        rows = int(plan.rows_EP[e, p] if transfer.parts == 1 else plan.sliced_E[e])
        if rows:  # a relay need not compute
            guests[p].append(_Guest(arrival, guest_ps(problem, rows, transfer.parts, chunks)))
    held_EP = np.where(problem.holds_PE.T > 0, plan.rows_EP, 0)
    works = []
    for p, (touched, rows) in enumerate(zip((held_EP > 0).sum(0).tolist(), held_EP.sum(0).tolist(), strict=True)):
        work_ps = max(rates.expert_ps * touched * chunks, rates.row_ps * rows, rates.wire_ps * rows)
        last_ps = 0
        for guest in sorted(guests[p], key=lambda g: g.arrival_ns):
            work_ps += guest.work_ps
            last_ps = max(last_ps, max(0, guest.arrival_ns - rates.hidden_ns) * PS) + guest.work_ps
        works.append(RoutedWork(bool(touched or guests[p]), work_ps, last_ps))
    return works


def guest_ps(problem: Problem, rows: int, parts: int, chunks: int = 1) -> int:
    """Picoseconds of `rows` rows through one of `parts` column parts of an expert, computed apart from the others."""
    rates = problem.rates
    streaming = _ceil_div(rates.expert_ps * chunks, parts)
    computing = _ceil_div(rates.row_ps * rows, parts)
    return max(streaming, computing, rates.wire_ps * rows) + rates.guest_ns * PS * chunks


def transfer_ns(problem: Problem, parts: int, far: bool) -> int:
    """Nanoseconds that one transfer keeps its links busy."""
    rates = problem.rates
    alpha = rates.far_alpha_ns if far else rates.near_alpha_ns
    rate = rates.far_fs_per_byte if far else rates.near_fs_per_byte
    return alpha + _ceil_div(part_bytes(problem.expert_bytes, parts) * rate, FS)


def arrivals(problem: Problem, plan: Plan) -> list[int]:
    """When each transfer has arrived, in nanoseconds from the first one's start.

    Each is sent as soon as its two links are free and its source has the weights, in the plan's order: the links of
    source and destination within a node, the bundles of their nodes between nodes.
    """
    node_P = problem.node_P.tolist()
    sending: dict[tuple[bool, int], int] = {}
    receiving: dict[tuple[bool, int], int] = {}
    there: dict[tuple[int, int], int] = {}
    arrived = []
    for t in plan.transfers:
        far = node_P[t.source] != node_P[t.destination]
        out = (True, node_P[t.source]) if far else (False, t.source)
        into = (True, node_P[t.destination]) if far else (False, t.destination)
        start = max(sending.get(out, 0), receiving.get(into, 0), there.get((t.source, t.expert), 0))
        end = start + transfer_ns(problem, t.parts, far)
        sending[out] = receiving[into] = end
        if t.parts == 1:
            there[t.destination, t.expert] = end
        arrived.append(end)
    return arrived


# A time below which no plan can be


def bound(problem: Problem) -> int:
    """Nanoseconds that every plan needs, by this model: the largest of

    - the mean over the ranks of all work, shared experts' too, where the experts of a rank whose time is their weights'
      streaming count as that;
    - for each hot expert, for sets of ranks (the busiest one, two, ..., and each node): the time by which the work on
      experts that only they hold is done, when every link carries one transfer after the other, receivers pass on what
      they have whole, and all helpers do nothing else.

    Milliseconds: for reports and tests, not for every step.
    """
    rates = problem.rates
    shared_ps = rates.shared_ps * int(problem.tokens_P.sum())
    if not problem.loads_E.any():
        return rates.base_ns + _ceil_div(shared_ps, problem.ranks * PS) if shared_ps else 0
    from .bound import STEPS, least_ns  # compiled: not needed to price a plan

    rows_ps = max(rates.row_ps, rates.wire_ps) * int(problem.loads_E.sum())
    together_ps = shared_ps + max(rows_ps, rates.expert_ps * int((problem.loads_E > 0).sum()))
    return rates.base_ns + max(
        _ceil_div(together_ps, problem.ranks * PS),
        int(
            least_ns(
                problem.loads_E,
                problem.holds_PE,
                problem.home_E,
                problem.node_P,
                rates_array(problem.rates),
                problem.expert_bytes,
                STEPS,
            )
        ),
    )
