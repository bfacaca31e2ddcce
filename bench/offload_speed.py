"""Whether a model suits offloading, in words: by the modelled times of `scheduler/offload_cost.py`."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.config import format_size
from ..launch.offload_budgets import rate_text
from ..scheduler.offload_cost import Machine, Need, Speed, between, hiding_share


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
