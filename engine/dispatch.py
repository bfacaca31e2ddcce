"""Tokens to expert rows and back: the dispatcher contract, and its specification for one rank.

Those of several ranks are in `all_gather` and `all_to_all`, on the base in `rank_dispatch`. A step's tokens may be cut
into chunks, so that one chunk travels while another is computed.

T: tokens, K: experts per token, D: hidden size, S: expert slots of this rank, R: rows (grouped by slot: one per token
and expert; on the way: one per token and rank).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..scheduler.step_plan import StepPlan


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


@dataclass(frozen=True, kw_only=True)
class Note:
    """A few bytes that every rank tells all others in a layer's exchange: `mine_N`, as many on each rank, a multiple of
    8. `heard` gets those of all ranks [P, N] before the layer's first chunk is computed.
    """

    mine_N: torch.Tensor
    heard: Callable[[torch.Tensor], None]


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
