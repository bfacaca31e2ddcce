"""One MoE layer over several ranks: chunks of tokens travel while others are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..scheduler.choices import choose_degree
from ..scheduler.cost import Constants
from ..scheduler.row_budget import RowBudget
from ..scheduler.step_plan import StepPlan
from ..scheduler.table import ExpertTable
from .all_gather import AllGatherDispatcher
from .all_to_all import AllToAllDispatcher
from .balance import Balancer
from .balanced_layer import BalancedLayer
from .dispatch import Arrived
from .group import RankGroup
from .guests import Guest, run_guests, run_guests_on_all
from .lookup import Lookups
from .rank_dispatch import RankDispatcher
from .row_format import RowFormat
from .shared_fill import SharedFill
from .step_reads import StepReads

if TYPE_CHECKING:
    from .moe import MoELayer


@dataclass
class StepContext:
    """What the layers of one engine share: the group, the plan of the step that runs, and what was measured."""

    group: RankGroup
    plan: StepPlan
    constants: Constants | None = None
    balancer: Balancer | None = None
    budget: RowBudget | None = None
    """What the ranks' memory has room for; None: before that is known."""
    reads: StepReads | None = None
    """Of experts that are not all in memory."""


class ParallelLayer:
    """Runs a layer with the dispatcher of the step's plan."""

    def __init__(self, context: StepContext, table: ExpertTable, index: int, layer: MoELayer) -> None:
        self.context = context
        self.index = index
        self.degrees: dict[int, int] = {}
        """How often each number of chunks was run."""
        self.moves_shared = False
        """Whether plans may let other ranks compute shared experts for this one's tokens; on all ranks alike."""
        lookups = Lookups(table, context.group.device)
        balancer = context.balancer
        self._balance = (
            BalancedLayer(balancer, index, layer.pool, layer.cutter, lookups, table, lambda: layer.counts_E)
            if balancer is not None
            else None
        )
        self._by_plans = AllToAllDispatcher(
            context.group, table, self._choose_degree, self._balance, lookups, lambda: context.budget
        )
        self.dispatchers: dict[str, RankDispatcher] = {
            "all_gather": AllGatherDispatcher(context.group, table, lookups),
            "all_to_all": self._by_plans,
        }
        self._row_bytes = (0, 0)

    def use(self, table: ExpertTable) -> None:
        """Goes over to another table; on every rank before the same step."""
        for dispatcher in self.dispatchers.values():
            dispatcher.use(table)
        if self._balance is not None:
            self._balance.use(table)

    def run(self, layer: MoELayer, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Weighted outputs [T, D] of this rank's tokens; takes part for the others' when it has none."""
        context = self.context
        progress = context.group.progress
        outer, progress.layer = progress.layer, self.index
        form = RowFormat(x_TD.shape[1], ids_TK.shape[1], x_TD.dtype)
        self._row_bytes = (form.nbytes, form.hidden_bytes)
        if self._balance is not None:
            self._balance.tokens_P = context.plan.tokens_P if self.moves_shared else ()
        with progress.span("plan"):
            note = layer.offloaded.note() if layer.offloaded is not None else None
        chunks = self.dispatchers[context.plan.dispatcher].cut(x_TD, ids_TK, weights_TK, context.plan, note)
        self.degrees[len(chunks)] = self.degrees.get(len(chunks), 0) + 1
        if context.reads is not None:
            context.reads.begin_layer()
        chunks[0].send()
        fill = None
        if layer.overlap is not None and self._balance is not None and (moves := self._balance.shared_moves):
            fill = SharedFill(context.group, layer.overlap, moves, x_TD)
            fill.run()
        elif layer.overlap is not None:
            with progress.span("shared"):
                layer.overlap.run()
        for index, chunk in enumerate(chunks):
            if index + 1 < len(chunks):
                chunks[index + 1].send()
            arrived = chunk.arrive()
            y_RD = self._compute(layer, arrived)
            del arrived
            chunk.give_back(y_RD)
        out_TD = torch.zeros_like(x_TD)
        for chunk in chunks:
            chunk.add_to(out_TD)
        if fill is not None:
            fill.finish()
        if self._balance is not None:
            self._make_up(layer, x_TD, weights_TK, out_TD)
            self._balance.finish()
            assert context.balancer is not None
            context.balancer.begin(self.index, context.plan)
        progress.layer = outer
        return out_TD

    def _compute(self, layer: MoELayer, arrived: Arrived) -> torch.Tensor:
        """The weighted sums of this rank's experts for what arrived: those it holds, then its guests."""
        progress = self.context.group.progress
        balance = self._balance
        slots_RK = arrived.slots_RK
        guests_expected = balance is not None and balance.guests_expected
        if guests_expected:
            slots_RK = slots_RK.masked_fill(slots_RK >= layer.own.num_slots, -1)
        with progress.span("experts"):
            if self.context.reads is not None:
                run = partial(layer.run_own, arrived.x_RD, slots_RK, arrived.weights_RK, None)
                y_RD = self.context.reads.run(run, arrived.x_RD)
            else:
                pairs = int((slots_RK >= 0).sum()) if slots_RK.device.type == "cpu" else None
                y_RD = layer.run_own(arrived.x_RD, slots_RK, arrived.weights_RK, pairs)
        if balance is None or not (guests_expected or balance.moving):
            return y_RD
        guests = balance.guests()  # also passes on what others wait for
        if guests:
            with progress.span("experts"):
                numbers_RK = torch.where(arrived.slots_RK >= layer.own.num_slots, arrived.slots_RK, -1)
                if numbers_RK.device.type == "cuda" and not self.context.plan.balanced:
                    return y_RD + run_guests_on_all(arrived.x_RD, numbers_RK, arrived.weights_RK, guests, layer.gate)
                _add_guests(y_RD, arrived, numbers_RK, guests, layer)
        return y_RD

    def _make_up(self, layer: MoELayer, x_TD: torch.Tensor, weights_TK: torch.Tensor, out_TD: torch.Tensor) -> None:
        """Adds what guests were to compute whose weights are late: their experts' homes compute it."""
        balance, dispatcher = self._balance, self._by_plans
        assert balance is not None
        if (missed := balance.missed(dispatcher.routing)) is None:
            return
        for chunk in dispatcher.again(x_TD, weights_TK, missed, self.context.plan, balance.chunks_for):
            chunk.send()
            arrived = chunk.arrive()
            slots_RK = arrived.slots_RK
            with self.context.group.progress.span("experts"):
                whole_RK = slots_RK.masked_fill(slots_RK >= layer.own.num_slots, -1)
                y_RD, _ = layer.run_local(arrived.x_RD, whole_RK, arrived.weights_RK, int((whole_RK >= 0).sum()))
                for number, part in balance.late_parts():
                    _add_guests(y_RD, arrived, torch.where(slots_RK == number, number, -1), {number: part}, layer)
            chunk.give_back(y_RD)
            chunk.add_to(out_TD)

    def _choose_degree(self, rows_PP: torch.Tensor, pairs_PE: torch.Tensor) -> int:
        """The degree for exact counts, the same on every rank: integers, and constants that all ranks hold."""
        constants = self.context.constants
        if constants is None:
            return 1
        rank_PE = self.dispatchers["all_to_all"].rank_PE
        pairs = pairs_PE.numpy()
        size = self.context.group.size
        pairs_P = np.bincount(rank_PE.ravel(), weights=pairs.ravel(), minlength=size).astype(np.int64)
        touched = [len(set(np.nonzero((rank_PE == p) & (pairs > 0))[1].tolist())) for p in range(size)]
        out, back = self._row_bytes
        return choose_degree(
            constants,
            rows_PP.numpy(),
            row_bytes_out=out,
            row_bytes_back=back,
            experts_P=touched,
            pairs_P=pairs_P.tolist(),
        )


def _add_guests(
    y_RD: torch.Tensor, arrived: Arrived, numbers_RK: torch.Tensor, guests: Mapping[int, Guest], layer: MoELayer
) -> None:
    """Adds the weighted sums over the guests that these numbers name."""
    used_R = (numbers_RK >= 0).any(1).nonzero()[:, 0]
    sums = run_guests(arrived.x_RD[used_R], numbers_RK[used_R], arrived.weights_RK[used_R], guests, layer.gate)
    y_RD.index_add_(0, used_R, sums)
