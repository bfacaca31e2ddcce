"""Measures what a missing expert costs on a device with a host tier: copying it there and computing it, or computing it
on the CPU, its rows' way there and back included; each alone and both at once.

At a start without a fresh file of constants, and by `moeyard profile`; about a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..scheduler.cost import LinkCost
from ..scheduler.fit import fit_experts, fit_link
from ..scheduler.misses import MissCosts
from . import constants
from .constants import Record
from .expert_rows import few_rows, many_rows
from .host_compute import HostCompute, Job
from .host_experts import HostPool
from .measure import Samples, undisturbed

if TYPE_CHECKING:
    from .moe import MoELayer

TRIAL_EXPERTS = 4
_ROWS_PER_EXPERT = (1, 16, 64)
_REPEATS = 5
_CASE_S = 0.2
"""A case that has taken so long is not repeated any more, after the second time."""
_JOBS = 4
"""Calls of the CPU beside which experts are copied."""
_WAIT_S = 60.0

log = logging.getLogger("moeyard.measure")


def key_of(layer: MoELayer, pinned: bool) -> dict[str, Any]:
    """That of a rank's constants, and whether the host memory is page-locked."""
    key = constants.key_of(layer.pool.reader, layer.pool.up_SND.device, torch.get_num_threads())
    return key | {"pinned": pinned}


def miss_constants(
    layer: MoELayer, pool: HostPool, compute: HostCompute, experts: int, *, force: bool = False, progress: bool = False
) -> Record[MissCosts]:
    """What is known of misses of such a layer, from the file or measured now with the first `experts` slots of `pool`,
    at least one, and as many places of the layer's own pool; `force` does not look at the file.
    """
    key = key_of(layer, pool.pinned)
    if force:
        constants.forget("misses", **key)
    elif (record := constants.load("misses", key)) is not None:
        return record
    log.info("measuring missing experts: copied, or computed by the CPU; kept for the next starts")
    samples = time_misses(layer, pool, compute, experts, progress)
    return constants.save("misses", key, fit(samples, pool.reader.nbytes), samples)


def fit(samples: Mapping[str, Samples], expert_bytes: int) -> MissCosts:
    """The constants that explain what `time_misses` gives."""
    best = {name: undisturbed(rows) for name, rows in samples.items()}
    copies = [(nbytes, ns) for nbytes, ns in best["copy"]]
    if len(copies) > 1:
        copy = fit_link(copies)
    else:  # room for one expert only: its start-up is in its time
        ((nbytes, ns),) = copies
        copy = LinkCost(0, -(-(ns * 10**6) // nbytes))
    device, host = (fit_experts([(n, rows, ns) for n, rows, ns in best[name]]) for name in ("device", "host"))
    both_ns = min(-(-ns // experts) for experts, ns in best["both"])
    return MissCosts(expert_bytes=expert_bytes, copy=copy, device=device, host=host, both_ns=both_ns)


def time_misses(
    layer: MoELayer, pool: HostPool, compute: HostCompute, experts: int, progress: bool = False
) -> dict[str, Samples]:
    """[bytes, ns] of copies, [experts, rows, ns] on the device and on the CPU, [experts, ns] of both at once."""
    trial = _Trial(layer, pool, compute, experts)
    counts = sorted({1, min(TRIAL_EXPERTS, experts, layer.pool.num_slots)})
    cases = [(n, n * rows) for n in counts for rows in _ROWS_PER_EXPERT]
    samples: dict[str, Samples] = {"copy": [], "device": [], "host": [], "both": []}
    bar = tqdm(
        total=len(counts) + 2 * len(cases) + 1,
        desc="measuring missing experts",
        leave=False,
        disable=None if progress else True,
    )
    with bar:
        for n in counts:
            samples["copy"] += [[n * pool.reader.nbytes, ns] for ns in _times(trial.copy, n)]
            bar.update()
        for name, run in (("device", trial.on_device), ("host", trial.on_cpu)):
            for n, rows in cases:
                samples[name] += [[n, rows, ns] for ns in _times(run, n, rows)]
                bar.update()
        samples["both"] = [trial.both(counts[-1]) for _ in range(_REPEATS)]
        bar.update()
    return samples


class _Trial:
    """What is timed, each time with other experts: a step finds none of them in a cache, either."""

    def __init__(self, layer: MoELayer, pool: HostPool, compute: HostCompute, experts: int) -> None:
        self._layer, self._pool, self._compute, self._experts = layer, pool, compute, experts
        self._turn = 0

    def copy(self, experts: int) -> None:
        places = self._some(experts, self._layer.pool.num_slots)
        for slot, place in zip(self._some(experts, self._experts), places, strict=True):
            self._pool.send(slot, self._layer.pool.views(place))
        self._turn += experts

    def on_device(self, experts: int, rows: int) -> None:
        layer = self._layer
        run = few_rows if layer.takes_few_rows(rows, experts) else many_rows
        x_RD, token_R, starts = self._inputs(experts, rows)
        weights = [layer.pool.weights(place) for place in self._some(experts, layer.pool.num_slots)]
        run(layer, x_RD, token_R, starts, weights, x_RD.new_empty(starts[-1], x_RD.shape[1]))
        self._turn += experts
        if x_RD.device.type == "cuda":
            torch.cuda.synchronize(x_RD.device)

    def on_cpu(self, experts: int, rows: int) -> None:
        x_RD, token_R, starts = self._inputs(experts, rows)
        y_RD = self._job(experts, x_RD, token_R, starts).wait(_WAIT_S)
        x_RD.copy_(y_RD, non_blocking=True)
        if x_RD.device.type == "cuda":
            torch.cuda.synchronize(x_RD.device)

    def both(self, experts: int) -> list[int]:
        """[experts, ns] of all that were copied or computed while the CPU was at work."""
        inputs = self._inputs(experts, experts)
        begun, copied = time.perf_counter_ns(), 0
        jobs = [self._job(experts, *inputs) for _ in range(_JOBS)]
        while not copied or not jobs[-1].done:
            self.copy(1)
            copied += 1
        for job in jobs:
            job.wait(_WAIT_S)
        return [_JOBS * experts + copied, max(1, time.perf_counter_ns() - begun)]

    def _job(self, experts: int, x_RD: torch.Tensor, token_R: torch.Tensor, starts: list[int]) -> Job:
        slots = self._some(experts, self._experts)
        self._turn += experts
        return self._compute.start(0, range(experts), slots, starts, x_RD, token_R)

    def _some(self, count: int, of: int) -> list[int]:
        """`count` different ones of `of`."""
        return [(self._turn + i) % of for i in range(count)]

    def _inputs(self, experts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """As many rows for each expert, each of a token of its own."""
        pool = self._layer.pool
        x_RD = torch.ones(rows, pool.hidden, dtype=pool.dtype, device=pool.up_SND.device)
        starts = [rows // experts * i for i in range(experts + 1)]
        return x_RD, torch.arange(starts[-1], dtype=torch.int32, device=pool.up_SND.device), starts


def _times(call: Callable[..., None], *args: int) -> list[int]:
    """Nanoseconds of each repeat; the first only warms up."""
    times: list[int] = []
    begun = time.perf_counter()
    while len(times) < 2 or (len(times) <= _REPEATS and time.perf_counter() - begun < _CASE_S):
        start = time.perf_counter_ns()
        call(*args)
        times.append(max(1, time.perf_counter_ns() - start))
    return times[1:]
