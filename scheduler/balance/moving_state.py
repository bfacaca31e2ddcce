"""What an attempt of `moving` knows and changes: the layer, its segments, and the state of ranks, links and offers.

P: ranks, E: experts, N: nodes, S: segments (an expert's rows at one rank that holds it).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiled import compiled
from .prices import COLUMNS, EXPERT, HIDDEN, NODES, PS, ROW, WIRE, ZERO

NEAR_OPEN, FAR_OPEN = 1, 2
"""Bits: what an offer may still use, and what is closed to a segment."""


# Rows of the arrays below: numba is slow to pass many arrays, so those of one kind are one.

NODE, ALL_ROOM, MOST_ROWS = range(3)
S_EXPERT, S_RANK, S_ROWS, S_NEXT = range(4)
LEFT, CLOSED = range(2)
"""Rows that stay in a segment; bits of the links by which nobody can take any more of it."""
DONE, ROWS, TOUCHED, INCOMING, ROOM, EXCESS, DROP, RELIEVED = range(8)
"""When a rank is done with all that it has so far; rows and experts of what it holds; rows of guests; bytes of room;
rows and experts that it wants to lose; whether it is to help later, and now may lose work.
"""
SENDING, RECEIVING = range(2)
O_RANK, O_SEGMENT, O_FROM, O_OPEN = range(4)
"""Who can send, what (-1: all that it has), from when, over which links."""
TAKER, READY, TAKEN, TRIAL, TRIAL_LINK, CHOSEN, CHOSEN_LINK = range(7)
"""Who can take an expert, by when they are ready; destinations of a group, and the links to them."""
W_RANK, W_FAR, W_FROM, W_FREE, W_NEXT = range(5)
"""Links that bring the parts of a group: whose, from when they are free, and the taker that is next."""


class Layer(NamedTuple):
    """What does not change."""

    rates: np.ndarray
    about_P: np.ndarray
    holds_PE: np.ndarray


class Segments(NamedTuple):
    """The rows before any have moved, by rank: `first_P[p]` is the first of rank p, S_NEXT a ring of each expert's."""

    rows_S: np.ndarray
    first_P: np.ndarray
    rows_P: np.ndarray
    touched_P: np.ndarray


class Aim(NamedTuple):
    """What an attempt is to reach, and how: see `ways.WAYS`."""

    goal: np.int64
    quantum: np.int64
    slices: np.int64
    later: np.int64
    pooled: np.int64
    relief: np.int64
    depth: np.int64
    seed: np.int64


class State(NamedTuple):
    """What changes during an attempt. L: each rank's near link, then each node's bundle (its number + P)."""

    segs_S: np.ndarray
    at_P: np.ndarray
    need_N: np.ndarray  # work that must leave the node
    links_L: np.ndarray
    has_PE: np.ndarray  # the number of the attempt in which a guest or a part came
    grouped_E: np.ndarray
    transfers: np.ndarray
    offers_O: np.ndarray
    pick_P: np.ndarray
    ways_W: np.ndarray


@compiled
def mixed(seed, a, b, amount):
    """1024 without a seed; else a number from 1024 - amount to 1024 + amount, like chance but the same everywhere.

    A greedy attempt that weighs its choices by such numbers may find what the best choice at each step misses.
    """
    if seed == 0:
        return np.int64(1024)
    h = (seed * 1_000_003 + a * 7919 + b * 104_729 + 12_345) & 0x7FFFFFFF
    h = (h * 48_271) % 2_147_483_647
    h = ((h ^ (h >> 13)) * 69_621) % 2_147_483_647
    h = h ^ (h >> 11)
    return 1024 - amount + h % (2 * amount + 1)


@compiled
def new_state(ranks, experts, nodes, segments, most_transfers):
    return State(
        np.empty((2, segments), dtype=np.int64),
        np.empty((8, ranks), dtype=np.int64),
        np.empty(nodes, dtype=np.int64),
        np.empty((2, 2 * ranks), dtype=np.int64),
        np.zeros((ranks, experts), dtype=np.int64),
        np.empty(experts, dtype=np.int64),
        np.zeros((most_transfers, COLUMNS), dtype=np.int64),
        np.empty((4, ranks + most_transfers), dtype=np.int64),
        np.empty((7, ranks), dtype=np.int64),
        np.empty((5, 2 * ranks + 2), dtype=np.int64),
    )


@compiled
def starts_at(rates, at_P, d, arrival):
    """When a rank can begin with a guest that arrives at this time."""
    return max(at_P[DONE, d], max(np.int64(0), arrival - rates[HIDDEN]) * PS)


@compiled
def space(about_P, at_P, d):
    """Rows for which a rank still has memory."""
    return about_P[MOST_ROWS, d] - at_P[ROWS, d] - at_P[INCOMING, d]


@compiled
def begin(aim, layer, segments, state):
    """Nothing has moved yet. Returns how many ranks have too much, and the offers: theirs first, the slowest at the
    head, then those of other holders of what they have.
    """
    rates = layer.rates
    about_P = layer.about_P
    holds_PE = layer.holds_PE
    rows_S = segments.rows_S
    first_P = segments.first_P
    at_P = state.at_P
    need_N = state.need_N
    links_L = state.links_L
    grouped_E = state.grouped_E
    segs_S = state.segs_S
    offers_O = state.offers_O
    ranks = about_P.shape[1]
    goal = aim.goal
    row = max(rates[ROW], rates[WIRE])
    for i in range(rows_S.shape[1]):
        segs_S[LEFT, i], segs_S[CLOSED, i] = rows_S[S_ROWS, i], 0
    for p in range(ranks):
        at_P[ROWS, p], at_P[TOUCHED, p] = segments.rows_P[p], segments.touched_P[p]
        at_P[INCOMING, p], at_P[ROOM, p], at_P[RELIEVED, p] = 0, about_P[ALL_ROOM, p], 0
    for i in range(links_L.shape[1]):
        links_L[SENDING, i], links_L[RECEIVING, i] = 0, 0
    for i in range(len(need_N)):
        need_N[i] = 0
    for i in range(len(grouped_E)):
        grouped_E[i] = 0
    most_offers = offers_O.shape[1]
    offers = 0
    for p in range(ranks):
        streaming, computing = rates[EXPERT] * at_P[TOUCHED, p], row * at_P[ROWS, p]
        at_P[DONE, p] = max(streaming, computing)
        over = -(-max(np.int64(0), computing - goal) // row) if row else np.int64(0)
        at_P[EXCESS, p] = max(over, at_P[ROWS, p] - about_P[MOST_ROWS, p])
        at_P[DROP, p] = -(-max(np.int64(0), streaming - goal) // rates[EXPERT]) if rates[EXPERT] else 0
        if aim.pooled:
            need_N[about_P[NODE, p]] += at_P[DONE, p] - goal
        if at_P[EXCESS, p] > 0 or at_P[DROP, p] > 0:
            at = offers
            while at > 0 and at_P[DONE, offers_O[O_RANK, at - 1]] < at_P[DONE, p]:
                offers_O[O_RANK, at] = offers_O[O_RANK, at - 1]
                at -= 1
            offers_O[O_RANK, at] = p
            offers += 1
    origins = offers
    for i in range(origins):
        offers_O[O_SEGMENT, i] = -1
        offers_O[O_FROM, i] = 0
        offers_O[O_OPEN, i] = NEAR_OPEN | FAR_OPEN if rates[NODES] > 1 and aim.pooled < 2 else NEAR_OPEN
    for i in range(origins):
        p = offers_O[O_RANK, i]
        for s in range(first_P[p], first_P[p + 1]):
            for q in range(ranks):
                if q != p and holds_PE[q, rows_S[S_EXPERT, s]] and offers < most_offers:
                    offer(rates, offers_O, offers, q, s, ZERO)
                    offers += 1
    return origins, offers


@compiled
def offer(rates, offers_O, i, rank, segment, start):
    """Offer number i: a rank can send a segment's expert from then on."""
    offers_O[O_RANK, i] = rank
    offers_O[O_SEGMENT, i] = segment
    offers_O[O_FROM, i] = start
    offers_O[O_OPEN, i] = NEAR_OPEN | FAR_OPEN if rates[NODES] > 1 else NEAR_OPEN
