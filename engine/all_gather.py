"""Dispatch by all-gather: every rank gets all tokens.

T: tokens, K: experts per token, D: hidden size, E: experts, P: ranks, R: rows (one per token and rank).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..scheduler.step_plan import StepPlan
from .dispatch import Arrived, Chunk, Note
from .group import Pending
from .rank_dispatch import RankDispatcher
from .routing import Routing
from .row_format import RowFormat


class AllGatherDispatcher(RankDispatcher):
    """Every rank gets all tokens, computes what its experts add to them, and the sums are scattered back.

    Two collectives of equal parts and no exchange of counts: the fewest messages, the most bytes. Ranks with fewer
    tokens than the busiest pad theirs.
    """

    def cut(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        plan: StepPlan,
        note: Note | None = None,
    ) -> list[Any]:
        most = max(plan.tokens_P)
        assert plan.tokens_P[self.group.position] == x_TD.shape[0]
        degree = max(1, plan.degree)
        bounds = [most * i // degree for i in range(degree + 1)]
        with self.group.progress.span("plan"):
            rank_TK, slot_TK = self.lookups.current.find(ids_TK, self.group.position)
            need_TP = Routing(ids_TK=ids_TK, rank_TK=rank_TK, slot_TK=slot_TK).need(self.group.size)
            need_TP[:, self.group.position] = False
            self._least = self._least + need_TP.sum()
            self.sent_rows += most * (self.group.size - 1)
        form = RowFormat(x_TD.shape[1], ids_TK.shape[1], x_TD.dtype)
        return [
            _AllGatherChunk(self, form, x_TD, ids_TK, weights_TK, low, high, note if not low else None)
            for low, high in itertools.pairwise(bounds)
            if high > low or degree == 1
        ]


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
        note: Note | None,
    ) -> None:
        self._dispatcher = dispatcher
        self._group = dispatcher.group
        self._form = form
        self._first = low
        self._rows = high - low
        self.tokens = x_TD.shape[0]
        self._own = slice(min(low, self.tokens), min(high, self.tokens))
        self._inputs = (x_TD, ids_TK, weights_TK)
        self._note = note
        self._note_rows = -(-len(note.mine_N) // form.nbytes) if note is not None else 0
        """A note takes the last rows that each rank sends."""
        self._pending: Pending

    def send(self) -> None:
        with self._group.progress.span("dispatch"):
            x_TD, ids_TK, weights_TK = (t[self._own] for t in self._inputs)
            own = x_TD.shape[0]
            rows = self._rows
            padded = torch.empty(rows + self._note_rows, self._form.nbytes, dtype=torch.uint8, device=x_TD.device)
            padded[:own] = self._form.pack(x_TD, ids_TK, weights_TK)
            if own < rows:
                blank = torch.zeros(rows - own, 1, device=x_TD.device)
                choices = blank.expand(-1, ids_TK.shape[1])
                padded[own:rows] = self._form.pack(blank.expand(-1, x_TD.shape[1]), choices - 1, choices)
            if self._note is not None:
                padded[rows:].view(-1)[: len(self._note.mine_N)] = self._note.mine_N.to(padded.device)
            self._gathered, self._pending = self._group.all_gather(padded)

    def arrive(self) -> Arrived:
        self._pending.wait()
        with self._group.progress.span("dispatch"):
            rows, sent = self._rows, self._rows + self._note_rows
            arrived = self._form.unpack(self._gathered)
            if self._note is not None:
                notes = self._gathered.view(self._group.size, sent, -1)[:, rows:].flatten(1)
                self._note.heard(notes[:, : len(self._note.mine_N)].cpu())
            del self._gathered, self._pending
            ids_PRK = arrived.slots_RK.view(self._group.size, sent, arrived.slots_RK.shape[1])[:, :rows]
            lookup = self._dispatcher.lookups.current
            slots_RK = lookup.slots_at(self._group.position, ids_PRK, self._first).flatten(0, 1)
            # Rows without an expert here are not worth a place in what the experts read.
            self._used_R = (slots_RK >= 0).any(1).nonzero()[:, 0]
            came_R = self._used_R
            if self._note_rows:
                came_R = came_R + came_R // max(rows, 1) * self._note_rows
            return Arrived(
                x_RD=arrived.x_RD.index_select(0, came_R),
                slots_RK=slots_RK.index_select(0, self._used_R),
                weights_RK=arrived.weights_RK.index_select(0, came_R),
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
