"""MoonEP (MoonshotAI/MoonEP): every rank gets exactly the mean; a receiver is filled from one rank only.

P: ranks, E: experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .plan import Plan
from .problem import Problem
from .whole import Move, at_home, nodes, whole_plan


def plan(problem: Problem) -> Plan:
    """Exact balance inside each node (the published one knows a single NVLink domain), by `fill`.

    Traps: it balances to the last row, whatever a transfer costs, and splits experts that are too small for it; there
    is no way back to plain expert parallelism. A rank needs room for as many guests as another is home to experts;
    where `room_P` is less, the plan breaks that rule of `plan.check`. Replicas that exist count for nothing, but what a
    rank holds is not sent there.
    """
    loads_E, home_E = problem.loads_E.tolist(), problem.home_E.tolist()
    rows_EP = np.zeros((problem.experts, problem.ranks), dtype=np.int64)
    rows_EP[np.arange(problem.experts), problem.home_E] = problem.loads_E
    moves: list[Move] = []
    for ranks in nodes(problem):
        for expert, home, rank, rows in fill(loads_E, home_E, ranks):
            rows_EP[expert, home] -= rows
            rows_EP[expert, rank] += rows
            moves.append((expert, home, rank))
    return whole_plan("moonep", problem, rows_EP, moves)


def fill(loads_E: Sequence[int], home_E: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(expert, home, rank, rows) that these ranks give one another, in sending order.

    First quotas: the busiest rank fills the emptiest one completely, until none is above the mean. A rank that has
    given more than it had too much is filled later, so each is filled once at most, from one rank. Then each home, for
    its largest quota first, gives of its fullest experts. The mean is of these ranks' own rows; where it is no integer,
    the busiest ranks keep one more. O(P^2 + moves * (E / P + P)).

    Rank 0 has 14 rows, 9 too many, and fills rank 2 with 5 and rank 1 with 4; the second takes two experts to fill.

    >>> fill([8, 6, 1, 0], [0, 0, 1, 2], [0, 1, 2])
    [(0, 0, 2, 5), (1, 0, 1, 4)]
    >>> fill([3, 3, 3, 3], [0, 0, 0, 0], [0, 1])
    [(0, 0, 1, 3), (1, 0, 1, 3)]
    """
    experts_P = at_home(home_E, ranks)
    loads_P = {r: sum(loads_E[e] for e in experts_P[r]) for r in ranks}
    mean, rest = divmod(sum(loads_P.values()), len(ranks))
    one_more = sorted(ranks, key=lambda r: -loads_P[r])[:rest]
    excess = {r: loads_P[r] - mean - (r in one_more) for r in ranks}
    quotas: dict[int, dict[int, int]] = {r: {} for r in ranks}
    while any(excess.values()):
        home, rank = max(ranks, key=excess.__getitem__), min(ranks, key=excess.__getitem__)
        quotas[home][rank] = -excess[rank]
        excess[home] += excess[rank]
        excess[rank] = 0

    given = []
    for home in ranks:
        left = {e: loads_E[e] for e in experts_P[home]}
        while any(quotas[home].values()):
            rank = max(sorted(quotas[home]), key=quotas[home].__getitem__)
            expert = max(left, key=left.__getitem__)
            rows = min(left[expert], quotas[home][rank])
            left[expert] -= rows
            quotas[home][rank] -= rows
            given.append((expert, home, rank, rows))
    return given
