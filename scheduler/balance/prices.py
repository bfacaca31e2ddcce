"""The model's price of a plan in the making, compiled: the same numbers as `model`, which says what they mean.

Times are picoseconds where nothing else is said; links are reckoned in nanoseconds. P: ranks, E: experts.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled

BASE, EXPERT, ROW, WIRE, NEAR_ALPHA, NEAR_RATE, FAR_ALPHA, FAR_RATE, HIDDEN, GUEST, PLAN = range(11)
"""Places of `Rates` in an array."""
MOST_PARTS, EXPERT_BYTES, NODES = range(11, 14)
"""Behind them, in `search`: into how many parts an expert may be cut, its bytes, and the number of nodes."""
FS = 1_000_000
PS = 1000
MOST = np.int64(1) << 60
ZERO, ONE = np.int64(0), np.int64(1)
"""For arguments: numba compiles a function again for a literal."""

# Columns of a transfer in the making.
T_EXPERT, T_SOURCE, T_DESTINATION, T_PART, T_PARTS, T_ROWS, T_ARRIVAL, T_SEGMENT = range(8)
COLUMNS = 8


@compiled
def copy(values, into):
    """Assigning a slice compiles to a hundred times as much code."""
    for i in range(len(values)):
        into[i] = values[i]


@compiled
def link_ns(expert_bytes, parts, alpha, rate):
    size = -(-expert_bytes // parts)
    return alpha + -(-(size * rate) // FS)


@compiled
def guest_ps(rates, rows, parts, chunks):
    """Work of a guest; as `model.guest_ps`."""
    streaming = -(-(rates[EXPERT] * chunks) // parts)
    computing = -(-(rates[ROW] * rows) // parts)
    return max(streaming, computing, rates[WIRE] * rows) + rates[GUEST] * PS * chunks


@compiled
def times(rates, hidden_row, held_rows_P, held_touched_P, transfers, count, chunks, done_P):
    """Fills done_P with each rank's picoseconds after `base`; the same as `model.rank_times`."""
    ranks = len(held_rows_P)
    for p in range(ranks):
        done_P[p] = max(rates[EXPERT] * held_touched_P[p] * chunks, hidden_row * held_rows_P[p])
    order = np.empty(count, dtype=np.int64)  # by arrival; of equal ones as they are sent
    for i in range(count):
        at = i
        while at > 0 and transfers[order[at - 1], T_ARRIVAL] > transfers[i, T_ARRIVAL]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i
    for i in order:
        rows = transfers[i, T_ROWS]
        if rows > 0:
            d = transfers[i, T_DESTINATION]
            arrival = max(np.int64(0), transfers[i, T_ARRIVAL] - rates[HIDDEN]) * PS
            done_P[d] = max(done_P[d], arrival) + guest_ps(rates, rows, transfers[i, T_PARTS], chunks)


@compiled
def worst_ns(rates, held_rows_P, held_touched_P, transfers, count, chunks, done_P):
    """The price without `plan_ns`."""
    times(rates, max(rates[ROW], rates[WIRE]), held_rows_P, held_touched_P, transfers, count, chunks, done_P)
    worst = np.int64(0)
    busy = False
    for p in range(len(done_P)):
        worst = max(worst, -(-done_P[p] // PS))
        busy = busy or held_touched_P[p] > 0
    for i in range(count):
        busy = busy or transfers[i, T_ROWS] > 0
    return worst + (rates[BASE] * chunks if busy else 0)


@compiled
def arrive(rates, expert_bytes, node_P, holds_PE, transfers, count):
    """Fills the arrivals in; the same as `model.arrivals`."""
    ranks, experts = holds_PE.shape
    sending = np.zeros(2 * ranks, dtype=np.int64)  # a node has its number + ranks
    receiving = np.zeros(2 * ranks, dtype=np.int64)
    there = np.zeros((ranks, experts), dtype=np.int64)
    for i in range(count):
        e, s, d = transfers[i, T_EXPERT], transfers[i, T_SOURCE], transfers[i, T_DESTINATION]
        parts = transfers[i, T_PARTS]
        if node_P[s] != node_P[d]:
            out, into = ranks + node_P[s], ranks + node_P[d]
            took = link_ns(expert_bytes, parts, rates[FAR_ALPHA], rates[FAR_RATE])
        else:
            out, into = s, d
            took = link_ns(expert_bytes, parts, rates[NEAR_ALPHA], rates[NEAR_RATE])
        end = max(sending[out], receiving[into], there[s, e]) + took
        sending[out] = end
        receiving[into] = end
        if parts == 1:
            there[d, e] = end
        transfers[i, T_ARRIVAL] = end


@compiled
def chunks_for(rows_P, most_rows_P):
    chunks = np.int64(1)
    for p in range(len(rows_P)):
        chunks = max(chunks, -(-rows_P[p] // most_rows_P[p]))
    return chunks
