"""Moving experts between ranks on request: new tables from the planners, sent to all ranks, until these are done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from ..engine.messages import Place, Placed
from ..scheduler.placement import imbalance, incremental, keep_slots, linear, replicated, round_robin
from ..scheduler.table import ExpertTable
from .sequences import RequestError

PLACEMENT_TIMEOUT_S = 300.0
"""How long a request with `wait` waits for the ranks to say that all experts are in place."""
RETRY_S = 5
PLANNERS = ("linear", "round_robin", "replicated", "incremental")

log = logging.getLogger("moeyard.placement")

Loads = list[list[int]]


class Ranks(Protocol):
    """What is needed of an `EngineGroup`."""

    @property
    def members(self) -> tuple[int, ...]: ...
    @property
    def state(self) -> str: ...

    tables: list[Any] | None

    def broadcast(self, message: object) -> None: ...
    def wake(self) -> None: ...


def read_tables(rows: Any) -> tuple[ExpertTable, ...]:
    """Tables `[layer][rank][slot]` as messages carry them; in each the highest id is that of the last expert."""
    return tuple(
        ExpertTable.from_lists(1 + max((expert for row in layer for expert in row), default=-1), layer)
        for layer in rows or []
    )


def plan(
    old: ExpertTable, planner: str, loads_E: Sequence[int] | None = None, max_moves: int | None = None
) -> ExpertTable:
    """A table of the same shape from one of `PLANNERS`; what stays on a rank stays in its slot.

    Raises ValueError when the planner needs loads and there are none.
    """
    if planner in ("replicated", "incremental") and not any(loads_E or ()):
        raise ValueError(f"{planner} needs the experts' loads, and nothing was computed yet; send requests first")
    if planner == "linear":
        new = linear(old.experts, old.ranks, old.slots)
    elif planner == "round_robin":
        new = round_robin(old.experts, old.ranks, old.slots)
    elif planner == "replicated":
        assert loads_E is not None
        new = replicated(loads_E, old.ranks, old.slots)
    else:
        assert loads_E is not None and max_moves is not None
        return incremental(old, loads_E, max_moves)
    return keep_slots(new, old)


def changed_slots(old: Sequence[ExpertTable], new: Sequence[ExpertTable]) -> int:
    """Slots, over all layers and ranks, that must get another expert."""
    return sum(
        after not in (before, -1)
        for old_table, new_table in zip(old, new, strict=True)
        for old_row, new_row in zip(old_table.slots_PS, new_table.slots_PS, strict=True)
        for before, after in zip(old_row, new_row, strict=True)
    )


class Placements:
    """The tables that ranks have, and the placement that is under way, if any. One event loop owns it.

    `version` is that of the newest placement (0: the one that the ranks started with), `moved` the bytes that the last
    completed one moved, None before the first.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.version = 0
        self.moved: int | None = None
        self._ranks = ranks
        self._read: tuple[Any, tuple[ExpertTable, ...]] = (None, ())
        self._under_way: asyncio.Future[Placed] | None = None

    @property
    def moving(self) -> bool:
        return self._under_way is not None

    @property
    def tables(self) -> tuple[ExpertTable, ...]:
        """One for each MoE layer, by the last word of the ranks; none when they have not said."""
        if self._ranks.tables is not self._read[0]:
            self._read = self._ranks.tables, read_tables(self._ranks.tables)
        return self._read[1]

    @property
    def experts(self) -> list[int]:
        """How many each MoE layer has."""
        return [table.experts for table in self.tables]

    def new_tables(
        self,
        loads: Loads | None,
        *,
        planner: str | None = None,
        max_moves: int | None = None,
        layers: Sequence[int] | None = None,
        rows: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> tuple[ExpertTable, ...]:
        """The tables that a request asks for: from a planner for all or some `layers`, or `rows` as they are.

        Raises RequestError 400 with the field, 503 while there are no ranks to move experts between.
        """
        old = self._present()
        if rows is not None:
            return tuple(self._read_rows(old, rows))
        assert planner is not None
        wanted = range(len(old)) if layers is None else layers
        for place, layer in enumerate(wanted):
            if not 0 <= layer < len(old):
                message = f"layers[{place}] is {layer}; MoE layers go from 0 to {len(old) - 1}"
                raise RequestError(message, param="layers")
        new = list(old)
        for layer in wanted:
            try:
                new[layer] = plan(old[layer], planner, loads[layer] if loads else None, max_moves)
            except ValueError as error:
                raise RequestError(f"planner: layer {layer}: {error}", param="planner") from error
        return tuple(new)

    def begin(self, new: Sequence[ExpertTable]) -> tuple[int, int]:
        """Sends the tables to all ranks; the placement's version and how many slots change. An older one that is not
        done is given up."""
        changed = changed_slots(self._present(), new)
        self._give_up(RequestError("a newer placement took this one's place", status=409, code="placement_replaced"))
        self.version += 1
        self._under_way = asyncio.get_running_loop().create_future()
        self._ranks.broadcast(Place(version=self.version, tables=[table.to_lists() for table in new]))
        self._ranks.wake()
        return self.version, changed

    async def wait(self) -> None:
        """Until the ranks have placed the experts. Raises RequestError when they do not, or not in time."""
        if self._under_way is None:
            return
        try:
            await asyncio.wait_for(asyncio.shield(self._under_way), PLACEMENT_TIMEOUT_S)
        except TimeoutError:
            raise RequestError(
                f"the experts were not in place within {PLACEMENT_TIMEOUT_S:g} s; they still move: see GET"
                " /admin/placement",
                status=503,
                code="placement_timeout",
                retry_after=30,
            ) from None

    def take(self, message: Placed) -> None:
        if message.version == self.version and self._under_way is not None:
            self.moved = message.moved
            self._under_way.set_result(message)
            self._under_way = None
            log.info("placement %d is done: %d bytes moved", message.version, message.moved)

    def forget(self) -> None:
        """A rank was lost: the placement under way is not completed."""
        self._give_up(
            RequestError("a rank was lost meanwhile; ask again", status=503, code="recovering", retry_after=RETRY_S)
        )

    def describe(self, loads: Loads | None) -> dict[str, Any]:
        """For `GET /admin/placement`. An imbalance is the busiest rank's tokens over the mean rank's."""
        layers = [
            {
                "layer": layer,
                "experts": table.experts,
                "imbalance": imbalance(table, loads[layer]) if loads and any(loads[layer]) else None,
                "table": table.to_lists(),
            }
            for layer, table in enumerate(self.tables)
        ]
        return {
            "version": self.version,
            "moving": self.moving,
            "moved_bytes": self.moved,
            "ranks": list(self._ranks.members),
            "layers": layers,
        }

    def _present(self) -> tuple[ExpertTable, ...]:
        if self._ranks.state == "recovering":
            raise RequestError(
                "a rank was lost; the others take over", status=503, code="recovering", retry_after=RETRY_S
            )
        if len(self._ranks.members) < 2:
            raise RequestError("there is one rank, which has all experts: there is nothing to place")
        if not self.tables:
            raise RequestError("the model has no MoE layers: there is nothing to place")
        return self.tables

    def _read_rows(self, old: Sequence[ExpertTable], rows: Sequence[Sequence[Sequence[int]]]) -> list[ExpertTable]:
        if len(rows) != len(old):
            raise RequestError(f"tables has {len(rows)} layers; the model has {len(old)}", param="tables")
        tables = []
        for layer, (before, given) in enumerate(zip(old, rows, strict=True)):
            field = f"tables[{layer}]"
            if len(given) != before.ranks:
                raise RequestError(f"{field} has {len(given)} ranks; there are {before.ranks}", param=field)
            for rank, row in enumerate(given):
                if len(row) > before.slots:
                    message = f"{field}[{rank}] has {len(row)} experts; a rank has {before.slots} slots"
                    raise RequestError(message, param=f"{field}[{rank}]")
            padded = [[*row, *[-1] * (before.slots - len(row))] for row in given]
            table = ExpertTable.from_lists(before.experts, padded)
            try:
                table.check()
            except ValueError as error:
                raise RequestError(f"{field}: {error}", param=field) from error
            tables.append(table)
        return tables

    def _give_up(self, error: RequestError) -> None:
        future, self._under_way = self._under_way, None
        if future is not None:
            future.set_exception(error)
            future.exception()  # nobody may be waiting
