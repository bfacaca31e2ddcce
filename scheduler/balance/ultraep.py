"""UltraEP (Dots-Infra/UltraEP, arXiv 2606.04101): quotas below the lowest peak that a few guests per rank can reach.

P: ranks, E: experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .plan import Plan
from .problem import Problem
from .whole import Move, at_home, nodes, whole_plan

Given = tuple[int, int, int, int]
"""(expert, home, rank, rows)."""


def plan(problem: Problem, *, slots: int = 2, fast: bool = True, floor: int = 1024) -> Plan:
    """Balance inside each node (the published one knows a single NVLink domain), by `quotas`.

    Args:
        slots: guests that a rank may have; fewer where `room_P` has not the bytes. An expert that the rank holds is
            no guest: it takes no slot and no transfer.
        fast: see `quotas`.
        floor: see `quotas`.

    Traps: the fast mode raises its peak in steps of 1 % of the busiest rank's load, which at extreme skew is far more
    than it needs; the floors keep the last piece of an expert at home; without the fast mode, or where it fails,
    batches with less than `floor` rows above the mean stay as they are.
    """
    loads_E, home_E = problem.loads_E.tolist(), problem.home_E.tolist()
    slots_P = [min(slots, room // max(1, problem.expert_bytes)) for room in problem.room_P.tolist()]
    held = {(int(e), int(p)) for p, e in np.argwhere(problem.holds_PE)}
    rows_EP = np.zeros((problem.experts, problem.ranks), dtype=np.int64)
    rows_EP[np.arange(problem.experts), problem.home_E] = problem.loads_E
    moves: list[Move] = []
    for ranks in nodes(problem):
        for expert, home, rank, rows in quotas(loads_E, home_E, ranks, slots_P, held, fast=fast, floor=floor):
            rows_EP[expert, home] -= rows
            rows_EP[expert, rank] += rows
            moves.append((expert, home, rank))
    return whole_plan("ultraep", problem, rows_EP, moves)


def quotas(
    loads_E: Sequence[int],
    home_E: Sequence[int],
    ranks: Sequence[int],
    slots_P: Sequence[int],
    held: set[tuple[int, int]] | frozenset[tuple[int, int]] = frozenset(),
    *,
    fast: bool = True,
    floor: int = 1024,
) -> list[Given]:
    """What these ranks give one another, in sending order, so that none has more than the lowest peak that is found.

    The fast mode tries 1.01 times the mean, then twice 1 % of the busiest rank's load more; a piece has at least an
    even share of what its home has to give, over the ranks that can take it. If these fail (the published code stops
    there), or without it, pieces have at least `floor` rows: first at the lowest peak that pieces of any size
    could reach, then by bisection, four peaks at a time. `held`: (expert, rank) that need no slot.
    O(tries * pieces * P).

    Rank 0 has 12 of 14 rows. Of a peak of 6 (1.01 times the mean of 5, rounded up), it gives its largest expert to the
    emptiest rank:

    >>> quotas([8, 4, 2, 0], [0, 0, 1, 2], [0, 1, 2], [1, 1, 1])
    [(0, 0, 2, 6)]
    """
    experts_P = {r: sorted(experts, key=lambda e: -loads_E[e]) for r, experts in at_home(home_E, ranks).items()}
    loads_P = {r: sum(loads_E[e] for e in experts) for r, experts in experts_P.items()}

    def attempt(peak: int, least: int | None) -> list[Given] | None:
        """The pieces that bring all ranks to the peak, or None; `least` rows each, None: the even share."""
        slack = {r: max(0, peak - loads_P[r]) for r in ranks}
        used = dict.fromkeys(ranks, 0)
        given: list[Given] = []
        if sum(max(0, loads_P[r] - peak) for r in ranks) > sum(slack.values()):
            return None
        for home in sorted(ranks, key=lambda r: -loads_P[r]):
            need = loads_P[home] - peak
            for e in experts_P[home]:
                left = loads_E[e]
                there = {home}
                while need > 0 and left > 0:
                    takers = [
                        r for r in ranks if slack[r] and r not in there and (used[r] < slots_P[r] or (e, r) in held)
                    ]
                    rank = max(takers, key=slack.__getitem__, default=home)
                    rows = min(need, left, slack[rank])
                    if not takers or rows < (-(-need // len(takers)) if least is None else least):
                        break
                    given.append((e, home, rank, rows))
                    slack[rank] -= rows
                    used[rank] += (e, rank) not in held
                    there.add(rank)
                    need -= rows
                    left -= rows
            if need > 0:
                return None
        return given

    low, high = -(-sum(loads_P.values()) // len(ranks)), max(loads_P.values())
    if fast:
        for retry in range(3):
            if (given := attempt(-(-low * 101 // 100) + retry * -(-high // 100), None)) is not None:
                return given
    low, _ = _lowest(low, high, lambda peak: attempt(peak, 1))
    return _lowest(low, high, lambda peak: attempt(peak, floor))[1]


def _lowest(low: int, high: int, attempt: Callable[[int], list[Given] | None]) -> tuple[int, list[Given]]:
    """The lowest peak that bisection finds, and what is given for it; nothing is to be given at `high`."""
    if (given := attempt(low)) is not None:
        return low, given
    best: list[Given] = []
    while high - low > 1:
        for peak in sorted({low + (high - low) * i // 5 for i in range(1, 5)} - {low}):
            if (given := attempt(peak)) is not None:
                high, best = peak, given
                break
            low = peak
    return high, best
