"""The cost model of experts that are not in memory: what reading one takes, and what a budget for others is worth.

One request, one token a step. Reading takes misses * an expert's bytes / bandwidth, computing what was measured or the
bytes of the token's weights / memory rate. Between both at once (the larger) and one after the other (the sum) is what
an engine can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Any

import numpy as np

from .cost import LinkCost

# What a read costs


@dataclass(frozen=True, kw_only=True)
class DiskCost:
    """`reads[n]`: the share of one expert's read in the time of many of which n are in flight; `expert_bytes` are those
    of an expert as it is stored.
    """

    reads: Mapping[int, LinkCost]
    sequential_fs_per_byte: int
    """From start to end of the files."""
    expert_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", {index(n): cost for n, cost in sorted(self.reads.items())})
        for name in ("sequential_fs_per_byte", "expert_bytes"):
            if index(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1, measure it again")
        if not self.reads or min(self.reads) < 1:
            raise ValueError(f"reads are for {list(self.reads)} in flight; at least one number above 0 is needed")

    def time_ns(self, experts: int, in_flight: int) -> int:
        return experts * self.reads[in_flight].time_ns(self.expert_bytes)

    @property
    def best(self) -> int:
        """How many reads should be in flight: the fewest of those that read an expert soonest."""
        return min(self.reads, key=lambda n: (self.time_ns(1, n), n))

    @property
    def bytes_per_s(self) -> float:
        """Of experts, with the best number in flight."""
        return self.expert_bytes * 1e9 / max(self.time_ns(1, self.best), 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiskCost:
        """The inverse of `dataclasses.asdict`, also after JSON. Raises ValueError or TypeError for anything else."""
        _check_names(cls, values)
        return cls(**{**values, "reads": {int(n): LinkCost(**cost) for n, cost in values["reads"].items()}})


# What routing lets one expect


@dataclass(frozen=True, kw_only=True)
class HitCurve:
    """The share of a token's experts that is in memory, by the share of all experts that is: straight lines between
    points, from none with none to all with all. Never below even routing, which hits the share itself.
    """

    shares: Sequence[float]
    hits: Sequence[float]

    def at(self, share: float) -> float:
        points = sorted(zip(self.shares, self.hits, strict=True))
        x, y = zip((0.0, 0.0), *points, (1.0, 1.0), strict=True)
        return max(float(np.interp(share, x, y)), share)


EVEN = HitCurve(shares=(), hits=())
"""No locality."""


@dataclass(frozen=True, kw_only=True)
class RoutingSummary:
    """What a model's recorded routing made of budgets: for each of `shares` of resident experts the misses per token of
    the policies `default` and `lru`, and the least possible.
    """

    tokens: int
    active: float
    """Experts of a token, of all layers."""
    shares: Sequence[float]
    default: Sequence[float]
    lru: Sequence[float]
    least: Sequence[float]

    def __post_init__(self) -> None:
        columns = {name: tuple(map(float, getattr(self, name))) for name in ("shares", "default", "lru", "least")}
        for name, column in columns.items():
            object.__setattr__(self, name, column)
        lengths, numbers = {len(c) for c in columns.values()}, [x for c in columns.values() for x in c]
        if self.active <= 0 or len(lengths) > 1 or min(numbers, default=0) < 0:
            raise ValueError("shares, default, lru and least must be as many numbers from 0 up, and active above 0")

    def curve(self, policy: str) -> HitCurve:
        """Of `lru`; the others do not differ much from `default`."""
        misses = self.lru if policy == "lru" else self.default
        return HitCurve(shares=self.shares, hits=[1 - missed / self.active for missed in misses])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingSummary:
        """The inverse of `dataclasses.asdict`. Raises ValueError or TypeError for anything else."""
        _check_names(cls, values)
        return cls(**values)


def _check_names(cls: Any, values: Mapping[str, Any]) -> None:
    names = {field.name for field in fields(cls)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ValueError(f"constants: expected {', '.join(sorted(names))}")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model's hit rates that others published, of a least-recently-used cache for all layers, by its slots in experts
    that one token uses: 1, 2 and 3 times as many.
    """

    name: str
    top_k: int
    experts: int
    hits: tuple[float, float, float]

    def curve(self, top_k: int, experts: int) -> HitCurve:
        """For a model of other numbers: as many times its own active experts hit as often."""
        points = [(times * top_k / experts, hit) for times, hit in enumerate(self.hits, start=1)]
        points = [point for point in points if point[0] < 1]
        return HitCurve(shares=[share for share, _ in points], hits=[hit for _, hit in points])


PUBLISHED_IN = "arXiv 2505.16056"
PUBLISHED = (
    Published(name="Qwen3-30B-A3B", top_k=8, experts=128, hits=(0.47, 0.65, 0.75)),
    Published(name="DeepSeek-V2-Lite", top_k=6, experts=64, hits=(0.28, 0.42, 0.53)),
    Published(name="OLMoE", top_k=8, experts=64, hits=(0.43, 0.61, 0.74)),
    Published(name="Phi-3.5-MoE", top_k=2, experts=16, hits=(0.43, 0.63, 0.76)),
    Published(name="Mixtral-8x7B", top_k=2, experts=8, hits=(0.36, 0.61, 0.83)),
)
"""Read from the study's figures, of texts of 512 tokens."""


def most_like(top_k: int, experts: int) -> Published:
    """The published model whose share of active experts is nearest by ratio, of equals the first."""

    def distance(model: Published) -> float:
        ratio = (model.top_k * experts) / (model.experts * top_k)
        return max(ratio, 1 / ratio)

    return min(PUBLISHED, key=distance)


# What a budget is worth


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates in bytes per second: `bandwidth` of what brings missed experts, `memory` of the device's own memory."""

    bandwidth: float
    memory: float
    free: int
    """Bytes of the device's memory that weights may take."""
    source: str = ""
    """What brings missed experts."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one token takes."""

    dense_bytes: int
    expert_bytes: int
    active: float
    """Experts, of all layers."""
    experts: int
    """All that there are."""
    stored_bytes: int = 0
    """What is read of an expert that is missed; 0: as many as it takes in memory."""
    experts_s: float | None = None
    """Computing the token's experts, where that was measured."""

    def compute_s(self, machine: Machine) -> float:
        experts_s = self.active * self.expert_bytes / machine.memory if self.experts_s is None else self.experts_s
        return self.dense_bytes / machine.memory + experts_s

    def read_s(self, machine: Machine, misses: float) -> float:
        return misses * (self.stored_bytes or self.expert_bytes) / machine.bandwidth


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One budget. `misses` are those of the policy `default`; at least `least` are possible at all."""

    share: float
    slots: int
    resident_bytes: int
    misses: float
    lru: float
    least: float
    read_s: float
    compute_s: float

    @property
    def overlapped(self) -> float:
        """Tokens per second, reading and computing at the same time."""
        return 1 / max(self.read_s, self.compute_s)

    @property
    def serial(self) -> float:
        return 1 / (self.read_s + self.compute_s)


def speed(need: Need, machine: Machine, *, share: float, slots: int, misses: float, lru: float, least: float) -> Speed:
    """With `misses` experts per token."""
    return Speed(
        share=share,
        slots=slots,
        resident_bytes=slots * need.expert_bytes,
        misses=misses,
        lru=lru,
        least=least,
        read_s=need.read_s(machine, misses),
        compute_s=need.compute_s(machine),
    )


def between(rows: Sequence[Speed], share: float, need: Need, machine: Machine) -> Speed:
    """A budget between those of the rows, its misses by a straight line."""
    shares = [row.share for row in rows]
    misses, lru, least = (
        float(np.interp(share, shares, [getattr(row, name) for row in rows])) for name in ("misses", "lru", "least")
    )
    slots = round(share * need.experts)
    return speed(need, machine, share=share, slots=slots, misses=misses, lru=lru, least=least)


def hiding_share(rows: Sequence[Speed]) -> float:
    """From which share of resident experts on reading takes no longer than computing: by a straight line between two
    rows, or the first row's.
    """
    first = next(i for i, row in enumerate(rows) if row.read_s <= row.compute_s)  # with all experts there are no misses
    if first == 0:
        return rows[0].share
    before, after = rows[first - 1], rows[first]
    part = (before.read_s - before.compute_s) / (before.read_s - after.read_s)
    return before.share + part * (after.share - before.share)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What `slots` experts in memory let one expect: hit rates and tokens per second, each from least to most."""

    slots: int
    hits: tuple[float, float]
    tokens_per_s: tuple[float, float]


def expected(need: Need, machine: Machine, slots: int, curve: HitCurve) -> Expected:
    """The least: even routing, reading and computing in turn. The most: routing as local as `curve` says, at once."""
    share = slots / need.experts
    low, high = EVEN.at(share), curve.at(share)
    compute_s = need.compute_s(machine)
    slow = need.read_s(machine, (1 - low) * need.active) + compute_s
    fast = max(need.read_s(machine, (1 - high) * need.active), compute_s)
    return Expected(slots=slots, hits=(low, high), tokens_per_s=(1 / slow, 1 / fast))
