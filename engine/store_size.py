"""How a budget for experts is shared out: slots for those that stay, places for those that pass through, buffers."""

from __future__ import annotations

from dataclasses import dataclass

from .config import format_size

READS_IN_FLIGHT = 4
"""Most reads at a time where the disk was not measured: each takes a place and a buffer from the budget."""


@dataclass(frozen=True, kw_only=True)
class StoreSize:
    """`slots` places for experts that stay, and `staging` for those that pass through, of which at most `ahead` are
    for experts that are read ahead of the router's choice. `readers` reads run at a time, each through one of `buffers`
    of `scratch` bytes; with one more than readers, an urgent read need not wait for the end of another one.
    """

    expert: int
    scratch: int
    slots: int
    staging: int
    readers: int
    ahead: int = 0
    buffers: int = 0

    def __post_init__(self) -> None:
        assert self.staging >= 1 and 0 <= self.ahead < self.staging and self.buffers >= self.readers >= 1

    @property
    def places(self) -> int:
        return self.slots + self.staging

    @property
    def reading(self) -> int:
        """Bytes that reads take beside the places."""
        return self.buffers * self.scratch

    @property
    def nbytes(self) -> int:
        return self.places * self.expert + self.reading


def share_out(budget: int, expert: int, scratch: int, reads: int = READS_IN_FLIGHT) -> StoreSize:
    """The division of `budget` bytes: up to `reads` reads in flight, as many as a quarter of it allows with what passes
    through, the rest for experts that stay.

    With n reads in flight n + 1 experts pass through, one of which is computed, and n that are read ahead. Less than
    that is one read, with nothing ahead; the least budget is one place and one read. Raises ValueError for less.
    """
    least = expert + scratch
    if budget < least:
        raise ValueError(
            f"expert_memory gives {format_size(budget)}, and one expert of {format_size(expert)} with"
            f" {format_size(scratch)} to read it through needs {format_size(least)}; set --expert-memory to as much"
        )
    for readers in range(reads, 0, -1):
        staging, buffers, ahead = 2 * readers + 1, readers + 1, readers
        if 4 * (staging * expert + buffers * scratch) <= budget:
            break
    else:
        readers, buffers, ahead = 1, 1, 0
        staging = 2 if 3 * expert + scratch <= budget else 1
    slots = (budget - buffers * scratch) // expert - staging
    return StoreSize(
        expert=expert, scratch=scratch, slots=slots, staging=staging, readers=readers, ahead=ahead, buffers=buffers
    )
