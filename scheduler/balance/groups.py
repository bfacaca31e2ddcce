"""Column slices, compiled: whose parts of an expert come by which links, for an attempt of `moving`.

P: ranks, E: experts.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .moving_state import (
    CHOSEN,
    CHOSEN_LINK,
    NODE,
    RECEIVING,
    ROOM,
    SENDING,
    TAKEN,
    TAKER,
    TRIAL,
    TRIAL_LINK,
    W_FAR,
    W_FREE,
    W_FROM,
    W_NEXT,
    W_RANK,
    mixed,
    space,
    starts_at,
)
from .prices import (
    EXPERT,
    EXPERT_BYTES,
    FAR_ALPHA,
    FAR_RATE,
    GUEST,
    MOST,
    MOST_PARTS,
    NEAR_ALPHA,
    NEAR_RATE,
    PS,
    ROW,
    WIRE,
    link_ns,
)

OVER_ONE, OVER_BOTH, OVER_ALL = 1, 2, 3
"""Which links bring the parts of one expert: the one that is free first; that and the sender's other one; those of all
that have the expert.
"""
PARTS = np.array([2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 63], dtype=np.int64)


@compiled
def add_link(about_P, links_L, ways_W, links, rank, far, start):
    """Adds a link to the first `links` that a group can use, once; returns their number."""
    ranks = about_P.shape[1]
    start = max(start, links_L[SENDING, ranks + about_P[NODE, rank] if far else rank])
    for i in range(links):
        other = ways_W[W_RANK, i]
        if ways_W[W_FAR, i] == far and (about_P[NODE, other] == about_P[NODE, rank] if far else other == rank):
            if start < ways_W[W_FROM, i]:
                ways_W[W_RANK, i], ways_W[W_FROM, i] = rank, start
            return links
    ways_W[W_RANK, links] = rank
    ways_W[W_FAR, links] = far
    ways_W[W_FROM, links] = start
    return links + 1


@compiled
def best_group(aim, rates, about_P, at_P, links_L, pick_P, ways_W, links, start, most, score, n, spent):
    """The best number of parts for n takers, if it has more than `score`: (parts, rows), 0 parts for none.

    Each part goes over the link by which the next taker that this link reaches has it first. All parts compute the same
    rows, so the one with the least time limits them. The ways of the parts are left in `chosen`.
    """
    row = max(rates[ROW], rates[WIRE])
    best_parts, best_rows = 0, np.int64(0)
    for parts in PARTS:
        if parts > n or parts > rates[MOST_PARTS]:
            break
        spent[0] += parts * max(1, links // 2)
        last, spare, rows = _trial(aim, rates, about_P, at_P, links_L, pick_P, ways_W, links, start, most, parts, n)
        if spare <= -(-rates[EXPERT] // parts):
            continue
        if rates[ROW]:
            rows = min(rows, spare * parts // rates[ROW])
        if rates[WIRE]:
            rows = min(rows, spare // rates[WIRE])
        if rows <= 0:
            continue
        this = rows * row * mixed(aim.seed, parts, start, 400) // max(np.int64(1), last - start) + 1
        if this > score:
            score, best_parts, best_rows = this, parts, rows
            for i in range(parts):
                pick_P[CHOSEN, i] = pick_P[TRIAL, i]
                pick_P[CHOSEN_LINK, i] = pick_P[TRIAL_LINK, i]
    return best_parts, best_rows


@compiled
def _trial(aim, rates, about_P, at_P, links_L, pick_P, ways_W, links, start, most, parts, n):
    """One number of parts: (when the last arrives, the time that the one with the least has, rows for which there is
    memory). No time where it cannot be.
    """
    ranks = about_P.shape[1]
    size = -(-rates[EXPERT_BYTES] // parts)
    near_ns = link_ns(rates[EXPERT_BYTES], parts, rates[NEAR_ALPHA], rates[NEAR_RATE])
    far_ns = link_ns(rates[EXPERT_BYTES], parts, rates[FAR_ALPHA], rates[FAR_RATE])
    for i in range(links):
        ways_W[W_FREE, i] = ways_W[W_FROM, i]
        ways_W[W_NEXT, i] = 0
    for i in range(n):
        pick_P[TAKEN, i] = 0
    last, spare, rows = start, aim.quantum, most
    for i in range(parts):
        arrival, best, to = MOST, -1, -1
        for j in range(links):
            p, far = ways_W[W_RANK, j], ways_W[W_FAR, j]
            at = ways_W[W_NEXT, j]
            while at < n and (
                pick_P[TAKEN, at] or (about_P[NODE, pick_P[TAKER, at]] == about_P[NODE, p]) == (far == 1)
            ):
                at += 1
            ways_W[W_NEXT, j] = at
            if at == n:
                continue
            d = pick_P[TAKER, at]
            into = ranks + about_P[NODE, d] if far else d
            when = max(ways_W[W_FREE, j], links_L[RECEIVING, into]) + (far_ns if far else near_ns)
            if when < arrival:
                arrival, best, to = when, j, at
        if best < 0:
            return last, np.int64(0), rows
        d = pick_P[TAKER, to]
        pick_P[TAKEN, to] = 1
        ways_W[W_FREE, best] = arrival
        pick_P[TRIAL, i], pick_P[TRIAL_LINK, i] = d, best
        last = max(last, arrival)
        if at_P[ROOM, d] < size:
            return last, np.int64(0), rows
        spare = min(spare, aim.goal - starts_at(rates, at_P, d, arrival) - rates[GUEST] * PS)
        if spare <= 0:
            break
        rows = min(rows, space(about_P, at_P, d))
    return last, spare, rows
