"""Tokens of shared experts go from slow ranks to fast ones: the stage of the priced planner after its search.

Every rank has the shared experts' weights, so that a rank with few routed rows can compute them for the tokens of
another: two exchanges of hidden vectors, and no weights. P: ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from .model import RoutedWork, cost_ns, routed_work, times_with_shared
from .plan import Plan, SharedMove, native
from .problem import PS, Problem


def filled(problem: Problem, found: Plan) -> Plan:
    """The fastest of doing nothing, of the plan that was found, and of each with shared tokens moved.

    The first of equals. `modelled_ns` and `native_ns` are filled in, with the time of shared experts.
    """
    starts = [native(problem)] if found.is_native else [native(problem), found]
    plans, prices = [], []
    for start in starts:
        work_P = routed_work(problem, start)
        for plan in (start, with_moves(problem, start, work_P)):
            plans.append(plan)
            prices.append(cost_ns(problem, plan) + max(times_with_shared(problem, plan, work_P)))
    best_ns = min(prices)
    return replace(plans[prices.index(best_ns)], modelled_ns=best_ns, native_ns=prices[0])


def with_moves(problem: Problem, plan: Plan, work_P: list[RoutedWork]) -> Plan:
    """The plan with the fewest shared tokens moved with which its slowest rank is as early as moves can make it.

    By bisection on a goal, to a thousandth: ranks above it give tokens away, those below have room for some. What the
    moves cost altogether (`Rates.shared_ns`) is not looked at here. `work_P` is the plan's `routed_work`.
    """
    ranks, rates = range(problem.ranks), problem.rates
    gain_ps, cost_ps = rates.shared_ps - rates.shared_wire_ps, rates.shared_ps + rates.shared_wire_ps
    if gain_ps <= 0 or not problem.tokens_P.any():
        return plan
    tokens_P, most_P = problem.tokens_P.tolist(), problem.most_rows_P.tolist()
    done_P = [work_P[p].ps + rates.shared_ps * tokens_P[p] for p in ranks]

    def leaving(goal_ps: int) -> list[int]:
        return [max(0, -(-(done_P[p] - goal_ps) // gain_ps)) for p in ranks]

    def room(goal_ps: int) -> list[int]:
        return [min(most_P[p], max(0, goal_ps - done_P[p]) // cost_ps) for p in ranks]

    def possible(goal_ps: int) -> bool:
        leaving_P = leaving(goal_ps)
        return all(leaving_P[p] <= tokens_P[p] for p in ranks) and sum(leaving_P) <= sum(room(goal_ps))

    last_ps = max(work.last_ps for work in work_P)  # guests that come late: nothing is won below that
    high = -(-max(*done_P, last_ps) // PS)
    low = -(-max(sum(done_P) // problem.ranks, last_ps) // PS)
    while high - low > high // 1000:
        middle = (low + high) // 2
        if possible(middle * PS):
            high = middle
        else:
            low = middle + 1
    return replace(plan, shared=_paired(leaving(high * PS), room(high * PS), problem.node_P.tolist()))


def _paired(leaving_P: list[int], room_P: list[int], node_P: Sequence[int]) -> tuple[SharedMove, ...]:
    """Who computes for whom: within a node first, then lower ranks first."""
    moves: dict[tuple[int, int], int] = {}
    sources = [p for p, tokens in enumerate(leaving_P) if tokens]
    destinations = [p for p, tokens in enumerate(room_P) if tokens]
    for far in (False, True):
        for source, destination in product(sources, destinations):
            tokens = min(leaving_P[source], room_P[destination])
            if tokens and (node_P[source] != node_P[destination]) == far:
                leaving_P[source] -= tokens
                room_P[destination] -= tokens
                moves[source, destination] = tokens
    assert not any(leaving_P), "shared tokens without a place"
    return tuple(SharedMove(*pair, tokens) for pair, tokens in sorted(moves.items()))
