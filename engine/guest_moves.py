"""The weights of one layer's plan on their way, and by which numbers the ranks call a layer's guests.

P: ranks, E: experts.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..scheduler.balance.model import arrivals
from ..scheduler.balance.patience import Patience
from ..scheduler.balance.plan import Plan, Transfer
from ..scheduler.balance.problem import Integers, Problem
from ..scheduler.balance.striping import Message, messages
from .arrivals import Arrival
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


@dataclass(frozen=True, kw_only=True)
class Ways:
    """How a plan's transfers travel: `messages` are those from and to this rank. `due_N` is when each transfer should
    have come, in ns from the start, and `native_ns` what the layer would take without them, both by the model.
    """

    transfers: tuple[Transfer, ...]
    messages: list[Message]
    due_N: list[int]
    native_ns: int

    @classmethod
    def of(cls, problem: Problem, plan: Plan, cutter: Cutter, position: int) -> Ways:
        return cls(
            transfers=plan.transfers,
            messages=messages(problem, plan, [cutter.nbytes(t.part, t.parts) for t in plan.transfers], position),
            due_N=arrivals(problem, plan),
            native_ns=plan.native_ns,
        )


class GuestMoves:
    """The weights of one layer's plan on their way from and to this rank, and over it.

    Sent and received on exchanges of their own, beside the tokens'. Between two ranks all messages go in the plan's
    order, which is how the receiver tells them apart. What this rank passes on leaves when it has come. Every rank has
    one, also where nothing comes or goes: all hear what is late.

    Args:
        pack: gives the bytes of what this rank has already, None for others.
        patience: how long weights that are due are waited for.
    """

    def __init__(
        self,
        group: RankGroup,
        cutter: Cutter,
        room: GuestRoom,
        numbers: Numbers,
        ways: Ways,
        pack: Callable[[Transfer], torch.Tensor | None],
        patience: Patience,
    ) -> None:
        self._group = group
        self._cutter = cutter
        self._ways = ways
        self._pack = pack
        self._patience = patience
        self._begun_ns = time.monotonic_ns()
        self._here: dict[int, tuple[int, torch.Tensor]] = {}
        """Of each transfer to this rank its guest's number, and its place in the room."""
        self._coming: dict[int, list[tuple[Message, torch.Tensor, Arrival]]] = {}
        """Of each transfer to or over this rank."""
        self._to_send = [m for m in ways.messages if m.sender == group.position]
        self._leaving: list[tuple[torch.Tensor, Pending]] = []
        self._packed: dict[tuple[int, int, int], torch.Tensor] = {}
        self._guests: dict[int, Guest] | None = None
        self._said: tuple[torch.Tensor, Pending] | None = None
        self._sending = threading.Lock()
        self._take_places(room, numbers)
        with self._sending:  # what comes is passed on when all is known that comes
            for m in ways.messages:
                if m.receiver == group.position:
                    self._coming.setdefault(m.transfer, []).append((m, *self._receive(m)))
        self._send()

    def _take_places(self, room: GuestRoom, numbers: Numbers) -> None:
        mine = [(i, t) for i, t in enumerate(self._ways.transfers) if t.destination == self._group.position]
        slots, parts = itertools.count(), itertools.count()
        room.first_part(sum(t.parts == 1 for _, t in mine))
        for index, t in mine:
            nbytes = self._cutter.nbytes(t.part, t.parts)
            if t.parts == 1:
                slot = next(slots)
                self._here[index] = numbers.whole(slot), room.whole(slot, nbytes)
            else:
                self._here[index] = numbers.part(next(parts)), room.part(nbytes)

    def _receive(self, m: Message) -> tuple[torch.Tensor, Arrival]:
        if m.transfer in self._here:
            place = self._here[m.transfer][1][m.start : m.stop]
        else:  # for another rank
            place = torch.empty(m.stop - m.start, dtype=torch.uint8, device=self._group.device)
        return place, self._group.receive_weights(m.sender, place, self._send)

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """The plan's."""
        return self._ways.transfers

    @property
    def expected(self) -> bool:
        """Whether any guest comes here."""
        return bool(self._here)

    def guests(self) -> dict[int, Guest]:
        """This rank's guests by number, without those that are late: they are not waited for any longer. Tells the
        others which.
        """
        if self._guests is None:
            self._guests = {}
            began = time.monotonic_ns()
            wait_ns = self._patience.wait_ns(self._ways.native_ns)
            late_N = torch.zeros(len(self._ways.transfers), dtype=torch.uint8)
            for index, due_ns in enumerate(self._ways.due_N):
                due = self._begun_ns + due_ns
                until = max(began, due) + wait_ns  # before this rank could use it, waiting cost nothing
                if index in self._here:
                    if (came_at := self._came(index, until)) is None:
                        late_N[index] = 1
                        self._patience.came(wait_ns)
                    else:
                        self._patience.came(came_at - due)
                        t, (number, packed) = self._ways.transfers[index], self._here[index]
                        self._guests[number] = self._cutter.unpack(packed, t.part, t.parts)
                elif self._group.device.type == "cuda":  # on a CPU, threads pass on
                    self._came(index, until)
            self._said = self._group.all_gather_beside(late_N)
        return self._guests

    def _came(self, index: int, until_ns: int) -> int | None:
        """When the last message of a transfer came; None for later than then."""
        last = 0
        for _, _, arrival in self._coming.get(index, ()):
            if not arrival.came(until_ns):
                return None
            if self._group.device.type == "cuda":
                self._send()
            last = max(last, arrival.at_ns)
        return last

    def late(self) -> list[int]:
        """The plan's transfers that are late at their destination: the same on every rank. The weights that come
        late are of no use, so they are passed on at once, whatever they are.
        """
        self.guests()
        assert self._said is not None
        late_PN, pending = self._said
        pending.wait()
        late: list[int] = late_PN.any(0).nonzero()[:, 0].tolist()
        if late:
            self._send(given_up=True)
        return late

    @property
    def open(self) -> bool:
        """Whether anything is still on its way here."""
        return not all(arrival.came(0) for coming in self._coming.values() for _, _, arrival in coming)

    def finish(self) -> None:
        """When all has come everywhere: what left this rank is not needed any more."""
        with self._sending:
            assert not self._to_send, "a plan passes on what does not come"
            for _, pending in self._leaving:
                pending.wait()
            self._leaving.clear()
            self._packed.clear()

    def _send(self, given_up: bool = False) -> None:
        """What is here, as far as nothing that is to reach the same rank before it is still missing."""
        with self._sending:
            waiting: list[Message] = []
            blocked: set[int] = set()
            for m in self._to_send:
                packed = self._bytes(m) if m.receiver not in blocked else None
                if packed is None and given_up:
                    packed = torch.zeros(m.stop - m.start, dtype=torch.uint8, device=self._group.device)
                if packed is None:
                    waiting.append(m)
                    blocked.add(m.receiver)
                else:
                    self._leaving.append((packed, self._group.send_weights(m.receiver, packed)))
            self._to_send = waiting

    def _bytes(self, m: Message) -> torch.Tensor | None:
        """What a message is to bring, if it is here."""
        t = self._ways.transfers[m.transfer]
        if t.source != self._group.position:  # on its way over this rank
            return self._piece(m.transfer, m.start, m.stop)
        key = (t.expert, t.part, t.parts)
        if key not in self._packed:
            packed = self._pack(t)
            if packed is None:  # a guest that comes
                index = next(i for i in self._here if self._is_whole(i, t.expert))
                if t.parts == 1:
                    return self._piece(index, m.start, m.stop)
                whole = self._piece(index, 0, self._here[index][1].numel())
                if whole is None:
                    return None
                packed = self._cutter.cut(whole, t.part, t.parts)
            self._packed[key] = packed
        return self._packed[key][m.start : m.stop]

    def _is_whole(self, index: int, expert: int) -> bool:
        t = self._ways.transfers[index]
        return t.expert == expert and t.parts == 1

    def _piece(self, index: int, start: int, stop: int) -> torch.Tensor | None:
        """These bytes of a transfer to or over this rank, if they have come."""
        needed = [it for it in self._coming[index] if it[0].start < stop and it[0].stop > start]
        if not all(arrival.at_ns for _, _, arrival in needed):
            return None
        if index in self._here:
            return self._here[index][1][start:stop]
        ((_, place, _),) = needed
        return place
