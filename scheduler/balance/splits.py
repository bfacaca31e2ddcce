"""Rows over the ranks that hold the expert, nothing moved: three published ways, compiled, each refined.

Picoseconds. P: ranks, E: experts.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .prices import COLUMNS, EXPERT, MOST, ROW, WIRE, chunks_for, worst_ns


@compiled
def _whole(rates, loads_E, several, holders_EP, count_E, split_EP, rows_P, touched_P, fewest):
    """Each expert with several holders onto one: the one with the `fewest` experts (METRO), or the one that then has
    the least time (TEMPO's seed). Largest first; of equal ones that with fewer rows, then the lower rank.
    """
    row = max(rates[ROW], rates[WIRE])
    for e in several:
        for i in range(count_E[e]):
            p = holders_EP[e, i]
            rows_P[p] -= split_EP[e, p]
            touched_P[p] -= split_EP[e, p] > 0
            split_EP[e, p] = 0
    for e in several:
        best, best_time, best_rows = -1, MOST, MOST
        for i in range(count_E[e]):
            p = holders_EP[e, i]
            time = max(rates[EXPERT] * (touched_P[p] + 1), row * (rows_P[p] + loads_E[e]))
            if fewest:
                time = touched_P[p]
            if time < best_time or (time == best_time and rows_P[p] < best_rows):
                best, best_time, best_rows = p, time, rows_P[p]
        split_EP[e, best] = loads_E[e]
        rows_P[best] += loads_E[e]
        touched_P[best] += 1


@compiled
def _level(several, holders_EP, count_E, split_EP, rows_P, touched_P):
    """Fewer experts on the ranks that have most: whole experts each to another holder, in chains that end at a rank
    which has two fewer. The shortest chains first; the end is optimal, as in any matching.
    """
    ranks = len(rows_P)
    queue = np.empty(ranks, dtype=np.int64)
    came_from, came_with = np.empty(ranks, dtype=np.int64), np.empty(ranks, dtype=np.int64)
    for _ in range(len(several)):
        most = touched_P.max()
        end = 0
        for p in range(ranks):
            came_from[p] = -1
            if touched_P[p] == most:
                queue[end], came_from[p] = p, p
                end += 1
        at, last = 0, -1
        while at < end and last < 0:
            p = queue[at]
            at += 1
            for e in several:
                if split_EP[e, p] == 0:
                    continue
                for i in range(count_E[e]):
                    q = holders_EP[e, i]
                    if came_from[q] < 0 and last < 0:
                        came_from[q], came_with[q] = p, e
                        queue[end] = q
                        end += 1
                        if touched_P[q] <= most - 2:
                            last = q
        if last < 0:
            return
        while came_from[last] != last:
            p, e = came_from[last], came_with[last]
            rows = split_EP[e, p]
            split_EP[e, p], split_EP[e, last] = 0, rows
            rows_P[p] -= rows
            rows_P[last] += rows
            touched_P[p] -= 1
            touched_P[last] += 1
            last = p


@compiled
def _pour(loads_E, several, holders_EP, count_E, split_EP, rows_P, touched_P):
    """Each expert with several holders over them like water, again and again until nothing moves: LPLB's linear
    programme, one expert at a time.
    """
    ranks = len(rows_P)
    order = np.empty(ranks, dtype=np.int64)
    for _ in range(32):
        moved = np.int64(0)
        for e in several:
            n = count_E[e]
            for i in range(n):  # in order of their other rows
                p = holders_EP[e, i]
                rows_P[p] -= split_EP[e, p]
                touched_P[p] -= split_EP[e, p] > 0
                at = i
                while at > 0 and rows_P[order[at - 1]] > rows_P[p]:
                    order[at] = order[at - 1]
                    at -= 1
                order[at] = p
            total, wet = loads_E[e], 0
            while wet < n:  # holders under water
                total += rows_P[order[wet]]
                wet += 1
                if wet == n or total <= rows_P[order[wet]] * wet:
                    break
            level, rest = total // wet, total % wet
            for i in range(n):
                p = order[i]
                rows = level - rows_P[p] + (i < rest) if i < wet else np.int64(0)
                moved += abs(rows - split_EP[e, p])
                split_EP[e, p] = rows
                rows_P[p] += rows
                touched_P[p] += rows > 0
        if moved <= 2 * len(several):
            break


@compiled
def _refine(rates, several, holders_EP, count_E, split_EP, rows_P, touched_P, rounds):
    """Moves rows off the slowest rank to other holders, as long as that makes it faster (TEMPO's local search)."""
    ranks = len(rows_P)
    row = max(rates[ROW], rates[WIRE])
    for _ in range(rounds):
        slow, slow_time = 0, np.int64(-1)
        for p in range(ranks):
            time = max(rates[EXPERT] * touched_P[p], row * rows_P[p])
            if time > slow_time:
                slow, slow_time = p, time
        best_time, best_e, best_p, best_rows = slow_time, -1, -1, np.int64(0)
        for e in several:
            have = split_EP[e, slow]
            if have == 0:
                continue
            for i in range(count_E[e]):
                p = holders_EP[e, i]
                if p == slow:
                    continue
                new = split_EP[e, p] == 0
                half = (rows_P[slow] - rows_P[p]) // 2
                for rows in (have, min(have, half)):
                    if rows <= 0:
                        continue
                    left = max(rates[EXPERT] * (touched_P[slow] - (rows == have)), row * (rows_P[slow] - rows))
                    there = max(rates[EXPERT] * (touched_P[p] + new), row * (rows_P[p] + rows))
                    if max(left, there) < best_time:
                        best_time, best_e, best_p, best_rows = max(left, there), e, p, rows
        if best_e < 0:
            return
        new = split_EP[best_e, best_p] == 0
        gone = split_EP[best_e, slow] == best_rows
        split_EP[best_e, slow] -= best_rows
        split_EP[best_e, best_p] += best_rows
        rows_P[slow] -= best_rows
        rows_P[best_p] += best_rows
        touched_P[slow] -= gone
        touched_P[best_p] += new


@compiled
def with_several_holders(loads_E, holds_PE):
    """The experts with rows that more than one rank holds, most rows first."""
    ranks, experts = holds_PE.shape
    several = np.empty(experts, dtype=np.int64)
    n = 0
    for e in range(experts):
        held = 0
        for p in range(ranks):
            held += holds_PE[p, e]
        if held > 1 and loads_E[e] > 0:
            at = n
            while at > 0 and loads_E[several[at - 1]] < loads_E[e]:
                several[at] = several[at - 1]
                at -= 1
            several[at] = e
            n += 1
    return several[:n]


@compiled
def over_holders(rates, loads_E, holds_PE, several, native_EP, native_rows, native_touched, most_rows_P, best_ns):
    """The best split of the rows over the ranks that hold the experts, if it is better than `best_ns`: its price
    (without `plan_ns`), split_EP, rows_P and touched_P. By water (LPLB), by least time (TEMPO), by fewest experts
    (METRO, made optimal), and native; each refined.
    """
    experts, ranks = native_EP.shape
    holders_EP = np.empty((experts, ranks), dtype=np.int64)
    count_E = np.zeros(experts, dtype=np.int64)
    for e in several:
        for p in range(ranks):
            if holds_PE[p, e]:
                holders_EP[e, count_E[e]] = p
                count_E[e] += 1
    none = np.zeros((0, COLUMNS), dtype=np.int64)
    done_P = np.empty(ranks, dtype=np.int64)
    best_EP, best_rows, best_touched = native_EP, native_rows, native_touched
    for start in range(4):
        rows_P, touched_P, split_EP = native_rows.copy(), native_touched.copy(), native_EP.copy()
        if start == 0:
            _pour(loads_E, several, holders_EP, count_E, split_EP, rows_P, touched_P)
        elif start < 3:
            _whole(rates, loads_E, several, holders_EP, count_E, split_EP, rows_P, touched_P, start == 2)
            if start == 2:
                _level(several, holders_EP, count_E, split_EP, rows_P, touched_P)
        _refine(rates, several, holders_EP, count_E, split_EP, rows_P, touched_P, 2 * ranks)
        ns = worst_ns(rates, rows_P, touched_P, none, np.int64(0), chunks_for(rows_P, most_rows_P), done_P)
        if ns < best_ns:
            best_ns, best_EP, best_rows, best_touched = ns, split_EP, rows_P, touched_P
    return best_ns, best_EP, best_rows, best_touched
