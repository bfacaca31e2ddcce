"""Slots for what a layer remembers of a whole sequence: the states of linear attention, state spaces and convolutions.

Where keys and values grow with a sequence, such a state is of one size, so that a request needs one slot for as long as
it runs. The lowest free slot is given out: those that run together lie together.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from .requests import Request

NO_SLOT = -1


class StateSlots:
    """`num_slots` slots, by number from 0. Raises ValueError for fewer than one."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; it must be at least 1")
        self.num_slots = num_slots
        self._free = list(range(num_slots))
        heapify(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.num_slots - len(self._free)

    def allocate(self, request: Request) -> None:
        """Sets the request's `state_slot`. What is in it is of whoever had it last."""
        assert request.state_slot == NO_SLOT, f"{request!r} has a state already"
        request.state_slot = heappop(self._free)

    def free(self, request: Request) -> None:
        assert request.state_slot != NO_SLOT, f"{request!r} has no state"
        heappush(self._free, request.state_slot)
        request.state_slot = NO_SLOT

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise AssertionError unless each of the requests that run has a slot of its own and all others are free."""
        held = [request.state_slot for request in requests]
        assert sorted([*held, *self._free]) == list(range(self.num_slots)), f"held {held}, free {sorted(self._free)}"
