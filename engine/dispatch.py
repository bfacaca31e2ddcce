"""Tokens to expert rows and back: the dispatcher contract and its specification for one rank.

T: tokens, K: experts per token, D: hidden size, S: expert slots, R: rows (one per token and expert, grouped by slot).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DispatchState:
    """What `combine` needs to undo a dispatch: for each token and choice its row (any, where the weight is 0)."""

    rows_TK: torch.Tensor
    weights_TK: torch.Tensor


class LocalDispatcher:
    """All experts are here. Every other dispatcher must return what this one returns.

    An id of -1 means no expert: it makes no row and adds nothing.
    """

    def __init__(self, num_slots: int):
        self.num_slots = num_slots

    def dispatch(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
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
