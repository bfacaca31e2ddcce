"""The weights of one layer's plan on their way, and by which numbers the ranks call a layer's guests.

P: ranks, E: experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..scheduler.balance.plan import Plan, Transfer
from ..scheduler.balance.problem import Integers
from .group import Pending, RankGroup
from .guests import Cutter, Guest, GuestRoom


@dataclass(frozen=True, kw_only=True)
class Newcomers:
    """Where a plan's guests lie in their ranks' rooms: the same on every rank.

    `whole` are (rank, expert, slot) of whole ones, `part_PE` numbers the parts that come to each rank (-1: none), and
    `slots_P` is how many slots of each rank's room they take.
    """

    whole: tuple[tuple[int, int, int], ...]
    part_PE: Integers
    slots_P: list[int]

    @classmethod
    def of(cls, plan: Plan, ranks: int, experts: int, cutter: Cutter, room: GuestRoom) -> Newcomers:
        whole: list[tuple[int, int, int]] = []
        part_PE = np.full((ranks, experts), -1, dtype=np.int64)
        whole_P, parts_P, bytes_P = [0] * ranks, [0] * ranks, [0] * ranks
        for t in plan.transfers:
            p = t.destination
            if t.parts == 1:
                whole.append((p, t.expert, whole_P[p]))
                whole_P[p] += 1
            else:
                part_PE[p, t.expert] = parts_P[p]
                parts_P[p] += 1
                bytes_P[p] += cutter.nbytes(t.part, t.parts)
        slots_P = [n + room.slots_for(nbytes) for n, nbytes in zip(whole_P, bytes_P, strict=True)]
        return cls(whole=tuple(whole), part_PE=part_PE, slots_P=slots_P)


class Numbers:
    """What ranks call the experts of a layer at each other: a slot of the expert table has its own number, whole
    guests, transient or kept, have the numbers of their slots in the room after those, and parts come last.
    """

    def __init__(self, table_slots: int, room_slots: int) -> None:
        self.table_slots = table_slots
        self._parts = table_slots + room_slots

    def whole(self, slot: int) -> int:
        return self.table_slots + slot

    def slot(self, number: int) -> int:
        """The room's slot of a number that a whole guest has."""
        assert self.table_slots <= number < self._parts
        return number - self.table_slots

    def with_newcomers(self, number_PE: Integers, newcomers: Newcomers) -> tuple[Integers, Integers | None]:
        """[P, E] numbers of all whole experts, and of parts (None without any); -1 where there is none."""
        whole_PE = number_PE.copy()
        for rank, expert, slot in newcomers.whole:
            whole_PE[rank, expert] = self.whole(slot)
        there = newcomers.part_PE >= 0
        part_PE = np.where(there, newcomers.part_PE + self._parts, -1) if there.any() else None
        return whole_PE, part_PE

    def part(self, number: int) -> int:
        return self._parts + number


class GuestMoves:
    """The weights of one layer's plan on their way from and to this rank.

    Sent and received on exchanges of their own, beside the tokens', and between two ranks in the plan's order, which
    is how the receiver tells them apart. What this rank passes on leaves when it has come. `pack(transfer)` gives the
    bytes of what this rank has already, None for others.
    """

    def __init__(
        self,
        group: RankGroup,
        cutter: Cutter,
        room: GuestRoom,
        numbers: Numbers,
        transfers: Sequence[Transfer],
        pack: Callable[[Transfer], torch.Tensor | None],
    ) -> None:
        self._group = group
        self._cutter = cutter
        self._pack = pack
        self._coming: list[tuple[Transfer, int, torch.Tensor, Pending]] = []
        self._to_send = [t for t in transfers if t.source == group.position]
        self._whole: dict[int, torch.Tensor] = {}
        self._leaving: list[tuple[torch.Tensor, Pending]] = []
        self._guests: dict[int, Guest] | None = None
        mine = [t for t in transfers if t.destination == group.position]
        slots, parts = itertools.count(), itertools.count()
        room.first_part(sum(t.parts == 1 for t in mine))
        for t in mine:
            nbytes = cutter.nbytes(t.part, t.parts)
            if t.parts == 1:
                slot = next(slots)
                packed, number = room.whole(slot, nbytes), numbers.whole(slot)
            else:
                packed, number = room.part(nbytes), numbers.part(next(parts))
            self._coming.append((t, number, packed, group.receive_weights(t.source, packed)))
        self._send()

    @property
    def expected(self) -> bool:
        """Whether any guest comes here."""
        return bool(self._coming)

    def guests(self) -> dict[int, Guest]:
        """Waits for all that comes and passes on what others wait for; by number."""
        if self._guests is None:
            self._guests = {}
            for t, number, packed, pending in self._coming:
                pending.wait()
                if t.parts == 1:
                    self._whole[t.expert] = packed
                    self._send()
                self._guests[number] = self._cutter.unpack(packed, t.part, t.parts)
        return self._guests

    def finish(self) -> None:
        """The end of the layer: what left this rank is not needed any more."""
        self.guests()
        assert not self._to_send, "a plan passes on what does not come"
        for _, pending in self._leaving:
            pending.wait()
        self._leaving.clear()

    def _send(self) -> None:
        """What is here, as far as nothing that is to reach the same rank before it is still missing."""
        waiting: list[Transfer] = []
        for t in self._to_send:
            packed = None
            if all(t.destination != other.destination for other in waiting):
                packed = self._pack(t)
                if packed is None and (whole := self._whole.get(t.expert)) is not None:
                    packed = whole if t.parts == 1 else self._cutter.cut(whole, t.part, t.parts)
            if packed is None:
                waiting.append(t)
            else:
                self._leaving.append((packed, self._group.send_weights(t.destination, packed)))
        self._to_send = waiting
