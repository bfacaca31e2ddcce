"""Shared experts of a layer whose plan gives some of their tokens to other ranks: every rank has the weights.

T: tokens, R: rows that came, D: hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..scheduler.balance.plan import SharedMove
from .group import RankGroup
from .overlap import Overlap


class SharedFill:
    """One run of a layer's shared experts by a plan's moves: a rank's last tokens go to the ranks that compute them,
    in order of ranks, and their outputs come back. All ranks of the group take part, at the same place among their
    exchanges; those without tokens too.
    """

    def __init__(self, group: RankGroup, overlap: Overlap, moves: Sequence[SharedMove], none_TD: torch.Tensor) -> None:
        """Sends the tokens. `none_TD` has the width, type and device of the shared experts' input."""
        self._group = group
        self._overlap = overlap
        here = group.position
        self._sends, self._receives = [0] * group.size, [0] * group.size
        for move in moves:
            if move.source == here:
                self._sends[move.destination] += move.tokens
            if move.destination == here:
                self._receives[move.source] += move.tokens
        self._input = overlap.take()
        x_TD = none_TD[:0] if self._input is None else self._input.reshape(-1, none_TD.shape[1])
        self._keep = x_TD.shape[0] - sum(self._sends)
        assert self._keep >= 0, f"{sum(self._sends)} of {x_TD.shape[0]} tokens are to be computed elsewhere"
        self._own_TD = x_TD[: self._keep]
        self._rows_RD, self._pending = group.all_to_all(x_TD[self._keep :].contiguous(), self._sends, self._receives)

    def run(self) -> None:
        """Computes what stays here, then what has come, and sends that back."""
        with self._group.progress.span("shared"):
            self._own_TD = self._compute(self._own_TD)
            self._pending.wait()
            y_RD = self._compute(self._rows_RD)
            self._rows_RD, self._pending = self._group.all_to_all(y_RD, self._receives, self._sends)

    def finish(self) -> None:
        """Waits for the outputs of the tokens that went away; then the block gets all of its own."""
        self._pending.wait()
        if self._input is not None:
            self._overlap.give(torch.cat([self._own_TD, self._rows_RD]).view(self._input.shape))

    def _compute(self, x_RD: torch.Tensor) -> torch.Tensor:
        """In the form in which a block would give it: [1, R, D] where it gives three dimensions."""
        return self._overlap.compute(x_RD[None])[0].contiguous() if x_RD.shape[0] else x_RD
