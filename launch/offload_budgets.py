"""What memory for experts is worth, before loading: the part of `moeyard plan` about experts that are read from disk.

For some budgets the hit rate and the speed of one request, each as a range, and what the next gigabyte would buy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..engine.config import EngineConfig, format_size, parse_budget, parse_size
from ..scheduler.offload_cost import (
    PUBLISHED_IN,
    DiskCost,
    Expected,
    HitCurve,
    Machine,
    Need,
    RoutingSummary,
    expected,
    most_like,
)
from ..scheduler.placement import slots_needed
from . import machine, profile

if TYPE_CHECKING:
    from ..engine.constants import Record
    from ..engine.loader import Blueprint

SHARES = (6, 12, 25, 50, 75, 100)
"""Percent of the experts."""
NEXT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Own:
    """The experts that one rank has, with room for copies, of all layers: how many, and how many of them a step touches
    at most in which each rank has one token and their experts are spread evenly.
    """

    ranks: int
    experts: int
    nbytes: int
    active: int


def own_experts(config: EngineConfig, blueprint: Blueprint) -> Own:
    specs, ranks = blueprint.spec.experts, config.ep or 1
    slots_L = [spec.num_experts for spec in specs]
    if ranks > 1:
        slots_L = [slots_needed(experts, ranks, config.redundant_experts) for experts in slots_L]
    layers = list(zip(specs, slots_L, strict=True))
    return Own(
        ranks=ranks,
        experts=sum(slots_L),
        nbytes=sum(blueprint.weights.reader(spec).nbytes * slots for spec, slots in layers),
        active=sum(min(spec.top_k, slots) for spec, slots in layers),
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A budget in bytes. `now` is None for one that has no room for an expert and a read."""

    budget: int
    now: Expected | None
    more: Expected | None
    """With `NEXT_BYTES` more, or all experts."""
    note: str


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """All that is said. The row in question has a note; others have one if they do not fit."""

    need: Need
    machine: Machine
    disk: Record[DiskCost]
    source: str
    """Of the most hits."""
    rows: Sequence[Row]
    chosen: Row
    ranks: int = 1
    """All figures are those of one of them, with one request on each."""

    def lines(self) -> Iterator[str]:
        need, rate = self.need, self.machine
        how = "weights" if need.experts_s is None else "experts as measured, other weights"
        yield (
            f"one request{self._each()}, by the model: computing a token takes {_ms(need.compute_s(rate))} ({how} at"
            f" {rate.memory / 1e9:.3g} GB/s), reading a missed expert {_ms(need.read_s(rate, 1))}"
            f" ({rate.source})"
        )
        share = need.expert_bytes * need.experts
        titles = ("for experts", "", "stay", "hits", "tokens/s", "the next GiB, or the rest: hits", "tokens/s", "")
        cells = [titles]
        for row in self.rows:
            first = (f"{100 * row.budget / share:.3g} %", format_size(row.budget))
            if row.now is None or row.more is None:
                cells.append((*first, "-", "-", "-", "-", "-", row.note))
                continue
            gain = [(b - a) for a, b in zip(row.now.hits, row.more.hits, strict=True)]
            faster = [(b - a) for a, b in zip(row.now.tokens_per_s, row.more.tokens_per_s, strict=True)]
            cells.append(
                (
                    *first,
                    f"{row.now.slots}",
                    _percent(row.now.hits),
                    _rates(row.now.tokens_per_s),
                    "-" if row.more == row.now else "+" + _percent(sorted(gain)),
                    "-" if row.more == row.now else "+" + _rates(sorted(faster)),
                    row.note,
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            yield "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        yield f"  hits: at least as with even routing, at most {self.source}"
        yield "  tokens/s: at least with the fewest hits, reading and computing in turn; at most with the most, at once"
        if self.ranks > 1:
            yield f"  memory, experts, hits and tokens/s are of one rank; {self.ranks} give as many times the tokens/s"
        yield self.sentence()

    def sentence(self) -> str:
        row, full = self.chosen, 1 / self.need.compute_s(self.machine)
        assert row.now is not None and row.more is not None
        share = row.budget / (self.need.expert_bytes * self.need.experts)
        if row.now.slots == self.need.experts:
            return (
                f"With all experts in memory nothing is read: {rate_text(full)} tokens/s for one request{self._each()}."
            )
        more = f", with 1 GiB more {_rates(row.more.tokens_per_s)}" if row.more.slots < self.need.experts else ""
        return (
            f"With {format_size(row.budget)} for experts ({100 * share:.3g} %) expect {_rates(row.now.tokens_per_s)}"
            f" tokens/s for one request{self._each()}{more}; all in memory would give {rate_text(full)}."
        )

    def _each(self) -> str:
        return f" on each of {self.ranks} ranks" if self.ranks > 1 else ""


def budgets(config: EngineConfig, blueprint: Blueprint, free: float, suggested: str | None = None) -> Budgets:
    """For `config.expert_memory`, or the one `suggested` instead, with `free` bytes for weights. Measures the memory,
    and the disk where that is not known. Raises ValueError for what cannot be, OSError for files that cannot be read.

    Several ranks are taken to be on this machine: they share its disk, and on a CPU the rate of its memory.
    """
    from ..engine import constants
    from ..engine.expert_files import ExpertFiles
    from ..engine.measure_disk import disk_constants

    size, specs = blueprint.footprint, blueprint.spec.experts
    with closing(ExpertFiles([blueprint.weights.reader(spec) for spec in specs])) as files:
        disk = disk_constants(files, progress=config.progress)
    own = own_experts(config, blueprint)
    need = Need(
        dense_bytes=size.dense,
        expert_bytes=size.expert,
        active=own.active,
        experts=own.experts,
        stored_bytes=disk.values.expert_bytes,
        experts_s=profile.experts_s(config, blueprint),
    )
    missed_s, tiers = _missed(config, blueprint, disk.values, own)
    rate = Machine(
        bandwidth=disk.values.expert_bytes / missed_s,
        memory=machine.read_rate(blueprint.device.type) / (own.ranks if blueprint.device.type == "cpu" else 1),
        free=int(free),
        source=f"{tiers}, measured {disk.date:%Y-%m-%d}",
    )
    checkpoint = blueprint.weights.checkpoint
    key = {"digest": checkpoint.fingerprint, "layers": len(specs), "experts": max(s.num_experts for s in specs)}
    checkpoint.close()
    recorded: list[Record[RoutingSummary]] = constants.find("routing", **key)
    if recorded:
        curve = recorded[0].values.curve(config.residency)
        source = (
            f"as in this model's routing of {recorded[0].values.tokens} tokens, recorded {recorded[0].date:%Y-%m-%d}"
        )
    else:
        curve, source = _published(sum(spec.top_k for spec in specs), size.num_experts)
    return _table(config, blueprint, suggested, curve, need, rate, disk, source, own)


def _missed(config: EngineConfig, blueprint: Blueprint, disk: DiskCost, own: Own) -> tuple[float, str]:
    """Seconds until a missed expert is there, on average, and from where it comes. Ranks share the disk."""
    from ..engine.host_experts import host_budget

    disk_s, size = own.ranks * disk.time_ns(1, disk.best) / 1e9, blueprint.footprint
    if blueprint.device.type == "cpu":
        return disk_s, "disk" if own.ranks == 1 else f"disk, shared by {own.ranks} ranks"
    rate = machine.host_to_gpu_rate()
    from_disk = 1 - min(host_budget(config.host_memory, own.nbytes, own.ranks) // size.expert / own.experts, 1)
    tiers = f"host memory at {rate / 1e9:.3g} GB/s" + (
        f", {from_disk:.0%} of them from disk before" if from_disk else ""
    )
    return size.expert / rate + from_disk * disk_s, tiers


def _published(top_k: int, experts: int) -> tuple[HitCurve, str]:
    model = most_like(top_k, experts)
    text = f"as published of {model.name} ({PUBLISHED_IN}), not of this model: moeyard analyze MODEL measures it"
    return model.curve(top_k, experts), text


def _table(
    config: EngineConfig,
    blueprint: Blueprint,
    suggested: str | None,
    curve: HitCurve,
    need: Need,
    rate: Machine,
    disk: Record[DiskCost],
    source: str,
    own: Own,
) -> Budgets:
    total = own.nbytes

    def row(text: str, note: str = "") -> Row:
        budget = min(parse_budget(text, total, "expert_memory"), total)
        slots = _slots(config, blueprint, text, own)
        if slots is None:
            return Row(budget=budget, now=None, more=None, note="too little for one expert and one read")
        more = min(slots + NEXT_BYTES // need.expert_bytes, need.experts)
        if budget + NEXT_BYTES >= total:
            more = need.experts
        now, then = (expected(need, rate, count, curve) for count in (slots, more))
        if blueprint.footprint.dense + budget > rate.free:
            note = f"{note}, more than is free" if note else "more than is free"
        return Row(budget=budget, now=now, more=then, note=note)

    rows = [row(f"{share}%") for share in SHARES]
    wanted = {text: note for text, note in ((config.expert_memory, "asked for"), (suggested, "suggested")) if text}
    for text, note in wanted.items():
        mine = row(text, note)
        rows = [other for other in rows if other.budget != mine.budget] + [mine]
    chosen = rows[-1]
    rows.sort(key=lambda each: each.budget)
    return Budgets(need=need, machine=rate, disk=disk, source=source, rows=rows, chosen=chosen, ranks=own.ranks)


def _slots(config: EngineConfig, blueprint: Blueprint, text: str, own: Own) -> int | None:
    """Experts that stay with this budget; None if it is too small."""
    from ..engine.offload_plan import plan_offload

    try:
        plan = plan_offload(_with(config, text), blueprint, own.ranks)
    except ValueError:
        return None
    return own.experts if plan is None else plan.budget.slots


def suggestion(config: EngineConfig, blueprint: Blueprint, free: float) -> str | None:
    """The most memory for experts that leaves room for one request, in percent if that is at least one; None if no
    budget helps. Raises ValueError where experts cannot be read as they are needed.
    """
    from ..engine.memory import kv_blocks
    from ..engine.offload_plan import plan_offload

    size, length, total = blueprint.footprint, blueprint.max_model_len, own_experts(config, blueprint).nbytes
    states = size.state_per_request * config.max_num_seqs
    one = -(-length // config.block_size) * config.block_size * size.kv_per_token
    if config.kv_memory is not None:
        cache = parse_size(config.kv_memory, "kv_memory") + states
    else:
        cache = math.ceil(
            (one + states) / (config.memory_fraction or (0.9 if blueprint.device.type == "cuda" else 0.5))
        )
    budget = int(free) - size.dense - cache
    if not 0 < budget < total:
        return None
    percent = 100 * budget // total
    text = f"{percent}%" if percent else f"{budget}"
    try:
        kv_blocks(config, blueprint.device, size, length, free - size.dense - budget)
    except ValueError:
        return None
    plan_offload(_with(config, text), blueprint, config.ep or 1)
    return text


def _with(config: EngineConfig, expert_memory: str) -> EngineConfig:
    """As many experts stay whichever policy chooses them."""
    return replace(config, expert_memory=expert_memory, residency="default", predictor="none")


# Text


def rate_text(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _rates(pair: Sequence[float]) -> str:
    low, high = (rate_text(value) for value in pair)
    return low if low == high else f"{low} to {high}"


def _percent(pair: Sequence[float]) -> str:
    low, high = (f"{100 * value:.0f}" for value in pair)
    return f"{low} %" if low == high else f"{low} to {high} %"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
