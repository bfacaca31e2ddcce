"""One MoE layer over several ranks: chunks of tokens travel while others are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..scheduler.cost import Constants, choose_degree
from ..scheduler.step_plan import StepPlan
from ..scheduler.table import ExpertTable
from .dispatch import AllGatherDispatcher, AllToAllDispatcher, RankDispatcher, RowFormat
from .group import RankGroup

if TYPE_CHECKING:
    from .moe import MoELayer


@dataclass
class StepContext:
    """What the layers of one engine share: the group, the plan of the step that runs, and what was measured."""

    group: RankGroup
    plan: StepPlan
    constants: Constants | None = None


class ParallelLayer:
    """Runs a layer with the dispatcher of the step's plan."""

    def __init__(self, context: StepContext, table: ExpertTable, index: int) -> None:
        self.context = context
        self.index = index
        self.degrees: dict[int, int] = {}
        """How often each number of chunks was run."""
        self.dispatchers: dict[str, RankDispatcher] = {
            "all_gather": AllGatherDispatcher(context.group, table),
            "all_to_all": AllToAllDispatcher(context.group, table, self._choose_degree),
        }
        self._row_bytes = (0, 0)

    @property
    def table(self) -> ExpertTable:
        return self.dispatchers["all_to_all"].table

    def use(self, table: ExpertTable) -> None:
        """Goes over to another table; on every rank before the same step."""
        for dispatcher in self.dispatchers.values():
            dispatcher.use(table)

    def run(self, layer: MoELayer, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Weighted outputs [T, D] of this rank's tokens; takes part for the others' when it has none."""
        context = self.context
        progress = context.group.progress
        outer, progress.layer = progress.layer, self.index
        form = RowFormat(x_TD.shape[1], ids_TK.shape[1], x_TD.dtype)
        self._row_bytes = (form.nbytes, form.hidden_bytes)
        chunks = self.dispatchers[context.plan.dispatcher].cut(x_TD, ids_TK, weights_TK, context.plan)
        self.degrees[len(chunks)] = self.degrees.get(len(chunks), 0) + 1
        chunks[0].send()
        if layer.overlap is not None:
            with progress.span("shared"):
                layer.overlap.run()
        for index, chunk in enumerate(chunks):
            if index + 1 < len(chunks):
                chunks[index + 1].send()
            arrived = chunk.arrive()
            with progress.span("experts"):
                pairs = int((arrived.slots_RK >= 0).sum()) if x_TD.device.type == "cpu" else None
                y_RD, _ = layer.run_local(arrived.x_RD, arrived.slots_RK, arrived.weights_RK, pairs)
            del arrived
            chunk.give_back(y_RD)
        out_TD = torch.zeros_like(x_TD)
        for chunk in chunks:
            chunk.add_to(out_TD)
        progress.layer = outer
        return out_TD

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
