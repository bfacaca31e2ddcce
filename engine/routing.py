"""Where each of a rank's tokens goes in one layer: by the table, or by a balancing plan.

T: tokens, K: experts per token, P: ranks, E: experts, R: rows (one per token and destination rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..scheduler.balance.shares import mixing_step

SLICED = -2
"""In place of a rank: the expert's slice group computes this choice."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """`rank_TK` and `slot_TK` are where each choice is computed, -1 for none; for a sliced choice `rank_TK` is
    `SLICED` and each rank of its expert's group computes a part, in the slot that `part_slot_PE` names (-1: not in
    the group).
    """

    ids_TK: torch.Tensor
    rank_TK: torch.Tensor
    slot_TK: torch.Tensor
    part_slot_PE: torch.Tensor | None = None

    def need(self, ranks: int) -> torch.Tensor:
        """[T, P]: whether a token goes to a rank."""
        rank_TK = self.rank_TK
        need_TP = torch.zeros(rank_TK.shape[0], ranks + 1, dtype=torch.bool, device=rank_TK.device)
        need_TP.scatter_(1, rank_TK.clamp_min(-1) + 1, True)
        need_TP = need_TP[:, 1:]
        if self.part_slot_PE is not None:
            member_EP = (self.part_slot_PE >= 0).t()
            sliced_TK = rank_TK == SLICED
            token_R, choice_R = sliced_TK.nonzero(as_tuple=True)
            groups_RP = member_EP[self.ids_TK[token_R, choice_R]]
            row_R, group_rank_R = groups_RP.nonzero(as_tuple=True)
            need_TP[token_R[row_R], group_rank_R] = True
        return need_TP

    def pairs(self, ranks: int) -> torch.Tensor:
        """[T, P]: how many of a token's experts, or parts of them, a rank computes."""
        rank_TK = self.rank_TK
        pairs_TP = torch.zeros(rank_TK.shape[0], ranks + 1, dtype=torch.int32, device=rank_TK.device)
        pairs_TP.scatter_add_(1, rank_TK.clamp_min(-1) + 1, torch.ones_like(rank_TK, dtype=torch.int32))
        pairs_TP = pairs_TP[:, 1:]
        if self.part_slot_PE is not None:
            token_R, choice_R = (rank_TK == SLICED).nonzero(as_tuple=True)
            member_EP = (self.part_slot_PE >= 0).t().to(torch.int32)
            pairs_TP = pairs_TP.contiguous().index_add_(0, token_R, member_EP[self.ids_TK[token_R, choice_R]])
        return pairs_TP

    def slots(self, token_R: torch.Tensor, to_R: torch.Tensor) -> torch.Tensor:
        """[R, K]: the slots at rank `to_R[r]` of token `token_R[r]`'s choices, -1 for what others compute."""
        there = self.rank_TK[token_R] == to_R[:, None]
        slots_RK = torch.where(there, self.slot_TK[token_R], -1)
        if self.part_slot_PE is not None:
            sliced = self.rank_TK[token_R] == SLICED
            parts_RK = self.part_slot_PE[to_R[:, None], self.ids_TK[token_R].clamp_min(0)]
            slots_RK = torch.where(sliced, parts_RK, slots_RK)
        return slots_RK


def by_shares(
    ids_TK: torch.Tensor, shares_EQ: np.ndarray, slot_EP: np.ndarray, part_slot_PE: np.ndarray | None
) -> Routing:
    """Gives the rows of each expert to ranks in numbers of `shares_EQ` [E, P + 1] (the last: its slice group).

    `slot_EP` is the slot of each expert on each rank. Which rows go where is spread over the tokens, so that every
    chunk of them has rows for every rank.
    """
    device = ids_TK.device
    experts, ranks = slot_EP.shape
    flat = ids_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    sorted_ids = flat[order]
    none = int((flat < 0).sum())
    order, sorted_ids = order[none:], sorted_ids[none:]
    counts = shares_EQ.sum(1)
    starts_E = torch.from_numpy(counts.cumsum() - counts).to(device)
    counts_E = torch.from_numpy(counts).to(device)
    steps_E = torch.tensor([mixing_step(int(n)) for n in counts], device=device)
    place = torch.arange(order.shape[0], device=device) - starts_E[sorted_ids]
    place = place * steps_E[sorted_ids] % counts_E[sorted_ids]
    ends_EQ = torch.from_numpy(shares_EQ.cumsum(1)).to(device)
    to = (place[:, None] >= ends_EQ[sorted_ids]).sum(1)
    slot = torch.from_numpy(np.concatenate([slot_EP, np.full((experts, 1), -1)], axis=1)).to(device)[sorted_ids, to]
    rank_N, slot_N = torch.full_like(flat, -1), torch.full_like(flat, -1)
    rank_N[order] = torch.where(to == ranks, SLICED, to)
    slot_N[order] = slot
    return Routing(
        ids_TK=ids_TK,
        rank_TK=rank_N.view_as(ids_TK),
        slot_TK=slot_N.view_as(ids_TK),
        part_slot_PE=None if part_slot_PE is None else torch.from_numpy(part_slot_PE).to(device),
    )


def instead(
    routing: Routing,
    whole_PE: np.ndarray,
    part_E: np.ndarray,
    rank_E: np.ndarray,
    slot_E: np.ndarray,
    part_slot_E: np.ndarray,
) -> Routing:
    """Only those choices that went to an expert at a rank as `whole_PE` says, or to a slice group as `part_E` says: to
    `rank_E`, and the slots `slot_E` and `part_slot_E` there.
    """
    ids_TK, rank_TK = routing.ids_TK.clamp_min(0), routing.rank_TK
    device = ids_TK.device
    whole, part, rank, slot, part_slot = (
        torch.from_numpy(it.copy()).to(device) for it in (whole_PE, part_E, rank_E, slot_E, part_slot_E)
    )
    sliced_TK = (rank_TK == SLICED) & part[ids_TK]
    chosen_TK = sliced_TK | ((rank_TK >= 0) & whole[rank_TK.clamp_min(0), ids_TK])
    return Routing(
        ids_TK=routing.ids_TK,
        rank_TK=torch.where(chosen_TK, rank[ids_TK], -1),
        slot_TK=torch.where(chosen_TK, torch.where(sliced_TK, part_slot[ids_TK], slot[ids_TK]), -1),
    )
