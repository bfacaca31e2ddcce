"""What a transfer changes in an attempt of `moving`, compiled: links, room, the sender's rows and the receiver's.

P: ranks, E: experts, S: segments.
"""

from __future__ import annotations

from .compiled import compiled
from .moving_state import (
    CLOSED,
    DONE,
    DROP,
    EXCESS,
    INCOMING,
    LEFT,
    NEAR_OPEN,
    NODE,
    O_OPEN,
    O_RANK,
    RECEIVING,
    ROOM,
    ROWS,
    S_NEXT,
    S_RANK,
    SENDING,
    TOUCHED,
    space,
    starts_at,
)
from .prices import (
    EXPERT,
    EXPERT_BYTES,
    NEAR_ALPHA,
    NEAR_RATE,
    ONE,
    ROW,
    T_ARRIVAL,
    T_DESTINATION,
    T_EXPERT,
    T_PART,
    T_PARTS,
    T_ROWS,
    T_SEGMENT,
    T_SOURCE,
    WIRE,
    guest_ps,
    link_ns,
)


@compiled
def send(rates, about_P, at_P, links_L, has_PE, transfers, i, e, s, p, far, start, d, part, parts, rows, stamp):
    """Transfer number i, as early as it can be; returns when it arrives."""
    ranks = about_P.shape[1]
    out, into = (ranks + about_P[NODE, p], ranks + about_P[NODE, d]) if far else (p, d)
    end = max(links_L[SENDING, out], links_L[RECEIVING, into], start)
    end += link_ns(rates[EXPERT_BYTES], parts, rates[NEAR_ALPHA + 2 * far], rates[NEAR_RATE + 2 * far])
    links_L[SENDING, out] = end
    links_L[RECEIVING, into] = end
    at_P[ROOM, d] -= -(-rates[EXPERT_BYTES] // parts)
    has_PE[d, e] = stamp
    at_P[INCOMING, d] += rows
    at_P[DONE, d] = starts_at(rates, at_P, d, end) + guest_ps(rates, rows, parts, ONE)
    transfer = transfers[i]
    transfer[T_EXPERT], transfer[T_SOURCE], transfer[T_DESTINATION] = e, p, d
    transfer[T_PART], transfer[T_PARTS], transfer[T_ROWS] = part, parts, rows
    transfer[T_ARRIVAL], transfer[T_SEGMENT] = end, s
    return end


@compiled
def give(rates, about_P, rows_S, segs_S, at_P, need_N, s, rows, d):
    """Rows of a segment are computed on rank d instead."""
    row = max(rates[ROW], rates[WIRE])
    p = rows_S[S_RANK, s]
    segs_S[LEFT, s] -= rows
    at_P[ROWS, p] -= rows
    at_P[EXCESS, p] -= rows
    if segs_S[LEFT, s] == 0:
        at_P[TOUCHED, p] -= 1
        at_P[DROP, p] -= 1
    at_P[DONE, p] = max(rates[EXPERT] * at_P[TOUCHED, p], row * at_P[ROWS, p])
    if about_P[NODE, p] != about_P[NODE, d]:
        need_N[about_P[NODE, p]] -= rows * row


@compiled
def share(aim, rates, about_P, rows_S, segs_S, at_P, need_N, transfers, s, i):
    """The whole expert that transfer i brings is of use for the expert's other holders too."""
    row = max(rates[ROW], rates[WIRE])
    if row == 0:
        return
    d = transfers[i, T_DESTINATION]
    other = rows_S[S_NEXT, s]
    while other != s:
        rows = min(segs_S[LEFT, other], at_P[EXCESS, rows_S[S_RANK, other]], (aim.goal - at_P[DONE, d]) // row)
        rows = min(rows, space(about_P, at_P, d), aim.quantum // row - transfers[i, T_ROWS])
        if rows > 0:
            give(rates, about_P, rows_S, segs_S, at_P, need_N, other, rows, d)
            transfers[i, T_ROWS] += rows
            at_P[INCOMING, d] += rows
            at_P[DONE, d] += rows * row
        other = rows_S[S_NEXT, other]


@compiled
def reopen(about_P, rows_S, segs_S, offers_O, origins, node):
    """A rank of this node can take from others now."""
    for i in range(segs_S.shape[1]):
        if about_P[NODE, rows_S[S_RANK, i]] == node:
            segs_S[CLOSED, i] &= ~NEAR_OPEN
    for i in range(origins):
        if about_P[NODE, offers_O[O_RANK, i]] == node:
            offers_O[O_OPEN, i] |= NEAR_OPEN
