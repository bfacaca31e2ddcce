"""Measures what the cost model needs to know: this machine's experts and its exchanges with the other ranks.

At a start without a fresh file of constants, and by `moeyard profile`. A second or two, some more for large experts.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..scheduler.cost import FREE, NO_EXPERTS, Constants, ExpertCost, LinkCost, RankConstants
from ..scheduler.fit import fit_experts, fit_link
from . import constants
from .constants import Record

if TYPE_CHECKING:
    from .group import RankGroup
    from .moe import MoELayer

TRIAL_EXPERTS = 16
"""Most experts that are timed at once."""
_EXPERTS = (1, 4, TRIAL_EXPERTS)
_ROWS_PER_EXPERT = (1, 16, 64, 256, 1024)
_MOST_ROWS = 2048
"""Of one call: what is measured must not be what most memory is used for."""
_EXPERTS_BUDGET_S = 3.0
"""Cases that would take longer than what is left of this are left out."""
_CASE_S = 0.02
"""Short cases are repeated for so long, at most `_MOST_REPEATS` times."""
_MOST_REPEATS = 16
_ROWS = (8, 128, 1024)
"""Rows of one hidden vector to or from each other rank; at most so many that all together are:"""
_EXCHANGE_BYTES = 2**21
_SMALL = (64, 1024)
_REPEATS = 4
_EXCHANGES, _LARGE = 12, 2**22
"""Repeats of an exchange; one of more than so many bytes has `_REPEATS`."""
_SMALLEST_WEIGHTS, _LARGEST_WEIGHTS = 2**23, 2**25
"""Bytes of the largest weight transfer that is timed: an expert's, within these."""
_HOST_BYTES = (2**16, 2**20, 2**26)

log = logging.getLogger("moeyard.measure")

Samples = list[list[int]]


# One rank


def rank_constants(layer: MoELayer, *, force: bool = False, progress: bool = False) -> Record[RankConstants]:
    """What is known of this rank's experts, from the file or measured now; `force` does not look at the file."""
    key = constants.key_of(layer.pool.reader, layer.pool.up_SND.device, torch.get_num_threads())
    if force:
        constants.forget("rank", **key)
    elif (record := constants.load("rank", key)) is not None:
        return record
    log.info("measuring the experts of %s; kept for the next starts", layer.pool.spec.module)
    layer.panel_rows = layer.measure_panel_rows()
    layer.few_rows = layer.measure_few_rows()
    samples = {"experts": time_experts(layer, progress)}
    host = FREE
    if layer.pool.up_SND.device.type == "cuda":
        samples |= {"to_device": _time_copies(layer, False), "to_host": _time_copies(layer, True)}
        both = [_link(samples[name]) for name in ("to_device", "to_host")]
        host = LinkCost(max(link.alpha_ns for link in both), max(link.fs_per_byte for link in both))
    values = RankConstants(_expert_cost(samples["experts"]), layer.few_rows, host, layer.panel_rows)
    return constants.save("rank", key, values, samples)


def few_rows_of(layer: MoELayer, progress: bool = False) -> int:
    """`few_rows` of the constants; `panel_rows` is set to theirs. Where they are not known and too few experts have a
    place to measure them, only these two are measured, and not kept.
    """
    if layer.offloaded is not None and layer.pool.num_slots < TRIAL_EXPERTS:
        key = constants.key_of(layer.pool.reader, layer.pool.up_SND.device, torch.get_num_threads())
        record: Record[RankConstants] | None = constants.load("rank", key)
        if record is None:
            layer.panel_rows = layer.measure_panel_rows()
            return layer.measure_few_rows()
    else:
        record = rank_constants(layer, progress=progress)
    layer.panel_rows = record.values.panel_rows
    return record.values.few_rows


def time_experts(layer: MoELayer, progress: bool = False) -> Samples:
    """[experts touched, rows, ns] of calls of the layer's own experts, each time of other ones: a step finds none of
    them in a cache, either.
    """
    pool = layer.pool
    device, dtype, hidden = pool.up_SND.device, pool.dtype, pool.hidden
    cases = sorted(
        {
            (n, rows)
            for n in (min(n, pool.num_slots) for n in _EXPERTS)
            for rows in _ROWS_PER_EXPERT
            if n * rows <= _MOST_ROWS
        },
        key=lambda case: case[0] * case[1],
    )
    samples: Samples = []
    start, per_row_ns = time.perf_counter_ns(), 0.0
    bar = tqdm(cases, desc="measuring experts", leave=False, disable=None if progress else True)
    for done, (experts, rows) in enumerate(bar):
        left_ns = _EXPERTS_BUDGET_S * 1e9 - (time.perf_counter_ns() - start)
        if done >= 4 and (_REPEATS + 1) * experts * rows * per_row_ns > left_ns:
            continue
        x_RD = torch.randn(experts * rows, hidden, dtype=dtype, device=device)
        slots_RK = torch.arange(experts, device=device).repeat(rows)[:, None]
        weights_RK = torch.ones(slots_RK.shape, device=device)
        times: list[int] = []
        while len(times) <= _REPEATS or (len(times) <= _MOST_REPEATS and sum(times) < _CASE_S * 1e9):
            part = _some_of(layer, len(times) * experts % (pool.num_slots - experts + 1), experts)
            times.append(_timed(device, part.run_local, x_RD, slots_RK, weights_RK))
        samples += [[experts, experts * rows, ns] for ns in times[1:]]  # the first only warms up
        per_row_ns = min(times) / (experts * rows)
    return samples


def time_shared(layer: MoELayer) -> Samples:
    """[1, tokens, ns] of calls of the layer's shared experts: all together they are one expert; nothing where the
    layer has none that plans may move.
    """
    overlap, pool = layer.overlap, layer.pool
    if overlap is None or not movable(layer):
        return []
    samples: Samples = []
    start, per_token_ns = time.perf_counter_ns(), 0.0
    for done, tokens in enumerate(_ROWS_PER_EXPERT):
        left_ns = _EXPERTS_BUDGET_S * 1e9 - (time.perf_counter_ns() - start)
        if done >= 3 and (_REPEATS + 1) * tokens * per_token_ns > left_ns:
            continue
        x = torch.randn(1, tokens, pool.hidden, dtype=pool.dtype, device=pool.up_SND.device)
        times = [_timed(pool.up_SND.device, overlap.compute, x) for _ in range(_REPEATS + 1)]
        samples += [[1, tokens, ns] for ns in times[1:]]
        per_token_ns = min(times) / tokens
    return samples


def movable(layer: MoELayer) -> bool:
    """Whether other ranks could compute the layer's shared experts for this one's tokens: they run beside the routed
    experts, on vectors of the same kind.
    """
    pool = layer.pool
    return layer.overlap is not None and layer.overlap.enabled and layer.overlap.row == (pool.hidden, pool.dtype)


def _some_of(layer: MoELayer, first: int, count: int) -> MoELayer:
    """The layer as if it had only these slots: what it does follows from the mean rows of all it has."""
    part = copy.copy(layer)
    part.pool = layer.pool.part(first, count)
    part.resized()
    return part


def _time_copies(layer: MoELayer, to_host: bool) -> Samples:
    """[bytes, ns] of copies between this rank's device and page-locked memory."""
    device = layer.pool.up_SND.device
    samples: Samples = []
    for nbytes in _HOST_BYTES:
        host, there = (
            torch.empty(nbytes, dtype=torch.uint8).pin_memory(),
            torch.empty(nbytes, dtype=torch.uint8, device=device),
        )
        target, source = (host, there) if to_host else (there, host)
        for repeat in range(_REPEATS + 1):
            ns = _timed(device, target.copy_, source, True)
            if repeat:
                samples.append([nbytes, ns])
    return samples


def _timed(device: torch.device, call: Callable[..., Any], *args: Any) -> int:
    """Nanoseconds of a call, what it left to the device included."""
    begin = time.perf_counter_ns()
    call(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(1, time.perf_counter_ns() - begin)


def _link(samples: Samples) -> LinkCost:
    return fit_link((nbytes, ns) for nbytes, ns in undisturbed(samples))


def _expert_cost(samples: Samples) -> ExpertCost:
    return fit_experts((experts, rows, ns) for experts, rows, ns in undisturbed(samples))


def undisturbed(samples: Samples) -> Samples:
    """For each case the time that a quarter of its samples are within. What is measured once counts for a month: a
    moment in which something else ran must not.
    """
    times: dict[tuple[int, ...], list[int]] = {}
    for *case, ns in samples:
        times.setdefault(tuple(case), []).append(ns)
    return [[*case, sorted(all_ns)[(len(all_ns) - 1) // 4]] for case, all_ns in times.items()]


# Several ranks


def measure(
    group: RankGroup, layer: MoELayer, *, planner: Callable[[], Any] | None = None, progress: bool = False
) -> Constants:
    """What all ranks know of their group; every rank calls it at the same time.

    Each looks for its file. Only where all have a fresh one is nothing measured: every exchange is timed together with
    the others. All ranks get the worst of each constant. `planner` makes a balancing plan for such a layer, compiled
    already (that takes longer than an exchange may); without one its time is 0.
    """
    machine_P = [row[0] for row in group.all_gather_ints([machine_number()])]
    key = constants.key_of(layer.pool.reader, group.device, torch.get_num_threads())
    key |= {"ranks": group.size, "machines": "+".join(str(machine_P.count(m)) for m in dict.fromkeys(machine_P))}
    key["shared"] = layer.overlap.weights if layer.overlap is not None and movable(layer) else 0
    if layer.offloaded is not None and layer.pool.num_slots < TRIAL_EXPERTS:
        key["places"] = layer.pool.num_slots  # too few to know what those say who have more
    record = constants.load("group", key)
    fresh = record is not None and (planner is None or record.values.planner_ns > 0)
    if all(row[0] for row in group.all_gather_ints([fresh])):
        assert record is not None
        return _agree(group, record.values)
    if group.position == 0:
        log.info("measuring the exchanges of %d ranks; kept for the next starts", group.size)
    samples = _time_exchanges(group, layer, machine_P, progress)
    samples["experts"] = time_experts(layer, progress)
    samples["shared"] = time_shared(layer)
    if planner is not None:
        samples["planner"] = [[_timed(torch.device("cpu"), planner)] for _ in range(_EXCHANGES)]
    agreed = _agree(group, _fit(samples))
    if machine_P.index(machine_number()) == group.position:  # one writes for all ranks of its machine
        if record is not None:  # for another rank, or without the planner's time
            constants.forget("group", **key)
        constants.save("group", key, agreed, samples)
    return agreed


def _agree(group: RankGroup, mine: Constants) -> Constants:
    return Constants.worst([Constants.from_list(values) for values in group.all_gather_ints(mine.to_list())])


def _fit(samples: Mapping[str, Samples]) -> Constants:
    others = ("experts", "shared", "planner")
    links = {name: _link(rows) for name, rows in samples.items() if name not in others and rows}
    # Where there are no two ranks on one machine, or only one machine, there is one class of pairs.
    near = links.get("near") or links.get("far") or FREE
    far = links.get("far") or near
    return Constants(
        links["small"],
        links["all_gather"],
        links["reduce_scatter"],
        links["all_to_all"],
        _expert_cost(samples["experts"]),
        near,
        far,
        round(median(ns for (ns,) in samples.get("planner", [[0]]))),
        _expert_cost(samples["shared"]) if samples["shared"] else NO_EXPERTS,
    )


def _time_exchanges(
    group: RankGroup, layer: MoELayer, machine_P: Sequence[int], progress: bool = False
) -> dict[str, Samples]:
    """[bytes, ns] of each collective, and of weight transfers between ranks of one machine and of two."""
    pool, size, device = layer.pool, group.size, group.device
    sent = group.sent_bytes
    samples: dict[str, Samples] = {
        name: [] for name in ("small", "all_gather", "reduce_scatter", "all_to_all", "near", "far")
    }
    show = progress and group.position == 0
    with tqdm(
        total=len(_SMALL) + len(_ROWS) + 2, desc="measuring exchanges", leave=False, disable=None if show else True
    ) as bar:
        for count in _SMALL:
            vector = torch.zeros(count, dtype=torch.int32)
            times = _times(group, vector.nbytes, group.all_gather_counts, vector)
            samples["small"] += [[(size - 1) * count * 4, ns] for ns in times]
            bar.update()
        row_bytes = pool.hidden * pool.dtype.itemsize
        most = max(_ROWS[1] + 1, min(_ROWS[2], _EXCHANGE_BYTES // (size * row_bytes)))
        for rows in (*_ROWS[:2], most):
            every = torch.zeros(size * rows, pool.hidden, dtype=pool.dtype, device=device)
            nbytes = every[:rows].nbytes
            for name, exchange, args in (
                ("all_gather", group.all_gather, (every[:rows],)),
                ("reduce_scatter", group.reduce_scatter, (every,)),
                ("all_to_all", group.all_to_all, (every, [rows] * size, [rows] * size)),
            ):
                times = _times(group, every.nbytes, exchange, *args)
                samples[name] += [[(size - 1) * nbytes, ns] for ns in times]
            bar.update()
        largest = min(max(layer.pool.reader.nbytes, _SMALLEST_WEIGHTS), _LARGEST_WEIGHTS)
        for name, pairs, together in pair_classes(machine_P):
            for nbytes in (largest // 64, largest // 8, largest) if pairs else ():
                samples[name] += [[nbytes * together, ns] for ns in _time_weights(group, pairs, nbytes)]
            bar.update()
    group.sent_bytes = sent
    return samples


def pair_classes(machine_P: Sequence[int]) -> list[tuple[str, list[tuple[int, int]], int]]:
    """("near" or "far", pairs of ranks that send and receive at the same time, how many of them share a link).

    Near: neighbours on each machine, each rank with a link of its own. Far: all ranks of each machine with those of
    the next one, over the links that the machine has.
    """
    ranks_M = [[p for p, m in enumerate(machine_P) if m == machine] for machine in dict.fromkeys(machine_P)]
    near = [pair for ranks in ranks_M for pair in zip(ranks[::2], ranks[1::2], strict=False)]
    width = min(map(len, ranks_M))
    far = [
        pair
        for a, b in zip(ranks_M[::2], ranks_M[1::2], strict=False)
        for pair in zip(a[:width], b[:width], strict=True)
    ]
    return [("near", near, 1), ("far", far, width)]


def _time_weights(group: RankGroup, pairs: Sequence[tuple[int, int]], nbytes: int) -> list[int]:
    """Nanoseconds of each repeat on the rank that took longest; every rank calls it."""
    weights = torch.zeros(nbytes, dtype=torch.uint8, device=group.device)
    sends = [(target, weights) for source, target in pairs if source == group.position]
    receives = [(source, weights) for source, target in pairs if target == group.position]
    times = []
    for repeat in range(_repeats(nbytes) + 1):
        group.all_gather_ints([0])  # so that all begin together
        ns = _timed(group.device, group.exchange_flat, sends, receives)
        longest = max(row[0] for row in group.all_gather_ints([ns]))
        if repeat:
            times.append(longest)
    return times


def _times(group: RankGroup, nbytes: int, exchange: Callable[..., Any], *args: Any) -> list[int]:
    """Nanoseconds of each repeat of an exchange of so many bytes; the first only warms up."""

    def finish() -> None:
        result = exchange(*args)
        if isinstance(result, tuple):  # what it will give, and what is under way
            result[1].wait()

    return [_timed(group.device, finish) for _ in range(_repeats(nbytes) + 1)][1:]


def _repeats(nbytes: int) -> int:
    return _EXCHANGES if nbytes <= _LARGE else _REPEATS


def machine_number() -> int:
    """A number that ranks of one machine share: of its running system and host name. A container is a machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = str(os.getuid()) if hasattr(os, "getuid") else ""
    digest = hashlib.blake2b(f"{platform.node()} {boot}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
