"""How a MoE layer runs whose experts are in an `ExpertStore`.

What a token gets does not depend, to the bit, on which experts were in memory: each expert computes all its rows at
once, wherever it came from, and the rows are summed in top-k order.

T: tokens, K: experts per token, D: hidden size, E: experts, R: rows (token and expert pairs), G: experts with rows.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .dispatch import LocalDispatcher, Note
from .expert_rows import few_rows, many_rows
from .miss_ways import MissWays
from .predict.forecast import Forecast
from .predict.shared_forecast import SharedForecast
from .source import CheckpointSource
from .store import ExpertLate, ExpertStore, Visit

if TYPE_CHECKING:
    from .host_compute import Job
    from .moe import MoELayer


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
                rows_of(layer, x_TD, token_R[low:high], inner, weights, y_RD[low:high])
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
