"""The reports of all ranks added up: totals that never go down, whatever happens to a rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..engine.messages import Stats
from ..engine.predict.meter import add_up

GAUGES = (
    "running",
    "waiting",
    "kv_blocks_used",
    "kv_blocks_total",
    "state_slots_used",
    "state_slots_total",
    "expert_resident_bytes",
)
COUNTERS = tuple(f.name for f in dataclasses.fields(Stats) if f.name not in (*GAUGES, "expert_counts", "predictors"))


class Totals:
    """Sums of `Stats` over ranks.

    What a lost rank counted stays in the totals; what it held (running requests, KV blocks) does not. A counter that
    went down began again from 0. `ranks` has the last report of every rank that is not lost.
    """

    def __init__(self) -> None:
        self.ranks: dict[int, Stats] = {}
        self._sums = dict.fromkeys(COUNTERS, 0)
        # Per layer, an array over its experts: the last of each rank, and the sums.
        self._counts: dict[int, list[np.ndarray]] = {}
        self._sums_of_experts: list[np.ndarray] = []
        self._as_lists: list[list[int]] | None = None

    def take(self, rank: int, stats: Stats) -> None:
        """The newest report of a rank."""
        before = self.ranks.get(rank, Stats())
        for name in COUNTERS:
            new, old = getattr(stats, name), getattr(before, name)
            self._sums[name] += new - old if new >= old else new
        self.ranks[rank] = stats
        if stats.expert_counts is not None:
            self._take_counts(rank, [np.array(row, dtype=np.int64) for row in stats.expert_counts])

    def lose(self, rank: int) -> None:
        """The rank's process is over; another may come under its number and counts from 0."""
        self.ranks.pop(rank, None)
        self._counts.pop(rank, None)

    @property
    def total(self) -> Stats:
        """Everything added up; `expert_counts` is None until a rank has sent some."""
        values: dict[str, Any] = {name: sum(getattr(s, name) for s in self.ranks.values()) for name in GAUGES}
        if self._as_lists is None and self._sums_of_experts:
            self._as_lists = [sum_E.tolist() for sum_E in self._sums_of_experts]
        predictors = add_up(stats.predictors for stats in self.ranks.values())
        return Stats(**values, **self._sums, expert_counts=self._as_lists, predictors=predictors)

    def _take_counts(self, rank: int, counts: list[np.ndarray]) -> None:
        zeros = [np.zeros_like(new_E) for new_E in counts]
        before = self._counts.get(rank, zeros)
        if any((new_E < old_E).any() for new_E, old_E in zip(counts, before, strict=True)):
            before = zeros
        sums = self._sums_of_experts or zeros
        self._sums_of_experts = [s_E + new_E - old_E for s_E, new_E, old_E in zip(sums, counts, before, strict=True)]
        self._counts[rank] = counts
        self._as_lists = None
