"""The compiled loops of an event: filling slots, newcomers by value, and counting uses.

L: layers, E: experts of a layer, K: experts of an event, N: newcomers, M: those who come, H: half-lives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]


@njit(cache=True)
def fill(
    values_RE: Array,
    first: int,
    resident_LE: Array,
    keep_LE: Array,
    count_L: Array,
    slots: int,
    floor: int,
    margin: float,
    layer_N: Array,
    expert_N: Array,
) -> Array:
    """[M, 4] who comes (layer, expert), and whose slot it takes (layer, expert): -1, -1 for a free one.

    Newcomers come by value, the largest first, of equals by layer and expert. There is a free slot for one if its
    layer's floor is not filled, or if one is left beside all floors. Else the least valuable resident is the victim,
    the first of equals: not one of `keep_LE`, nor of another layer at its floor. The newcomer must be worth
    more than it by more than `margin`. `resident_LE` and `count_L` are brought up to date.

    `values_RE` are of the rows (layers) from `first` on, the only ones that are looked at.
    """
    rows, experts = values_RE.shape
    free = slots - count_L.sum()
    for count in count_L:
        free -= max(0, floor - count)
    waiting_N = np.ones(len(layer_N), dtype=np.bool_)
    changes = np.full((len(layer_N), 4), -1, dtype=np.int64)
    found = 0
    for _ in range(len(layer_N)):
        best = -1
        for n in range(len(layer_N)):
            if waiting_N[n] and (
                best < 0
                or values_RE[layer_N[n] - first, expert_N[n]] > values_RE[layer_N[best] - first, expert_N[best]]
            ):
                best = n
        waiting_N[best] = False
        layer, expert = layer_N[best], expert_N[best]
        if count_L[layer] < floor or free > 0:
            free -= count_L[layer] >= floor
            count_L[layer] += 1
        else:
            victim_layer = victim = -1
            for row in range(rows):
                at = row + first
                if at != layer and count_L[at] <= floor:
                    continue
                for e in range(experts):
                    if (
                        resident_LE[at, e]
                        and not keep_LE[at, e]
                        and (victim < 0 or values_RE[row, e] < values_RE[victim_layer - first, victim])
                    ):
                        victim_layer, victim = at, e
            if victim < 0:
                continue
            if not values_RE[layer - first, expert] - values_RE[victim_layer - first, victim] > margin:
                continue
            resident_LE[victim_layer, victim] = False
            count_L[victim_layer] -= 1
            count_L[layer] += 1
            changes[found, 2], changes[found, 3] = victim_layer, victim
        resident_LE[layer, expert] = True
        changes[found, 0], changes[found, 1] = layer, expert
        found += 1
    return changes[:found]


@njit(cache=True)
def add_uses(decayed_HLE: Array, layer: int, expert_K: Array, weight_H: Array) -> None:
    """A use of each expert, weighted for each half-life. Adding through index arrays takes numpy ten times as long."""
    for h in range(len(weight_H)):
        for expert in expert_K:
            decayed_HLE[h, layer, expert] += weight_H[h]
