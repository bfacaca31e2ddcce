"""Whose link sends next, compiled: for an attempt of `moving`. P: ranks, N: nodes, S: segments, L: links, O: offers."""

from __future__ import annotations

from .compiled import compiled
from .moving_state import (
    DROP,
    EXCESS,
    FAR_OPEN,
    LEFT,
    NEAR_OPEN,
    NODE,
    O_FROM,
    O_OPEN,
    O_RANK,
    O_SEGMENT,
    S_RANK,
    SENDING,
)
from .prices import MOST, ROW, WIRE


@compiled
def first_link(aim, rates, about_P, rows_S, segs_S, at_P, need_N, links_L, offers_O, origins, first, last):
    """Of the offers from `first` to before `last`, the link that is free first and has something to send: (when, offer,
    whether it is the bundle to other nodes).
    """
    ranks = about_P.shape[1]
    row = max(rates[ROW], rates[WIRE])
    start, at, far = MOST, -1, 0
    for i in range(first, last):
        if offers_O[O_OPEN, i] == 0:
            continue
        p, s = offers_O[O_RANK, i], offers_O[O_SEGMENT, i]
        q = p if s < 0 else rows_S[S_RANK, s]
        wants = at_P[EXCESS, q] > 0 or at_P[DROP, q] > 0
        if s >= 0:
            crosses = about_P[NODE, p] != about_P[NODE, q] and need_N[about_P[NODE, q]] >= row
            wants = segs_S[LEFT, s] > 0 and (wants or crosses)
        if not wants:
            offers_O[O_OPEN, i] = 0
            continue
        if offers_O[O_OPEN, i] & NEAR_OPEN:
            t = max(offers_O[O_FROM, i], links_L[SENDING, p])
            # Where nodes pool what they have too much of, those that are last to send far ones send near ones first.
            if t < start or (aim.pooled and t == start and far == 0 and i < origins):
                start, at, far = t, i, 0
        if offers_O[O_OPEN, i] & FAR_OPEN:
            t = max(offers_O[O_FROM, i], links_L[SENDING, ranks + about_P[NODE, p]])
            if t < start:
                start, at, far = t, i, 1
    return start, at, far


@compiled
def inside(about_P, links_L, offers_O, origins, offers, segment, node):
    """The first near link of a node over which what came from another node can be spread: (when, offer)."""
    begin, at = MOST, -1
    for i in range(origins, offers):
        p = offers_O[O_RANK, i]
        if offers_O[O_SEGMENT, i] == segment and offers_O[O_OPEN, i] & NEAR_OPEN and about_P[NODE, p] == node:
            t = max(offers_O[O_FROM, i], links_L[SENDING, p])
            if t < begin:
                begin, at = t, i
    return begin, at
