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
    of `scratch` bytes; with one more than readers, an urgent read need not wait for the end of another one. Where
    experts are read into their places there are no buffers: `scratch` is 0, and each place has `around` bytes more than
    an expert, for the blocks of the files that it is in.
    """

    expert: int
    scratch: int
    slots: int
    staging: int
    readers: int
    ahead: int = 0
    buffers: int = 0
    around: int = 0

    def __post_init__(self) -> None:
        assert self.staging >= 1 and 0 <= self.ahead < self.staging and self.buffers >= self.readers >= 1

    @property
    def places(self) -> int:
        return self.slots + self.staging

    @property
    def place(self) -> int:
        """Bytes of a place."""
        return self.expert + self.around

    @property
    def reading(self) -> int:
        """Bytes that reads take beside the places."""
        return self.buffers * self.scratch

    @property
    def nbytes(self) -> int:
        return self.places * self.place + self.reading


def choose_size(
    budget: int, expert: int, scratch: int, around: int | None, reads: int = READS_IN_FLIGHT
) -> tuple[StoreSize, bool]:
    """The better division of a budget, and whether experts are read into their places, with `around` bytes each; None
    where that cannot be. Raises ValueError for a budget that is too small.
    """
    placed = None if around is None or budget < expert + around else share_out(budget, expert, 0, reads, around)
    if placed is None or budget >= expert + scratch:
        copied = share_out(budget, expert, scratch, reads)
        if placed is None or placed.slots < copied.slots:
            return copied, False
    return placed, True


def share_out(budget: int, expert: int, scratch: int, reads: int = READS_IN_FLIGHT, around: int = 0) -> StoreSize:
    """The division of `budget` bytes: up to `reads` reads in flight, as many as a quarter of it allows with what passes
    through, the rest for experts that stay.

    With n reads in flight n + 1 experts pass through, one of which is computed, and n that are read ahead. Less than
    that is one read, with nothing ahead; the least budget is one place and one read. Raises ValueError for less.
    """
    place = expert + around
    least = place + scratch
    if budget < least:
        through = f" with {format_size(scratch)} to read it through" if scratch else ""
        raise ValueError(
            f"expert_memory gives {format_size(budget)}, and one expert of {format_size(expert)}{through} needs"
            f" {format_size(least)}; set --expert-memory to as much"
        )
    for readers in range(reads, 0, -1):
        staging, buffers, ahead = 2 * readers + 1, readers + 1, readers
        if 4 * (staging * place + buffers * scratch) <= budget:
            break
    else:
        readers, buffers, ahead = 1, 1, 0
        staging = 2 if 3 * place + scratch <= budget else 1
    return StoreSize(
        expert=expert,
        scratch=scratch,
        slots=(budget - buffers * scratch) // place - staging,
        staging=staging,
        readers=readers,
        ahead=ahead,
        buffers=buffers,
        around=around,
    )
