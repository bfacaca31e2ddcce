"""Measures what the cost model needs to know: this machine's exchanges and its experts. A fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..scheduler.cost import Constants, ExpertCost, fit_experts, fit_link
from .group import Pending, RankGroup
from .moe import MoELayer

_ROWS = (8, 128, 1024)
"""Rows of one hidden vector to or from each other rank."""
_SMALL = (64, 1024)
_REPEATS = 4
_TRIAL_EXPERTS = 4
_TRIAL_ROWS = (1, 32, 128)
"""Rows per expert."""


def measure(group: RankGroup, layer: MoELayer) -> Constants:
    """Times every exchange together with the other ranks, and this rank's experts; all ranks get the worst of each."""
    hidden_bytes = layer.pool.down_SDI.shape[1] * layer.pool.down_SDI.element_size()
    size, device = group.size, group.device
    sent = group.sent_bytes
    small, gather, scatter, to_all = [], [], [], []
    for count in _SMALL:
        vector = torch.zeros(count, dtype=torch.int32)
        for ns in _times(group, lambda vector=vector: (group.all_gather_counts(vector), None)):  # type: ignore[misc]
            small.append(((size - 1) * count * 4, ns))
    for rows in _ROWS:
        block = torch.zeros(rows, hidden_bytes, dtype=torch.uint8, device=device)
        all_blocks = torch.zeros(size * rows, layer.pool.down_SDI.shape[1], dtype=layer.pool.down_SDI.dtype).to(device)
        every = block.repeat(size, 1)
        nbytes = (size - 1) * block.nbytes
        gather += [(nbytes, ns) for ns in _times(group, lambda block=block: group.all_gather(block))]  # type: ignore[misc]
        scatter += [(nbytes, ns) for ns in _times(group, lambda x=all_blocks: group.reduce_scatter(x))]  # type: ignore[misc]
        to_all += [
            (nbytes, ns)
            for ns in _times(group, lambda x=every, n=[rows] * size: group.all_to_all(x, n, n))  # type: ignore[misc]
        ]
    group.sent_bytes = sent
    mine = Constants(fit_link(small), fit_link(gather), fit_link(scatter), fit_link(to_all), _experts(layer))
    return Constants.worst([Constants.from_list(values) for values in group.all_gather_ints(mine.to_list())])


def _times(group: RankGroup, start: Callable[[], tuple[torch.Tensor, Pending | None]]) -> list[int]:
    """Nanoseconds of each repeat; the first only warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter_ns()
        _, pending = start()
        if pending is not None:
            pending.wait()
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)
        times.append(max(1, time.perf_counter_ns() - begin))
    return times[1:]


def _experts(layer: MoELayer) -> ExpertCost:
    pool = layer.pool
    device = pool.up_SND.device
    experts = min(_TRIAL_EXPERTS, pool.num_slots)
    samples = []
    for touched in {1, experts}:
        for rows in _TRIAL_ROWS:
            x_RD = torch.randn(touched * rows, pool.down_SDI.shape[1]).to(device, pool.up_SND.dtype)
            slots_RK = torch.arange(touched, device=device).repeat(rows)[:, None]
            weights_RK = torch.ones(slots_RK.shape, device=device)
            for repeat in range(_REPEATS):
                begin = time.perf_counter_ns()
                layer.run_local(x_RD, slots_RK, weights_RK)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if repeat:
                    samples.append((touched, touched * rows, max(1, time.perf_counter_ns() - begin)))
    return fit_experts(samples)
