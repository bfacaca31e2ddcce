"""Where each expert of one pool is: the table that planners make, the executor applies and dispatch reads.

P: ranks, S: slots of a rank, E: experts of the pool (usually one MoE layer).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

EMPTY = -1
NO_HOST = (-1, -1)

Position = tuple[int, int]  # (rank, slot)


@dataclass(frozen=True)
class ExpertTable:
    """Where each of `experts` experts has its weights: `slots_PS[rank][slot]` is an expert id, or -1 for empty.

    An expert in several places has replicas. `hosts_E[expert]` is its place in host memory, (rank, offset in
    that rank's host store), (-1, -1) for none; None when there is no host store. Making a table checks
    nothing, since one that has lost a rank is a table too: see `missing` and `check`.
    """

    experts: int
    slots_PS: tuple[tuple[int, ...], ...]
    hosts_E: tuple[tuple[int, int], ...] | None = None

    @property
    def ranks(self) -> int:
        return len(self.slots_PS)

    @property
    def slots(self) -> int:
        """Slots of each rank."""
        return len(self.slots_PS[0]) if self.slots_PS else 0

    @cached_property
    def _homes_E(self) -> tuple[tuple[Position, ...], ...]:
        homes_E: list[list[Position]] = [[] for _ in range(self.experts)]
        for rank, row in enumerate(self.slots_PS):
            for slot, expert in enumerate(row):
                if expert != EMPTY:
                    homes_E[expert].append((rank, slot))
        return tuple(map(tuple, homes_E))

    def homes(self, expert: int) -> tuple[Position, ...]:
        """Every (rank, slot) that has the expert, in that order."""
        return self._homes_E[expert]

    @property
    def replicas_E(self) -> tuple[int, ...]:
        """How many homes each expert has; 0 where it is missing."""
        return tuple(map(len, self._homes_E))

    @property
    def missing(self) -> tuple[int, ...]:
        """The experts without a home."""
        return tuple(expert for expert, homes in enumerate(self._homes_E) if not homes)

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """The experts that the rank holds, in slot order."""
        return tuple(expert for expert in self.slots_PS[rank] if expert != EMPTY)

    def slot_of(self, rank: int) -> list[int]:
        """For each expert its slot on the rank, -1 where it has none there: `[E]`."""
        slot_E = [EMPTY] * self.experts
        for slot, expert in enumerate(self.slots_PS[rank]):
            if expert != EMPTY:
                slot_E[expert] = slot
        return slot_E

    def check(self, *, complete: bool = True) -> None:
        """Raises ValueError unless every rank has the same number of slots, every id is an expert's or -1, no
        rank has an expert twice, every host home is on a rank, and (with `complete`) every expert has a home."""
        if self.experts < 1:
            raise ValueError(f"experts is {self.experts}; a table has at least 1 expert")
        if not self.slots_PS:
            raise ValueError("slots_PS is empty; a table has at least 1 rank")
        for rank, row in enumerate(self.slots_PS):
            if len(row) != self.slots:
                raise ValueError(
                    f"rank {rank} has {len(row)} slots and rank 0 has {self.slots}; give every rank as many, empty"
                    " ones as -1"
                )
            seen: dict[int, int] = {}
            for slot, expert in enumerate(row):
                if expert == EMPTY:
                    continue
                if not 0 <= expert < self.experts:
                    raise ValueError(
                        f"rank {rank}, slot {slot} has expert {expert}; ids are -1 (empty) and 0 to {self.experts - 1}"
                    )
                if expert in seen:
                    raise ValueError(
                        f"rank {rank} has expert {expert} in slot {seen[expert]} and in slot {slot}; a second replica"
                        " belongs on another rank"
                    )
                seen[expert] = slot
        self._check_hosts()
        if complete and self.missing:
            raise ValueError(f"expert {self.missing[0]} has no home ({len(self.missing)} in all); repair the table")

    def _check_hosts(self) -> None:
        if self.hosts_E is None:
            return
        if len(self.hosts_E) != self.experts:
            raise ValueError(
                f"hosts_E has {len(self.hosts_E)} entries; it needs one for each of {self.experts} experts"
            )
        for expert, home in enumerate(self.hosts_E):
            if home != NO_HOST and (not 0 <= home[0] < self.ranks or home[1] < 0):
                raise ValueError(
                    f"expert {expert} has the host home {home}; it is a rank from 0 to {self.ranks - 1} and an offset"
                    " of 0 or more, or (-1, -1) for none"
                )

    def to_lists(self) -> list[list[int]]:
        """`slots_PS` for msgpack and JSON; `from_lists` takes it back."""
        return [list(row) for row in self.slots_PS]

    @classmethod
    def from_lists(
        cls, experts: int, rows: Sequence[Sequence[Any]], hosts: Sequence[Sequence[Any]] | None = None
    ) -> ExpertTable:
        """A table from `to_lists` (and `hosts_E` as lists); numpy's integers become plain ones. See `check`.

        Raises ValueError for what is not an integer.
        """
        slots_PS = tuple(_integers(f"rank {rank}, slot", row) for rank, row in enumerate(rows))
        if hosts is None:
            return cls(experts, slots_PS)
        hosts_E = []
        for expert, home in enumerate(hosts):
            if len(home) != 2:
                raise ValueError(f"expert {expert} has the host home {home!r}; it is a rank and an offset")
            rank, offset = _integers(f"expert {expert}'s host home, item", home)
            hosts_E.append((rank, offset))
        return cls(experts, slots_PS, tuple(hosts_E))

    def with_rows(self, rows: Iterable[Iterable[int]]) -> ExpertTable:
        """The same experts and host homes with other slots."""
        return replace(self, slots_PS=tuple(map(tuple, rows)))

    def without_rank(self, rank: int) -> ExpertTable:
        """Without that rank's row; the ranks above it get the number below. Experts may be missing, and host
        homes on the rank are gone."""
        assert 0 <= rank < self.ranks and self.ranks > 1, f"rank {rank} of {self.ranks}"
        hosts_E = self.hosts_E and tuple(
            NO_HOST if host == rank else (host - (host > rank), offset) for host, offset in self.hosts_E
        )
        return ExpertTable(self.experts, self.slots_PS[:rank] + self.slots_PS[rank + 1 :], hosts_E)

    def with_slots(self, slots: int) -> ExpertTable:
        """Every rank padded with empty slots to `slots`, which is not below what it has."""
        assert slots >= self.slots, f"{slots} slots for a table of {self.slots}"
        return self.with_rows(row + (EMPTY,) * (slots - len(row)) for row in self.slots_PS)

    @cached_property
    def _digest(self) -> int:
        text = f"{self.experts} {self.to_lists()} {self.hosts_E and [list(home) for home in self.hosts_E]}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def digest(self) -> int:
        """63 bits of a hash of the whole table, the same on every machine: equal tables, equal digests."""
        return self._digest


def _integers(where: str, values: Sequence[Any]) -> tuple[int, ...]:
    found = []
    for index, value in enumerate(values):
        try:
            found.append(operator.index(value))
        except TypeError:
            raise ValueError(f"{where} {index} is {value!r}; give an integer") from None
    return tuple(found)
