"""A sharper time below which no plan can be, by linear programmes: slower than `model.bound`, for reports only.

What `model.bound` takes apart is in one programme here: where each expert can be, how many experts a rank has time to
stream, the rows that each rank has time for, and what guests take of that. A time is impossible when the programme has
no solution. The solver works with floats, so that its word is not enough: the multipliers that it found are checked in
integers. Without scipy there is no programme and `model.bound` is what is known. P: ranks, E: experts.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..scheduler.balance.model import bound, transfer_ns
from ..scheduler.balance.problem import FS, PS, Integers, Problem
from .balance_departures import add_departures

AVAILABLE = find_spec("scipy") is not None
"""Whether there is a solver. It is imported when it is needed: that takes a while."""
ENOUGH = 0.95
"""A plan whose `model.bound` is that near to its time needs no better one."""
FINENESS = 100
"""The bound is known to one part of so many."""
EXACT = 1 << 40
"""Multipliers are rounded to so many parts of one."""
FINE = 1 << 30
"""Shares of a link's time are, too."""


def sharper(problem: Problem, time_ns: int) -> int:
    """`model.bound`, or a better one if that is far from `time_ns`, which some plan needs."""
    least = bound(problem)
    row = max(problem.rates.row_ps, problem.rates.wire_ps)
    if not AVAILABLE or least >= ENOUGH * time_ns or not row or problem.rates.shared_ps or problem.ranks == 1:
        return least
    base, enough = problem.rates.base_ns, int(ENOUGH * time_ns)
    low, most = least - base - 1, time_ns - base
    for more in (False, True):
        high = most
        middle = enough - base  # it need not be known better than that
        while low + base < enough and high - low > max(1, high // FINENESS):  # all below `low` is impossible
            if _refuted(_programme(problem, middle, departures=more)):
                low = middle
            else:
                high = middle
            middle = (low + high) // 2
        if low + base >= enough:
            return low + 1 + base
    return low + 1 + base


def impossible(problem: Problem, ns: int) -> bool:
    """Whether it is certain that no plan is done `ns` after `base_ns`. False says nothing."""
    # The larger programme has all rows of the smaller one, but what the solver says of it is less exact.
    return _refuted(_programme(problem, ns)) or _refuted(_programme(problem, ns, departures=True))


class _Elsewhere(NamedTuple):
    """What ranks that do not hold an expert can do of it: at most so much work, at the least cost of a guest's time for
    it in 1024ths; and when the first part of it can be there.

    Where it cannot come whole: by how many ranks at least all of it is done in parts, and for how long by each of them.
    """

    work_ps: int
    cost: int
    arrival_ps: int
    whole: bool
    parts: int
    part_ps: int


NOWHERE = _Elsewhere(0, 1024, 0, False, 0, 0)


def _elsewhere(problem: Problem, ns: int, load: int, holders: int, bundles: int) -> _Elsewhere:
    """For an expert with `load` rows that `holders` near links and `bundles` to other nodes have to send.

    There is one slice group of an expert, and all its parts compute the same rows, so the last to arrive limits them.
    Whole guests can be many, and cut the expert for others.
    """
    rates = problem.rates
    row = max(rates.row_ps, rates.wire_ps)
    work_ps, cost, first_ns, whole_ns = 0, 0, ns, 0
    whole, least_parts, part_ps = False, 0, 0
    for parts in range(1, min(problem.most_parts, problem.ranks - holders) + 1):
        near, far = transfer_ns(problem, parts, False), transfer_ns(problem, parts, True)
        soonest = min(near, far) if bundles else near
        all_there = _sent(parts, near, holders, far, bundles)
        if parts == 1:
            whole_ns = all_there
        all_there = min(all_there, whole_ns + soonest)  # from the holders, or from one that got it whole
        left_ps = (ns - max(0, all_there - rates.hidden_ns) - rates.guest_ns) * PS
        if left_ps < -(-rates.expert_ps // parts):
            continue
        first_ns = min(first_ns, max(0, soonest - rates.hidden_ns))
        each = max(rates.row_ps, parts * rates.wire_ps)  # of all parts together
        rows = min(load, left_ps * parts // max(1, each))
        if not rows:
            continue
        took = parts * rates.guest_ns * PS + max(rates.expert_ps, each * rows)
        share = 1024 * took // (row * rows)
        cost = min(cost, share) if cost else share
        whole |= parts == 1
        work_ps = row * load if parts == 1 else max(work_ps, row * rows)
        if rows == load:
            least_parts = least_parts or parts
            part = rates.guest_ns * PS + max(rates.expert_ps, each * load) // parts
            part_ps = min(part_ps, part) if part_ps else part
    return _Elsewhere(work_ps, cost, first_ns * PS, whole, least_parts, part_ps) if work_ps else NOWHERE


def _sent(parts: int, near: int, links: int, far: int, bundles: int) -> int:
    """The first time by which so many parts can have come over these links."""
    low, high = 0, parts * near
    while low < high:
        middle = (low + high) // 2
        sent = links * (middle // near) if near else parts
        sent += bundles * (middle // far) if bundles and far else parts * bool(bundles)
        if sent >= parts:
            high = middle
        else:
            low = middle + 1
    return low


class _Programme(NamedTuple):
    """Is there x with 0 <= x <= most and, in every row, the sum of `values` times x at most `limits`? Integers."""

    rows: Integers
    columns: Integers
    values: Integers
    limits: Integers
    most: Integers


class _Rows:
    """Rows of a programme in the making."""

    def __init__(self) -> None:
        self.parts: list[tuple[Integers, Integers, Integers]] = []
        self.limits: list[Integers] = []
        self.count = 0

    def add(self, limits: Integers, *terms: tuple[Integers, Integers, Integers | int]) -> None:
        """Rows with these limits; each term is (which of the rows, column, value)."""
        for at, columns, values in terms:
            self.parts.append((at + self.count, columns, np.broadcast_to(values, at.shape).astype(np.int64)))
        self.limits.append(limits)
        self.count += len(limits)


def _programme(problem: Problem, ns: int, *, departures: bool = False) -> _Programme:
    """What every plan that is done at `ns` fulfils.

    Of each pair of an expert with rows and a holder: the work that is done there (ps), and whether it is streamed there
    (0 or 1, here anything between); of each rank: the time that guests take; of each expert: the work elsewhere.
    """
    rates, time_ps = problem.rates, ns * PS
    row = max(rates.row_ps, rates.wire_ps)
    live = np.flatnonzero(problem.loads_E)
    load_L = problem.loads_E[live]
    rank_J, expert_J = np.nonzero(problem.holds_PE[:, live])  # J: pairs, L: experts with rows
    ranks, n, experts = problem.ranks, len(rank_J), len(live)
    known: dict[tuple[int, int, int], _Elsewhere] = {}
    several = len(np.unique(problem.node_P)) > 1
    found = []
    for i, load in enumerate(load_L.tolist()):
        held = rank_J[expert_J == i]
        key = load, len(held), len(np.unique(problem.node_P[held])) if several else 0
        if key not in known:
            known[key] = _elsewhere(problem, ns, *key)
        found.append(known[key])
    away_L = np.array([it.work_ps for it in found], dtype=np.int64)
    cost_L = np.array([it.cost for it in found], dtype=np.int64)
    arrival_ps = min((it.arrival_ps for it in found if it.work_ps), default=time_ps)
    work_L = load_L * row
    most_J = np.minimum(work_L[expert_J], time_ps)
    j, p, e = np.arange(n), np.arange(ranks), np.arange(experts)
    streams_J, guests_P, away = n + j, 2 * n + p, 2 * n + ranks + e
    one = np.ones
    rows = _Rows()
    # All rows of an expert are computed, and it is streamed where they are.
    rows.add(-work_L, (expert_J, j, -1), (e, away, -1))
    rows.add(-work_L, (expert_J, streams_J, -work_L[expert_J]), (e, away, -1))
    rows.add(np.zeros(n, dtype=np.int64), (j, j, 1), (j, streams_J, -most_J))
    # A rank streams no more experts than it has time for, and its guests come after them.
    if rates.expert_ps:
        rows.add(np.full(ranks, time_ps // rates.expert_ps), (rank_J, streams_J, 1))
        rows.add(np.full(ranks, time_ps), (rank_J, streams_J, rates.expert_ps), (p, guests_P, 1))
    rows.add(np.full(ranks, time_ps), (rank_J, j, 1), (p, guests_P, 1))
    nought = np.zeros(1, dtype=np.int64)
    rows.add(nought, (np.zeros_like(e), away, cost_L), (np.zeros_like(p), guests_P, -1024))
    if several:
        _bundles(problem, ns, found, away_L, (rank_J, expert_J), 2 * n + ranks, rows)
    more = _only_in_parts(problem, time_ps, found, (rank_J, expert_J), guests_P, len(live) + 2 * n + ranks, rows)
    leaving: list[int] = []
    if departures:
        new = 2 * n + ranks + experts + more
        leaving = add_departures(problem, ns, (rank_J, expert_J), load_L, 2 * n + ranks, new, rows)
    at, columns, values = (np.concatenate(it) for it in zip(*rows.parts, strict=True))
    most = np.concatenate(
        [
            most_J,
            one(n, dtype=np.int64),
            np.full(ranks, time_ps - arrival_ps),
            away_L,
            one(more, dtype=np.int64),
            np.array(leaving, dtype=np.int64),
        ],
    )
    return _Programme(at, columns, values, np.concatenate(rows.limits), most)


def _bundles(
    problem: Problem,
    ns: int,
    found: list[_Elsewhere],
    away_L: Integers,
    pairs: tuple[Integers, Integers],
    first: int,
    rows: _Rows,
) -> None:
    """Adds that experts which cannot leave whole share the links between nodes, for what near links have no time for.

    By then no other rank has such an expert to send. `first` is the column of the first expert's work elsewhere.
    """
    rates = problem.rates
    if not rates.near_fs_per_byte:
        return
    rank_J, expert_J = pairs
    last_ns = ns + rates.hidden_ns - rates.guest_ns
    nodes = int(problem.node_P.max()) + 1
    terms: dict[int, list[tuple[int, int]]] = {}
    for i, it in enumerate(found):
        if it.whole or not it.work_ps:
            continue
        held = rank_J[expert_J == i]
        far_bytes = problem.expert_bytes - len(held) * last_ns * FS // rates.near_fs_per_byte - 1
        took = max(0, far_bytes) * rates.far_fs_per_byte // FS
        value = took * FINE // int(away_L[i])
        if value:
            homes = np.unique(problem.node_P[held]).tolist()
            terms.setdefault(homes[0] if len(homes) == 1 else -1, []).append((first + i, value))
    everything = [it for some in terms.values() for it in some]
    for most, some in [(1, terms[node]) for node in terms if node >= 0] + [(nodes, everything)] * bool(everything):
        columns, values = (np.array(it, dtype=np.int64) for it in zip(*some, strict=True))
        rows.add(np.array([most * last_ns * FINE]), (np.zeros_like(columns), columns, values))


def _only_in_parts(
    problem: Problem,
    time_ps: int,
    found: list[_Elsewhere],
    pairs: tuple[Integers, Integers],
    guests_P: Integers,
    first: int,
    rows: _Rows,
) -> int:
    """Adds that experts which cannot leave whole are streamed by a holder, or all of them is done in parts by others.

    Whether they are is a number from 0 to 1, and for each rank another one, whether it has a part. What a rank streams
    and has parts of are whole numbers, from which follows more than from its time alone (mixed-integer rounding).
    Returns how many numbers are new; `first` is the first one's column.
    """
    expert_ps = problem.rates.expert_ps
    if not expert_ps:
        return 0
    rank_J, expert_J = pairs
    streams_J = len(rank_J) + np.arange(len(rank_J))
    places, rest = divmod(time_ps, expert_ps)
    count = 0
    terms: list[tuple[Integers, Integers, int]] = [(rank_J, streams_J, 1024)]
    for i, it in enumerate(found):
        if it.whole:
            continue
        nought = np.zeros(1, dtype=np.int64)
        held = expert_J == i
        streamed = (np.zeros(int(held.sum()), dtype=np.int64), streams_J[held], -1)
        if not it.parts:
            rows.add(nought - 1, streamed)
            continue
        others = np.setdiff1d(guests_P - guests_P[0], rank_J[held])
        away, here = nought + first + count, first + count + 1 + np.arange(len(others))
        count += 1 + len(others)
        rows.add(nought - 1, streamed, (nought, away, -1))
        rows.add(nought, (nought, away, it.parts), (np.zeros_like(here), here, -1))
        whole, part = divmod(it.part_ps, expert_ps)
        rounded = 1024 * whole + 1024 * max(0, part - rest) // (expert_ps - rest)
        terms.append((others, here, rounded))
        rows.add(np.zeros(len(others), dtype=np.int64), (np.arange(len(others)), here, it.part_ps),
                 (np.arange(len(others)), guests_P[others], -1))  # fmt: skip
    if count:
        rows.add(np.full(len(guests_P), 1024 * places), *terms)
    return count


def _refuted(programme: _Programme) -> bool:
    """Whether a programme has no solution, for certain.

    The solver finds multipliers of the rows that make one row of them which no x fulfils; that is checked exactly.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix, hstack

    at, columns, values, limits, most = programme
    scaled = values * most[columns].astype(np.float64)
    size = np.maximum(np.abs(limits).astype(np.float64), 1.0)
    np.maximum.at(size, at, np.abs(scaled))
    count, n = len(limits), len(most)
    matrix = csr_matrix((scaled / size[at], (at, columns)), shape=(count, n))
    slack = csr_matrix((-np.ones(count), (np.arange(count), np.zeros(count, dtype=np.int64))), shape=(count, 1))
    solved = linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=hstack([matrix, slack], format="csr"),
        b_ub=limits / size,
        bounds=np.column_stack([np.zeros(n + 1), np.append(np.ones(n), 2.0)]),
        method="highs",
    )
    if solved.status or solved.fun < 1e-9:
        return False
    return _contradicts(programme, -solved.ineqlin.marginals / size)


def _contradicts(programme: _Programme, multipliers: npt.NDArray[np.float64]) -> bool:
    """Whether the rows, each taken so many times, add up to one that no x within its limits can fulfil."""
    at, columns, values, limits, most = programme
    largest = multipliers.max(initial=0.0)
    if largest <= 0:
        return False
    times = [int(it) for it in np.maximum(multipliers / largest * EXACT, 0.0)]
    sums = [0] * len(most)
    for i, j, value in zip(at.tolist(), columns.tolist(), values.tolist(), strict=True):
        sums[j] += times[i] * value
    least = sum(it * top for it, top in zip(sums, most.tolist(), strict=True) if it < 0)
    return least > sum(it * limit for it, limit in zip(times, limits.tolist(), strict=True))
