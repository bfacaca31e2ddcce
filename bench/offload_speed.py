"""What a budget of resident experts is worth by modelled times: reading what is missed against computing.

One request, one token a step. Reading takes misses * expert bytes / bandwidth, computing the bytes of the token's
weights / memory rate. Between both at once (the larger) and one after the other (the sum) is what an engine can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def verdict(rows: Sequence[Speed], need: Need, machine: Machine) -> str:
    """Whether the model suits offloading here, and with which budget, in plain words.

    The rule compares modelled times: it suits if some budget that fits has misses whose reading takes no longer than
    computing does, so that it can hide behind it. `rows` by budget, the last with all experts.
    """
    full, part = rows[-1], rows[:-1]
    fits = [row for row in part if need.dense_bytes + row.resident_bytes <= machine.free]
    hidden = [row for row in part if row.read_s <= row.compute_s]
    everything = need.dense_bytes + full.resident_bytes
    first = f"All weights take {format_size(everything)}, and {format_size(machine.free)} is free here"
    if everything <= machine.free:
        first += ": this model needs no offloading on this machine."
        if hidden:
            return (
                f"{first} It would suit it: already with {_budget(hidden[0])} resident, reading what is missed takes no"
                f" longer than computing (by the model up to {_rate(hidden[0].overlapped)})."
            )
        if not part:
            return first
        last = part[-1]
        return (
            f"{first} It would not suit it: already with {_budget(last)} resident, reading what is missed takes"
            f" {last.read_s / last.compute_s:.3g} times as long as computing (by the model at most"
            f" {_rate(last.overlapped)} instead of {_rate(full.overlapped)})."
        )
    if not fits:
        return f"{first}: the smallest budget of the table does not fit, so this machine cannot run the model."
    if hidden and hidden[0] in fits:
        best = hidden[0]
        return (
            f"{first}: this model suits offloading on this machine. Give it {_budget(best)}: reading what is missed"
            f" then takes no longer than computing, up to {_rate(best.overlapped)}, as with all of them."
        )
    best = fits[-1]
    return (
        f"{first}: this model does not suit offloading on this machine, for reading takes longer than computing with"
        f" every budget that fits. If it must run, give it {_budget(best)}: at most {_rate(best.overlapped)} by the"
        f" model, {best.overlapped / full.overlapped:.2g} of the speed with all of them."
    )


def _budget(row: Speed) -> str:
    return f"{format_size(row.resident_bytes)} of experts ({100 * row.share:.4g} %)"


def _rate(tokens: float) -> str:
    return f"{rate_text(tokens)} tokens/s"


def rate_text(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"
