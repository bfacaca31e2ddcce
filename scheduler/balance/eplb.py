"""EPLB (deepseek-ai/EPLB): a placement with replicas from recorded loads, and an even split over the replicas.

As published, to be compared with; `scheduler.placement` has our own, which never puts two replicas on one rank.
P: ranks, E: experts, S: slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import lcm

import numpy as np

from .plan import Plan
from .problem import Integers, Problem
from .whole import holders, whole_plan


def plan(problem: Problem) -> Plan:
    """Each expert's rows in even shares to the ranks that hold it, whatever the others have to do. Moves nothing.

    O(E P). Traps: shares are even where loads are not, which leaves about a third of what a split by load could win;
    every replica of an active expert is streamed from memory, also for a handful of rows.
    """
    return whole_plan("eplb", problem, even_split(problem.loads_E.tolist(), problem.holds_PE))


def even_split(loads_E: Sequence[int], holds_PE: Integers) -> Integers:
    """[E, P] rows; what does not divide goes to holders from the (expert mod holders)-th on, not always the first.

    >>> even_split([9, 5, 2], np.array([[1, 1, 0], [1, 1, 1]])).tolist()
    [[5, 4], [2, 3], [0, 2]]
    """
    rows_EP = np.zeros((len(loads_E), len(holds_PE)), dtype=np.int64)
    for expert, ranks in enumerate(holders(holds_PE)):
        share, rest = divmod(loads_E[expert], max(1, len(ranks)))
        for i, rank in enumerate(ranks):
            rows_EP[expert, rank] = share + ((i - expert) % len(ranks) < rest)
    return rows_EP


@dataclass(frozen=True, eq=False)
class Placement:
    """`slots_PS`: the expert in each slot. `holds_PE`: 1 where a rank has one, so that a `Problem` can be made of it.
    `home_E`: the rank of the first replica.
    """

    slots_PS: Integers
    holds_PE: Integers
    home_E: Integers

    @property
    def wasted_slots(self) -> int:
        """Slots with an expert that the same rank has in another slot."""
        return self.slots_PS.size - int(self.holds_PE.sum())


def eplb_placement(
    loads_E: Sequence[int], ranks: int, slots_per_rank: int, nodes: int = 1, groups: int = 1
) -> Placement:
    """EPLB's placement for recorded loads: every slot is filled.

    `groups` is the number of groups of neighbouring experts that the model's router picks from; 1 where it has none. If
    the nodes divide it, the policy is hierarchical: groups are packed onto nodes, and experts are replicated and packed
    inside each node. Otherwise it is global: as if all ranks were on one node.

    O(E log E + (slots - E) log E + slots * P). Traps: packing does not look at what a rank has, so two replicas of one
    expert may share a rank (`wasted_slots`); a small drift of the loads moves nearly all experts.

    Raises ValueError for sizes that do not fit.

    Two ranks with three slots for four experts. Expert 0 gets both spare slots (the second at 60 for each of its two
    replicas, as much as expert 1 has), then 60, 50, 40, 40, 40 and 10 go, each to the lighter rank that has a slot. The
    last 40 shows the trap: expert 0 is twice on rank 1.

    >>> placement = eplb_placement([120, 60, 50, 10], ranks=2, slots_per_rank=3)
    >>> placement.slots_PS.tolist(), placement.wasted_slots
    ([[1, 0, 3], [2, 0, 0]], 1)
    """
    loads_E = [int(load) for load in loads_E]  # Python's, which do not overflow
    experts, slots = len(loads_E), ranks * slots_per_rank
    if not 0 < experts <= slots:
        raise ValueError(f"loads_E has {experts} experts; {ranks} ranks with {slots_per_rank} slots take 1 to {slots}")
    if nodes < 1 or ranks % nodes:
        raise ValueError(f"nodes is {nodes}; it must divide the {ranks} ranks")
    if groups < 1 or experts % groups:
        raise ValueError(f"groups is {groups}; it must divide the {experts} experts")
    if groups % nodes:
        groups = nodes = 1

    size = experts // groups
    loads_G = [sum(loads_E[g * size : (g + 1) * size]) for g in range(groups)]
    rows: list[list[int]] = []
    homes: dict[int, int] = {}
    for packed in _pack(loads_G, nodes):
        local = [g * size + i for g in packed for i in range(size)]
        replicas, counts = _replicate([loads_E[e] for e in local], slots // nodes)
        scale = lcm(*counts)
        shares = [loads_E[local[i]] * (scale // counts[i]) for i in replicas]
        for items in _pack(shares, ranks // nodes):
            for item in items:
                if item < len(local):  # the first replicas come first
                    homes[local[item]] = len(rows)
            rows.append([local[replicas[item]] for item in items])

    holds_PE = np.zeros((ranks, experts), dtype=np.int64)
    for rank, row in enumerate(rows):
        holds_PE[rank, row] = 1
    return Placement(np.array(rows, dtype=np.int64), holds_PE, np.array([homes[e] for e in range(experts)]))


def _pack(weights: Sequence[int], packs: int) -> list[list[int]]:
    """Items into packs of one size: heaviest first, each to the lightest pack with a free place."""
    size = len(weights) // packs
    if size == 1:
        return [[item] for item in range(packs)]
    items: list[list[int]] = [[] for _ in range(packs)]
    totals = [0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if len(items[p]) < size), key=totals.__getitem__)
        items[pack].append(item)
        totals[pack] += weights[item]
    return items


def _replicate(loads: Sequence[int], slots: int) -> tuple[list[int], list[int]]:
    """(the expert in each slot, the replicas of each expert): every spare slot to the highest load per replica."""
    replicas, counts = list(range(len(loads))), [1] * len(loads)
    scale = lcm(*range(1, slots - len(loads) + 2))
    heap = [(-load * scale, expert) for expert, load in enumerate(loads)]
    heapify(heap)
    for _ in range(slots - len(loads)):
        expert = heap[0][1]
        counts[expert] += 1
        replicas.append(expert)
        heapreplace(heap, (-loads[expert] * (scale // counts[expert]), expert))
    return replicas, counts
