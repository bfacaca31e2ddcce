"""Plans of whole experts, which is what all published planners make: rows for ranks, and experts that move for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .plan import Plan, Transfer, chunks_needed
from .problem import Integers, Problem

Move = tuple[int, int, int]
"""(expert, source, destination)."""


def whole_plan(planner: str, problem: Problem, rows_EP: Integers, moves: Iterable[Move] = ()) -> Plan:
    """The Plan of `rows_EP`, in as many chunks as memory needs.

    A move that says nothing new (its destination holds the expert, or gets it by an earlier move) is left out.
    """
    return Plan(
        planner,
        rows_EP,
        np.zeros(problem.experts, dtype=np.int64),
        tuple(
            Transfer(*move)
            for move in dict.fromkeys(moves)  # each once, in order
            if not problem.holds_PE[move[2], move[0]]
        ),
        chunks_needed(problem, rows_EP.sum(0)),
    )


def native_loads(loads_E: Sequence[int], home_E: Sequence[int], ranks: int) -> list[int]:
    """[P] rows of each rank with every expert at its home."""
    loads_P = [0] * ranks
    for load, home in zip(loads_E, home_E, strict=True):
        loads_P[home] += load
    return loads_P


def nodes(problem: Problem) -> list[list[int]]:
    """The ranks of each node."""
    ranks_N: dict[int, list[int]] = {}
    for rank, node in enumerate(problem.node_P.tolist()):
        ranks_N.setdefault(node, []).append(rank)
    return [ranks_N[node] for node in sorted(ranks_N)]


def at_home(home_E: Sequence[int], ranks: Iterable[int]) -> dict[int, list[int]]:
    """The experts whose home each of these ranks is."""
    experts: dict[int, list[int]] = {rank: [] for rank in ranks}
    for expert, home in enumerate(home_E):
        if home in experts:
            experts[home].append(expert)
    return experts


def holders(holds_PE: Integers) -> list[list[int]]:
    """[E] the ranks that hold each expert, in order."""
    return [np.flatnonzero(column).tolist() for column in np.asarray(holds_PE).T]
