"""LLEP, least-loaded expert parallelism (Salesforce, arXiv 2601.17111): rows above the mean to the least loaded rank.

As published, with its traps: the reference to beat. P: ranks, E: experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from .plan import Plan
from .problem import Problem
from .whole import Move, native_loads, whole_plan

Segments = list[tuple[int, int, int]]
"""(rank, start, end) of an expert's rows in the order of their sources: rank 0's first."""


def plan(
    problem: Problem, *, alpha: Fraction = Fraction(1), m: int = 1024, lambda_: Fraction = Fraction(13, 10)
) -> Plan:
    """Plain expert parallelism where its busiest rank has less than `lambda_` times the mean, else `assign`'s plan.

    The ratio is of loads of ranks, as in the published code (the paper writes loads of experts). The three constants
    are the paper's; its code has alpha 1.1 and no lambda.

    Traps, all kept: `m` sends small excess away all the same, so that small batches have many transfers and stay
    uneven; a rank is no target because it holds the expert (but what it holds is not sent there), nor because it is on
    the same node; nothing looks at `room_P`, so a plan may break that rule of `plan.check`; and a weight that goes
    twice to one rank is one transfer here, as a plan cannot say it, so the modelled time is kinder than the real one
    (`assign` has both).
    """
    loads_E, home_E = problem.loads_E.tolist(), problem.home_E.tolist()
    rows_EP = np.zeros((problem.experts, problem.ranks), dtype=np.int64)
    loads_P = native_loads(loads_E, home_E, problem.ranks)
    if max(loads_P, default=0) * problem.ranks < lambda_ * sum(loads_P):
        rows_EP[np.arange(problem.experts), problem.home_E] = problem.loads_E
        return whole_plan("llep", problem, rows_EP)
    segments_E, moves = assign(loads_E, home_E, problem.ranks, alpha=alpha, m=m)
    for expert, segments in enumerate(segments_E):
        for rank, start, end in segments:
            rows_EP[expert, rank] += end - start
    return whole_plan("llep", problem, rows_EP, moves)


def assign(
    loads_E: Sequence[int], home_E: Sequence[int], ranks: int, *, alpha: Fraction = Fraction(1), m: int = 1024
) -> tuple[list[Segments], list[Move]]:
    """Segments of each expert, and the transfers in sending order, with those that are sent twice.

    Experts by load, the largest first. A rank has `alpha` times the mean to give, and what of its own experts is still
    to come counts as taken. An expert 1. stays where it fits; 2. fills what its home has left, and the rest goes to
    the least loaded ranks; 3. leaves a full home altogether. A chunk of less than `m` rows is not given, unless
    it ends the expert; what nobody takes is forced on the least loaded rank that is not the home.
    O(E log E + chunks * P log P).

    Two experts each on two ranks: expert 0 fills its home up to 6 less the 1 of expert 1.

    >>> assign([10, 1, 1, 0], [0, 0, 1, 1], 2, m=1)
    ([[(0, 0, 5), (1, 5, 10)], [(0, 0, 1)], [(1, 0, 1)], []], [(0, 0, 1)])

    With chunks of at least 4 rows no other rank has room for as many; the least loaded one gets all the rest, and its
    own expert has to leave it.

    >>> assign([8, 2, 2], [0, 1, 2], 3, m=4)
    ([[(0, 0, 4), (1, 4, 8)], [(2, 0, 2)], [(2, 0, 2)]], [(0, 0, 1), (1, 1, 2)])
    """
    mean = sum(loads_E) // ranks
    cap = max(1, int(alpha * mean) if mean else sum(loads_E))
    assigned, pending = [0] * ranks, native_loads(loads_E, home_E, ranks)
    segments_E: list[Segments] = [[] for _ in loads_E]
    moves: list[Move] = []

    def room(rank: int) -> int:
        return cap - assigned[rank] - pending[rank]

    def others(home: int) -> list[tuple[int, int]]:
        """(rank, room), the least loaded first."""
        return sorted(((r, room(r)) for r in range(ranks) if r != home), key=lambda pair: -pair[1])

    for e in sorted((e for e, load in enumerate(loads_E) if load), key=lambda e: -loads_E[e]):
        n, home = loads_E[e], home_E[e]
        pending[home] -= n
        chunks: list[tuple[int, int]] = []
        free = room(home)
        if free >= n or ranks == 1:
            _give(home, n, chunks, assigned)
        elif free > 0:
            left = n - _give(home, free, chunks, assigned)
            while left:
                order = others(home)
                rank, rows = next(_wanted(order, left, m), (order[0][0], left))
                left -= _give(rank, rows, chunks, assigned)
        else:
            left, order = n, others(home)  # once for all chunks
            for pair in order:
                for rank, rows in _wanted([pair], left, m):
                    left -= _give(rank, rows, chunks, assigned)
            if left:
                _give(order[0][0], left, chunks, assigned)
        moves += [(e, home, rank) for rank, _ in chunks if rank != home]
        start = 0
        for rank, rows in chunks:
            segments_E[e].append((rank, start, start + rows))
            start += rows
    return segments_E, moves


def _wanted(order: Sequence[tuple[int, int]], left: int, m: int) -> Iterator[tuple[int, int]]:
    """(rank, rows) of the chunks that are worth giving, one for each rank with room."""
    for rank, room in order:
        rows = min(left, room)
        if rows > 0 and (rows >= m or rows == left):
            yield rank, rows


def _give(rank: int, rows: int, chunks: list[tuple[int, int]], assigned: list[int]) -> int:
    chunks.append((rank, rows))
    assigned[rank] += rows
    return rows
