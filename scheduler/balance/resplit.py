"""Re-split: rows of experts with several holders are divided anew so that the busiest rank has fewest rows.

The lever of LPLB (deepseek-ai/LPLB), whose linear program is solved here by edge balance. P: ranks, E: experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .plan import Plan
from .problem import Integers, Problem
from .whole import holders, native_loads, whole_plan

_SWEEPS = 200
"""Enough for all but the longest chains of replicas; a few are usual."""


def plan(problem: Problem) -> Plan:
    """Fewest rows on the busiest rank, with the weights where they are. Moves nothing.

    Traps: rows are all it looks at. Below about 160 rows of an expert every further replica that gets rows costs a
    streaming of the expert's weights and wins nothing.
    """
    rows_EP = balance(problem.loads_E.tolist(), problem.holds_PE, problem.home_E.tolist())
    return whole_plan("resplit", problem, rows_EP)


def balance(loads_E: Sequence[int], holds_PE: Integers, home_E: Sequence[int], sweeps: int = _SWEEPS) -> Integers:
    """[E, P] rows, by edge balance (a note of Lyu and Peng, 2026, on LPLB's program).

    There, an expert has two holders, and half the difference of their loads goes over to the lighter one, as far as
    there are rows, again and again for all experts. Here it may have any number: its rows are poured over its holders
    so that the lowest ones rise to one level, which is the same for two. A sweep does all experts, and the next one
    goes backwards; it ends when no rank's share of an expert changed by more than one row, or after `sweeps`.

    Each step lowers the sum of squared loads, whose minimum has the lowest peak too; the steps are of whole rows, so a
    chain of n replicas may stay n rows uneven. O(sweeps * replicas * log P).

    Rank 0 shares expert 0 with rank 1, which shares expert 1 with rank 2: of 900 rows each gets 300, or one more or
    less.

    >>> balance([600, 300, 0], np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]]), [0, 1, 2]).T.tolist()
    [[301, 0, 0], [299, 1, 0], [0, 299, 0]]
    """
    ranks = len(holds_PE)
    rows_EP = np.zeros((len(loads_E), ranks), dtype=np.int64)
    loads_P = native_loads(loads_E, home_E, ranks)
    shared = [(e, ranks_e) for e, ranks_e in enumerate(holders(holds_PE)) if len(ranks_e) > 1 and loads_E[e]]
    shares = {e: [loads_E[e] if rank == home_E[e] else 0 for rank in ranks_e] for e, ranks_e in shared}
    for _ in range(sweeps):
        changed = 0
        for e, ranks_e in shared:
            old = shares[e]
            new = shares[e] = pour(loads_E[e], [loads_P[p] - rows for p, rows in zip(ranks_e, old, strict=True)])
            for p, before, after in zip(ranks_e, old, new, strict=True):
                loads_P[p] += after - before
                changed = max(changed, abs(after - before))
        if changed <= 1:
            break
        shared.reverse()
    for e, load in enumerate(loads_E):
        rows_EP[e, home_E[e]] = load
    for e, ranks_e in shared:
        rows_EP[e, ranks_e] = shares[e]
    return rows_EP


def pour(rows: int, loads: Sequence[int]) -> list[int]:
    """What each of several ranks gets of `rows`: the least loaded rise to one level, the first of them by one more
    where it does not divide. A rank that would get a single row or two for no lower peak gets none.

    >>> pour(10, [7, 1, 4])
    [0, 7, 3]
    """
    order = sorted(range(len(loads)), key=lambda i: loads[i])
    total = rows  # of the ranks that get some, when all is poured
    for count, i in enumerate(order):
        if count and total < count * (loads[i] + 1):
            break
        total += loads[i]
    else:
        count = len(order)
    level, rest = divmod(total, count)
    given = [0] * len(loads)
    for i in sorted(order[:count]):
        given[i] = level - loads[i] + (rest > 0)
        rest -= 1
    return given
