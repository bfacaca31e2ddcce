"""Tokens to expert rows and back: the dispatcher contract, its specification for one rank, and two for several.

A dispatcher of several ranks sends each token to the ranks that hold its experts, once per rank, and sums what comes
back. In between each rank does what the specification does, with the experts it has. A step's tokens may be cut into
chunks, so that one chunk travels while another is computed.

T: tokens, K: experts per token, D: hidden size, E: experts, S: expert slots of this rank, P: ranks, C: chunks,
R: rows (grouped by slot: one per token and expert; on the way: one per token and rank).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..scheduler.assignment import nearest_homes
from ..scheduler.step_plan import StepPlan
from ..scheduler.table import ExpertTable
from .group import Pending, RankGroup

EIGHTHS = 8
"""Counts are exchanged for eighths of each rank's tokens: any degree of 1, 2, 4 or 8 chunks is made of those."""


class PlanMismatch(RuntimeError):
    """The ranks do not hold the same plan: going on would give wrong results."""


@dataclass(frozen=True, kw_only=True)
class DispatchState:
    """What `combine` needs to undo a dispatch: for each token and choice its row (any, where the weight is 0), and
    the way back to the ranks that the tokens came from (None when they are this rank's own).
    """

    rows_TK: torch.Tensor
    weights_TK: torch.Tensor
    way_back: Chunk | None = None


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """Tokens that this rank's experts compute: `slots_RK` are its own slots, -1 for experts of other ranks."""

    x_RD: torch.Tensor
    slots_RK: torch.Tensor
    weights_RK: torch.Tensor


class Chunk:
    """A part of a layer's tokens on its way: `send`, `arrive`, compute, `give_back`, `add_to`, in this order.

    `tokens` is the number of all of this rank's tokens, not only the chunk's.
    """

    tokens: int

    def send(self) -> None:
        """Starts the way to the experts' ranks."""
        raise NotImplementedError

    def arrive(self) -> Arrived:
        """Waits for what the other ranks sent."""
        raise NotImplementedError

    def give_back(self, y_RD: torch.Tensor) -> None:
        """Starts the way back of the weighted sums of this rank's experts, one for each arrived row."""
        raise NotImplementedError

    def add_to(self, out_TD: torch.Tensor) -> None:
        """Waits for the sums of all ranks and adds them to the rows of this rank's tokens, in order of ranks."""
        raise NotImplementedError


class LocalDispatcher:
    """All experts are here. Every other dispatcher must return what this one returns.

    An id of -1 means no expert: it makes no row and adds nothing.
    """

    def __init__(self, num_slots: int):
        self.num_slots = num_slots

    def dispatch(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, plan: StepPlan | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchState]:
        """Rows [R, D] sorted by slot (stable, so by token within a slot), counts [S] and the state for `combine`."""
        token_R, counts_S, state = self.route(ids_TK, weights_TK)
        return x_TD.index_select(0, token_R), counts_S, state

    def route(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, DispatchState]:
        """`dispatch` without moving rows: the token of each row instead."""
        tokens, choices = ids_TK.shape
        flat = ids_TK.reshape(-1)
        order = torch.argsort(torch.where(flat < 0, self.num_slots, flat), stable=True)
        # bincount would wait for the device to learn its result's size.
        counts_S = flat.new_zeros(self.num_slots + 1).scatter_add_(0, flat + 1, torch.ones_like(flat))[1:]
        rows_TK = torch.empty_like(order)
        rows_TK[order] = torch.arange(order.shape[0], device=order.device)
        valid = ids_TK >= 0
        if ids_TK.device.type == "cpu":
            order = order[: int(counts_S.sum())]
        state = DispatchState(
            rows_TK=torch.where(valid, rows_TK.view(tokens, choices), 0),
            weights_TK=torch.where(valid, weights_TK, 0),
        )
        return order // choices, counts_S, state

    def combine(self, rows_RD: torch.Tensor, state: DispatchState) -> torch.Tensor:
        """Weighted sums [T, D] of the experts' rows, in top-k order."""
        tokens, choices = state.rows_TK.shape
        if not tokens or not rows_RD.shape[0]:
            return rows_RD.new_zeros(tokens, rows_RD.shape[1])
        y_TKD = rows_RD.index_select(0, state.rows_TK.reshape(-1)).view(tokens, choices, -1)
        return torch.bmm(state.weights_TK.to(y_TKD.dtype)[:, None], y_TKD)[:, 0]


class RowFormat:
    """How a token travels: its hidden vector, then the slots of its experts at the destination, then their weights.

    One row of bytes, so that one collective carries all three.
    """

    def __init__(self, hidden: int, choices: int, dtype: torch.dtype):
        self.dtype = dtype
        self.hidden_bytes = hidden * dtype.itemsize
        ends = [self.hidden_bytes, 0, 0, 0]
        ends[1] = -(-ends[0] // 4) * 4
        ends[2] = ends[1] + 4 * choices
        ends[3] = ends[2] + 2 * choices
        self._hidden, self._weights, self._slots = slice(0, ends[0]), slice(ends[1], ends[2]), slice(ends[2], ends[3])
        # Every row starts where a float or two int16 may.
        self.nbytes = -(-ends[3] // 8) * 8

    def pack(self, x_RD: torch.Tensor, slots_RK: torch.Tensor, weights_RK: torch.Tensor) -> torch.Tensor:
        """Bytes [R, nbytes]."""
        rows = x_RD.shape[0]
        packed = torch.empty(rows, self.nbytes, dtype=torch.uint8, device=x_RD.device)
        if rows:
            packed[:, self._hidden].view(self.dtype).copy_(x_RD)
            packed[:, self._weights].view(torch.float32).copy_(weights_RK)
            packed[:, self._slots].view(torch.int16).copy_(slots_RK)
        return packed

    def unpack(self, packed_RB: torch.Tensor) -> Arrived:
        """Views of the bytes; the slots are widened."""
        return Arrived(
            x_RD=packed_RB[:, self._hidden].view(self.dtype),
            slots_RK=packed_RB[:, self._slots].view(torch.int16).long(),
            weights_RK=packed_RB[:, self._weights].view(torch.float32),
        )


class RankDispatcher(LocalDispatcher):
    """What the dispatchers of several ranks have in common. `table` says where this layer's experts are."""

    def __init__(self, group: RankGroup, table: ExpertTable):
        super().__init__(table.slots)
        self.group = group
        self.sent_rows = 0
        """Hidden vectors that went to other ranks."""
        self.least_rows = 0
        """The fewest that could have: each token once for each other rank that has one of its experts."""
        self.use(table)

    def use(self, table: ExpertTable) -> None:
        """Goes over to another table; on every rank before the same layer."""
        self.table = table
        self.num_slots = table.slots
        rank_PE, slot_PE = nearest_homes(table)
        self.rank_PE = rank_PE
        device = self.group.device
        self._rank_PE = torch.from_numpy(rank_PE.copy()).to(device)
        self._slot_PE = torch.from_numpy(slot_PE.copy()).to(device)

    def cut(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, plan: StepPlan) -> list[Any]:
        """The chunks of this rank's tokens; the same number on every rank."""
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

    def _lookup(self, ids_TK: torch.Tensor, source: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank and the slot there of each choice of a source rank's tokens; -1 for none."""
        none = ids_TK < 0
        safe = ids_TK.clamp_min(0)
        rank_TK = self._rank_PE[source][safe].masked_fill_(none, -1)
        slot_TK = self._slot_PE[source][safe].masked_fill_(none, -1)
        return rank_TK, slot_TK

    def _need(self, rank_TK: torch.Tensor) -> torch.Tensor:
        """[T, P]: whether a token has an expert on a rank."""
        need_TP = torch.zeros(rank_TK.shape[0], self.group.size + 1, dtype=torch.bool, device=rank_TK.device)
        return need_TP.scatter_(1, rank_TK + 1, True)[:, 1:]


class AllGatherDispatcher(RankDispatcher):
    """Every rank gets all tokens, computes what its experts add to them, and the sums are scattered back.

    Two collectives of equal parts and no exchange of counts: the fewest messages, the most bytes. Ranks with fewer
    tokens than the busiest pad theirs.
    """

    def cut(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, plan: StepPlan) -> list[Any]:
        most = max(plan.tokens_P)
        assert plan.tokens_P[self.group.position] == x_TD.shape[0]
        degree = max(1, plan.degree)
        bounds = [most * i // degree for i in range(degree + 1)]
        with self.group.progress.span("plan"):
            rank_TK, _ = self._lookup(ids_TK, self.group.position)
            need_TP = self._need(rank_TK)
            need_TP[:, self.group.position] = False
            self.least_rows += int(need_TP.sum())
            self.sent_rows += most * (self.group.size - 1)
        form = RowFormat(x_TD.shape[1], ids_TK.shape[1], x_TD.dtype)
        return [
            _AllGatherChunk(self, form, x_TD, ids_TK, weights_TK, low, high)
            for low, high in itertools.pairwise(bounds)
            if high > low or degree == 1
        ]

    def own_slots(self, ids_PRK: torch.Tensor) -> torch.Tensor:
        """[P, R, K]: this rank's slot of each choice that the source rank sends here, -1 otherwise."""
        here = self.group.position
        slots_PE = torch.where(self._rank_PE == here, self._slot_PE, -1)
        sources = torch.arange(self.group.size, device=ids_PRK.device)[:, None, None]
        return slots_PE[sources, ids_PRK.clamp_min(0)].masked_fill_(ids_PRK < 0, -1)


class _AllGatherChunk(Chunk):
    def __init__(
        self,
        dispatcher: AllGatherDispatcher,
        form: RowFormat,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        low: int,
        high: int,
    ) -> None:
        self._dispatcher = dispatcher
        self._group = dispatcher.group
        self._form = form
        self._rows = high - low
        self.tokens = x_TD.shape[0]
        self._own = slice(min(low, self.tokens), min(high, self.tokens))
        self._inputs = (x_TD, ids_TK, weights_TK)
        self._pending: Pending

    def send(self) -> None:
        with self._group.progress.span("dispatch"):
            x_TD, ids_TK, weights_TK = (t[self._own] for t in self._inputs)
            own = x_TD.shape[0]
            padded = torch.empty(self._rows, self._form.nbytes, dtype=torch.uint8, device=x_TD.device)
            padded[:own] = self._form.pack(x_TD, ids_TK, weights_TK)
            if own < self._rows:
                blank = torch.zeros(self._rows - own, 1, device=x_TD.device)
                choices = blank.expand(-1, ids_TK.shape[1])
                padded[own:] = self._form.pack(blank.expand(-1, x_TD.shape[1]), choices - 1, choices)
            self._gathered, self._pending = self._group.all_gather(padded)

    def arrive(self) -> Arrived:
        self._pending.wait()
        with self._group.progress.span("dispatch"):
            arrived = self._form.unpack(self._gathered)
            del self._gathered, self._pending
            ids_PRK = arrived.slots_RK.view(self._group.size, self._rows, arrived.slots_RK.shape[1])
            slots_RK = self._dispatcher.own_slots(ids_PRK).flatten(0, 1)
            # Rows without an expert here are not worth a place in what the experts read.
            self._used_R = (slots_RK >= 0).any(1).nonzero()[:, 0]
            return Arrived(
                x_RD=arrived.x_RD.index_select(0, self._used_R),
                slots_RK=slots_RK.index_select(0, self._used_R),
                weights_RK=arrived.weights_RK.index_select(0, self._used_R),
            )

    def give_back(self, y_RD: torch.Tensor) -> None:
        with self._group.progress.span("combine"):
            sums = y_RD.new_zeros(self._group.size * self._rows, y_RD.shape[1])
            sums.index_copy_(0, self._used_R, y_RD)
            self._sums, self._pending = self._group.reduce_scatter(sums)

    def add_to(self, out_TD: torch.Tensor) -> None:
        self._pending.wait()
        own = self._own
        out_TD[own] += self._sums[: own.stop - own.start]


class AllToAllDispatcher(RankDispatcher):
    """Each token goes once to each rank that has one of its experts, and one sum comes back from each.

    Before that one all-gather of int32 gives every rank's counts: the loads of all experts, from which the degree is
    chosen, and the rows from each rank to each, from which the splits follow. `choose_degree(rows_PP, pairs_PE)` gives
    the degree where the plan leaves it open; the same on every rank.
    """

    def __init__(
        self,
        group: RankGroup,
        table: ExpertTable,
        choose_degree: Callable[[torch.Tensor, torch.Tensor], int] | None = None,
    ):
        super().__init__(group, table)
        self._choose_degree = choose_degree

    def cut(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, plan: StepPlan) -> list[Any]:
        group, experts = self.group, self.table.experts
        with group.progress.span("plan"):
            rank_TK, slot_TK = self._lookup(ids_TK, group.position)
            need_TP = self._need(rank_TK)
            # For each eighth of the tokens the rows to each rank.
            bounds = [x_TD.shape[0] * i // EIGHTHS for i in range(EIGHTHS + 1)]
            sums_TP = need_TP.to(torch.int32).cumsum(0, dtype=torch.int32)
            zero = sums_TP.new_zeros(1, group.size)
            ends_P = torch.cat([zero, sums_TP])[bounds]
            counts_CP = ends_P.diff(dim=0)
            pairs_E = torch.zeros(experts + 1, dtype=torch.int32, device=ids_TK.device)
            flat = ids_TK.reshape(-1)
            pairs_E.scatter_add_(0, flat + 1, torch.ones_like(flat, dtype=torch.int32))
            mine = torch.cat([pairs_E[1:], counts_CP.flatten()]).cpu()
            digest = plan.digest
        counts = group.all_gather_counts(torch.cat([mine, torch.tensor([digest], dtype=torch.int32)]))
        with group.progress.span("plan"):
            if not bool((counts[:, -1] == digest).all()):
                odd = [group.members[p] for p in range(group.size) if int(counts[p, -1]) != digest]
                raise PlanMismatch(
                    f"rank {group.rank} and rank {', '.join(map(str, odd))} hold different plans for step"
                    f" {group.progress.step}; that is a defect, please report it"
                )
            counts_PCP = counts[:, experts:-1].reshape(group.size, EIGHTHS, group.size)
            rows_PP = counts_PCP.sum(1)
            degree = plan.degree
            if not degree:
                degree = 1 if self._choose_degree is None else self._choose_degree(rows_PP, counts[:, :experts])
            per = EIGHTHS // degree
            splits_PCP = counts_PCP.reshape(group.size, degree, per, group.size).sum(2)
            elsewhere = int(rows_PP[group.position].sum() - rows_PP[group.position, group.position])
            self.sent_rows += elsewhere
            self.least_rows += elsewhere
        form = RowFormat(x_TD.shape[1], ids_TK.shape[1], x_TD.dtype)
        inputs = (x_TD, slot_TK, weights_TK, rank_TK, need_TP)
        return [
            _AllToAllChunk(
                group,
                form,
                inputs,
                slice(bounds[c * per], bounds[(c + 1) * per]),
                sends=splits_PCP[group.position, c].tolist(),
                receives=splits_PCP[:, c, group.position].tolist(),
            )
            for c in range(degree)
        ]


class _AllToAllChunk(Chunk):
    def __init__(
        self,
        group: RankGroup,
        form: RowFormat,
        inputs: tuple[torch.Tensor, ...],
        own: slice,
        *,
        sends: list[int],
        receives: list[int],
    ) -> None:
        self._group = group
        self._form = form
        self._inputs = inputs
        self._own = own
        self._sends = sends
        self._receives = receives
        self.tokens = inputs[0].shape[0]
        self._pending: Pending

    def send(self) -> None:
        with self._group.progress.span("dispatch"):
            x_TD, slot_TK, weights_TK, rank_TK, need_TP = self._inputs
            # Rows in order of destination, then of token.
            to_R, token_R = need_TP[self._own].t().nonzero(as_tuple=True)
            self._token_R = token_R = token_R + self._own.start
            there = rank_TK[token_R] == to_R[:, None]
            packed = self._form.pack(x_TD[token_R], slot_TK[token_R].masked_fill_(~there, -1), weights_TK[token_R])
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
