"""What the dispatchers of several ranks share: where experts are, the contract in one piece, and counters.

Each token goes to the ranks that hold its experts, once per rank, and what comes back is summed. In between each rank
does what the specification (`LocalDispatcher`) does, with the experts it has.

T: tokens, K: experts per token, D: hidden size, E: experts, S: expert slots of this rank, P: ranks, R: rows.
"""

from __future__ import annotations

from typing import Any

import torch

from ..scheduler.assignment import nearest_homes
from ..scheduler.step_plan import StepPlan
from ..scheduler.table import ExpertTable
from .dispatch import DispatchState, LocalDispatcher, Note
from .group import RankGroup
from .lookup import Lookups


class RankDispatcher(LocalDispatcher):
    """What the dispatchers of several ranks have in common. `table` says where this layer's experts are.

    `lookups` are shared by the dispatchers of a layer; without them it has its own.
    """

    def __init__(self, group: RankGroup, table: ExpertTable, lookups: Lookups | None = None):
        super().__init__(table.slots)
        self.group = group
        self.lookups = Lookups(table, group.device) if lookups is None else lookups
        self.sent_rows = 0
        """Hidden vectors that went to other ranks."""
        # On the device, so that counting waits for nothing; only reading it does.
        self._least: int | torch.Tensor = 0
        self.use(table)

    @property
    def least_rows(self) -> int:
        """The fewest that could have: each token once for each other rank that has one of its experts. Reading it
        waits for the device.
        """
        return int(self._least)

    def use(self, table: ExpertTable) -> None:
        """Goes over to another table; on every rank before the same layer."""
        self.table = table
        self.num_slots = table.slots
        self.lookups.use(table)
        self.rank_PE, _ = nearest_homes(table)

    def cut(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        plan: StepPlan,
        note: Note | None = None,
    ) -> list[Any]:
        """The chunks of this rank's tokens; the same number on every rank. A note is on all ranks or on none."""
        raise NotImplementedError

    def dispatch(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, plan: StepPlan | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchState]:
        """The contract in one piece, without overlap: rows for this rank's slots from every rank's tokens."""
        assert plan is not None, "several ranks need the step's plan"
        chunks = self.cut(x_TD, ids_TK, weights_TK, plan)
        assert len(chunks) == 1, "dispatch and combine are for one chunk; the layer runs more"
        chunks[0].send()
        arrived = chunks[0].arrive()
        token_R, counts_S, state = self.route(arrived.slots_RK, arrived.weights_RK)
        state = DispatchState(rows_TK=state.rows_TK, weights_TK=state.weights_TK, way_back=chunks[0])
        return arrived.x_RD.index_select(0, token_R), counts_S, state

    def combine(self, rows_RD: torch.Tensor, state: DispatchState) -> torch.Tensor:
        assert state.way_back is not None
        chunk = state.way_back
        chunk.give_back(super().combine(rows_RD, state))
        out_TD = rows_RD.new_zeros(chunk.tokens, rows_RD.shape[1])
        chunk.add_to(out_TD)
        return out_TD
