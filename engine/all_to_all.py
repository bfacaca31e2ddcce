"""Dispatch by all-to-all: every rank gets the tokens that its experts compute.

T: tokens, K: experts per token, D: hidden size, E: experts, P: ranks, C: chunks, R: rows (one per token and rank).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..scheduler.choices import DEGREES
from ..scheduler.step_plan import StepPlan
from ..scheduler.table import ExpertTable
from .dispatch import Arrived, Chunk, PlanMismatch
from .group import Pending, RankGroup
from .lookup import Lookups
from .rank_dispatch import RankDispatcher
from .routing import Routing
from .row_format import RowFormat

EIGHTHS = 8
"""Counts are exchanged for eighths of each rank's tokens: any degree of 1, 2, 4 or 8 chunks is made of those."""


class Way(Protocol):
    """Where a layer's tokens go by a balancing plan, and in how many chunks at least."""

    @property
    def chunks(self) -> int: ...
    def route(self, ids_TK: torch.Tensor) -> Routing: ...


class Balancing(Protocol):
    """Makes balancing plans, the same on every rank; `digest` stands for the last one."""

    @property
    def digest(self) -> int: ...
    def make(self, pairs_PE: torch.Tensor) -> Way | None:
        """The way by which tokens go instead of the table's, for the rows that each rank has for each expert."""


class AllToAllDispatcher(RankDispatcher):
    """Each token goes once to each rank that has one of its experts, and one sum comes back from each.

    Before that one all-gather of int32 gives every rank's counts: the loads of all experts, from which the balancing
    plan and the degree are made, and the rows from each rank to each, from which the splits follow. A plan that sends
    tokens elsewhere costs another exchange of rows.

    `choose_degree(rows_PP, pairs_PE)` gives the degree where the step's plan leaves it open; the same on every rank.
    """

    def __init__(
        self,
        group: RankGroup,
        table: ExpertTable,
        choose_degree: Callable[[torch.Tensor, torch.Tensor], int] | None = None,
        balance: Balancing | None = None,
        lookups: Lookups | None = None,
    ):
        super().__init__(group, table, lookups)
        self._choose_degree = choose_degree
        self._balance = balance

    def cut(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, plan: StepPlan) -> list[Any]:
        group, experts = self.group, self.table.experts
        with group.progress.span("plan"):
            # A plan is made for this step alone, and is native where it would do nothing.
            lookup = self.lookups.homes if plan.balanced else self.lookups.current
            rank_TK, slot_TK = lookup.find(ids_TK, group.position)
            routing = Routing(ids_TK=ids_TK, rank_TK=rank_TK, slot_TK=slot_TK)
            need_TP = routing.need(group.size)
            bounds = [x_TD.shape[0] * i // EIGHTHS for i in range(EIGHTHS + 1)]
            pairs_E = torch.zeros(experts + 1, dtype=torch.int32, device=ids_TK.device)
            flat = ids_TK.reshape(-1)
            pairs_E.scatter_add_(0, flat + 1, torch.ones_like(flat, dtype=torch.int32))
            mine = torch.cat([pairs_E[1:], _rows(need_TP, bounds)]).cpu()
        counts = self._exchange(mine, plan)
        with group.progress.span("plan"):
            pairs_PE, rows = counts[:, :experts], counts[:, experts:]
            way = self._balance.make(pairs_PE) if plan.balanced and self._balance is not None else None
            if way is not None:
                routing = way.route(ids_TK)
                need_TP = routing.need(group.size)
        if way is not None:
            rows = self._exchange(_rows(need_TP, bounds).cpu(), plan)
        with group.progress.span("plan"):
            rows_PCP = rows.reshape(group.size, EIGHTHS, group.size)
            rows_PP = rows_PCP.sum(1)
            degree = plan.degree
            if not degree:
                degree = 1 if self._choose_degree is None else self._choose_degree(rows_PP, pairs_PE)
            if way is not None:
                degree = next((d for d in DEGREES if d >= max(degree, way.chunks)), DEGREES[-1])
            per = EIGHTHS // degree
            splits_PCP = rows_PCP.reshape(group.size, degree, per, group.size).sum(2)
            elsewhere = int(rows_PP[group.position].sum() - rows_PP[group.position, group.position])
            self.sent_rows += elsewhere
            self._least += elsewhere
        form = RowFormat(x_TD.shape[1], ids_TK.shape[1], x_TD.dtype)
        return [
            _AllToAllChunk(
                group,
                form,
                (x_TD, weights_TK, need_TP),
                routing,
                slice(bounds[c * per], bounds[(c + 1) * per]),
                sends=splits_PCP[group.position, c].tolist(),
                receives=splits_PCP[:, c, group.position].tolist(),
            )
            for c in range(degree)
        ]

    def _exchange(self, mine_N: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """[P, N] of all ranks' counts. Raises PlanMismatch when a rank holds another plan of the step, or made another
        of the layer before.
        """
        group = self.group
        digest = plan.digest ^ (self._balance.digest if self._balance is not None else 0)
        counts = group.all_gather_counts(torch.cat([mine_N, torch.tensor([digest], dtype=torch.int32)]))
        if not bool((counts[:, -1] == digest).all()):
            odd = [group.members[p] for p in range(group.size) if int(counts[p, -1]) != digest]
            raise PlanMismatch(
                f"rank {group.rank} and rank {', '.join(map(str, odd))} hold different plans for step"
                f" {group.progress.step}; that is a defect, please report it"
            )
        return counts[:, :-1]


def _rows(need_TP: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """The rows to each rank from each part of the tokens between two bounds, flat."""
    sums_TP = need_TP.to(torch.int32).cumsum(0, dtype=torch.int32)
    ends_P = torch.cat([sums_TP.new_zeros(1, need_TP.shape[1]), sums_TP])[bounds]
    return ends_P.diff(dim=0).flatten()


class _AllToAllChunk(Chunk):
    def __init__(
        self,
        group: RankGroup,
        form: RowFormat,
        inputs: tuple[torch.Tensor, ...],
        routing: Routing,
        own: slice,
        *,
        sends: list[int],
        receives: list[int],
    ) -> None:
        self._group = group
        self._form = form
        self._inputs = inputs
        self._routing = routing
        self._own = own
        self._sends = sends
        self._receives = receives
        self.tokens = inputs[0].shape[0]
        self._pending: Pending

    def send(self) -> None:
        with self._group.progress.span("dispatch"):
            x_TD, weights_TK, need_TP = self._inputs
            # Rows in order of destination, then of token.
            to_R, token_R = need_TP[self._own].t().nonzero(as_tuple=True)
            self._token_R = token_R = token_R + self._own.start
            slots_RK = self._routing.slots(token_R, to_R)
            packed = self._form.pack(x_TD[token_R], slots_RK, weights_TK[token_R])
            self._packed, self._pending = self._group.all_to_all(packed, self._sends, self._receives)

    def arrive(self) -> Arrived:
        self._pending.wait()
        packed = self._packed
        del self._packed, self._pending  # and what was sent with them: it is memory
        return self._form.unpack(packed)

    def give_back(self, y_RD: torch.Tensor) -> None:
        with self._group.progress.span("combine"):
            self._sums, self._pending = self._group.all_to_all(y_RD.contiguous(), self._receives, self._sends)

    def add_to(self, out_TD: torch.Tensor) -> None:
        self._pending.wait()
        with self._group.progress.span("combine"):
            start = 0
            for count in self._sends:  # a token is at most once in each part, so the order of sums is fixed
                part = slice(start, start + count)
                out_TD.index_add_(0, self._token_R[part], self._sums[part])
                start += count
