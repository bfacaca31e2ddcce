"""What a budget of resident experts is worth by modelled times: reading what is missed against computing.

One request, one token a step. Reading takes misses * expert bytes / bandwidth, computing the bytes of the token's
weights / memory rate. Between both at once (the larger) and one after the other (the sum) is what an engine can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.config import format_size


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

    def compute_s(self, machine: Machine) -> float:
        return (self.dense_bytes + self.active * self.expert_bytes) / machine.memory


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
        read_s=misses * need.expert_bytes / machine.bandwidth,
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


def verdict(rows: Sequence[Speed], need: Need, machine: Machine) -> str:
    """Whether the model suits offloading here, and with which budget, in plain words.

    The rule compares modelled times: it suits if a budget fits at which reading what is missed takes no longer than
    computing, so that it can hide behind it. `rows` by budget, the last with all experts.
    """
    full, least = rows[-1], rows[0]
    hiding = hiding_share(rows)
    best = between(rows, hiding, need, machine)
    everything = need.dense_bytes + full.resident_bytes
    first = f"All weights take {format_size(everything)}, and {format_size(machine.free)} is free here"
    if everything <= machine.free:
        first += ": this model needs no offloading on this machine."
        if len(rows) == 1:
            return first
        text = f"{first} By the model it would cost no speed down to about {_budget(best)}"
        if best.share == least.share:
            return text + ", the smallest budget of the table."
        return f"{text}; with {_budget(least)} it runs at {_rate(least)} at most instead of {_rate(full)}."
    room = (machine.free - need.dense_bytes) / full.resident_bytes
    if room < least.share:
        return f"{first}: not even the smallest budget of the table fits, {_budget(least)} beside the other weights."
    if hiding <= room:
        return (
            f"{first}: this model suits offloading on this machine. Give it about {_budget(best)}: from there on"
            f" reading what is missed takes no longer than computing, up to {_rate(full)}, as with all of them."
        )
    most = between(rows, room, need, machine)
    return (
        f"{first}: this model does not suit offloading on this machine, for reading what is missed takes longer than"
        f" computing with every budget that fits; it would take about {_budget(best)}. If it must run, give it all that"
        f" fits, {_budget(most)}: by the model {_rate(most)} at most, {most.overlapped / full.overlapped:.0%} of the"
        " speed with all of them."
    )


def _budget(row: Speed) -> str:
    return f"{format_size(row.resident_bytes)} of experts ({100 * row.share:.3g} %)"


def _rate(row: Speed) -> str:
    return f"{rate_text(row.overlapped)} tokens/s"


def rate_text(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"
