"""What becomes of experts that a layer needs and its device does not have: copied to it, or computed by the CPU where
their weights are; and whether the next layer's are copied before its router has chosen.

The CPU works beside the device, and copies beside both, so that a layer takes as long as the slowest of them. Integers
in nanoseconds, from times that were measured on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Any

from .cost import ExpertCost, LinkCost

EXACT = 10
"""Misses up to which all that could be better is tried where the simple rule is not proven to be the best."""


@dataclass(frozen=True, kw_only=True)
class MissCosts:
    """Measured times of experts of one shape."""

    expert_bytes: int
    copy: LinkCost
    """Bytes of experts from host memory to the device, one expert after the other."""
    device: ExpertCost
    """Experts on the device."""
    host: ExpertCost
    """The same on the CPU, with its rows on their way there and back."""
    both_ns: int
    """An expert's share of the time in which some are copied while the CPU computes others: host memory is read for
    both.
    """

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "both_ns"):
            value = index(getattr(self, name))
            if value < (name == "expert_bytes"):
                raise ValueError(f"{name} is {value}; that cannot be, measure it again")
            object.__setattr__(self, name, value)

    @property
    def copy_ns(self) -> int:
        """One more expert on the link."""
        return self.copy.time_ns(self.expert_bytes) - self.copy.alpha_ns

    def device_ns(self, rows: Sequence[int]) -> int:
        """The device's time for experts that are there, with so many rows each, in one call."""
        return self.device.base_ns + _work_ns(self.device, rows) if rows else 0

    def host_ns(self, rows: Sequence[int]) -> int:
        """The CPU's time for experts with so many rows each, all together."""
        return self.host.base_ns + _work_ns(self.host, rows) if rows else 0

    def time_ns(self, copied: Sequence[int], on_cpu: Sequence[int], busy_ns: int = 0) -> int:
        """From the router's choice until all is computed: experts with these rows, the copied ones in the order in
        which they go over, on a device that has `busy_ns` to do anyway.
        """
        link_ns, device_ns = self.copy.alpha_ns, busy_ns
        for rows in copied:
            link_ns += self.copy_ns
            device_ns = max(device_ns, link_ns) + self.device.time_ns(1, rows)
        both_ns = (len(copied) + len(on_cpu)) * self.both_ns if copied and on_cpu else 0
        return max(device_ns, self.host_ns(on_cpu), both_ns)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MissCosts:
        """The inverse of `dataclasses.asdict`. Raises ValueError or TypeError for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ValueError(f"constants: expected {', '.join(sorted(names))}")
        parts = {name: ExpertCost(**values[name]) for name in ("device", "host")}
        return cls(**{**values, **parts, "copy": LinkCost(**values["copy"])})


def _work_ns(cost: ExpertCost, rows: Sequence[int]) -> int:
    return sum(cost.time_ns(1, count) - cost.base_ns for count in rows)


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Positions of missing experts: those that are copied, in that order, and those that the CPU computes."""

    copied: tuple[int, ...]
    on_cpu: tuple[int, ...]
    time_ns: int
    """Modelled, of the layer."""


def choose_ways(costs: MissCosts, rows: Sequence[int], *, busy_ns: int = 0, copied: Sequence[int] = ()) -> Ways:
    """The way of each missing expert, with so many rows, so that the layer is done soonest; of equal times the one with
    more copies, as a copied expert can stay.

    Experts with the most rows are copied, and first: the CPU takes longest for them, and what the device has to do for
    the last one comes after all copies. That is the best possible wherever the device takes equally long for each,
    which is so up to the rows at which it is no longer bound by reading weights. Beyond, up to `EXACT` misses, all
    other choices that could be better are tried too. The balance of CPU and link is that of Fiddler (arXiv 2402.07033)
    and FreeToken (arXiv 2608.16157), with rows and the device's own work in it.

    Args:
        rows: of each missing expert.
        busy_ns: what the device computes meanwhile, the experts that it has.
        copied: rows of those that are copied in any case, before the others: on their way, or not in host memory.
    """
    rows_M, first = tuple(map(index, rows)), tuple(map(index, copied))
    if min((*rows_M, *first), default=1) < 1:
        raise ValueError(f"rows are {rows_M} and {first}; an expert that nobody needs is not missing")
    order = sorted(range(len(rows_M)), key=lambda m: (-rows_M[m], m))
    on_cpu, time_ns = _split(costs, tuple(rows_M[m] for m in order), index(busy_ns), first)
    return Ways(
        copied=tuple(order[m] for m in range(len(order)) if m not in on_cpu),
        on_cpu=tuple(sorted(order[m] for m in on_cpu)),
        time_ns=time_ns,
    )


def _split(costs: MissCosts, rows: tuple[int, ...], busy_ns: int, first: tuple[int, ...]) -> tuple[frozenset[int], int]:
    """Positions that the CPU computes, of experts in descending order of rows, and the layer's time."""
    count = len(rows)
    found = _heaviest_copied(costs, rows, busy_ns, first)
    on_cpu = frozenset(range(count - found[1], count))
    if count <= EXACT and _least(costs, rows, busy_ns, first, 0, frozenset()) < found:
        found, on_cpu = _best(costs, rows, busy_ns, first, found, on_cpu)
    return on_cpu, found[0]


def _heaviest_copied(costs: MissCosts, rows: tuple[int, ...], busy_ns: int, first: tuple[int, ...]) -> tuple[int, int]:
    """(time, experts on the CPU), the least where those with the most rows are copied, however many."""
    host_M = [_work_ns(costs.host, (count,)) for count in rows]
    host_ns, link_ns, device_ns = sum(host_M), costs.copy.alpha_ns, busy_ns
    for count in first:
        link_ns += costs.copy_ns
        device_ns = max(device_ns, link_ns) + costs.device.time_ns(1, count)
    both_ns = (len(first) + len(rows)) * costs.both_ns
    ways = []
    for copies, (count, work_ns) in enumerate(zip((*rows, 0), (*host_M, 0), strict=True)):
        left = len(rows) - copies
        times = [device_ns]
        if left:
            times += [costs.host.base_ns + host_ns, both_ns if copies or first else 0]
        ways.append((max(times), left))
        host_ns -= work_ns
        link_ns += costs.copy_ns
        device_ns = max(device_ns, link_ns) + costs.device.time_ns(1, count)
    return min(ways)


def _least(
    costs: MissCosts, rows: tuple[int, ...], busy_ns: int, first: tuple[int, ...], done: int, on_cpu: frozenset[int]
) -> tuple[int, int]:
    """(time, experts on the CPU) that no choice for those after the first `done` is below: as if those with the fewest
    rows were the ones that the CPU gets, and the ones that are copied.
    """
    copied = (*first, *(rows[m] for m in range(done) if m not in on_cpu))
    given, left = tuple(rows[m] for m in on_cpu), len(rows) - done
    return min(
        (
            costs.time_ns((*copied, *(rows[-1:] * more)), (*given, *rows[done + more :]), busy_ns),
            len(on_cpu) + left - more,
        )
        for more in range(left + 1)
    )


def _best(
    costs: MissCosts,
    rows: tuple[int, ...],
    busy_ns: int,
    first: tuple[int, ...],
    found: tuple[int, int],
    who: frozenset[int],
) -> tuple[tuple[int, int], frozenset[int]]:
    """Branch and bound, from the expert with the most rows to the one with the fewest: the best choice of all, `who`
    with `found` if none is better.
    """
    stack: list[tuple[int, frozenset[int]]] = [(0, frozenset())]
    while stack:
        done, on_cpu = stack.pop()
        bound = _least(costs, rows, busy_ns, first, done, on_cpu)
        if (bound[0], len(on_cpu)) >= found:
            continue
        if done == len(rows):
            found, who = bound, on_cpu
        else:
            stack += [(done + 1, on_cpu | {done}), (done + 1, on_cpu)]
    return found, who


def streams(costs: MissCosts, *, missing: int, touched: int, experts: int, room: int, gap_ns: int) -> bool:
    """Whether to begin with copies of the next layer's experts before its router has chosen: the link is idle until
    then, for `gap_ns`.

    A batch that touches `touched` of a layer's `experts` touches as large a share of the next one's, `missing` of which
    are not there; `room` of them have a place. What is copied in the gap and used is saved. A copy that is under way
    when the router has chosen cannot be taken back: for nothing it keeps those waiting that are needed. In a prefill
    that is each layer, one after the other, the next one's weights coming while this one's are computed.
    """
    missing, touched, experts, room, gap_ns = map(index, (missing, touched, experts, room, gap_ns))
    if not 0 <= touched <= experts or not 0 <= missing <= experts:
        raise ValueError(f"touched is {touched} and missing {missing}, of {experts} experts")
    begun = min(missing, room)
    done = min(begun, gap_ns // max(costs.copy_ns, 1))
    saved = done * touched * costs.copy_ns
    lost = (experts - touched) * costs.copy_ns if begun > done else 0
    return saved > lost
