"""METRO (arXiv 2512.09277): decode is bound by weights, so let the rank with most active experts have few of them.

E: experts, P: ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .plan import Plan
from .problem import Integers, Problem
from .whole import holders, whole_plan


def plan(problem: Problem) -> Plan:
    """All rows of an expert to one of the ranks that hold it, by `choose`. Moves nothing.

    Traps: rows count for nothing, so it is for small batches only (its authors leave prefill to EPLB); being greedy,
    it takes experts as they come, those without a choice last if they have the highest number.
    """
    loads_E = problem.loads_E.tolist()
    rows_EP = np.zeros((problem.experts, problem.ranks), dtype=np.int64)
    for expert, rank in enumerate(choose(loads_E, problem.holds_PE)):
        if loads_E[expert]:
            rows_EP[expert, rank] = loads_E[expert]
    return whole_plan("metro", problem, rows_EP)


def choose(loads_E: Sequence[int], holds_PE: Integers) -> list[int]:
    """[E] the rank of each active expert, -1 for the others: the holder with fewest active experts so far.

    The published kernel takes all experts at once and locks ranks in their order; here they go by number, and the
    lowest rank wins a tie. Some optimum has every expert on one rank; the paper finds this at most 10.9 % above it.
    O(E P).

    >>> choose([5, 900, 3, 0], np.array([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]]))
    [0, 1, 2, -1]
    """
    active_P = [0] * len(holds_PE)
    chosen = [-1] * len(loads_E)
    for expert, ranks in enumerate(holders(holds_PE)):
        if loads_E[expert]:
            chosen[expert] = rank = min(ranks, key=active_P.__getitem__)
            active_P[rank] += 1
    return chosen
