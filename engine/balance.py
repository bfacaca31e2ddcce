"""Balances one layer of one step: a plan from the counts, the weights' way to where it wants them, tokens by it.

P: ranks, E: experts, T: tokens, K: experts per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..scheduler.balance.baselines import Planner
from ..scheduler.balance.model import price
from ..scheduler.balance.plan import Plan, Transfer, native
from ..scheduler.balance.problem import PS, Integers, Problem, Rates
from ..scheduler.balance.shares import own_shares
from ..scheduler.table import ExpertTable
from .experts import ExpertPool
from .group import Pending, RankGroup
from .guests import Cutter, Guest, GuestRoom
from .routing import Routing, by_shares

UNLIMITED_ROWS = 2**40
NO_RATES = Rates(0, 0, 0)


@dataclass
class BalanceFigures:
    """Sums over planned layers, in nanoseconds by the model but for `plan_ns`, which is measured."""

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
    """Plans the layers of one engine. The same on every rank of the group: all hold the same counts and rates."""

    def __init__(
        self,
        group: RankGroup,
        planner: Planner,
        room: GuestRoom,
        *,
        node_P: Sequence[int],
        most_rows: int = UNLIMITED_ROWS,
        rates: Rates = NO_RATES,
        figures: BalanceFigures | None = None,
    ) -> None:
        self.group = group
        self.rates = rates
        """What work and moves cost; given when it has been measured."""
        self.room = room
        self.figures = BalanceFigures() if figures is None else figures
        self.last_digest = 0
        """Of the last layer's plan: it travels with the next exchange of counts."""
        self._planner = planner
        self._node_P = np.array(node_P, dtype=np.int64)
        self._most_rows_P = np.full(group.size, most_rows, dtype=np.int64)
        self._places: dict[ExpertTable, tuple[Integers, Integers]] = {}

    def plan(self, layer: BalancedLayer, rows_PE: Integers) -> tuple[Problem, Plan]:
        """The layer's plan for these counts [P, E]."""
        started = time.perf_counter_ns()
        problem = self.problem(layer.cutter, layer.table, rows_PE)
        plan = self._planner(problem)
        if not plan.modelled_ns and rows_PE.any():  # a published planner does not look at times
            plan = replace(plan, modelled_ns=price(problem, plan), native_ns=price(problem, native(problem)))
        self.last_digest = plan.digest
        self._count(problem, plan, time.perf_counter_ns() - started)
        return problem, plan

    def trial(self, cutter: Cutter, table: ExpertTable, rows_PE: Integers) -> None:
        """A plan that nobody follows."""
        self._planner(self.problem(cutter, table, rows_PE))

    def problem(self, cutter: Cutter, table: ExpertTable, rows_PE: Integers) -> Problem:
        slot_PE, home_E = self.places(table)
        return Problem(
            rows_PE=rows_PE,
            holds_PE=(slot_PE >= 0).astype(np.int64),
            home_E=home_E,
            node_P=self._node_P,
            expert_bytes=cutter.nbytes(),
            room_P=np.full(self.group.size, self.room.nbytes, dtype=np.int64),
            most_rows_P=self._most_rows_P,
            rates=self.rates,
        )

    def places(self, table: ExpertTable) -> tuple[Integers, Integers]:
        """[P, E] slots (-1: not there) and [E] homes of a table."""
        if table not in self._places:
            slot_PE = np.full((table.ranks, table.experts), -1, dtype=np.int64)
            home_E = np.zeros(table.experts, dtype=np.int64)
            for expert in range(table.experts):
                homes = table.homes(expert)
                home_E[expert] = homes[0][0]
                for rank, slot in homes:
                    slot_PE[rank, expert] = slot
            if len(self._places) > 256:
                self._places.pop(next(iter(self._places)))
            self._places[table] = (slot_PE, home_E)
        return self._places[table]

    def _count(self, problem: Problem, plan: Plan, ns: int) -> None:
        it = self.figures
        it.layers += 1
        it.plan_ns += ns
        it.native_ns += plan.native_ns
        it.modelled_ns += plan.modelled_ns
        it.ideal_ns += ideal_ns(problem)
        if not plan.is_native:
            it.acted += 1
            it.moved_bytes += plan.moved_bytes(problem)
            it.transfers += len(plan.transfers)
            it.parts += sum(t.parts > 1 for t in plan.transfers)
            it.split_experts += int(((plan.rows_EP > 0).sum(1) + (plan.sliced_E > 0) > 1).sum())


def ideal_ns(problem: Problem) -> int:
    """The layer's time if its rows and the experts' streaming were spread evenly, and nothing moved."""
    rates, loads_E = problem.rates, problem.loads_E
    rows_ps = int(loads_E.sum()) * max(rates.row_ps, rates.wire_ps)
    streaming_ps = int((loads_E > 0).sum()) * rates.expert_ps
    return rates.base_ns + max(rows_ps, streaming_ps) // (problem.ranks * PS) if rows_ps else 0


class BalancedLayer:
    """One layer's side: what moves for the plan that runs, and where its tokens go."""

    def __init__(self, balancer: Balancer, pool: ExpertPool, cutter: Cutter, table: ExpertTable) -> None:
        self.table = table
        self.cutter = cutter
        self.moves: GuestMoves | None = None
        """The weights of the plan that runs, where this rank has a part in their way."""
        self._balancer = balancer
        self._pool = pool

    @property
    def digest(self) -> int:
        """Of the last plan, of whatever layer."""
        return self._balancer.last_digest

    def make(self, pairs_PE: torch.Tensor) -> BalancedWay | None:
        """Plans for these counts and starts the weights' transfers; None when every expert stays at its home."""
        problem, plan = self._balancer.plan(self, pairs_PE.numpy().astype(np.int64))
        if plan.is_native and plan.chunks == 1:
            return None
        slot_PE, _ = self._balancer.places(self.table)
        here = self._balancer.group.position
        if mine := [t for t in plan.transfers if here in (t.source, t.destination)]:
            self.moves = GuestMoves(
                self._balancer.group, self._pool, self.cutter, self._balancer.room, mine, slot_PE[here]
            )
        return BalancedWay(problem, plan, slot_PE, self.table.slots, here)

    def finish(self) -> None:
        """The end of the layer: what left this rank is not needed any more."""
        if self.moves is not None:
            self.moves.finish()
            self.moves = None


@dataclass(frozen=True)
class BalancedWay:
    """Where one rank's tokens go by a plan. `slot_PE` are the slots of the table, of which each rank has `slots`."""

    problem: Problem
    plan: Plan
    slot_PE: Integers
    slots: int
    position: int

    @property
    def chunks(self) -> int:
        return self.plan.chunks

    def route(self, ids_TK: torch.Tensor) -> Routing:
        whole_PE, part_PE = guest_slots(self.plan, self.slot_PE, self.slots)
        shares_EQ = own_shares(self.problem, self.plan, self.position)
        return by_shares(ids_TK, shares_EQ, whole_PE.T, part_PE if self.plan.sliced_E.any() else None)


def guest_slots(plan: Plan, slot_PE: Integers, slots: int) -> tuple[Integers, Integers]:
    """[P, E] the slot of each whole expert, held or coming, and of each part that comes; -1 where there is none.

    Guests have the numbers after a rank's own `slots`, in the order in which they come.
    """
    whole_PE = slot_PE.copy()
    part_PE = np.full_like(slot_PE, -1)
    guests = [0] * slot_PE.shape[0]
    for t in plan.transfers:
        places = whole_PE if t.parts == 1 else part_PE
        places[t.destination, t.expert] = slots + guests[t.destination]
        guests[t.destination] += 1
    return whole_PE, part_PE


class GuestMoves:
    """The weights of one layer's plan on their way from and to this rank.

    Sent and received on exchanges of their own, in the plan's order, beside the tokens'. What this rank passes on
    leaves when it has come.
    """

    def __init__(
        self,
        group: RankGroup,
        pool: ExpertPool,
        cutter: Cutter,
        room: GuestRoom,
        transfers: Sequence[Transfer],
        slot_E: Integers,
    ) -> None:
        self._group = group
        self._cutter = cutter
        self._coming: list[tuple[Transfer, torch.Tensor, Pending]] = []
        self._relays: list[Transfer] = []
        self._leaving: list[tuple[torch.Tensor, Pending]] = []
        self._guests: list[Guest] | None = None
        room.clear()
        here = group.position
        for t in transfers:
            if t.destination == here:
                packed = room.take(cutter.nbytes(t.part, t.parts))
                self._coming.append((t, packed, group.receive_weights(t.source, packed)))
            elif slot_E[t.expert] >= 0:
                self._send(t, cutter.pack(int(slot_E[t.expert]), t.part, t.parts))
            else:
                self._relays.append(t)

    @property
    def expected(self) -> bool:
        """Whether any guest comes here."""
        return bool(self._coming)

    def guests(self) -> list[Guest]:
        """Waits for all that comes and passes on what others wait for; in order of arrival slots."""
        if self._guests is None:
            self._guests = []
            whole: dict[int, torch.Tensor] = {}
            for t, packed, pending in self._coming:
                pending.wait()
                if t.parts == 1:
                    whole[t.expert] = packed
                    for relay in [r for r in self._relays if r.expert == t.expert]:
                        self._pass_on(relay, packed)
                self._guests.append(self._cutter.unpack(packed, t.part, t.parts))
        return self._guests

    def finish(self) -> None:
        """The end of the layer: what left this rank is not needed any more."""
        self.guests()
        for _, pending in self._leaving:
            pending.wait()
        self._leaving.clear()

    def _pass_on(self, t: Transfer, packed: torch.Tensor) -> None:
        if t.parts > 1:
            packed = self._cutter.cut(packed, t.part, t.parts)
        self._send(t, packed)

    def _send(self, t: Transfer, packed: torch.Tensor) -> None:
        self._leaving.append((packed, self._group.send_weights(t.destination, packed)))
