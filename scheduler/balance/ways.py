"""The ways in which weights can move, compiled: for each a search for the least goal that an attempt reaches.

Picoseconds. P: ranks, E: experts.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .groups import OVER_BOTH
from .moving import attempt
from .moving_state import LEFT, MOST_ROWS, ROWS, S_EXPERT, S_NEXT, S_RANK, S_ROWS, TOUCHED, Aim, Segments, new_state
from .prices import BASE, MOST, NODES, PS, T_DESTINATION, T_ROWS, chunks_for, copy, worst_ns

SLICES, QUANTUM, LATER, POOLED, RELIEF, DEPTH = range(6)
WAYS = np.array(
    [
        (0, 0, 0, 0, 0, 0),
        (0, 0, 0, 1, 0, 0),
        (1, 0, 0, 1, 0, 0),
        (3, 0, 0, 1, 0, 0),
        (1, 0, 0, 0, 0, 0),
        (1, 1, 0, 1, 0, 0),
        (1, 2, 0, 1, 0, 0),
        (2, 0, 0, 1, 0, 0),
        (3, 0, 2, 1, 0, 0),
        (1, 0, 2, 1, 0, 0),
        (1, 0, 4, 1, 0, 0),
        (1, 0, 5, 1, 0, 0),
        (2, 0, 3, 1, 0, 0),
        (0, 1, 0, 1, 0, 0),
        (0, 2, 0, 1, 0, 0),
        (2, 1, 0, 1, 0, 0),
        (2, 0, 2, 1, 0, 0),
        (1, 1, 2, 1, 0, 0),
        (1, 0, 1, 1, 0, 0),
        (1, 0, 3, 1, 0, 0),
        (2, 0, 0, 0, 0, 0),
        (0, 3, 0, 1, 0, 0),
        (1, 0, 0, 1, 2, 1),
        (1, 0, 0, 1, 3, 1),
        (1, 0, 0, 1, 4, 1),
        (1, 0, 0, 1, 2, 2),
        (1, 0, 0, 1, 3, 2),
        (1, 0, 0, 1, 4, 2),
        (1, 0, 0, 1, 6, 1),
        (0, 0, 0, 1, 2, 1),
        (0, 0, 0, 1, 2, 2),
        (2, 0, 0, 2, 0, 0),
        (2, 1, 0, 2, 0, 0),
        (2, 2, 0, 2, 0, 0),
        (3, 0, 0, 2, 0, 0),
        (2, 0, 2, 2, 0, 0),
    ],
    dtype=np.int64,
)
"""How weights move, in the columns above: whole experts, and slices (`groups.OVER_ONE`, `OVER_BOTH`, `OVER_ALL`); one
transfer brings at most 1/2 ** QUANTUM of the goal (0: no limit); slices only after LATER eighths of it; POOLED: whether
a node sends away what it has too much of together, so that a rank can give more than it must and then take from others
(1), and from there by bundles only with slices that near links bring, too (2); how many helpers of each rank lose work
of their own first (RELIEF), for each of the first DEPTH experts that it sends.
"""

BEST, TRIES = 8, 120
"""All ways are tried as they are, then with choices weighed as if by chance (`moving_state.mixed`): first all, those
that came nearest at the head; then, if that was of use, only so many of these, so often in all.
"""
LEAST_BUDGET = 350_000
BUDGET_PER_PAIR = 26
"""How long the search looks, in steps that are counted, so that all ranks stop at the same place: for each pair of an
expert and a rank, and at least so many; twice that with several nodes, which have more ways. About 250 steps take a
microsecond.
"""


@compiled
def _segments(split_EP, rows_P, touched_P):
    """The segments of a split over the ranks that hold the experts, by rank."""
    experts, ranks = split_EP.shape
    size = 0
    for e in range(experts):
        for p in range(ranks):
            size += split_EP[e, p] > 0
    rows_S = np.empty((4, size), dtype=np.int64)
    first_P = np.zeros(ranks + 1, dtype=np.int64)
    last_E = np.full(experts, -1)
    end = 0
    for p in range(ranks):
        for e in range(experts):
            if split_EP[e, p] > 0:
                rows_S[S_EXPERT, end], rows_S[S_RANK, end], rows_S[S_ROWS, end] = e, p, split_EP[e, p]
                rows_S[S_NEXT, end] = end
                if last_E[e] >= 0:
                    rows_S[S_NEXT, end] = rows_S[S_NEXT, last_E[e]]
                    rows_S[S_NEXT, last_E[e]] = end
                last_E[e] = end
                end += 1
        first_P[p + 1] = end
    return Segments(rows_S, first_P, rows_P, touched_P)


@compiled
def _next_goal(turn, step, low, high, mean):
    """A goal to try; 0 where there is nothing to learn from one."""
    if turn and step == 0:  # one look whether this way is better at all
        return max(mean + mean // 250, high - high // (50 if turn < len(WAYS) else 100))
    if step < 2:
        goal = mean + mean // (250 if step == 0 else 80)
        return goal if goal < high else np.int64(0)
    return low + (high - low) // (8 if high > 4 * low else 4 if high > 2 * low else 2)


@compiled
def by_transfers(split_EP, rows_P, touched_P, layer, mean, best_ns, budget, spent, best_split_EP, best_transfers):
    """Weights that move, from one split of the rows over the ranks that hold the experts: for each of WAYS, bisection
    on a goal for the slowest rank (UltraEP's idea, with time for tokens), from the mean of all work up for the first
    way, from what is best so far down for the others.

    Returns the best price (without `plan_ns`), its number of transfers (-1: nothing better than `best_ns`) and chunks;
    the plan is left in `best_split_EP` and `best_transfers`. No attempt begins when `spent` has come to `budget`.
    """
    experts, ranks = split_EP.shape
    rates = layer.rates
    segments = _segments(split_EP, rows_P, touched_P)
    rows_S = segments.rows_S
    state = new_state(ranks, experts, rates[NODES], rows_S.shape[1], len(best_transfers))
    at_P, segs_S, transfers, most_rows_P = state.at_P, state.segs_S, state.transfers, layer.about_P[MOST_ROWS]
    best_left = rows_S[S_ROWS].copy()
    received = np.empty(ranks, dtype=np.int64)
    done_P = np.empty(ranks, dtype=np.int64)
    stamp = np.int64(0)
    best_count, chunks = np.int64(-1), np.int64(1)
    reached_W = np.full(len(WAYS), MOST)
    order_W = np.arange(len(WAYS))
    for turn in range(len(WAYS) + TRIES):
        way, seed = turn, np.int64(0)
        if turn >= len(WAYS):
            if turn == len(WAYS):
                order_W = np.argsort(reached_W, kind="mergesort")
            if spent[0] >= budget or (best_count < 0 and turn >= 2 * len(WAYS)):
                break
            if turn < 2 * len(WAYS):
                way = order_W[turn - len(WAYS)]
                seed = np.int64(len(WAYS) + way)
            else:
                way, seed = order_W[turn % BEST], np.int64(turn)
        if rates[NODES] == 1 and (WAYS[way, SLICES] == OVER_BOTH or way == 1 or (way and WAYS[way, POOLED] != 1)):
            continue  # the same as another
        low, high = mean, (best_ns - rates[BASE]) * PS
        for step in range(14):
            if high - low <= high // (200 if turn else 500) or spent[0] >= budget:
                break
            goal = _next_goal(turn, step, low, high, mean)
            if goal == 0:
                continue
            stamp += 1
            quantum = goal >> WAYS[way, QUANTUM] if WAYS[way, QUANTUM] else MOST
            aim = Aim(
                goal,
                quantum,
                WAYS[way, SLICES],
                goal * WAYS[way, LATER] // 8,
                WAYS[way, POOLED],
                WAYS[way, RELIEF],
                WAYS[way, DEPTH],
                seed,
            )
            count = attempt(aim, layer, segments, state, stamp, spent)
            if count < 0:
                break
            copy(at_P[ROWS], received)
            for i in range(count):
                received[transfers[i, T_DESTINATION]] += transfers[i, T_ROWS]
            trial_chunks = chunks_for(received, most_rows_P)
            ns = worst_ns(rates, at_P[ROWS], at_P[TOUCHED], transfers, count, trial_chunks, done_P)
            reached_W[way] = min(reached_W[way], ns)
            if ns < best_ns:
                best_ns, chunks, best_count = ns, trial_chunks, count
                for i in range(count):
                    copy(transfers[i], best_transfers[i])
                copy(segs_S[LEFT], best_left)
            if (ns - rates[BASE]) * PS <= goal + PS:
                high = min(goal, (ns - rates[BASE]) * PS)
            else:
                low = goal
                if turn and step == 0:
                    break
    if best_count >= 0:
        for e in range(experts):
            copy(split_EP[e], best_split_EP[e])
        for s in range(len(best_left)):
            best_split_EP[rows_S[S_EXPERT, s], rows_S[S_RANK, s]] = best_left[s]
    return best_ns, best_count, chunks
