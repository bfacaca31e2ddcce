"""A rank's experts where memory holds a part of them only: its row of the expert table, without the weights.

R: rows, K: experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..scheduler.table import EMPTY
from .expert_reader import ExpertReader


class OwnExperts:
    """Which expert is in each of a rank's slots of one layer's table.

    To the table, and to all that moves experts, it is what an `ExpertPool` is. Where an expert's weights are now, the
    store knows, which reads them when they are needed.
    """

    def __init__(self, reader: ExpertReader, contents: Sequence[int]) -> None:
        self.reader = reader
        self.contents = list(contents)
        """The expert of each slot; -1 where there is none."""

    @property
    def num_slots(self) -> int:
        return len(self.contents)

    def fill(self, slot: int, expert: int) -> None:
        """The slot is the expert's from now on; nothing is read."""
        self.contents[slot] = expert

    def grow(self, num_slots: int) -> None:
        """Adds empty slots, which take no memory."""
        assert num_slots >= self.num_slots
        self.contents += [EMPTY] * (num_slots - self.num_slots)

    def experts_in(self, slots_RK: torch.Tensor) -> torch.Tensor:
        """[R, K] the experts of slots; -1 stays -1."""
        return torch.tensor([*self.contents, EMPTY], device=slots_RK.device)[
            slots_RK
        ]  # -1 is the last, of which there is none
