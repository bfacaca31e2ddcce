"""TEMPO (KlingAI Research, 2026): rows over the replicas that exist, by modelled time instead of by rows.

P: ranks, E: experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .eplb import even_split
from .plan import Plan
from .problem import Integers, Problem
from .resplit import balance
from .whole import holders, whole_plan

_STEPS = 300
"""Most steps of the local search, as published."""


def plan(problem: Problem) -> Plan:
    """The split of least modelled time: `split`, or one by rows or in even shares where that is over 1 % better.

    Moves nothing. The published one plans from the last window's counts, here as all planners from the exact ones.
    Trap: where the hot experts have no replica there is nothing to win.
    """
    loads_E = problem.loads_E.tolist()
    rates = problem.rates
    expert_ps, row_ps = rates.expert_ps, max(rates.row_ps, rates.wire_ps)
    rows_EP = split(loads_E, problem.holds_PE, expert_ps, row_ps)
    least_ps = _peak_ps(rows_EP, expert_ps, row_ps)
    for other_EP in (
        balance(loads_E, problem.holds_PE, problem.home_E.tolist()),
        even_split(loads_E, problem.holds_PE),
    ):
        other_ps = _peak_ps(other_EP, expert_ps, row_ps)
        if other_ps * 101 < least_ps * 100:
            rows_EP, least_ps = other_EP, other_ps
    return whole_plan("tempo", problem, rows_EP)


def split(loads_E: Sequence[int], holds_PE: Integers, expert_ps: int, row_ps: int) -> Integers:
    """[E, P] rows, for ranks that take max(`expert_ps` * active experts, `row_ps` * rows).

    1. Seed: experts by load, the largest first, each whole to the holder that is then done first.
    2. Chains: the rank with most active experts passes one on, where need be to a rank that passes on another; not
       if the slowest rank gets slower.
    3. Local search, at most 300 steps: the slowest rank gives an expert, or the part of its rows that makes the two
       ranks even, to another holder; the step that leaves the two fastest. (The paper searches for the part; as
       all ranks have the same rates here, it is half the difference.)

    O(E P + steps * experts of a rank * P). Two replicas of one hot expert are worth a second streaming (10 each) for
    300 rows of 1, and not for 12:

    >>> split([300, 12], np.array([[1, 1], [1, 1]]), expert_ps=10, row_ps=1).tolist()
    [[156, 144], [0, 12]]
    """
    state = _Split(loads_E, holds_PE, expert_ps, row_ps)
    while state.shorten():
        pass
    for _ in range(_STEPS):
        if not state.improve():
            break
    return state.rows_EP()


def _peak_ps(rows_EP: Integers, expert_ps: int, row_ps: int) -> int:
    return int(np.maximum(expert_ps * (rows_EP > 0).sum(0), row_ps * rows_EP.sum(0)).max(initial=0))


class _Split:
    """Rows of experts on their holders, with the active experts and the rows of each rank."""

    def __init__(self, loads_E: Sequence[int], holds_PE: Integers, expert_ps: int, row_ps: int) -> None:
        self.holders_E = holders(holds_PE)
        self.expert_ps, self.row_ps = expert_ps, row_ps
        ranks = len(holds_PE)
        self.active_P, self.rows_P = [0] * ranks, [0] * ranks
        self.experts_P: list[dict[int, int]] = [{} for _ in range(ranks)]  # expert -> rows
        self.shape = (len(loads_E), ranks)
        for e in sorted((e for e, load in enumerate(loads_E) if load), key=lambda e: -loads_E[e]):
            n = loads_E[e]
            _, _, rank = min((self.ps(p, 1, n), self.active_P[p], p) for p in self.holders_E[e])
            self.add(e, rank, n)

    def ps(self, rank: int, more_active: int = 0, more_rows: int = 0) -> int:
        return max(self.expert_ps * (self.active_P[rank] + more_active), self.row_ps * (self.rows_P[rank] + more_rows))

    def add(self, expert: int, rank: int, rows: int) -> None:
        """More rows, or fewer."""
        experts = self.experts_P[rank]
        before = experts.pop(expert, 0)
        if before + rows:
            experts[expert] = before + rows
        self.active_P[rank] += (before + rows > 0) - (before > 0)
        self.rows_P[rank] += rows

    def pass_on(self, expert: int, source: int, rank: int, rows: int) -> None:
        self.add(expert, source, -rows)
        self.add(expert, rank, rows)

    def shorten(self) -> bool:
        """One active expert less on the first rank with most of them, by a chain of one or two; False if none does."""
        most = max(self.active_P, default=0)
        if not most:
            return False
        first = self.active_P.index(most)
        peak_ps = max(map(self.ps, range(len(self.active_P))))
        for chain in self.chains(first, most):
            done = [(e, source, rank, self.experts_P[source][e]) for e, source, rank in chain]
            for step in done:
                self.pass_on(*step)
            if max(map(self.ps, range(len(self.active_P)))) <= peak_ps:
                return True
            for e, source, rank, rows in reversed(done):
                self.pass_on(e, rank, source, rows)
        return False

    def chains(self, first: int, most: int) -> Iterator[list[tuple[int, int, int]]]:
        """[(expert, source, rank)] that take an expert from `first` and leave all others below `most`."""
        firsts = [(e, rank) for e in sorted(self.experts_P[first]) for rank in self.holders_E[e] if rank != first]
        for e, rank in firsts:
            if self.active_P[rank] + (e not in self.experts_P[rank]) < most:
                yield [(e, first, rank)]
        for e, rank in firsts:
            for other in sorted(self.experts_P[rank]):
                for end in self.holders_E[other]:
                    if end not in (first, rank) and other != e and self.active_P[end] + 1 < most:
                        yield [(e, first, rank), (other, rank, end)]

    def improve(self) -> bool:
        """The best step that makes the slowest rank faster, and no other as slow; False if there is none."""
        ranks = range(len(self.active_P))
        slowest = max(ranks, key=lambda p: (self.ps(p), -p), default=-1)
        if slowest < 0:
            return False
        steps = [
            (
                max(self.ps(slowest, -(rows == here), -rows), self.ps(rank, e not in self.experts_P[rank], rows)),
                rows,
                e,
                rank,
            )
            for e, here in self.experts_P[slowest].items()
            for rank in self.holders_E[e]
            if rank != slowest
            for rows in {here, max(1, min(here, -(-(self.rows_P[slowest] - self.rows_P[rank]) // 2)))}
        ]
        ps, rows, e, rank = min(steps, default=(self.ps(slowest), 0, 0, 0))
        if ps >= self.ps(slowest):
            return False
        self.pass_on(e, slowest, rank, rows)
        return True

    def rows_EP(self) -> Integers:
        rows_EP = np.zeros(self.shape, dtype=np.int64)
        for rank, experts in enumerate(self.experts_P):
            for expert, rows in experts.items():
                rows_EP[expert, rank] = rows
        return rows_EP
