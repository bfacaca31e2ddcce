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

import numpy as np
import torch

from ..scheduler.placement import slots_needed
from ..scheduler.residency.policies import LFRU, LFU, LRU, DecayedFrequency, PredictedNow, default_policy
from ..scheduler.residency.preload import preload_order
from ..scheduler.residency.slots import Budget, Policy
from . import usage
from .config import EngineConfig, format_size, parse_budget
from .dispatch import LocalDispatcher, Note
from .expert_files import PIECE_BYTES, AlignedBuffer, ExpertFiles
from .expert_rows import few_rows, many_rows
from .experts import ExpertPool, ExpertWeights, pool_in
from .host_experts import HostExperts, host_budget
from .measure_disk import disk_constants
from .miss_ways import STREAM, MissWays, ways_for
from .predict.base import Predictor, Rows
from .predict.choose import Chosen, predictors_for
from .predict.exact import Exact
from .predict.forecast import Forecast
from .predict.look_ahead import LookAhead
from .predict.meter import Meter
from .predict.shared_forecast import SharedForecast
from .readers import Priority, Read, Readers
from .store import READ_TIMEOUT_S, ExpertLate, ExpertStore, Outcome, Visit, Want
from .store_size import StoreSize, choose_size, share_out

if TYPE_CHECKING:
    from .host_compute import Job
    from .loader import Blueprint
    from .moe import MoELayer
    from .weights import ExpertReader

POLICIES: dict[str, Callable[[Budget], Policy]] = {
    "predicted": PredictedNow,
    "default": default_policy,
    "decayed": DecayedFrequency,
    "lfru": LFRU,
    "lfu": LFU,
    "lru": LRU,
}

LEAST_CHANCE = 0.5
"""With which an expert is needed that is read ahead. Measured: with 0.25 half as much again is read for nothing, and no
step is faster.
"""

log = logging.getLogger("moeyard.offload")


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """The store that the options ask for: its division, and the slots as the policy sees them."""

    size: StoreSize
    budget: Budget
    residency: str
    predictors: Chosen
    shares: bool = False
    """Whether this is one of several ranks, which tell each other what they predict."""
    read_ns_per_byte: float
    """Of the checkpoint's files."""
    used_LE: Any = None
    """How often each expert was used before, None where that is not known."""
    host_bytes: int | None = None
    """Of host memory for experts beside the device's; None where the device is the host."""
    misses: str = "auto"
    """What becomes of experts that are there and not on the device."""
    in_place: bool = False
    """Whether experts are read into their places, where they are then as they are in their files."""

    def pool(self, reader: ExpertReader, device: torch.device) -> ExpertPool:
        """The memory of all places, for the first of the layers, with whom the others share it."""
        if not self.in_place:
            return ExpertPool(reader, self.size.places, device)
        return pool_in(AlignedBuffer(self.size.places * self.size.place), reader)

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
    if on_cpu and config.misses != "auto":
        raise ValueError(
            f"misses is {config.misses}, and on a CPU missing experts are read and computed in one place; leave it out"
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
        around = files.place_bytes - readers[0].nbytes if on_cpu and files.in_place else None
    # A GPU's slots are filled from host memory: the buffers are there.
    if on_cpu:
        size, in_place = choose_size(budget, readers[0].nbytes, files.buffer_bytes, around, disk.best)
    else:
        size, in_place = share_out(budget, readers[0].nbytes, 0), False
    experts = max(spec.num_experts for spec in specs)
    slots = min(size.slots, len(specs) * experts)
    # A token has that many on a rank, if they are spread evenly; more than it has of its own must not be kept free.
    floor = min(*(-(-spec.top_k // ranks) for spec in specs), slots // len(specs), *own)
    shared = Budget(layers=len(specs), experts=experts, slots=slots, floor=floor)
    fingerprint = blueprint.weights.checkpoint.fingerprint
    predictors = predictors_for(config.predictor, fingerprint, len(specs), experts)
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
        shares=ranks > 1 and config.predictor != "none",
        read_ns_per_byte=1e9 / disk.bytes_per_s,
        used_LE=usage.load(fingerprint, len(specs), experts) if ranks == 1 else None,
        host_bytes=host_bytes,
        misses=config.misses,
        in_place=in_place,
    )


class CheckpointSource:
    """Experts from the checkpoint's own files, past the page cache where that is possible, the most urgent first. With
    `host` from host memory, and from the files those that are not there.
    """

    def __init__(
        self, files: ExpertFiles, pools: Sequence[ExpertPool], size: StoreSize, host: HostExperts | None = None
    ) -> None:
        assert host is None or pools[0].memory is None, "what comes from host memory is copied to slots"
        self.host = host
        self._files = files
        self._pools = pools
        self._places: list[AlignedBuffer] | None = None
        buffers: list[AlignedBuffer] = []
        if pools[0].memory is None:
            self._weights = [pools[0].weights(place) for place in range(size.places)]
            buffers = [AlignedBuffer(files.buffer_bytes) for _ in range(size.buffers)]
        else:
            self._places = pools[0].memory.split(size.place)
            nothing = torch.empty(0)
            self._weights = [ExpertWeights(up_PND=(nothing,), down_DI=nothing)] * size.places
        self._readers = Readers(host or files, buffers, threads=size.readers)
        self.nbytes_LE = [
            [sum(extent.nbytes for extent in files.extents(layer, expert)) for expert in range(experts)]
            for layer, experts in enumerate(files.num_experts_L)
        ]

    def fetch(self, layer: int, expert: int, place: int, priority: Priority) -> Read:
        """As `store.Source` says, and so are the others."""
        if self.host is not None:
            self.host.mark()
        if self._places is None:
            return self._readers.submit(layer, expert, self._pools[layer].views(place), priority)
        buffer = self._places[place]
        self._weights[place] = self._pools[layer].named(self._files.placed(layer, expert, buffer))
        return self._readers.submit(layer, expert, {}, priority, buffer)

    def weights(self, place: int) -> ExpertWeights:
        """What layers compute with, once the expert that is on its way to a place has been read."""
        return self._weights[place]

    def promote(self, read: Future[Any], priority: Priority) -> None:
        assert isinstance(read, Read)
        self._readers.promote(read, priority)

    def abandon(self, read: Future[Any]) -> None:
        assert isinstance(read, Read)
        self._readers.abandon(read)

    def nbytes(self, layer: int, expert: int) -> int:
        return self.nbytes_LE[layer][expert]

    def bytes_read(self, read: Future[Any]) -> int:
        assert isinstance(read, Read)
        return read.bytes_read

    def in_the_way(self, read: Future[Any]) -> int:
        assert isinstance(read, Read)
        if not self._readers.running(read):
            return 0
        nbytes = self.nbytes(read.layer, read.expert)
        return (nbytes if self.host is not None else min(nbytes, PIECE_BYTES)) // 2

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
        self.ways = None if host is None else ways_for(plan.misses, layers, host, blueprint.model, progress=progress)
        self.source = CheckpointSource(files, pools, plan.size, host)
        self.store = ExpertStore(plan.size, plan.policy(), self.source)
        chosen = plan.predictors
        self._look_ahead = None
        if chosen.look_ahead:
            self._look_ahead = LookAhead(blueprint.model, blueprint.spec, ridge=chosen.ridge)
        self._exact = Exact(blueprint.model, blueprint.spec) if chosen.exact else None
        untrained = [*([self._look_ahead] if self._look_ahead is not None else []), *chosen.others]
        ns_per_byte = host.ns_per_byte if host is not None else plan.read_ns_per_byte

        def meter(predictor: Predictor, judged: bool = True) -> Meter:
            return Meter(
                predictor,
                ns_per_byte=ns_per_byte,
                resident=self._not_read,
                least_chance=LEAST_CHANCE,
                judged=judged,
            )

        self.forecast: Forecast = (SharedForecast if plan.shares else Forecast)(
            [meter(predictor, False) for predictor in chosen.trained],
            [meter(predictor) for predictor in untrained],
            plan.budget.layers,
            plan.budget.experts,
            least_chance=LEAST_CHANCE,
        )
        self._meter = meter
        self._layers = layers
        self._fingerprint = blueprint.weights.checkpoint.fingerprint
        self._filling = False
        self.store.heard = self._heard
        self.forecast.idle_layers = lambda: self.store.figures.idle_layers
        for number, layer in enumerate(layers):
            layer.offloaded = OffloadedLayer(self.store, self.source, self.forecast, layer, number, self.ways)

    def announce(self, rows: Sequence[Rows]) -> None:
        """With several ranks: the next step is about to be agreed on, with these sequences' tokens of this rank."""
        if isinstance(self.forecast, SharedForecast):
            self.forecast.announce(rows)

    def begin_step(self, rows: Sequence[Rows]) -> None:
        """A step of the engine, with these sequences' tokens."""
        self.store.begin_step()
        self.tend()
        self.forecast.begin_step(rows)
        self.store.fetch_ahead(self.forecast.wants(-1))

    def _heard(self, want: Want, outcome: Outcome) -> None:
        if self.ways is not None and want.by == STREAM:
            self.ways.heard(outcome.used)
        else:
            self.forecast.heard(want, outcome)

    def forget(self) -> None:
        """Empties the store, as after the start: the warm-up is over."""
        if self._look_ahead is not None:
            self._look_ahead.settle()
        if self._exact is not None:
            self._exact.settle()
            if self._exact.layers:
                self.forecast.add(self._meter(self._exact))
            self._exact = None
        self.store.forget(self.plan.policy())
        if self.ways is not None:
            self.ways.forget()
        if self.plan.used_LE is not None:
            order = preload_order(self.plan.used_LE, self.plan.budget)
            log.info("filling empty slots with %d experts that were used most before, as the disk has time", len(order))
            self._filling = True
            self.store.preload(order)

    def tend(self) -> bool:
        """Goes on with filling empty slots. Whether there is more to do."""
        if self._filling and not (more := self.store.tend()):
            self._filling = more
            log.info("%d slots were filled before they were asked for", self.store.figures.preloaded)
        return self._filling

    def remember(self) -> None:
        """Keeps how often each expert was used, for the next start. Of one rank alone."""
        counts_LE = np.zeros((self.plan.budget.layers, self.plan.budget.experts), dtype=np.int64)
        for layer, counts in zip(self._layers, counts_LE, strict=True):
            counts[: len(layer.counts_E)] = layer.counts_E.cpu().numpy()
        usage.add(self._fingerprint, counts_LE)

    def close(self) -> None:
        """Ends reading, and what the CPU computes. What is on its way is waited for, within `store.READ_TIMEOUT_S`."""
        ended = self.ways is None or self.ways.compute.close(READ_TIMEOUT_S)
        if self.store.close() and ended and self.source.host is not None:
            self.source.host.close()

    def _not_read(self, layer: int) -> Any:
        """[E] which experts of a layer this rank need not read: they are here, or other ranks have them."""
        here_E = self.store.here(layer)
        return here_E | self.forecast.elsewhere(layer) if isinstance(self.forecast, SharedForecast) else here_E

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
            "expert_preloaded": figures.preloaded,
            "expert_wait_ns": figures.waited_ns,
            "predictors": self.forecast.figures(),
        } | ({} if self.ways is None else self.ways.counts())


class OffloadedLayer:
    """A layer whose experts are in the store, MoE layer `number` of it."""

    def __init__(
        self,
        store: ExpertStore,
        source: CheckpointSource,
        forecast: Forecast,
        layer: MoELayer,
        number: int,
        ways: MissWays | None = None,
    ) -> None:
        self._store = store
        self._source = source
        self._ways = ways
        self.forecast = forecast
        self._layer = layer
        self._number = number

    def routed(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """The layer's router has chosen for this rank's tokens."""
        self.forecast.routed(self._number, ids_TK, weights_TK)

    def note(self) -> Note | None:
        """What this rank tells the others when the router has chosen; None where predictions are not shared."""
        forecast, number = self.forecast, self._number
        if not isinstance(forecast, SharedForecast):
            return None
        mine_N = torch.from_numpy(forecast.say(number))
        return Note(mine_N=mine_N, heard=lambda notes_PN: forecast.hear(number, notes_PN.numpy()))

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
        Raises ExpertUnreadable, ExpertLate and CpuExpertsFailed.
        """
        layer, counts = self._layer, counts_E.tolist()
        used = [expert for expert, count in enumerate(counts) if count]
        choose = None
        if self._ways is not None:
            self._ways.begin(self._number, used, counts)
            choose = self._ways.chooser(self._number, counts)
        self._store.ask(self._number, used, choose)
        if experts is None:
            self.routed(ids_TK, weights_TK)
        visit = self._store.visit(self._number, used, self.forecast.future())
        self._store.fetch_ahead(self.forecast.wants(self._number))
        if not used:
            return torch.zeros_like(x_TD)
        # Experts are numbered in the order in which they run, so that each group's rows follow each other.
        order = (*visit.experts, *visit.elsewhere)
        starts = [0, *itertools.accumulate(counts[expert] for expert in order)]
        if experts is None:
            few = layer.takes_few_rows(ids_TK.numel(), len(counts))
        else:
            few = layer.takes_few_rows(sum(counts), experts)
        y_RD = x_TD.new_empty(starts[-1], x_TD.shape[1])
        if layer.compiled:
            from ..kernels.grouped_linear import combine
            from ..kernels.sort_rows import sort_rows_in

            rows = sort_rows_in(order, ids_TK, len(counts))
            self._compute(visit, starts, few, deadline, x_TD, rows.token_R, y_RD)
            out_TD = combine(y_RD, rows.position_TK, weights_TK)
        else:
            order_E = torch.full(counts_E.shape, -1)
            order_E[list(order)] = torch.arange(len(order))
            order_E = order_E.to(ids_TK.device)
            order_TK = order_E[ids_TK.clamp_min(0)].masked_fill_(ids_TK < 0, -1)
            local = LocalDispatcher(len(order))
            token_R, _, state = local.route(order_TK, weights_TK)
            self._compute(visit, starts, few, deadline, x_TD, token_R, y_RD)
            out_TD = local.combine(y_RD, state)
        if self._ways is not None and experts is None:
            room = self._store.size.staging - 1
            self._store.stream(self._ways.end(self._number, len(used), room, self._store.has))
        return out_TD

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
        """Fills `y_RD` as the experts come; those of `visit.experts[i]` are the rows starts[i] to starts[i + 1], and
        those computed elsewhere follow.
        """
        layer, done = self._layer, 0
        job = self._begin_elsewhere(visit, starts, few, x_TD, token_R) if visit.elsewhere else None
        for places in visit:
            rows = starts[done : done + len(places) + 1]
            low, high = rows[0], rows[-1]
            inner = [row - low for row in rows]
            if layer.grouped is not None:
                assert layer.pool.memory is None, "a device's places are slots"
                y_RD[low:high] = layer.grouped.listed(x_TD, token_R[low:high].int(), inner, places)
            else:
                rows_of = few_rows if few else many_rows
                weights = [self._source.weights(place) for place in places]
                y_RD[low:high] = rows_of(layer, x_TD, token_R[low:high], inner, weights)
            done += len(places)
            if done < len(visit.experts) and time.monotonic() > deadline:
                raise ExpertLate(
                    f"{len(visit.experts) - done} experts of MoE layer {self._number} were not read in the time for"
                    " which the other ranks wait; raise --collective-timeout, or --expert-memory"
                )
        if job is not None:
            y_RD[starts[done] :].copy_(job.wait(self._store.timeout_s), non_blocking=True)

    def _begin_elsewhere(
        self, visit: Visit, starts: Sequence[int], few: bool, x_TD: torch.Tensor, token_R: torch.Tensor
    ) -> Job:
        """Gives the CPU what it is to compute beside the device."""
        assert self._ways is not None
        if self._layer.compiled:
            self._ways.compute.same_kernels(self._number, self._layer)
        rows = starts[len(visit.experts) :]
        return self._ways.compute.start(
            self._number,
            visit.elsewhere,
            self._ways.slots(self._number, visit.elsewhere),
            [row - rows[0] for row in rows],
            x_TD,
            token_R[rows[0] : rows[-1]],
            few if self._layer.compiled else None,
        )
