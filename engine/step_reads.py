"""Experts that a rank could not read in a step of several ranks: the others are told when the step is over.

A rank whose read failed goes on with nothing in the place of its sums: the exchanges of the step's layers are the same
on every rank, and one that left would be waited for. What the step gave is then used by nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .expert_files import ExpertUnreadable
from .group import RankGroup
from .host_compute import CpuExpertsFailed
from .store import ExpertLate


class ReadFailed(RuntimeError):
    """A step whose experts were not all read, on whatever rank."""


class StepReads:
    """The reads of one rank's steps, one step after the other.

    In a layer others wait for this rank, and at most as long as an exchange may take: from the arrival of the layer's
    first tokens on its reads get half of that, and the last of them may take a quarter more (`wait_s`).
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._error: str | None = None
        self._deadline: float | None = None

    def begin_layer(self) -> None:
        """Another layer: its time for reads begins with the next `run`."""
        self._deadline = None

    def run(self, compute: Callable[[float], torch.Tensor], x_RD: torch.Tensor) -> torch.Tensor:
        """`compute(deadline)`, the sums [R, D] for the rows `x_RD`; zeros once a read of this step has failed."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._group.timeout_s / 2
        if self._error is None:
            try:
                return compute(self._deadline)
            except (ExpertUnreadable, ExpertLate, CpuExpertsFailed) as error:
                self._error = str(error)
        return torch.zeros_like(x_RD)

    def settle(
        self, tally: Sequence[int] = (), told: Callable[[Sequence[Sequence[int]]], None] = lambda tallies: None
    ) -> None:
        """The end of the step, on every rank: `told` gets the tallies of all, as many numbers from each. Raises
        ReadFailed on all of them when a read failed on any.
        """
        group = self._group
        error, self._error = self._error, None
        rows = group.all_gather_ints([int(error is not None), *tally])
        told([row[1:] for row in rows])
        if not any(row[0] for row in rows):
            return
        key = f"unread in step {group.progress.step}"
        group.put(key, error)
        said = group.get_all(key, group.timeout_s)
        texts = dict.fromkeys(text for text in said if text is not None)  # often the same file
        raise ReadFailed("; ".join(f"rank {group.members[said.index(text)]}: {text}" for text in texts))


def wait_s(collective_timeout_s: float) -> float:
    """How long a rank may wait for one expert while others wait for it."""
    return collective_timeout_s / 4
