"""Expert offload of one rank: the layers' experts run from an `ExpertStore` whose memory holds a part of them.

What a token gets does not depend, to the bit, on which experts were in memory: each expert computes all its rows at
once, wherever it came from, and the rows are summed in top-k order.

T: tokens, K: experts per token, D: hidden size, E: experts, R: rows (token and expert pairs), G: experts with rows.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.expert_loop import expert_loop
from ..scheduler.placement import slots_needed
from ..scheduler.residency.policies import LFRU, LFU, LRU, DecayedFrequency, PredictedNow, default_policy
from ..scheduler.residency.slots import Budget, Policy
from .config import EngineConfig, format_size, parse_budget
from .dispatch import LocalDispatcher
from .expert_files import AlignedBuffer, ExpertFiles
from .host_experts import HostExperts, host_budget
from .measure_disk import disk_constants
from .predict.base import Predictor, Rows
from .predict.choose import Chosen, predictors_for
from .predict.forecast import Forecast
from .predict.look_ahead import LookAhead
from .predict.meter import Meter
from .readers import Priority, Read, Readers
from .store import ExpertLate, ExpertStore, Visit
from .store_size import READS_IN_FLIGHT, StoreSize, share_out

if TYPE_CHECKING:
    from .experts import ExpertPool
    from .loader import Blueprint
    from .moe import MoELayer

POLICIES: dict[str, Callable[[Budget], Policy]] = {
    "predicted": PredictedNow,
    "default": default_policy,
    "decayed": DecayedFrequency,
    "lfru": LFRU,
    "lfu": LFU,
    "lru": LRU,
}

LOOK_AHEAD = 2
"""Layers: a question takes some tenths of a millisecond."""

LEAST_CHANCE = 0.5
"""With which an expert is needed that is read ahead. Where steps wait for the disk, a read for nothing costs as much as
a right one saves.
"""

log = logging.getLogger("moeyard.offload")


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """The store that the options ask for: its division, and the slots as the policy sees them."""

    size: StoreSize
    budget: Budget
    residency: str
    predictors: Chosen
    read_ns_per_byte: float
    """Of the checkpoint's files."""
    host_bytes: int | None = None
    """Of host memory for experts beside the device's; None where the device is the host."""

    def policy(self) -> Policy:
        return POLICIES[self.residency](self.budget)


def plan_offload(config: EngineConfig, blueprint: Blueprint, sharing: int = 1) -> OffloadPlan | None:
    """What `expert_memory` means for a model; None when all experts are to be in memory. `sharing` ranks have this
    machine's memory.

    Each layer keeps as many slots as a token has experts, or its share where there are fewer. Of several ranks it is
    the plan of each, for as many experts as a rank has: the same on all, whoever is lost. Raises ValueError for what
    cannot be.
    """
    if config.expert_memory is None:
        return None
    specs, total, ranks = blueprint.spec.experts, blueprint.footprint.experts, config.ep or 1
    if not specs:
        raise ValueError("expert_memory: this model has no experts; leave it out")
    on_cpu = blueprint.device.type == "cpu"
    if on_cpu and config.host_memory is not None:
        raise ValueError(
            f"host_memory is {config.host_memory}, and on a CPU that is what --expert-memory sets; leave it out"
        )
    own = [spec.num_experts for spec in specs]
    if ranks > 1:
        own = [slots_needed(experts, ranks, config.redundant_experts) for experts in own]
        total = sum(blueprint.weights.reader(spec).nbytes * slots for spec, slots in zip(specs, own, strict=True))
    budget = parse_budget(config.expert_memory, total, "expert_memory")
    if budget >= total:
        log.info("expert_memory %s is room for all experts, %s", config.expert_memory, format_size(total))
        return None
    readers = [blueprint.weights.reader(spec) for spec in specs]
    shapes = {tuple((name, r.shape(name), r.dtype(name)) for name in r.spec.parameters) for r in readers}
    if len(shapes) > 1:
        raise ValueError("expert_memory: the experts of this model's layers differ in shape; leave it out")
    with closing(ExpertFiles(readers)) as files:
        disk = disk_constants(files, progress=config.progress).values
    # A GPU's slots are filled from host memory: the buffers are there.
    buffer, reads = (files.buffer_bytes, disk.best) if on_cpu else (0, READS_IN_FLIGHT)
    size = share_out(budget, readers[0].nbytes, buffer, reads)
    experts = max(spec.num_experts for spec in specs)
    slots = min(size.slots, len(specs) * experts)
    # A token has that many on a rank, if they are spread evenly; more than it has of its own must not be kept free.
    floor = min(*(-(-spec.top_k // ranks) for spec in specs), slots // len(specs), *own)
    shared = Budget(layers=len(specs), experts=experts, slots=slots, floor=floor)
    fingerprint = blueprint.weights.checkpoint.fingerprint
    predictors = predictors_for(config.predictor, fingerprint, len(specs), experts) if ranks == 1 else Chosen()
    residency = config.residency
    if residency == "auto":
        residency = "predicted" if predictors.trained else "default"
    elif residency == "predicted" and not predictors.trained:
        raise ValueError(
            "residency is predicted, and no predictor was trained for this model; train one with moeyard"
            " train-predictor, name one with --predictor FILE, or use --residency default"
        )
    host_bytes = None if on_cpu else host_budget(config.host_memory, total, sharing)
    return OffloadPlan(
        size=size,
        budget=shared,
        residency=residency,
        predictors=predictors,
        read_ns_per_byte=1e9 / disk.bytes_per_s,
        host_bytes=host_bytes,
    )


class CheckpointSource:
    """Experts from the checkpoint's own files, past the page cache where that is possible, the most urgent first. With
    `host` from host memory, and from the files those that are not there.
    """

    def __init__(
        self, files: ExpertFiles, pools: Sequence[ExpertPool], size: StoreSize, host: HostExperts | None = None
    ) -> None:
        self.host = host
        self._files = files
        self._pools = pools
        buffers = [AlignedBuffer(files.buffer_bytes) for _ in range(size.buffers)]
        self._readers = Readers(host or files, buffers, threads=size.readers)
        self.nbytes_LE = [
            [sum(extent.nbytes for extent in files.extents(layer, expert)) for expert in range(experts)]
            for layer, experts in enumerate(files.num_experts_L)
        ]

    def fetch(self, layer: int, expert: int, place: int, priority: Priority) -> Read:
        """As `store.Source` says, and so are the others."""
        if self.host is not None:
            self.host.mark()
        return self._readers.submit(layer, expert, self._pools[layer].views(place), priority)

    def promote(self, read: Future[Any], priority: Priority) -> None:
        assert isinstance(read, Read)
        self._readers.promote(read, priority)

    def abandon(self, read: Future[Any]) -> None:
        assert isinstance(read, Read)
        self._readers.abandon(read)

    def nbytes(self, layer: int, expert: int) -> int:
        return self.nbytes_LE[layer][expert]

    def close(self, timeout_s: float) -> None:
        self._readers.close(timeout_s)
        self._files.close()


class Offload:
    """The store of a model's layers, and how each runs from it."""

    def __init__(
        self,
        plan: OffloadPlan,
        layers: Sequence[MoELayer],
        blueprint: Blueprint,
        *,
        own: Sequence[Sequence[int]] | None = None,
        progress: bool = False,
    ) -> None:
        """`own` are the experts of each layer that this rank has (-1: none), if not all: they may be in host memory."""
        self.plan = plan
        pools = [layer.pool for layer in layers]
        files = ExpertFiles([pool.reader for pool in pools])
        files.drop_cached_pages()
        host = None
        if plan.host_bytes is not None:
            host = HostExperts(files, pools, plan.host_bytes, plan.size.readers, own=own, progress=progress)
        self.source = CheckpointSource(files, pools, plan.size, host)
        self.store = ExpertStore(plan.size, plan.policy(), self.source)
        chosen = plan.predictors
        self._look_ahead = LookAhead(blueprint.model, blueprint.spec, LOOK_AHEAD) if chosen.look_ahead else None
        untrained = [*([self._look_ahead] if self._look_ahead is not None else []), *chosen.others]
        ns_per_byte = host.ns_per_byte if host is not None else plan.read_ns_per_byte

        def meter(predictor: Predictor, judged: bool) -> Meter:
            return Meter(
                predictor,
                ns_per_byte=ns_per_byte,
                resident=self.store.here,
                least_chance=LEAST_CHANCE,
                judged=judged,
            )

        self.forecast = Forecast(
            [meter(predictor, False) for predictor in chosen.trained],
            [meter(predictor, True) for predictor in untrained],
            plan.budget.layers,
            plan.budget.experts,
            least_chance=LEAST_CHANCE,
        )
        self.store.heard = self.forecast.heard
        for number, layer in enumerate(layers):
            layer.offloaded = OffloadedLayer(self.store, self.forecast, layer, number)

    def begin_step(self, rows: Sequence[Rows]) -> None:
        """A step of the engine, with these sequences' tokens."""
        self.store.begin_step()
        self.forecast.begin_step(rows)
        self.store.fetch_ahead(self.forecast.wants(-1))

    def forget(self) -> None:
        """Empties the store, as after the start: the warm-up is over."""
        if self._look_ahead is not None:
            self._look_ahead.settle()
        self.store.forget(self.plan.policy())

    def close(self) -> None:
        """Ends reading. What is on its way is waited for, within `store.READ_TIMEOUT_S`."""
        self.store.close()

    def figures(self) -> dict[str, Any]:
        """The fields of `Stats` that are about the store."""
        figures = self.store.figures
        return {
            "expert_hits": figures.hits,
            "expert_misses": figures.misses,
            "expert_read_bytes": figures.read_bytes,
            "expert_admitted_bytes": figures.admitted_bytes,
            "expert_resident_bytes": figures.resident_bytes,
            "expert_ahead": figures.ahead,
            "expert_ahead_ready": figures.ahead_ready,
            "expert_ahead_bytes": figures.ahead_bytes,
            "expert_ahead_used_bytes": figures.ahead_used_bytes,
            "expert_wait_ns": figures.waited_ns,
            "predictors": self.forecast.figures(),
        }


class OffloadedLayer:
    """A layer whose experts are in the store, MoE layer `number` of it."""

    def __init__(self, store: ExpertStore, forecast: Forecast, layer: MoELayer, number: int) -> None:
        self._store = store
        self._forecast = forecast
        self._layer = layer
        self._number = number

    def run(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        counts_E: torch.Tensor,
        *,
        experts: int | None = None,
        deadline: float = math.inf,
    ) -> torch.Tensor:
        """Weighted sums [T, D] over the experts of each token; -1 adds nothing. `counts_E` are the experts' rows.

        Of several ranks' tokens only what this rank's `experts` add, which have to be there at `deadline` (monotonic).
        Raises ExpertUnreadable and ExpertLate.
        """
        layer, counts = self._layer, counts_E.tolist()
        if not any(counts):
            return torch.zeros_like(x_TD)
        if experts is None:  # of several ranks none sees all tokens that come to its experts
            self._forecast.routed(self._number, ids_TK, weights_TK)
        used = [expert for expert, count in enumerate(counts) if count]
        visit = self._store.visit(self._number, used, self._forecast.future())
        self._store.fetch_ahead(self._forecast.wants(self._number))
        # Experts are numbered in the order in which they run, so that each group's rows follow each other.
        order_E = torch.full(counts_E.shape, -1)
        order_E[list(visit.experts)] = torch.arange(len(visit.experts))
        order_E = order_E.to(ids_TK.device)
        order_TK = order_E[ids_TK.clamp_min(0)].masked_fill_(ids_TK < 0, -1)
        starts = [0, *itertools.accumulate(counts[expert] for expert in visit.experts)]
        if experts is None:
            few = layer.takes_few_rows(ids_TK.numel(), len(counts))
        else:
            few = layer.takes_few_rows(sum(counts), experts)
        y_RD = x_TD.new_empty(starts[-1], x_TD.shape[1])
        if layer.compiled:
            from ..kernels.grouped_linear import combine
            from ..kernels.sort_rows import sort_rows

            rows = sort_rows(order_TK, len(visit.experts))
            self._compute(visit, starts, few, deadline, x_TD, rows.token_R, y_RD)
            return combine(y_RD, rows.position_TK, weights_TK)
        local = LocalDispatcher(len(visit.experts))
        token_R, _, state = local.route(order_TK, weights_TK)
        if layer.grouped is not None:
            token_R = token_R.int()
        self._compute(visit, starts, few, deadline, x_TD, token_R, y_RD)
        return local.combine(y_RD, state)

    def _compute(
        self,
        visit: Visit,
        starts: Sequence[int],
        few: bool,
        deadline: float,
        x_TD: torch.Tensor,
        token_R: torch.Tensor,
        y_RD: torch.Tensor,
    ) -> None:
        """Fills `y_RD` as the experts come; those of `visit.experts[i]` are the rows starts[i] to starts[i + 1]."""
        done = 0
        for places in visit:
            rows = starts[done : done + len(places) + 1]
            low, high = rows[0], rows[-1]
            rows_of: Callable[..., torch.Tensor] = self._few_rows if few else self._many_rows
            if self._layer.grouped is not None:
                rows_of = self._layer.grouped.listed
            y_RD[low:high] = rows_of(x_TD, token_R[low:high], [row - low for row in rows], places)
            done += len(places)
            if done < len(visit.experts) and time.monotonic() > deadline:
                raise ExpertLate(
                    f"{len(visit.experts) - done} experts of MoE layer {self._number} were not read in the time for"
                    " which the other ranks wait; raise --collective-timeout, or --expert-memory"
                )

    def _few_rows(
        self, x_TD: torch.Tensor, token_R: torch.Tensor, starts: Sequence[int], places: Sequence[int]
    ) -> torch.Tensor:
        from ..kernels.grouped_linear import grouped_gate_up_silu, grouped_linear

        pool = self._layer.pool
        groups = torch.tensor(starts, dtype=torch.int32), torch.tensor(places, dtype=torch.int32)
        if self._layer.swiglu:
            h_RI = grouped_gate_up_silu(x_TD, pool.up_SND, *groups, token_R)
        else:
            h_RN = grouped_linear(x_TD, pool.up_SND, *groups, pool.up_bias_SN, token_R)
            # Expert by expert: torch computes the last elements of a tensor in another way than the first, and what
            # is last must not depend on who came together.
            h_RI = torch.cat([self._layer.gate(h_RN[low:high]) for low, high in itertools.pairwise(starts)])
        return grouped_linear(h_RI, pool.down_SDI, *groups, pool.down_bias_SD)

    def _many_rows(
        self, x_TD: torch.Tensor, token_R: torch.Tensor, starts: Sequence[int], places: Sequence[int]
    ) -> torch.Tensor:
        pool = self._layer.pool

        def of(tensor: torch.Tensor | None) -> list[torch.Tensor] | None:
            return None if tensor is None else [tensor[place] for place in places]

        up_GND, down_GDI = of(pool.up_SND), of(pool.down_SDI)
        assert up_GND is not None and down_GDI is not None
        counts_G = torch.tensor([high - low for low, high in itertools.pairwise(starts)])
        biases = of(pool.up_bias_SN), of(pool.down_bias_SD)
        return expert_loop(x_TD, token_R, counts_G, up_GND, down_GDI, self._layer.gate, *biases)
