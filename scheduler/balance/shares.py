"""From a plan's totals to each source rank's part: how many of its rows of an expert go to which rank.

Rows stay at home where they can, else on their node, else they go where there is room, in order of ranks. Decided by
the counts and the plan alone: every rank knows where every other sends, without asking.

P: ranks, E: experts, Q: destinations, the ranks and then an expert's slice group (P + 1 of them).
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import numpy as np

from .plan import Plan
from .problem import Integers, Problem


def own_shares(problem: Problem, plan: Plan, source: int) -> Integers:
    """[E, P + 1] rows of `source`'s own tokens for each destination; the last one is the expert's slice group.

    Over all sources they add up to `plan.rows_EP` and `plan.sliced_E`. UltraEP's locality-first order.
    """
    ranks, experts = problem.ranks, problem.experts
    supply_EP = problem.rows_PE.T.copy()
    demand_EQ = np.concatenate([plan.rows_EP, plan.sliced_E[:, None]], axis=1)
    taken_EQ = np.zeros((experts, ranks + 1), dtype=np.int64)

    home_EP = np.minimum(supply_EP, demand_EQ[:, :ranks])
    supply_EP -= home_EP
    demand_EQ[:, :ranks] -= home_EP
    taken_EQ[:, source] = home_EP[:, source]

    nodes = np.unique(problem.node_P)
    for inside in [problem.node_P == node for node in nodes] if len(nodes) > 1 else []:
        columns = np.flatnonzero(inside)
        given, received, own = _match(
            supply_EP[:, columns], demand_EQ[:, columns], int((columns < source).sum()) if inside[source] else None
        )
        supply_EP[:, columns] -= given
        demand_EQ[:, columns] -= received
        if own is not None:
            taken_EQ[:, columns] += own
    _, _, own = _match(supply_EP, demand_EQ, source)
    assert own is not None
    return taken_EQ + own


def _match(supply_ES: Integers, demand_EQ: Integers, source: int | None) -> tuple[Integers, Integers, Integers | None]:
    """Lays supplies and demands of each expert side by side, in order: what each gives, gets, and one source's part."""
    supply_ends, demand_ends = supply_ES.cumsum(1), demand_EQ.cumsum(1)
    matched_E = np.minimum(supply_ends[:, -1:], demand_ends[:, -1:])
    given = np.diff(np.minimum(supply_ends, matched_E), prepend=0)
    received = np.diff(np.minimum(demand_ends, matched_E), prepend=0)
    if source is None:
        return given, received, None
    high = np.minimum(supply_ends[:, source : source + 1], matched_E)
    low = high - given[:, source : source + 1]
    own = np.minimum(high, demand_ends) - np.maximum(low, demand_ends - demand_EQ)
    return given, received, np.maximum(own, 0)


@lru_cache(maxsize=65536)
def mixing_step(rows: int) -> int:
    """A step near rows / golden ratio that visits each of `rows` places once when taken again and again.

    Taking an expert's rows in this order spreads each destination's share over all tokens, so that every chunk of
    them has work for every rank.
    """
    if rows < 3:
        return 1
    step = max(1, rows * 618034 // 1000000)
    while gcd(step, rows) != 1:
        step += 1
    return step
