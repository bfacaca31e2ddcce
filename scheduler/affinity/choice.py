"""The step to run now: the best of three ways to group ready tokens, if it is worth what others wait for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .ready import Ready, Schedule, Step
from .ways import WAYS


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`rows` run now. `schedule` is what the model assumed for all, `way` who made it.

    Times are of the whole schedule, of the one in order beside it. `waits_ns` are summed over rows, from now to the
    end of a row's step.
    """

    rows: Step
    way: str
    schedule: Schedule
    total_ns: int
    waits_ns: int
    total_in_order_ns: int
    waits_in_order_ns: int


def choose(ready: Ready, ways: tuple[str, ...] = tuple(WAYS)) -> Choice:
    """The best schedule of those that take less time than the order of service, and add no more to the waits than they
    save: who comes later loses once, and all rows' next tokens come sooner by what is saved. In order wins ties.

    Where all rows fit into one step they run: experts that two steps share are then read once, and no split is better.
    """
    in_order = ready.in_order
    known = _judged(ready, in_order)
    if len(in_order) < 2:
        return _choice(ready, in_order, "in-order", known, known)
    best, best_way, best_times = in_order, "in-order", known

    def cost(times: tuple[int, int]) -> tuple[int, int]:
        return times[1] + ready.rows * times[0], times[0]

    for way in ways:
        schedule = WAYS[way](ready)
        times = _judged(ready, schedule)
        if times[0] < known[0] and cost(times) < cost(best_times):
            best, best_way, best_times = schedule, way, times
    return _choice(ready, best, best_way, best_times, known)


def _judged(ready: Ready, schedule: Schedule) -> tuple[int, int]:
    """Time of the whole schedule, and the sum of all rows' waits."""
    ends_R = ready.ends_ns(schedule)
    return int(ends_R.max(initial=0)), int(np.sum(ends_R))


def _choice(ready: Ready, schedule: Schedule, way: str, times: tuple[int, int], in_order: tuple[int, int]) -> Choice:
    return Choice(
        rows=schedule[0] if schedule else (),
        way=way,
        schedule=schedule,
        total_ns=times[0],
        waits_ns=times[1],
        total_in_order_ns=in_order[0],
        waits_in_order_ns=in_order[1],
    )
