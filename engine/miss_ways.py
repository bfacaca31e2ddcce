"""Missing experts of a device with a host tier, layer by layer: who is copied, who is computed by the CPU, and what is
copied before the next layer's router has chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ..scheduler.misses import MissCosts, Ways, choose_ways, streams
from .host_compute import HostCompute
from .host_experts import HostExperts
from .measure import TRIAL_EXPERTS, few_rows_of
from .measure_misses import miss_constants
from .moe import MoELayer
from .readers import Priority
from .wants import Want

STREAM = "stream"
"""On whose word a layer's experts are read ahead that is streamed (`Want.by`)."""

log = logging.getLogger("moeyard.miss_ways")


@dataclass(kw_only=True)
class MissFigures:
    """Experts since the start: computed by the CPU; copied when the router had chosen them; copied before, with the
    whole layer, and then used.
    """

    on_cpu: int = 0
    copied: int = 0
    streamed: int = 0


class MissWays:
    """Decides by `costs`; `mode` "copy" and "cpu" leave no choice but for experts that are not in host memory."""

    def __init__(
        self, host: HostExperts, compute: HostCompute, costs: MissCosts, mode: str, experts_L: Sequence[int]
    ) -> None:
        self.compute = compute
        self.costs = costs
        self.figures = MissFigures()
        self._host = host
        self._mode = mode
        self._experts_L = experts_L
        self._uses_LE = [[0] * experts for experts in experts_L]
        """Rows of each expert so far."""
        self._ways = lru_cache(maxsize=1024)(self._choose)  # decode steps are much alike
        self._ended = (-2, 0)
        """The layer that ran last, and when that was."""
        self._gap_ns = 0

    def begin(self, layer: int, used: Sequence[int], counts_E: Sequence[int]) -> None:
        """The layer's router has chosen: so many rows of each expert, `used` are those with any."""
        uses_E = self._uses_LE[layer]
        for expert in used:
            uses_E[expert] += counts_E[expert]
        before, at_ns = self._ended
        if before == layer - 1:
            self._gap_ns = time.monotonic_ns() - at_ns

    def chooser(
        self, layer: int, counts_E: Sequence[int]
    ) -> Callable[[Sequence[int], Sequence[int], Sequence[int]], tuple[list[int], list[int]]]:
        """For `ExpertStore.ask`, with the rows of each of the layer's experts."""

        def choose(here: Sequence[int], coming: Sequence[int], missing: Sequence[int]) -> tuple[list[int], list[int]]:
            near = [expert for expert in missing if (layer, expert) in self._host]
            far = [] if len(near) == len(missing) else [expert for expert in missing if expert not in near]
            on_cpu: list[int] = []
            if self._mode == "cpu":
                near, on_cpu = [], near
            elif self._mode == "auto" and near:
                rows = [tuple([counts_E[expert] for expert in some]) for some in (near, here, (*coming, *far))]
                ways = self._ways(*rows)
                near, on_cpu = [near[m] for m in ways.copied], [near[m] for m in ways.on_cpu]
            self.figures.copied += len(near) + len(far)
            self.figures.on_cpu += len(on_cpu)
            return [*near, *far], on_cpu

        return choose

    def _choose(self, rows: tuple[int, ...], here: tuple[int, ...], copied: tuple[int, ...]) -> Ways:
        """By the rows of missing experts, of those that the device has, and of those that are copied in any case."""
        return choose_ways(self.costs, rows, busy_ns=self.costs.device_ns(here), copied=copied)

    def slots(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Where these are in host memory."""
        return [self._host.slot(layer, expert) for expert in experts]

    def end(self, layer: int, touched: int, room: int, has: Callable[[int, int], bool]) -> Iterator[Want]:
        """The layer has run, which touched so many experts: whom to copy of the next one now, if `room` experts have a
        place there, those with the most rows so far first; `has` says who has a place already, by layer and expert.
        """
        self._ended = (layer, time.monotonic_ns())
        if self._mode == "cpu" or layer + 1 >= len(self._experts_L):
            return
        if self._gap_ns < self.costs.copy_ns:  # no copy would be made in time, whoever is missing
            return
        experts = self._experts_L[layer + 1]
        missing = [e for e in range(experts) if not has(layer + 1, e) and (layer + 1, e) in self._host]
        touched = min(touched * experts // self._experts_L[layer], experts)
        if streams(self.costs, missing=len(missing), touched=touched, experts=experts, room=room, gap_ns=self._gap_ns):
            missing.sort(key=lambda expert: -self._uses_LE[layer + 1][expert])  # those of equal uses in order
            for expert in missing[:room]:
                yield Want(
                    layer=layer + 1, expert=expert, chance=touched / experts, priority=Priority.NEXT_LAYER, by=STREAM
                )

    def heard(self, used: bool) -> None:
        """What became of an expert that was copied with its layer."""
        self.figures.streamed += used

    def counts(self) -> dict[str, int]:
        """The fields of `Stats`."""
        return {f"expert_{name}": getattr(self.figures, name) for name in ("on_cpu", "copied", "streamed")}

    def forget(self) -> None:
        """All counts at 0."""
        self.figures = MissFigures()


def ways_for(
    mode: str, layers: Sequence[MoELayer], host: HostExperts, model: nn.Module, *, progress: bool = False
) -> MissWays | None:
    """What decides for these layers, its costs from the file of constants or measured now; None where no expert is in
    host memory, which is an error for `mode` "cpu".
    """
    if not host.kept:
        if mode == "cpu":
            raise ValueError("misses is cpu, and host memory has room for no expert; give more with --host-memory")
        return None
    on_cpu = [MoELayer(model.get_submodule(layer.pool.spec.module), host.pool) for layer in layers]
    # Where the CPU is the device too, both take the same kernels for the same rows.
    few = 0
    if host.pool.device.type == "cuda":
        enough = host.kept >= TRIAL_EXPERTS
        few = few_rows_of(on_cpu[0], progress) if enough else on_cpu[0].measure_few_rows()
        for layer in on_cpu:
            layer.panel_rows = on_cpu[0].panel_rows
    compute = HostCompute(on_cpu, host.pool, few)
    with torch.inference_mode():
        record = miss_constants(layers[0], host.pool, compute, host.kept, progress=progress)
    return MissWays(host, compute, record.values, mode, [layer.pool.spec.num_experts for layer in layers])
