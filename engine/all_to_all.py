"""Dispatch by all-to-all: every rank gets the tokens that its experts compute.

T: tokens, K: experts per token, D: hidden size, E: experts, P: ranks, C: chunks, R: rows (one per token and rank).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..scheduler.choices import DEGREES
from ..scheduler.row_budget import LEAST_PARTS as EIGHTHS
from ..scheduler.row_budget import RowBudget
from ..scheduler.step_plan import StepPlan
from ..scheduler.table import ExpertTable
from .dispatch import Arrived, Chunk, Note, PlanMismatch
from .group import Pending, RankGroup
from .lookup import Lookups
from .rank_dispatch import RankDispatcher
from .routing import Routing
from .row_format import RowFormat

# Counts are exchanged for eighths of each rank's tokens: any degree of 1, 2, 4 or 8 chunks is made of those. Where
# memory is short there are more parts.


class Way(Protocol):
    """Where a layer's tokens go by a balancing plan, and in how many chunks at least."""

    @property
    def chunks(self) -> int: ...
    def route(self, ids_TK: torch.Tensor) -> Routing: ...


class Balancing(Protocol):
    """Makes balancing plans, the same on every rank; `digest` stands for the last one. `gap_us`, how long weights that
    set out before the counts could travel here, goes with the counts. `open` tells the others whether late weights are
    still to come here, and `heard` is told whether to any rank.
    """

    @property
    def digest(self) -> int: ...
    @property
    def gap_us(self) -> int: ...
    @property
    def open(self) -> bool: ...
    def heard(self, anywhere: bool) -> None: ...
    def make(self, pairs_PE: torch.Tensor, gap_us: int) -> Way | None:
        """The way by which tokens go instead of the table's, for the rows that each rank has for each expert, and the
        smallest of their gaps.
        """


class AllToAllDispatcher(RankDispatcher):
    """Each token goes once to each rank that has one of its experts, and one sum comes back from each.

    Before that one all-gather of int32 gives every rank's counts: the loads of all experts, from which the balancing
    plan and the degree are made, and the rows from each rank to each, from which the splits follow. A plan that sends
    tokens elsewhere costs another exchange of rows.

    `choose_degree(rows_PP, pairs_PE)` gives the degree where the step's plan leaves it open; the same on every rank.
    `budget()` says what fits into the ranks' memory: where a rank would get more, the layer runs in more chunks.
    """

    def __init__(
        self,
        group: RankGroup,
        table: ExpertTable,
        choose_degree: Callable[[torch.Tensor, torch.Tensor], int] | None = None,
        balance: Balancing | None = None,
        lookups: Lookups | None = None,
        budget: Callable[[], RowBudget | None] = lambda: None,
    ):
        super().__init__(group, table, lookups)
        self._choose_degree = choose_degree
        self._balance = balance
        self._budget = budget
        self.routing: Routing | None = None
        """Of the last tokens, if they went by a balancing plan."""

    def cut(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        plan: StepPlan,
        note: Note | None = None,
    ) -> list[Any]:
        group, experts = self.group, self.table.experts
        balance = self._balance if plan.balanced else None
        budget = self._scarce(plan)
        parts = EIGHTHS if budget is None else budget.parts(max(plan.tokens_P))
        with group.progress.span("plan"):
            # A plan is made for this step alone, and is native where it would do nothing.
            lookup = self.lookups.homes if plan.balanced else self.lookups.current
            rank_TK, slot_TK = lookup.find(ids_TK, group.position)
            routing = Routing(ids_TK=ids_TK, rank_TK=rank_TK, slot_TK=slot_TK)
            need_TP = routing.need(group.size)
            bounds = _bounds(x_TD.shape[0], parts)
            pairs_E = torch.zeros(experts + 1, dtype=torch.int32, device=ids_TK.device)
            flat = ids_TK.reshape(-1)
            pairs_E.scatter_add_(0, flat + 1, torch.ones_like(flat, dtype=torch.int32))
            mine = torch.cat([pairs_E[1:], _by_part(routing, need_TP, bounds, budget is not None)]).cpu()
            gap = torch.tensor([balance.gap_us if balance is not None else 0], dtype=torch.int32)
        words = [mine, gap] if note is None else [note.mine_N.view(torch.int32), mine, gap]
        counts = self._exchange(torch.cat(words), plan)
        if note is not None:
            notes, counts = counts.split([len(words[0]), counts.shape[1] - len(words[0])], dim=1)
            note.heard(notes.contiguous().view(torch.uint8))
        with group.progress.span("plan"):
            pairs_PE, rows, gap_P = counts[:, :experts], counts[:, experts:-1], counts[:, -1]
            way = balance.make(pairs_PE, int(gap_P.min())) if balance is not None else None
            if way is not None:
                routing = way.route(ids_TK)
                need_TP = routing.need(group.size)
        if way is not None:
            rows = self._exchange(_by_part(routing, need_TP, bounds, budget is not None).cpu(), plan)
        self.routing = routing if way is not None else None
        with group.progress.span("plan"):
            rows_PCP, *pairs = rows.reshape(group.size, -1, parts, group.size).unbind(1)
            degree = plan.degree
            if not degree:
                degree = 1 if self._choose_degree is None else self._choose_degree(rows_PCP.sum(1), pairs_PE)
            if way is not None:
                degree = next((d for d in DEGREES if d >= max(degree, way.chunks)), DEGREES[-1])
            if budget is not None:
                degree = max(degree, budget.least_degree(rows_PCP.numpy(), pairs[0].numpy()))
        return self._chunks(x_TD, weights_TK, routing, need_TP, rows_PCP, degree)

    def again(
        self,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        routing: Routing,
        plan: StepPlan,
        chunks_for: Callable[[torch.Tensor], int],
    ) -> list[Any]:
        """More chunks of the same layer: what this routing names. `chunks_for` gives how many the rows that arrive at
        each rank need by the plan.
        """
        group, budget = self.group, self._scarce(plan)
        parts = EIGHTHS if budget is None else budget.parts(max(plan.tokens_P))
        with group.progress.span("plan"):
            need_TP = routing.need(group.size)
            mine = _by_part(routing, need_TP, _bounds(x_TD.shape[0], parts), budget is not None).cpu()
        rows = self._exchange(mine, plan)
        rows_PCP, *pairs = rows.reshape(group.size, -1, parts, group.size).unbind(1)
        degree = next(d for d in DEGREES if d >= chunks_for(rows_PCP.sum((0, 1))) or d == DEGREES[-1])
        if budget is not None:
            degree = max(degree, budget.least_degree(rows_PCP.numpy(), pairs[0].numpy()))
        return self._chunks(x_TD, weights_TK, routing, need_TP, rows_PCP, degree)

    def _scarce(self, plan: StepPlan) -> RowBudget | None:
        """The ranks' memory, if a step's tokens could be too many for it."""
        budget = self._budget()
        return None if budget is None or budget.surely_fits(sum(plan.tokens_P)) else budget

    def _chunks(
        self,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        routing: Routing,
        need_TP: torch.Tensor,
        rows_PCP: torch.Tensor,
        degree: int,
    ) -> list[Any]:
        group, parts = self.group, rows_PCP.shape[1]
        bounds, per = _bounds(x_TD.shape[0], parts), parts // degree
        splits_PCP = rows_PCP.reshape(group.size, degree, per, group.size).sum(2)
        elsewhere = int(splits_PCP[group.position].sum() - splits_PCP[group.position, :, group.position].sum())
        self.sent_rows += elsewhere
        self._least += elsewhere
        form = RowFormat(x_TD.shape[1], routing.ids_TK.shape[1], x_TD.dtype)
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
        group, balance = self.group, self._balance
        digest, waits = plan.digest, 0
        if balance is not None:
            digest, waits = digest ^ balance.digest, int(balance.open)
        counts = group.all_gather_counts(torch.cat([mine_N, torch.tensor([waits, digest], dtype=torch.int32)]))
        if not bool((counts[:, -1] == digest).all()):
            odd = [group.members[p] for p in range(group.size) if int(counts[p, -1]) != digest]
            raise PlanMismatch(
                f"rank {group.rank} and rank {', '.join(map(str, odd))} hold different plans for step"
                f" {group.progress.step}; that is a defect, please report it"
            )
        if balance is not None:
            balance.heard(bool(counts[:, -2].any()))
        return counts[:, :-2]


def _bounds(tokens: int, parts: int) -> list[int]:
    """Between equal parts of the tokens."""
    return [tokens * i // parts for i in range(parts + 1)]


def _by_part(routing: Routing, need_TP: torch.Tensor, bounds: list[int], with_pairs: bool) -> torch.Tensor:
    """The rows to each rank from each part of the tokens between two bounds, flat; then those rows' pairs, if asked."""
    counts = _sums(need_TP, bounds)
    return torch.cat([counts, _sums(routing.pairs(need_TP.shape[1]), bounds)]) if with_pairs else counts


def _sums(counts_TP: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    sums_TP = counts_TP.to(torch.int32).cumsum(0, dtype=torch.int32)
    ends_P = torch.cat([sums_TP.new_zeros(1, counts_TP.shape[1]), sums_TP])[bounds]
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
