"""The executor of expert tables: brings the weights from where they are to where a new table wants them.

The difference between two tables is a list of units (`scheduler.moves`). Behind each step the ranks carry out as many
as their bytes allow and go over to the table that results, all at the same step, so that requests are served meanwhile
and never by a slot that is being written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from ..scheduler.moves import Unit, apply, plan_moves
from ..scheduler.table import EMPTY, ExpertTable
from .experts import ExpertPool
from .group import RankGroup
from .own_experts import OwnExperts


class Mover:
    """Moves the experts of all layers. `tables` is where they are now, the same on every rank.

    Where a layer's `pools` are without weights (`OwnExperts`, then on every rank) nothing travels: whoever has an
    expert by the new table reads it when it is needed.
    """

    def __init__(
        self, pools: Sequence[ExpertPool | OwnExperts], tables: Sequence[ExpertTable], limit_bytes: int
    ) -> None:
        self.pools = list(pools)
        self.tables = list(tables)
        self.limit_bytes = limit_bytes
        self.moved_bytes = 0
        """Bytes that came into this rank's slots."""
        self._goals: list[ExpertTable] = []
        self._units: deque[tuple[int, Unit]] = deque()
        self._under_way = False

    @property
    def pending(self) -> bool:
        return self._under_way

    def aim(self, goals: Sequence[ExpertTable]) -> None:
        """Sets out for new tables, from wherever an earlier move is. Raises ValueError as `plan_moves` does."""
        units: deque[tuple[int, Unit]] = deque()
        for layer, (now, goal) in enumerate(zip(self.tables, goals, strict=True)):
            units.extend((layer, unit) for unit in plan_moves(now, goal))
        self._goals, self._units, self._under_way = list(goals), units, True

    def step(self, group: RankGroup, *, unlimited: bool = False) -> list[int]:
        """Carries out the next units, at least one, within the limit; the layers whose table is another now.

        Every rank calls it at the same step. Raises RankLost; the tables are then those of the last whole unit on this
        rank, and may differ from another's.
        """
        changed: dict[int, None] = {}
        left = self.limit_bytes
        with group.progress.span("move"):
            while self._units:
                layer, unit = self._units[0]
                pool = self.pools[layer]
                cost = 0 if isinstance(pool, OwnExperts) else _most_received(unit) * pool.reader.nbytes
                if changed and cost > left and not unlimited:
                    break
                left -= cost
                self._carry_out(layer, unit, group)
                self.tables[layer] = apply(self.tables[layer], unit)
                self._forget_stale(layer, group.position)
                changed[layer] = None
                self._units.popleft()
        if not self._units and self._under_way:
            for layer, goal in enumerate(self._goals):
                if self.tables[layer] != goal:
                    self.tables[layer] = goal
                    changed[layer] = None
                self._forget_stale(layer, group.position)
            self._under_way = False
        return list(changed)

    def _carry_out(self, layer: int, unit: Unit, group: RankGroup) -> None:
        pool, here = self.pools[layer], group.position
        if isinstance(pool, OwnExperts):
            for transfer in unit:
                if transfer.target[0] == here:
                    pool.fill(transfer.target[1], transfer.expert)
            return
        sends: list[tuple[int, torch.Tensor]] = []
        receives: list[tuple[int, torch.Tensor]] = []
        arriving: list[tuple[int, int, torch.Tensor | None]] = []
        for transfer in unit:
            target_rank, target_slot = transfer.target
            if transfer.source is None:
                if target_rank == here:
                    arriving.append((target_slot, transfer.expert, None))
                continue
            source_rank, source_slot = transfer.source
            if source_rank == here:
                packed = pool.pack(source_slot)
                if target_rank == here:
                    arriving.append((target_slot, transfer.expert, packed))
                else:
                    sends.append((target_rank, packed))
            elif target_rank == here:
                packed = pool.empty_pack()
                receives.append((source_rank, packed))
                arriving.append((target_slot, transfer.expert, packed))
        group.exchange_flat(sends, receives)
        for slot, expert, weights in arriving:
            if weights is None:
                pool.fill(slot, expert)
            else:
                pool.unpack(slot, weights, expert)
            self.moved_bytes += pool.reader.nbytes

    def _forget_stale(self, layer: int, position: int) -> None:
        pool = self.pools[layer]
        for slot, expert in enumerate(self.tables[layer].slots_PS[position]):
            if expert == EMPTY:
                pool.contents[slot] = EMPTY


def _most_received(unit: Unit) -> int:
    """How many experts the rank that receives most in a unit gets."""
    targets = [transfer.target[0] for transfer in unit]
    return max(targets.count(rank) for rank in targets)
