"""How a layer's rows are to travel: the dispatcher and the number of chunks whose modelled time is least.

Integers with explicit tie-breaks: every rank makes the same choice. P: ranks, `tokens_P` one number for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np

from .cost import COUNT_BYTES, Constants, expected_rows, rank_counts, touched

DISPATCHERS = ("all_gather", "all_to_all")  # in the order in which they win ties
DEGREES = (1, 2, 4, 8)


def _ceil_div(value: int, by: int) -> int:
    return -(-value // by)


@dataclass(frozen=True)
class Choice:
    """How a step's MoE layers exchange rows, its time per layer, and every (dispatcher, degree, ns) that was priced."""

    dispatcher: str
    degree: int
    modelled_ns: int
    alternatives: tuple[tuple[str, int, int], ...]


def pipeline_ns(degree: int, dispatch_ns: int, experts_ns: int, combine_ns: int) -> int:
    """Time of a layer in `degree` equal chunks, given the time of each stage of one chunk.

    The schedule that the layer runs: dispatch 0 is posted; then for each chunk c dispatch c+1 is posted, dispatch c
    waited for, the experts run, combine c is posted; at the end all combines are waited for. Dispatches and combines
    share one link and take it in the order in which they were posted; experts run beside it.
    """
    link = arrived = dispatch_ns
    computed = 0
    for chunk in range(degree):
        next_arrived = 0
        if chunk + 1 < degree:
            link = next_arrived = link + dispatch_ns
        computed = max(computed, arrived) + experts_ns
        link = max(link, computed) + combine_ns
        arrived = next_arrived
    return link


def choose_step(
    constants: Constants,
    tokens_P: Sequence[int],
    *,
    row_bytes: int,
    top_k: int,
    experts: int,
    row_bytes_back: int | None = None,
    allowed: Sequence[str] = DISPATCHERS,
    degrees: Sequence[int] = DEGREES,
) -> Choice:
    """The dispatcher and the number of chunks for a step, before any routing is known.

    `all_gather`: all ranks' tokens come in and the partial sums are reduce-scattered out, both padded to the rank with
    the most tokens. `all_to_all`: the counts exchange, then rows out and rows back under uniform routing.

    Args:
        tokens_P: tokens of each rank in this step.
        row_bytes: of one row on its way to the experts, with what travels along (ids, weights).
        row_bytes_back: of one row on its way home; as `row_bytes` unless given.
        allowed: one name forces it.
        degrees: numbers of chunks to consider.

    Returns:
        The smallest modelled time; on a tie fewer chunks, then all_gather.
    """
    tokens_P, top_k, experts = rank_counts(tokens_P, "tokens_P"), index(top_k), index(experts)
    row_bytes = index(row_bytes)
    back = row_bytes if row_bytes_back is None else index(row_bytes_back)
    if not allowed or not set(allowed) <= set(DISPATCHERS):
        raise ValueError(f"allowed is {tuple(allowed)}; choose one or more of {', '.join(DISPATCHERS)}")
    ranks, c = len(tokens_P), constants
    here = _ceil_div(experts, ranks)  # on the rank that has the most
    alternatives = []
    for degree in _check_degrees(degrees):
        chunk_P = [_ceil_div(tokens, degree) for tokens in tokens_P]
        sent_P, received_P = expected_rows(chunk_P, top_k, experts, ranks)
        pairs = _ceil_div(sum(chunk_P) * top_k * here, experts)
        compute = c.experts.time_ns(touched(here, sum(chunk_P), top_k, experts), pairs)
        for dispatcher in (name for name in DISPATCHERS if name in allowed):
            exchange = out = home = 0
            if ranks > 1 and dispatcher == "all_gather":
                rows = (ranks - 1) * max(chunk_P)
                out, home = c.all_gather.time_ns(rows * row_bytes), c.reduce_scatter.time_ns(rows * back)
            elif ranks > 1:
                rows = max(sent_P + received_P)
                exchange = c.small.time_ns((ranks - 1) * experts * COUNT_BYTES)
                out, home = c.all_to_all.time_ns(rows * row_bytes), c.all_to_all.time_ns(rows * back)
            alternatives.append((dispatcher, degree, exchange + pipeline_ns(degree, out, compute, home)))
    best = min(alternatives, key=lambda choice: choice[2])  # the first of equals, so their order is the tie-break
    return Choice(*best, tuple(alternatives))


def choose_degree(
    constants: Constants,
    rows_out_PP: Sequence[Sequence[int]] | np.ndarray,
    *,
    row_bytes_out: int,
    row_bytes_back: int,
    experts_P: Sequence[int],
    pairs_P: Sequence[int],
    degrees: Sequence[int] = DEGREES,
) -> int:
    """In how many chunks to run one all-to-all layer, from the exact loads that the counts exchange gave.

    FSMoE's choice of the pipeline degree, corrected for skew: a collective, and so the layer, ends when its slowest
    member does, so each stage takes as long as on the rank that has the most of it, not as on the mean one. Each chunk
    streams the weights of the same experts again, which a purely linear cost would hide.

    Args:
        rows_out_PP: rows from each rank (first index) to each; what stays at home (the diagonal) costs nothing.
        experts_P: experts with at least one row, on each rank.
        pairs_P: (token, expert) pairs that each rank computes.

    Returns:
        The degree with the smallest modelled time; on a tie the smallest.
    """
    matrix = np.asarray(rows_out_PP)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or matrix.dtype.kind not in "iu" or matrix.min() < 0:
        raise ValueError("rows_out_PP must be a square matrix of counts, a row for each sending rank")
    matrix = matrix.astype(np.int64)  # a copy
    np.fill_diagonal(matrix, 0)
    busiest = int(max(matrix.sum(0).max(), matrix.sum(1).max()))
    experts_P, pairs_P = rank_counts(experts_P, "experts_P"), rank_counts(pairs_P, "pairs_P")
    if not len(matrix) == len(experts_P) == len(pairs_P):
        raise ValueError(f"experts_P has {len(experts_P)} and pairs_P {len(pairs_P)} ranks, not {len(matrix)}")

    def time_ns(degree: int) -> int:
        rows_P = [_ceil_div(pairs, degree) for pairs in pairs_P]
        # A chunk touches the same experts as the whole, unless it has too few rows for that. The cost is the larger of
        # two terms, so the largest of all ranks is that of the two terms' largest.
        compute = constants.experts.time_ns(max(map(min, experts_P, rows_P)), max(rows_P))
        out = home = 0
        if len(matrix) > 1:
            rows = _ceil_div(busiest, degree)
            out = constants.all_to_all.time_ns(rows * index(row_bytes_out))
            home = constants.all_to_all.time_ns(rows * index(row_bytes_back))
        return pipeline_ns(degree, out, compute, home)

    return min(_check_degrees(degrees), key=time_ns)  # ascending, and min takes the first of equals


def _check_degrees(degrees: Sequence[int]) -> list[int]:
    """Each once, ascending."""
    checked = sorted({index(degree) for degree in degrees})
    if not checked or checked[0] < 1:
        raise ValueError(f"degrees is {tuple(degrees)}; give one or more numbers from 1 up")
    return checked
