"""The way from one expert table to another, in small units after each of which every expert still has a home.

A pool has little spare memory, so a slot is written only when its occupant lives elsewhere too, and where
nothing but cycles is left two experts change places. Between two units requests can be served from the table as
it then is; the caller decides how many units go behind one step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from .table import EMPTY, ExpertTable, Position


@dataclass(frozen=True)
class Transfer:
    """Copies an expert's weights into the slot `target`.

    `source` is a slot that holds it when the unit starts; None when no rank has it and it comes from the
    checkpoint (or the host store).
    """

    expert: int
    source: Position | None
    target: Position


Unit = tuple[Transfer, ...]  # all sources are read before any target is written


def plan_moves(old: ExpertTable, new: ExpertTable) -> list[Unit]:
    """The units that lead from `old` to `new`: single transfers, and pairs that change places.

    `old` may lack experts (a rank was lost): these come as early as they can without orphaning another. With
    every unit done (`apply`), each slot has what `new` says; slots that `new` leaves empty cost nothing and may
    still show a replica, so the caller takes `new` itself at the end. A unit settles at least one slot of `new`
    for good, so there are at most two transfers for each slot that differs.

    Raises ValueError when the tables differ in experts, ranks or slots, or are not valid.
    """
    for name, a, b in (
        ("experts", old.experts, new.experts),
        ("ranks", old.ranks, new.ranks),
        ("slots", old.slots, new.slots),
    ):
        if a != b:
            raise ValueError(f"{name}: the old table has {a} and the new one {b}; bring them to the same number first")
    old.check(complete=False)
    new.check()

    now = _Slots(old)
    units: list[Unit] = []

    def wanted(position: Position) -> int:
        rank, slot = position
        return new.slots_PS[rank][slot]

    def priority(position: Position) -> tuple[bool, Position]:
        return bool(now.homes_E[wanted(position)]), position  # an expert without a home comes first

    def settled(position: Position) -> bool:
        return wanted(position) in (EMPTY, now.at(position))

    positions = [(rank, slot) for rank in range(new.ranks) for slot in range(new.slots)]
    ready = [priority(position) for position in positions if not settled(position)]
    heapify(ready)
    while ready:
        _, target = heappop(ready)
        if settled(target) or now.is_only_home(target):
            continue  # in the second case it comes back below, when its occupant gets another home
        expert = wanted(target)
        before = list(now.homes_E[expert])
        units.append((Transfer(expert, now.source(expert, target[0]), target),))
        now.put(expert, target)
        for position in before:
            if not settled(position):
                heappush(ready, priority(position))

    # In every slot that is still wrong sits the only copy of an expert, which belongs in one or more of the other
    # wrong slots. No slot is wanted by two of these experts, so each belongs in exactly one: the slots form closed
    # cycles, and nothing outside them is open. A swap puts one expert in its place; the cycle's last puts two.
    for position in positions:
        while not settled(position):
            expert = now.at(position)
            (target,) = new.homes(expert)
            assert now.is_only_home(position) and not settled(target), f"no cycle at {position}"  # or it would not end
            units.append((Transfer(expert, position, target), Transfer(now.at(target), target, position)))
            now.do(units[-1])
    return units


def apply(table: ExpertTable, unit: Unit) -> ExpertTable:
    """The table after a unit.

    An expert that goes to another slot of a rank that has it leaves its old slot empty: no table shows an expert
    twice on one rank.
    """
    for transfer in unit:
        assert transfer.source is None or transfer.source in table.homes(transfer.expert), f"{transfer}: not there"
    now = _Slots(table)
    now.do(unit)
    return table.with_rows(now.rows)


class _Slots:
    """A table that changes."""

    def __init__(self, table: ExpertTable) -> None:
        self.rows = table.to_lists()
        self.homes_E = [set(table.homes(expert)) for expert in range(table.experts)]

    def at(self, position: Position) -> int:
        rank, slot = position
        return self.rows[rank][slot]

    def is_only_home(self, position: Position) -> bool:
        occupant = self.at(position)
        return occupant != EMPTY and len(self.homes_E[occupant]) == 1

    def source(self, expert: int, rank: int) -> Position | None:
        """Where to read the expert for a slot of the rank: there if possible, else on the lowest rank."""
        return min(self.homes_E[expert], key=lambda home: (home[0] != rank, home), default=None)

    def put(self, expert: int, target: Position) -> None:
        for position in [target, *(home for home in self.homes_E[expert] if home[0] == target[0])]:
            self._clear(position)
        self.rows[target[0]][target[1]] = expert
        self.homes_E[expert].add(target)

    def _clear(self, position: Position) -> None:
        occupant = self.at(position)
        if occupant != EMPTY:
            self.homes_E[occupant].discard(position)
            self.rows[position[0]][position[1]] = EMPTY

    def do(self, unit: Iterable[Transfer]) -> None:
        for transfer in unit:
            self.put(transfer.expert, transfer.target)
