"""A part of the bound, compiled: how long experts take to leave the ranks that hold them, and what follows from that.

Rates are in the order of their fields. P: ranks, E: experts, J: experts in the order in which they leave.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled


@compiled
def link_steps(expert_bytes, parts, alpha, rate, step_ns):
    size = -(-expert_bytes // parts)
    return (alpha + -(-(size * rate) // 1_000_000)) // step_ns


@compiled
def all_left(bytes_near, bytes_far, near_alpha, far_alpha, near, far):
    """The first time by which all of an expert can have left `near` links and `far` bundles together."""
    low, high = np.int64(0), near_alpha + bytes_near + 1
    while low < high:
        middle = (low + high) // 2
        sent = near * max(np.int64(0), middle - near_alpha) / max(np.int64(1), bytes_near)
        sent += far * max(np.int64(0), middle - far_alpha) / max(np.int64(1), bytes_far)
        if sent >= 1:
            high = middle
        else:
            low = middle + 1
    return max(np.int64(0), low - 1)


@compiled
def left_by(j, rates, bytes_near, bytes_far, links, bundles, one_holder):
    """A time by which j experts cannot all have left ranks with so many near links and bundles, in ns; at the earliest
    then has somebody else all of the j-th. An expert of one holder leaves over one near link.
    """
    near, far = rates[4] + bytes_near, rates[6] + bytes_far
    if bundles == 0:
        return (j + links - 1) // links * near if one_holder else j * near // links
    # Whatever share of an expert goes over a link, the link is busy for that share of a whole transfer at least.
    if near == 0 or far == 0:
        return np.int64(0)
    even = np.int64(j / (links / near + bundles / far) * (1 - 1e-9))
    return max(even, all_left(j * bytes_near, j * bytes_far, rates[4], rates[6], links, bundles))


@compiled
def _can_leave(t, need, touched, loads, n, inside, helpers, rates, row, left_J):
    """Whether ranks that alone hold `n` experts can be done by t ns, when the j-th has left at left_J[j - 1].

    What no holder streams must have left as a whole. The work on an expert elsewhere is at most its rows', and at most
    what all helpers do once all of it has left.
    """
    if rates[1]:
        gone = touched - inside * (t * 1000 // rates[1])
        least = rates[9] + rates[1] // ((inside + helpers - 1) * 1000)  # a part may be on another of these ranks
        if gone > 0 and max(np.int64(0), left_J[gone - 1] - rates[8]) + least > t:
            return False
    need -= inside * t * 1000
    for j in range(n):
        if need <= 0:
            return True
        time = t - max(np.int64(0), left_J[j] - rates[8]) - rates[9]
        if time <= 0:
            return False
        need -= min(loads[j] * row, helpers * time * 1000)
    return need <= 0


@compiled
def _can_cross(t, need, touched, loads, n, inside, rates, row, bytes_far):
    """The same for ranks of whole nodes, from which experts leave over one bundle. Parts may stay in the node; as much
    of an expert's rows and streaming as crosses is done elsewhere.
    """
    far = rates[6] + bytes_far
    if far == 0:
        return True
    time = t + rates[8]
    whole, rest = min(time // far, n), time % far
    streams = touched - whole - (1 if rest and whole < n else 0)
    if streams * rates[1] > inside * t * 1000:
        return False
    need -= inside * t * 1000
    for j in range(whole):
        need -= loads[j] * row
    if whole < n:
        need -= loads[whole] * row * (rest + 1) // far + 1
    return need <= 0


@compiled
def leaving_ns(best, high, loads, n, inside, links, bundles, one_holder, ranks, rates, row, bytes_near, bytes_far):
    """The least time by which ranks can be done that alone hold `n` experts; `loads` in descending order."""
    need = row * loads[:n].sum()
    if need <= inside * best * 1000 and rates[1] * n <= inside * best * 1000:
        return best
    left_J = np.empty(n, dtype=np.int64)
    for j in range(n if links else 0):
        left_J[j] = left_by(j + 1, rates, bytes_near, bytes_far, links, bundles, one_holder)
    low = best
    while low < high:
        middle = (low + high) // 2
        if links == 0:
            possible = _can_cross(middle, need, n, loads, n, inside, rates, row, bytes_far)
        else:
            possible = _can_leave(middle, need, n, loads, n, inside, ranks - inside, rates, row, left_J)
        if possible:
            high = middle
        else:
            low = middle + 1
    return low
