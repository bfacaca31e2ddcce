"""Where a choice is computed and in which slot there, by its token's rank, its expert and its token's place: a table
on the device, which nobody waits for the host to read.

T: tokens, K: experts per token, P: ranks, E: experts, Q: places (1, or 8 for tokens 0, 8, ..., tokens 1, 9, ... of
their rank), R: rows.
"""

from __future__ import annotations

import numpy as np
import torch

from ..scheduler.assignment import nearest_homes
from ..scheduler.balance.problem import Integers
from ..scheduler.table import ExpertTable


class Lookup:
    """One table, never changed: whoever has it may go on reading while another takes its place."""

    def __init__(self, rank_PEQ: Integers, slot_PEQ: Integers, device: torch.device) -> None:
        self._ranks, experts, self._places = rank_PEQ.shape
        self._width = (experts + 1) * self._places
        # Of all sources and places it would be large. Slots travel as 16 bits, too.
        dtype = np.int64 if self._places == 1 else np.int16
        self._rank_PN, self._slot_PN = (
            # First what becomes of a choice that is none, -1.
            torch.from_numpy(np.pad(it.astype(dtype), ((0, 0), (1, 0), (0, 0)), constant_values=-1))
            .to(device)
            .view(self._ranks, self._width)
            for it in (rank_PEQ, slot_PEQ)
        )

    def find(self, ids_TK: torch.Tensor, source: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank and the slot there of each choice of all of a source's tokens; -1 for none."""
        index_TK = self._index(ids_TK, 0)
        return self._rank_PN[source][index_TK].long(), self._slot_PN[source][index_TK].long()

    def slots_at(self, position: int, ids_PRK: torch.Tensor, first: int) -> torch.Tensor:
        """[P, R, K]: the slot at `position` of each choice that its source sends there, -1 otherwise. The rows are the
        sources' tokens from number `first` on.
        """
        sources = torch.arange(self._ranks, device=ids_PRK.device)[:, None, None]
        index_PRK = self._index(ids_PRK, first) + sources * self._width
        here = self._rank_PN.view(-1)[index_PRK] == position
        return torch.where(here, self._slot_PN.view(-1)[index_PRK].long(), -1)

    def _index(self, ids_RK: torch.Tensor, first: int) -> torch.Tensor:
        """Of [..., R, K] choices, in a source's part of the table."""
        if self._places == 1:
            return ids_RK + 1
        place_R = torch.arange(first, first + ids_RK.shape[-2], device=ids_RK.device) % self._places
        return (ids_RK + 1) * self._places + place_R[:, None]


class Lookups:
    """A layer's two: `homes`, which follows from the expert table, and `current`, by which steps go that make no plan
    of their own. They are the same as long as nobody publishes another.
    """

    def __init__(self, table: ExpertTable, device: torch.device) -> None:
        self._device = device
        self.use(table)

    @property
    def published(self) -> bool:
        """Whether steps go by another table than to the homes."""
        return self.current is not self.homes

    def use(self, table: ExpertTable) -> None:
        """Goes over to another expert table; what was published is gone."""
        rank_PE, slot_PE = nearest_homes(table)
        self.homes = self.current = Lookup(rank_PE[..., None], slot_PE[..., None], self._device)

    def publish(self, rank_PEQ: Integers, slot_PEQ: Integers) -> None:
        """Steps go by this from the next one on."""
        self.current = Lookup(rank_PEQ, slot_PEQ, self._device)

    def withdraw(self) -> None:
        """Steps go to the homes again."""
        self.current = self.homes
