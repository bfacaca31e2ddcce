"""A part of the bound, compiled: the experts' weights that ranks must read, whatever moves.

Rates are in the order of their fields. P: ranks, E: experts.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .leaving import link_steps
from .prices import MOST


@compiled
def _done_elsewhere(links, bundles, expert_bytes, most_parts, rates):
    """The earliest time by which any rows of an expert can be done by ranks that did not hold it, when `links` near
    links and `bundles` have it to send: it arrives whole or in all parts, and the last to arrive is streamed. Who got
    it whole may cut it for others.
    """
    least, whole = MOST, np.int64(0)
    for k in range(1, most_parts + 1):
        near = link_steps(expert_bytes, k, rates[4], rates[5], 1)
        far = link_steps(expert_bytes, k, rates[6], rates[7], 1)
        low, high = np.int64(0), k * max(near, far)
        while low < high:  # until all parts have arrived
            middle = (low + high) // 2
            sent = links * (middle // near) if near else MOST
            if bundles:
                sent += bundles * (middle // far) if far else MOST
            if sent >= k:
                high = middle
            else:
                low = middle + 1
        whole = low if k == 1 else whole
        arrival = min(low, whole + min(near, far))  # from the holders, or from one that got it whole
        least = min(least, max(np.int64(0), arrival - rates[8]) + rates[9] + rates[1] // (k * 1000))
    return least


@compiled
def _often_enough(t, loads_E, ranks, expert, row):
    """Whether there is time by t ns to stream each expert as often as its rows need ranks.

    Nobody computes rows for longer than t, so an expert with more of them is streamed by several. The parts of a group
    stream one expert together, and are at work for as long as its rows take; with t of two streams or more that counts
    for as many streams as whole experts would need.
    """
    t_ps = max(t * 1000, 2 * expert)
    streams = np.int64(0)
    for load in loads_E:
        streams += -(-(load * row) // t_ps)
        streams += load > 0 and row == 0
    return streams * expert <= ranks * t_ps


@compiled
def _fit(experts_n, most, pinned, holds_PE):
    """Whether each of the `pinned` experts finds a place on a rank that holds it, `most` on each: a matching."""
    ranks = holds_PE.shape[0]
    place_E = np.full(experts_n, -1)
    used_P = np.zeros(ranks, dtype=np.int64)
    queue = np.empty(experts_n, dtype=np.int64)
    came_P = np.empty(ranks, dtype=np.int64)  # the expert that asked for a place on this rank
    for first in pinned:
        came_P[:] = -1
        queue[0] = first
        at, end, free = 0, 1, -1
        while at < end and free < 0:
            e = queue[at]
            at += 1
            for p in range(ranks):
                if not holds_PE[p, e] or came_P[p] >= 0:
                    continue
                came_P[p] = e
                if used_P[p] < most:
                    free = p
                    break
                for other in pinned:
                    if place_E[other] == p:
                        queue[end] = other
                        end += 1
        if free < 0:
            return False
        used_P[free] += 1
        while True:
            e = came_P[free]
            before = place_E[e]
            place_E[e] = free
            if e == first:
                break
            free = before
    return True


@compiled
def _splits_fit(t, places, loads, n, ranks, row):
    """Whether `n` experts (`loads` in descending order) that stay where they are can be done by t ns on ranks with
    `places` each. An expert with y places takes y - 1 of the spare ones; beside it are the smallest experts, or another
    spare place each is left empty or has next to nothing of an expert that is split.
    """
    spare = ranks * places - n
    used = np.int64(0)
    for i in range(n):
        if loads[i] * row * 2 <= t * 1000 or used > spare:
            break
        found = False
        for y in range(1, min(ranks, spare - used + 1) + 1):
            others = y * (places - 1) - (spare - (y - 1))
            rows = loads[i]
            for j in range(max(np.int64(0), min(others, n))):
                rows += loads[n - 1 - j] if n - 1 - j != i else 0
            if rows * row <= y * t * 1000:
                found = True
                used += y - 1
                break
        if not found:
            return False
    return used <= spare


@compiled
def streaming_ns(best, high, loads_E, holds_PE, node_P, rates, row, expert_bytes):
    """The least time in which the ranks can stream the experts that cannot have left all of their holders by then."""
    ranks, experts = holds_PE.shape
    gone_E = np.zeros(experts, dtype=np.int64)
    seen_node = np.zeros(node_P.max() + 1, dtype=np.bool_)
    for e in range(experts):
        if loads_E[e] == 0:
            continue
        seen_node[:] = False
        for p in range(ranks):
            seen_node[node_P[p]] |= holds_PE[p, e] > 0
        held = holds_PE[:, e].sum()
        bundles = seen_node.sum() if len(seen_node) > 1 else 0
        gone_E[e] = _done_elsewhere(held, bundles, expert_bytes, ranks - 1, rates)
    touched = (loads_E > 0).sum()
    sorted_loads = np.sort(loads_E)[::-1]
    low = best
    while low < high:
        middle = (low + high) // 2
        pinned = np.flatnonzero(gone_E > middle)
        places = middle * 1000 // rates[1]
        possible = _often_enough(middle, loads_E, ranks, rates[1], row) and _fit(experts, places, pinned, holds_PE)
        if possible and len(pinned) == touched:
            possible = _splits_fit(middle, places, sorted_loads, touched, ranks, row)
        if possible:
            high = middle
        else:
            low = middle + 1
    return low
