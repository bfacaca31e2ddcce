"""Expert offload of one rank: the store that its layers' experts run from, and what goes on around it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scheduler.residency.preload import preload_order
from . import usage
from .expert_files import ExpertFiles
from .host_experts import HostExperts
from .miss_ways import STREAM, ways_for
from .offload_plan import OffloadPlan
from .offloaded_layer import OffloadedLayer
from .predict.base import Predictor, Rows
from .predict.exact import Exact
from .predict.forecast import Forecast
from .predict.look_ahead import LookAhead
from .predict.meter import Meter
from .predict.shared_forecast import SharedForecast
from .source import CheckpointSource
from .store import READ_TIMEOUT_S, ExpertStore
from .wants import Outcome, Want

if TYPE_CHECKING:
    from .loader import Blueprint
    from .moe import MoELayer

LEAST_CHANCE = 0.5
"""With which an expert is needed that is read ahead. Measured: with 0.25 half as much again is read for nothing, and no
step is faster.
"""

log = logging.getLogger("moeyard.offload")


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
