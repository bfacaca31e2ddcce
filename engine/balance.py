"""Balancing plans of one engine's layers, the same on every rank: what the planners are asked, and who stays a guest.

P: ranks, E: experts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..scheduler.balance.baselines import Planner
from ..scheduler.balance.leases import Action, Evict, Keep, Leases
from ..scheduler.balance.model import price
from ..scheduler.balance.patience import Patience
from ..scheduler.balance.plan import Plan, native
from ..scheduler.balance.problem import FS, PS, Integers, Problem, Rates
from ..scheduler.step_plan import StepPlan
from ..scheduler.table import ExpertTable
from .group import RankGroup
from .guest_moves import GuestMoves, Newcomers
from .guests import GuestRoom

if TYPE_CHECKING:
    from .balanced_layer import BalancedLayer
    from .decode_tables import DecodeTables

UNLIMITED_ROWS = 2**40
NO_RATES = Rates(0, 0, 0)


log = logging.getLogger("moeyard.balance")


@dataclass
class BalanceFigures:
    """Sums over planned layers, in nanoseconds by the model but for `plan_ns`, which is measured.

    `guest_hits` counts experts of planned layers that were computed by a guest kept from an earlier step, and `tables`
    those published for the steps that make no plans of their own. `early` counts the layers whose weights set out
    before their counts were known, `shared_rows` tokens whose shared experts another rank computed,
    `late` transfers that were not waited for.
    """

    layers: int = 0
    acted: int = 0
    plan_ns: int = 0
    native_ns: int = 0
    modelled_ns: int = 0
    ideal_ns: int = 0
    moved_bytes: int = 0
    transfers: int = 0
    parts: int = 0
    split_experts: int = 0
    refused: int = 0
    guest_hits: int = 0
    guests_kept: int = 0
    guests_evicted: int = 0
    tables: int = 0
    early: int = 0
    shared_rows: int = 0
    late: int = 0


def warm_up(planner: Planner) -> None:
    """Compiles a planner that is compiled at all, or loads it from the cache of an earlier start."""
    two = np.ones(2, dtype=np.int64)
    planner(
        Problem(
            rows_PE=np.array([[9, 0], [9, 0]]),
            holds_PE=np.eye(2, dtype=np.int64),
            home_E=np.arange(2),
            node_P=two * 0,
            expert_bytes=1,
            room_P=two,
            most_rows_P=two * UNLIMITED_ROWS,
            rates=Rates(1, 1, 1),
        )
    )


class Balancer:
    """Plans the layers of one engine. The same on every rank of the group: all hold the same counts and rates.

    With `keep`, guests stay for later steps where that pays; a planner that does not look at the room for guests
    cannot have any. With `early`, weights set out before a layer's router has spoken where that pays; the planner must
    move nothing where there is no room.
    """

    def __init__(
        self,
        group: RankGroup,
        planner: Planner,
        room: GuestRoom,
        *,
        node_P: Sequence[int],
        rates: Rates = NO_RATES,
        figures: BalanceFigures | None = None,
        keep: bool = True,
        early: bool = False,
    ) -> None:
        self.group = group
        self.early = early
        self.room = room
        self.figures = BalanceFigures() if figures is None else figures
        self.last_digest = 0
        """Of the last layer's plan and guests: it travels with the next exchange of counts."""
        self.layers: dict[int, BalancedLayer] = {}
        self.late: GuestMoves | None = None
        """Weights that came too late for their layer and may still be on their way, to whatever rank: until they have
        come everywhere no plan may move any, since they need their place in the room."""
        self.tables: DecodeTables | None = None
        """For the steps that make no plans of their own."""
        self._planner = planner
        self._keep = keep
        self._node_P = np.array(node_P, dtype=np.int64)
        self.most_rows_P: Integers = np.full(group.size, UNLIMITED_ROWS, dtype=np.int64)
        """Rows that each rank has the memory for at once; more are computed in chunks."""
        self.rates = rates

    @cached_property
    def patience(self) -> Patience:
        """Of this rank. At most half of the time limit, or others would give up on who waits."""
        return Patience(int(self.group.timeout_s * 1e9 / 2))

    @property
    def rates(self) -> Rates:
        """What work and moves cost; to be given, before the first step, when it has been measured."""
        return self._rates

    @rates.setter
    def rates(self, rates: Rates) -> None:
        self._rates = rates
        self._check_still()
        if self.tables is not None:
            self.tables.clear()
        move_ns = rates.near_alpha_ns - (-self.room.expert_bytes * rates.near_fs_per_byte // FS) if self._keep else 0
        self.leases = Leases(self.group.size, self.room.slots, move_ns)
        for layer in self.layers.values():
            layer.update()

    def begin(self, after: int, step: StepPlan) -> None:
        """A layer of a step has ended (-1: the step begins): the next one's weights may set out. On every rank."""
        if step.balanced and (layer := self.layers.get(after + 1)) is not None:
            with self.group.progress.span("plan"):
                layer.begin(step.tokens_P)

    def plan(
        self, layer: BalancedLayer, rows_PE: Integers, how: Callable[[Problem], Plan] | None = None
    ) -> tuple[Problem, Plan]:
        """The layer's plan for these counts [P, E]; `how` makes it, if not `make`."""
        started = time.perf_counter_ns()
        problem = self.problem(layer, rows_PE)
        plan = self.make(layer, problem) if how is None else how(problem)
        self.last_digest = plan.digest ^ layer.holders_digest
        self._count(problem, plan, time.perf_counter_ns() - started)
        return problem, plan

    def make(self, layer: BalancedLayer, problem: Problem) -> Plan:
        """What the planner says, if it can be carried out."""
        plan = self._planner(problem)
        if plan.transfers and (self.late or not self._possible(layer, plan)):
            if not self.late:
                self._say_refused()
            plan = native(problem)
        if not plan.modelled_ns and problem.rows_PE.any():  # a published planner does not look at times
            plan = replace(plan, modelled_ns=price(problem, plan), native_ns=price(problem, native(problem)))
        return plan

    def _say_refused(self) -> None:
        self.figures.refused += 1
        if self.figures.refused == 1:
            log.warning(
                "a plan asked for more guests than guest_memory has room for; such layers stay as they are. Give"
                " --guest-memory, or another --balance"
            )

    def trial(self, index: int, rows_PE: Integers) -> None:
        """A plan that nobody follows."""
        self._planner(self.problem(self.layers[index], rows_PE))

    def problem(self, layer: BalancedLayer, rows_PE: Integers) -> Problem:
        expert_bytes = layer.cutter.nbytes()
        rooms = [0 if self.late else self.leases.room(layer.index, p) for p in range(self.group.size)]
        return Problem(
            rows_PE=rows_PE,
            holds_PE=(layer.number_PE >= 0).astype(np.int64),
            home_E=layer.home_E,
            node_P=self._node_P,
            expert_bytes=expert_bytes,
            room_P=np.array(rooms) * expert_bytes,
            most_rows_P=self.most_rows_P,
            rates=self._rates,
            most_parts=layer.cutter.most_parts,
            tokens_P=np.array(layer.tokens_P, dtype=np.int64),
        )

    def _possible(self, layer: BalancedLayer, plan: Plan) -> bool:
        """Whether the rooms hold the plan's guests, and its parts are such that the experts can be cut into. What was
        published did not look at either.
        """
        newcomers = Newcomers.of(plan, self.group.size, len(layer.home_E), layer.cutter, self.room)
        fits = all(n <= self.leases.room(layer.index, p) for p, n in enumerate(newcomers.slots_P))
        return fits and all(t.parts <= layer.cutter.most_parts for t in plan.transfers)

    # Weights that are late

    def is_late(self, layer: BalancedLayer, moves: GuestMoves, transfers: int) -> None:
        """So many of a layer's were not waited for; on every rank."""
        assert self.late is None, "weights moved while late ones were on their way"
        self.late = moves
        if not self.figures.late:
            log.warning(
                "layer %d: %d of the weights that its plan moves are late; their experts' homes compute their rows, and"
                " no more move until they have come. /metrics counts them as moe_balance_late_transfers",
                layer.index,
                transfers,
            )
        self.figures.late += transfers

    @property
    def open(self) -> bool:
        """Whether late weights are still on their way here. Raises RankLost when they do not come at all."""
        return self.late is not None and self.late.open

    def heard(self, anywhere: bool) -> None:
        """Whether any rank still waits for late ones; all ranks heard the same."""
        if self.late is not None and not anywhere:
            self.late.finish()
            self.late = None

    # Guests that stay

    def make_room(self, layer: BalancedLayer, slots_P: Sequence[int]) -> None:
        """Guests of other steps leave so many slots of each rank's room to those that come now."""
        self._carry_out(self.leases.make_room(layer.index, slots_P))

    def record(
        self, layer: BalancedLayer, problem: Problem, plan: Plan, whole: Iterable[tuple[int, int, int]], run: int
    ) -> None:
        """After a layer ran by this plan, for the `run`-th time, which brought these (rank, expert, slot)."""
        whole = list(whole)
        rates = problem.rates
        present = [(rank, expert) for rank, expert, _ in self.leases.held(layer.index)]
        rows = {(p, e): int(plan.rows_EP[e, p]) for p, e in [*present, *((p, e) for p, e, _ in whole)]}
        # What the rows would have cost elsewhere, beside others of the expert, against another streaming of it.
        used = {key: max(0, n * max(rates.row_ps, rates.wire_ps) - rates.expert_ps) // PS for key, n in rows.items()}
        self.figures.guest_hits += sum(rows[key] > 0 for key in present)
        actions = self.leases.record(layer.index, used, whole, run)
        self.figures.guests_kept += sum(isinstance(action, Keep) for action in actions)
        self._carry_out(actions)

    def drop_guests(self) -> None:
        """An expert table changes: guests and tables are forgotten, in every layer."""
        self._check_still()
        if self.tables is not None:
            self.tables.clear()
        held = [layer for index, layer in self.layers.items() if self.leases.held(index)]
        self.leases.drop_all()
        for layer in held:
            layer.update()

    def _check_still(self) -> None:
        moving = [index for index, layer in self.layers.items() if layer.moving]
        assert not moving, f"weights are on their way to the guests of layers {moving}"

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Evict):
                self.figures.guests_evicted += 1
                if self.tables is not None:
                    self.tables.guest_left(action.layer, action.rank, action.expert)
            elif action.rank == self.group.position:
                self.room.copy(action.from_slot, action.to_slot)
        for index in sorted({action.layer for action in actions}):
            self.layers[index].update()

    def _count(self, problem: Problem, plan: Plan, ns: int) -> None:
        it = self.figures
        it.layers += 1
        it.plan_ns += ns
        it.native_ns += plan.native_ns
        it.modelled_ns += plan.modelled_ns
        it.ideal_ns += ideal_ns(problem)
        it.acted += not plan.is_native
        if plan.transfers or not plan.is_native:  # what came early may have been of no use
            it.moved_bytes += plan.moved_bytes(problem)
            it.transfers += len(plan.transfers)
            it.shared_rows += sum(move.tokens for move in plan.shared)
            it.parts += sum(t.parts > 1 for t in plan.transfers)
            it.split_experts += int(((plan.rows_EP > 0).sum(1) + (plan.sliced_E > 0) > 1).sum())


def ideal_ns(problem: Problem) -> int:
    """The layer's time if its rows, the experts' streaming and shared experts were spread evenly, and nothing moved."""
    rates, loads_E = problem.rates, problem.loads_E
    rows_ps = int(loads_E.sum()) * max(rates.row_ps, rates.wire_ps)
    streaming_ps = int((loads_E > 0).sum()) * rates.expert_ps
    work_ps = max(rows_ps, streaming_ps) + int(problem.tokens_P.sum()) * rates.shared_ps
    return rates.base_ns + work_ps // (problem.ranks * PS) if work_ps else 0


def places(table: ExpertTable) -> tuple[Integers, Integers]:
    """[P, E] slots (-1: not there) and [E] homes of a table."""
    slot_PE = np.full((table.ranks, table.experts), -1, dtype=np.int64)
    home_E = np.zeros(table.experts, dtype=np.int64)
    for expert in range(table.experts):
        homes = table.homes(expert)
        home_E[expert] = homes[0][0]
        for rank, slot in homes:
            slot_PE[rank, expert] = slot
    return slot_PE, home_E
