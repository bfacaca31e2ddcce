"""Helpers that give away work of their own first, compiled: for an attempt of `moving`.

A helper with work of its own has little time left when a hot expert comes. If other ranks take that work while the hot
expert is on its way, a few helpers have time for nearly all of its rows: experts move on in a chain, over different
links at the same time. P: ranks, E: experts.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .moving_state import DONE, DROP, EXCESS, NEAR_OPEN, NODE, O_OPEN, O_RANK, RELIEVED, ROWS, TOUCHED, offer
from .prices import EXPERT, EXPERT_BYTES, HIDDEN, MOST, NEAR_ALPHA, NEAR_RATE, ONE, PS, ROW, WIRE, ZERO, link_ns


@compiled
def relieve(aim, rates, about_P, at_P, offers_O, origins, offers):
    """Adds offers of helpers that are to lose work; returns how many offers there are then.

    For each rank that has too much, and each of the `aim.depth` experts that it sends one after the other, `aim.relief`
    helpers: those that are done first, of its own node if there are several. They are to be done with their own work
    when the expert comes.
    """
    ranks = about_P.shape[1]
    row = max(rates[ROW], rates[WIRE])
    near_ns = link_ns(rates[EXPERT_BYTES], ONE, rates[NEAR_ALPHA], rates[NEAR_RATE])
    for i in range(aim.relief * aim.depth * origins):
        p = offers_O[O_RANK, (i // aim.relief) % origins]
        target = max(ZERO, (1 + i // (aim.relief * origins)) * near_ns - rates[HIDDEN]) * PS
        best, best_done, best_far = -1, MOST, True
        for d in range(ranks):
            if at_P[RELIEVED, d] or at_P[EXCESS, d] > 0 or at_P[DROP, d] > 0:
                continue
            far = about_P[NODE, d] != about_P[NODE, p]
            if at_P[DONE, d] < best_done or (at_P[DONE, d] == best_done and best_far and not far):
                best, best_done, best_far = d, at_P[DONE, d], far
        if best < 0 or target >= aim.goal:
            break
        at_P[RELIEVED, best] = 1
        if best_done > target and offers < offers_O.shape[1]:
            if row:
                at_P[EXCESS, best] = -(-max(ZERO, row * at_P[ROWS, best] - target) // row)
            if rates[EXPERT]:
                at_P[DROP, best] = -(-max(ZERO, rates[EXPERT] * at_P[TOUCHED, best] - target) // rates[EXPERT])
            offer(rates, offers_O, offers, best, np.int64(-1), ZERO)
            offers_O[O_OPEN, offers] = NEAR_OPEN  # bundles have hot experts to carry
            offers += 1
    return offers


@compiled
def relieved(at_P, offers_O, first, last):
    """These offers are over; who made them, and who needed none, helps now."""
    for i in range(first, last):
        offers_O[O_OPEN, i] = 0
        at_P[EXCESS, offers_O[O_RANK, i]] = 0
        at_P[DROP, offers_O[O_RANK, i]] = 0
    for p in range(at_P.shape[1]):
        at_P[RELIEVED, p] = 0
