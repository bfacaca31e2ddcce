"""Which home of an expert the tokens of each rank use, where an expert has several.

A rank uses its own copy when it has one, else the copies in turn by its number, so that different ranks use different
ones. Decided by source rank alone: every rank knows where every other sends, without asking.

P: ranks, E: experts.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .table import ExpertTable

Integers = npt.NDArray[np.int64]


@lru_cache(maxsize=256)
def nearest_homes(table: ExpertTable) -> tuple[Integers, Integers]:
    """For each source rank and expert the rank that computes it, and the slot there: two arrays [P, E].

    The table must have a home for every expert.
    """
    rank_PE = np.empty((table.ranks, table.experts), dtype=np.int64)
    slot_PE = np.empty_like(rank_PE)
    for expert in range(table.experts):
        homes = table.homes(expert)
        own = dict(homes)
        for source in range(table.ranks):
            slot = own.get(source)
            rank_PE[source, expert], slot_PE[source, expert] = (
                (source, slot) if slot is not None else homes[source % len(homes)]
            )
    rank_PE.flags.writeable = slot_PE.flags.writeable = False
    return rank_PE, slot_PE
