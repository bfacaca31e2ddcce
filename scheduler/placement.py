"""Planners of expert tables: which rank holds which experts, and which experts have replicas.

Pure functions of their arguments, in integers and with every tie broken, so that all ranks plan the same table;
what they return passes `ExpertTable.check`. A load is a number of tokens; an expert's replicas share its load
evenly. Raises ValueError (all of them) for numbers that cannot work.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import lcm

from .table import EMPTY, ExpertTable, Position

Fill = tuple[Position, int]  # an expert into a slot
Change = tuple[Fill, ...]


def slots_needed(experts: int, ranks: int, redundant: int = 0) -> int:
    """Slots of each rank that hold every expert once, and `redundant` more for replicas."""
    for name, value, least in (("experts", experts, 1), ("ranks", ranks, 1), ("redundant", redundant, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    return -(-experts // ranks) + redundant


def linear(experts: int, ranks: int, slots: int | None = None) -> ExpertTable:
    """Contiguous blocks, as most engines place them; their sizes differ by at most 1, the larger ones first."""
    slots = _enough(experts, ranks, slots)
    size, larger = divmod(experts, ranks)
    ends = [size * (rank + 1) + min(rank + 1, larger) for rank in range(ranks)]
    return _table(experts, map(range, [0, *ends], ends), slots)


def round_robin(experts: int, ranks: int, slots: int | None = None) -> ExpertTable:
    """Expert e on rank e % ranks."""
    slots = _enough(experts, ranks, slots)
    return _table(experts, (range(rank, experts, ranks) for rank in range(ranks)), slots)


def replicated(loads_E: Sequence[int], ranks: int, slots: int) -> ExpertTable:
    """The table for recorded loads, made from nothing, with replicas of the hottest experts in the spare slots.

    After the global policy of DeepSeek's EPLB: spare slots go one by one to the expert with the highest load per
    replica, then the replicas go, heaviest first, to the least loaded rank. Unlike there, no rank gets an expert
    twice, so an expert has at most as many replicas as there are ranks.
    """
    loads = _integers(loads_E)
    _enough(len(loads), ranks, slots)
    scale = _scale(ranks)
    counts = [1] * len(loads)
    heap = [(-load * scale, 1, expert) for expert, load in enumerate(loads) if ranks > 1]
    heapify(heap)
    for _ in range(ranks * slots - len(loads)):
        if not heap:
            break
        _, count, expert = heappop(heap)
        counts[expert] = count = count + 1
        if count < ranks:
            heappush(heap, (-loads[expert] * (scale // count), count, expert))

    shares = [load * (scale // count) for load, count in zip(loads, counts, strict=True)]
    return _table(len(loads), map(sorted, pack(shares, counts, ranks, slots)), slots)


def pack(shares_E: Sequence[int], counts_E: Sequence[int], ranks: int, slots: int) -> list[list[int]]:
    """Replicas onto ranks, heaviest first, each on the least loaded rank that has a free slot and not this expert.

    `shares_E` is the load of one replica, `counts_E` the number of replicas, from 1 to `ranks`; any such counts
    fit when there are slots enough. Returns the experts of each rank.
    """
    assert sum(counts_E) <= ranks * slots and all(1 <= count <= ranks for count in counts_E)
    rows: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks

    def key(rank: int) -> tuple[int, int, int]:
        return totals[rank], len(rows[rank]), rank

    for expert in sorted(range(len(shares_E)), key=lambda e: (-shares_E[e], e)):
        for _ in range(counts_E[expert]):
            free = [rank for rank in range(ranks) if len(rows[rank]) < slots]
            fits = [rank for rank in free if expert not in rows[rank]]
            target = min(fits, key=key) if fits else _make_room(rows, totals, shares_E, expert, min(free, key=key))
            rows[target].append(expert)
            totals[target] += shares_E[expert]
    return rows


def _make_room(rows: list[list[int]], totals: list[int], shares_E: Sequence[int], expert: int, free: int) -> int:
    """Every rank with a free slot holds the expert: moves another one to the rank `free` and returns the rank
    that it left, where the expert now fits.

    There is always one. The expert has no more replicas than ranks, so some rank lacks it, and that rank is full.
    `free` holds fewer experts than that rank, and `expert` is one of them, so the full rank has at least two that
    `free` lacks.
    """
    _, source, other = min(
        (max(totals[rank] - shares_E[other] + shares_E[expert], totals[free] + shares_E[other]), rank, other)
        for rank, row in enumerate(rows)
        if expert not in row
        for other in row
        if other not in rows[free]
    )
    rows[source].remove(other)
    totals[source] -= shares_E[other]
    rows[free].append(other)
    totals[free] += shares_E[other]
    return source


def keep_slots(table: ExpertTable, old: ExpertTable) -> ExpertTable:
    """The same experts on each rank, those that `old` has there too in their old slots: fewer copies on the way."""
    assert (table.ranks, table.slots) == (old.ranks, old.slots), "tables of two shapes"
    rows = []
    for row, before in zip(table.slots_PS, old.slots_PS, strict=True):
        kept = [expert if expert in row else EMPTY for expert in before]
        rest = iter([expert for expert in row if expert != EMPTY and expert not in kept])
        rows.append([next(rest, EMPTY) if expert == EMPTY else expert for expert in kept])
    return table.with_rows(rows)


def incremental(table: ExpertTable, loads_E: Sequence[int], max_moves: int) -> ExpertTable:
    """Lowers the load of the heaviest rank by at most `max_moves` fills of a slot with another expert.

    Greedy: each step takes the change that leaves the lowest heaviest rank (then the lowest sum of squared loads)
    among: filling an empty slot with a replica, putting a replica in the place of a redundant one, and letting
    two experts of two ranks change places, which is two moves. Stops when no change helps.
    """
    table.check()
    loads = _integers(loads_E, table.experts)
    if max_moves < 0:
        raise ValueError(f"max_moves is {max_moves}; it must be at least 0")
    state = _Loads(table, loads)
    left = max_moves
    while left > 0 and (change := state.best(left)):
        state.do(change)
        left -= len(change)
    return table.with_rows(state.rows)


class _Loads:
    """A table that changes, with the load of every rank (times a number that makes all shares integers)."""

    def __init__(self, table: ExpertTable, loads: list[int]) -> None:
        self.loads = loads
        self.scale = _scale(table.ranks)
        self.rows = table.to_lists()
        self.ranks_E = [{rank for rank, _ in table.homes(expert)} for expert in range(table.experts)]
        self.totals = [int(load * self.scale) for load in rank_loads(table, loads)]

    def share(self, expert: int, replicas: int) -> int:
        return self.loads[expert] * (self.scale // replicas)

    def best(self, budget: int) -> Change:
        """The best change of at most `budget` fills; empty when none helps."""
        order = sorted(range(len(self.rows)), key=lambda rank: (-self.totals[rank], rank))
        found: Change = ()
        best: tuple = (self.totals[order[0]], 0)
        for change in self.candidates(order[0], budget):
            after = self.after(change)
            untouched = next((self.totals[rank] for rank in order if rank not in after), 0)
            heaviest = max(untouched, *after.values())
            squares = sum(load * load - self.totals[rank] ** 2 for rank, load in after.items())
            if (heaviest, squares, len(change), change) < best:
                found, best = change, (heaviest, squares, len(change), change)
        return found

    def candidates(self, heaviest: int, budget: int) -> Iterator[Change]:
        """Changes that may lower the load of the rank `heaviest`: it shares an expert with another rank, holds
        something else in the place of a replica, or changes an expert for a lighter one."""
        here = [expert for expert in self.rows[heaviest] if expert != EMPTY]
        for rank, row in enumerate(self.rows):
            empty = EMPTY
            for slot, occupant in enumerate(row):
                if occupant == EMPTY:
                    if rank == heaviest or empty != EMPTY:
                        continue  # one empty slot of a rank is as good as another, and here none helps
                    empty = slot
                elif len(self.ranks_E[occupant]) == 1:
                    continue
                incoming: Iterable[int] = range(len(self.loads)) if rank == heaviest else here
                yield from ((((rank, slot), e),) for e in incoming if rank not in self.ranks_E[e])
        if budget < 2:
            return
        for slot, expert in enumerate(self.rows[heaviest]):
            if expert == EMPTY:
                continue
            load = self.share(expert, len(self.ranks_E[expert]))
            for rank, row in enumerate(self.rows):
                if rank in self.ranks_E[expert]:
                    continue
                for other_slot, other in enumerate(row):
                    if other == EMPTY or heaviest in self.ranks_E[other]:
                        continue
                    gain = load - self.share(other, len(self.ranks_E[other]))
                    if 0 < gain < self.totals[heaviest] - self.totals[rank]:
                        yield ((heaviest, slot), other), ((rank, other_slot), expert)

    def homes_after(self, change: Change) -> dict[int, set[int]]:
        """The ranks of every expert that the change touches."""
        homes: dict[int, set[int]] = {}
        for (rank, slot), expert in change:
            occupant = self.rows[rank][slot]
            if occupant != EMPTY:
                homes.setdefault(occupant, set(self.ranks_E[occupant])).remove(rank)
            homes.setdefault(expert, set(self.ranks_E[expert])).add(rank)
        return homes

    def after(self, change: Change) -> dict[int, int]:
        """The load that each rank with a touched expert has after the change."""
        totals: dict[int, int] = {}
        for expert, ranks in self.homes_after(change).items():
            before = self.ranks_E[expert]
            for rank in before:
                totals[rank] = totals.get(rank, self.totals[rank]) - self.share(expert, len(before))
            for rank in ranks:
                totals[rank] = totals.get(rank, self.totals[rank]) + self.share(expert, len(ranks))
        return totals

    def do(self, change: Change) -> None:
        for rank, load in self.after(change).items():
            self.totals[rank] = load
        for expert, ranks in self.homes_after(change).items():
            self.ranks_E[expert] = ranks
        for (rank, slot), expert in change:
            self.rows[rank][slot] = expert


def repair(table: ExpertTable, slots: int | None = None) -> ExpertTable:
    """Gives every missing expert a home, on the rank with the fewest experts, and leaves the rest where it is.

    Empty slots are used first, then every rank gets as many more slots as it takes: at most `slots` (None: no
    limit). At the limit a missing expert takes the place of a replica of the expert that has most.
    """
    table.check(complete=False)
    missing = table.missing
    held = sum(table.replicas_E)
    needed = max(table.slots, -(-(held + len(missing)) // table.ranks))
    if slots is not None:
        _enough(table.experts, table.ranks, slots)
        if slots < table.slots:
            raise ValueError(f"slots is {slots}, but each rank has {table.slots} now; give at least as many")
        needed = min(needed, slots)
    rows = table.with_slots(needed).to_lists()
    counts = list(table.replicas_E)
    for expert in missing:
        free = [rank for rank, row in enumerate(rows) if EMPTY in row]
        if free:
            rank = min(free, key=lambda r: (needed - rows[r].count(EMPTY), r))
            slot = rows[rank].index(EMPTY)
        else:  # every rank is full, so all have as many
            _, rank, slot = min(
                (-counts[other], rank, slot) for rank, row in enumerate(rows) for slot, other in enumerate(row)
            )
            counts[rows[rank][slot]] -= 1
        rows[rank][slot] = expert
        counts[expert] += 1
    return table.with_rows(rows)


def rank_loads(table: ExpertTable, loads_E: Sequence[int]) -> tuple[Fraction, ...]:
    """Tokens of each rank, exact."""
    loads = _integers(loads_E, table.experts)
    scale = lcm(*(count for count in table.replicas_E if count))
    shares = [load * (scale // count) if count else 0 for load, count in zip(loads, table.replicas_E, strict=True)]
    return tuple(
        Fraction(sum(shares[expert] for expert in table.experts_of(rank)), scale) for rank in range(table.ranks)
    )


def imbalance(table: ExpertTable, loads_E: Sequence[int]) -> float:
    """Load of the heaviest rank over the mean: 1.0 is even, also where there is no load."""
    loads = rank_loads(table, loads_E)
    total = sum(loads)
    return float(max(loads) * len(loads) / total) if total else 1.0


def _table(experts: int, rows: Iterable[Iterable[int]], slots: int) -> ExpertTable:
    full = (tuple(row) for row in rows)
    return ExpertTable(experts, tuple(row + (EMPTY,) * (slots - len(row)) for row in full))


def _enough(experts: int, ranks: int, slots: int | None) -> int:
    least = slots_needed(experts, ranks)
    if slots is not None and slots < least:
        raise ValueError(f"slots is {slots}; {experts} experts on {ranks} ranks need at least {least} slots on each")
    return least if slots is None else slots


def _scale(ranks: int) -> int:
    """A number that every count of replicas divides."""
    return lcm(*range(1, ranks + 1))


def _integers(loads_E: Sequence[int], experts: int | None = None) -> list[int]:
    """The loads as Python integers, which do not overflow."""
    if experts is not None and len(loads_E) != experts:
        raise ValueError(f"loads_E has {len(loads_E)} entries; it needs one for each of {experts} experts")
    loads = []
    for expert, load in enumerate(loads_E):
        try:
            loads.append(operator.index(load))
        except TypeError:
            raise ValueError(f"loads_E[{expert}] is {load!r}; give a whole number of tokens") from None
        if loads[-1] < 0:
            raise ValueError(f"loads_E[{expert}] is {load}; it must be at least 0")
    return loads
