"""The compiled half of the priced planner: candidate plans, and what each costs by the model.

`splits` has those that move nothing, `ways`, `moving` and `groups` those that move weights, `prices` their price.
Picoseconds where nothing else is said. P: ranks, E: experts, N: nodes.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .moving_state import ALL_ROOM, MOST_ROWS, NODE, Layer
from .prices import (
    COLUMNS,
    EXPERT,
    EXPERT_BYTES,
    NODES,
    PLAN,
    ROW,
    T_DESTINATION,
    T_EXPERT,
    T_PARTS,
    T_ROWS,
    WIRE,
    chunks_for,
    worst_ns,
)
from .splits import over_holders, with_several_holders
from .ways import BUDGET_PER_PAIR, LEAST_BUDGET, by_transfers


@compiled
def _native(loads_E, home_E, split_EP, rows_P, touched_P):
    """Every expert at its home. Returns all rows and the experts that have any."""
    total, used = np.int64(0), np.int64(0)
    for e in range(len(loads_E)):
        if loads_E[e] > 0:
            h = home_E[e]
            split_EP[e, h] = loads_E[e]
            rows_P[h] += loads_E[e]
            touched_P[h] += 1
            total += loads_E[e]
            used += 1
    return total, used


@compiled
def search(rows_PE, holds_PE, home_E, node_P, room_P, most_rows_P, rates, expert_bytes):
    """The best plan that is found: how far it went (0 native, 1 other rows, 2 transfers), rows_EP, sliced_E, [n, 5]
    transfers, chunks, its price and the native one.

    First rows over those that hold an expert. Then weights that move: from the best of those, and, where it is not
    native, from native too.
    """
    ranks, experts = rows_PE.shape
    loads_E = np.zeros(experts, dtype=np.int64)
    for p in range(ranks):
        for e in range(experts):
            loads_E[e] += rows_PE[p, e]
    native_EP = np.zeros((experts, ranks), dtype=np.int64)
    native_rows = np.zeros(ranks, dtype=np.int64)
    native_touched = np.zeros(ranks, dtype=np.int64)
    total, used = _native(loads_E, home_E, native_EP, native_rows, native_touched)
    done_P = np.empty(ranks, dtype=np.int64)
    sliced_E = np.zeros(experts, dtype=np.int64)
    transfers = np.zeros((4 * ranks + 64, COLUMNS), dtype=np.int64)
    native_chunks = chunks_for(native_rows, most_rows_P)
    native_ns = worst_ns(rates, native_rows, native_touched, transfers, np.int64(0), native_chunks, done_P)
    best_ns, kind, chunks, count = native_ns, 0, native_chunks, np.int64(0)
    if total == 0 or ranks == 1:
        return kind, native_EP, sliced_E, transfers[:0, :T_ROWS], chunks, best_ns, native_ns
    best_ns -= rates[PLAN]
    rows_P, touched_P, split_EP = native_rows, native_touched, native_EP
    several = with_several_holders(loads_E, holds_PE)
    if len(several):
        found, found_EP, found_rows, found_touched = over_holders(
            rates, loads_E, holds_PE, several, native_EP, native_rows, native_touched, most_rows_P, best_ns
        )
        if found < best_ns:
            best_ns, kind, chunks = found, 1, chunks_for(found_rows, most_rows_P)
            rows_P, touched_P, split_EP = found_rows, found_touched, found_EP
    nodes = np.int64(0)
    for p in range(ranks):
        nodes = max(nodes, node_P[p] + 1)
    mean = -(-max(max(rates[ROW], rates[WIRE]) * total, rates[EXPERT] * used) // ranks)
    budget = max(LEAST_BUDGET, BUDGET_PER_PAIR * experts * ranks) * (2 if nodes > 1 else 1)
    spent = np.zeros(1, dtype=np.int64)
    about_P = np.empty((3, ranks), dtype=np.int64)
    for p in range(ranks):
        about_P[NODE, p], about_P[ALL_ROOM, p], about_P[MOST_ROWS, p] = node_P[p], room_P[p], most_rows_P[p]
    more = np.empty(len(rates) + 2, dtype=np.int64)
    for i in range(len(rates)):
        more[i] = rates[i]
    more[EXPERT_BYTES], more[NODES] = expert_bytes, nodes
    layer = Layer(more, about_P, holds_PE)
    moved_EP = split_EP.copy()
    for start in range(1 + kind):
        if start:
            rows_P, touched_P, split_EP = native_rows, native_touched, native_EP
        found, found_count, found_chunks = by_transfers(
            split_EP, rows_P, touched_P, layer, mean, best_ns, budget, spent, moved_EP, transfers
        )
        if found_count >= 0:
            best_ns, kind, chunks, count = found, 2, found_chunks, found_count
    if kind == 0:
        return kind, native_EP, sliced_E, transfers[:0, :T_ROWS], native_chunks, native_ns, native_ns
    for i in range(count):
        e, d = transfers[i, T_EXPERT], transfers[i, T_DESTINATION]
        if transfers[i, T_PARTS] == 1:
            moved_EP[e, d] += transfers[i, T_ROWS]
        else:
            sliced_E[e] = transfers[i, T_ROWS]
    return kind, moved_EP, sliced_E, transfers[:count, :T_ROWS], chunks, best_ns + rates[PLAN], native_ns
