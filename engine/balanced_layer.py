"""Balances one layer of one step: a plan from the counts, the weights' way to where it wants them, tokens by it.

P: ranks, E: experts, T: tokens, K: experts per token, Q: places of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import numpy as np
import torch

from ..scheduler.assignment import nearest_homes
from ..scheduler.balance.plan import Plan, SharedMove, Transfer, chunks_needed
from ..scheduler.balance.problem import Integers, Problem
from ..scheduler.balance.shares import own_shares
from ..scheduler.table import ExpertTable
from .balance import Balancer, places
from .early_moves import EarlyMoves
from .experts import ExpertPool
from .guest_moves import GuestMoves, Newcomers, Numbers, Ways
from .guests import Cutter, Guest
from .lookup import Lookups
from .routing import Routing, by_shares, instead


@dataclass(frozen=True)
class BalancedWay:
    """Where one rank's tokens go by a plan; `whole_PE` and `part_PE` are the numbers of the experts there."""

    problem: Problem
    plan: Plan
    whole_PE: Integers
    part_PE: Integers | None
    position: int

    @property
    def chunks(self) -> int:
        return self.plan.chunks

    def route(self, ids_TK: torch.Tensor) -> Routing:
        shares_EQ = own_shares(self.problem, self.plan, self.position)
        return by_shares(ids_TK, shares_EQ, self.whole_PE.T, self.part_PE)


class BalancedLayer:
    """One layer's side: who holds which expert, guests included, what moves for the plan that runs, and where the
    tokens of steps without a plan go. `counts()` gives this rank's tokens for each expert since the start.
    """

    def __init__(
        self,
        balancer: Balancer,
        index: int,
        pool: ExpertPool,
        cutter: Cutter,
        lookups: Lookups,
        table: ExpertTable,
        counts: Callable[[], torch.Tensor],
    ) -> None:
        self.index = index
        self.pool = pool
        self.cutter = cutter
        self.counts = counts
        self._balancer = balancer
        self._lookups = lookups
        self._moves: GuestMoves | None = None
        self._made: tuple[Problem, Plan, Newcomers] | None = None
        self._early = EarlyMoves(balancer, self) if balancer.early else None
        self._newcomers: Newcomers | None = None  # of transfers that started before the counts were known
        self._late: tuple[Transfer, ...] = ()
        self._runs = 0
        self._wanted = False
        self.tokens_P: Sequence[int] = ()
        """Tokens of each rank whose shared experts a plan may move; to be given before each step's `make`."""
        self.table_PEQ: Integers | None = None
        """By which steps without a plan go, of ranks; None: to the nearest homes."""
        balancer.layers[index] = self
        self._set(table)
        self.update()

    def use(self, table: ExpertTable) -> None:
        """Goes over to another expert table, after the dispatchers did; on every rank before the same step."""
        self._set(table)
        self.table_PEQ = None
        self._balancer.drop_guests()
        self.update()

    def _set(self, table: ExpertTable) -> None:
        self._slot_PE, self.home_E = places(table)
        self.nearest_PE, self._nearest_slot_PE = nearest_homes(table)
        self._numbers = Numbers(table.slots, self._balancer.room.slots)

    def update(self) -> None:
        """Guests came, left or moved within their rooms."""
        here = self._balancer.group.position
        held = self._balancer.leases.held(self.index)
        self.number_PE = self._slot_PE.copy()
        """[P, E]: the number of each whole expert that a rank holds between steps, -1 for those that it does not."""
        for rank, expert, slot in held:
            self.number_PE[rank, expert] = self._numbers.whole(slot)
        self.holders_digest = crc32(self.number_PE.tobytes()) & 0x7FFFFFFF
        self._kept = [self._numbers.whole(slot) for rank, _, slot in held if rank == here]
        self.has_choice = bool(((self.number_PE >= 0).sum(0) > 1).any())
        """Whether any expert has several holders."""
        if self.table_PEQ is not None:
            self.publish(self.table_PEQ)

    # Steps that make no plan

    def publish(self, table_PEQ: Integers | None) -> None:
        """Lets steps without a plan go by a table of ranks [P, E, Q]; None: to the nearest homes."""
        self.table_PEQ = table_PEQ
        if table_PEQ is None:
            self._lookups.withdraw()
            return
        number_PEQ = self.number_PE[table_PEQ, np.arange(table_PEQ.shape[1])[:, None]]
        assert (number_PEQ >= 0).all(), f"layer {self.index}: a table sends tokens to a rank without their expert"
        self._lookups.publish(table_PEQ, number_PEQ)

    # Steps that make one

    @property
    def digest(self) -> int:
        """Of the last plan, of whatever layer."""
        return self._balancer.last_digest

    @property
    def open(self) -> bool:
        """Whether late weights are still on their way here."""
        return self._balancer.open

    def heard(self, anywhere: bool) -> None:
        """Whether they are on any rank: in an exchange, so that all hear it at the same place."""
        self._balancer.heard(anywhere)

    @property
    def gap_us(self) -> int:
        """How long weights that set out before the counts could travel, in the last step that planned this layer."""
        return self._early.gap_us if self._early is not None else 0

    def begin(self, tokens_P: Sequence[int]) -> None:
        """The layer before has ended, in a step of so many tokens: starts transfers, if any start before the counts."""
        if self._early is not None:
            assert self._newcomers is None, f"layer {self.index} did not run after its weights had set out"
            self.tokens_P = tokens_P if self.tokens_P else ()  # shared experts move in all of its steps, or in none
            plan = self._early.begin(tokens_P)
            if plan is not None:
                self._newcomers = self._start(self._early.problem, plan)
            self._early.travelling()

    def make(self, pairs_PE: torch.Tensor, gap_us: int) -> BalancedWay | None:
        """Plans for these counts and starts the weights' transfers, if none set out before; None when every expert
        stays at its home (where tokens of shared experts may move all the same). `gap_us` is the smallest of the ranks'
        gaps.
        """
        balancer, early = self._balancer, self._early
        if early is not None:
            early.counted()
        how = partial(early.plan, gap_us) if early is not None else None
        problem, plan = balancer.plan(self, pairs_PE.numpy().astype(np.int64), how)
        self._runs += 1
        newcomers, self._newcomers = self._newcomers, None
        if newcomers is None:
            newcomers = self._start(problem, plan)
        self._made = (problem, plan, newcomers)
        if plan.at_home and plan.chunks == 1:
            return None
        numbers = self._numbers.with_newcomers(self.number_PE, newcomers)
        return BalancedWay(problem, plan, *numbers, balancer.group.position)

    def _start(self, problem: Problem, plan: Plan) -> Newcomers:
        """Makes room for a plan's guests and starts their transfers."""
        balancer = self._balancer
        ranks, here = balancer.group.size, balancer.group.position
        newcomers = Newcomers.of(plan, ranks, len(self.home_E), self.cutter, balancer.room)
        wanted = any(newcomers.slots_P)
        if (wanted or self._wanted) and not balancer.late:
            balancer.make_room(self, newcomers.slots_P)
            self._wanted = wanted
        if plan.transfers:
            ways = Ways.of(problem, plan, self.cutter, here)
            self._moves = GuestMoves(
                balancer.group, self.cutter, balancer.room, self._numbers, ways, self._pack, balancer.patience
            )
        return newcomers

    @property
    def shared_moves(self) -> tuple[SharedMove, ...]:
        """Who computes shared experts for whom, by the plan of the step that runs."""
        return self._made[1].shared if self._made is not None else ()

    def _pack(self, t: Transfer) -> torch.Tensor | None:
        """What a transfer brings to another rank, if it is here already: from the pool, or of a guest that was kept."""
        number = int(self.number_PE[t.source, t.expert])
        if number < 0:
            return None
        if number < self._numbers.table_slots:
            return self.cutter.pack(number, t.part, t.parts)
        packed = self._packed(number)
        return packed if t.parts == 1 else self.cutter.cut(packed, t.part, t.parts)

    def _packed(self, number: int) -> torch.Tensor:
        return self._balancer.room.whole(self._numbers.slot(number), self.cutter.nbytes())

    # The experts that run

    @property
    def guests_expected(self) -> bool:
        """Whether rows that come may be for guests."""
        if self._moves is not None and self._moves.expected:
            return True
        return bool(self._kept) and (self._made is not None or self.table_PEQ is not None)

    def guests(self) -> dict[int, Guest]:
        """This rank's guests by number: those kept, and those that come, which are waited for as long as that pays.
        What others wait for is passed on.
        """
        guests = {number: self.cutter.unpack(self._packed(number)) for number in self._kept}
        if self._moves is not None:
            guests |= self._moves.guests()
        return guests

    @property
    def moving(self) -> bool:
        """Whether weights are on their way, from or to whatever rank."""
        return self._moves is not None

    def missed(self, routing: Routing | None) -> Routing | None:
        """What guests were to compute whose weights are late, at the nearest homes; None where all came in time. The
        number of an expert there is that of its slot, or `slots` more for those of its parts that `late_parts` gives.
        """
        if self._moves is None or not (late := self._moves.late()):
            return None
        self._late = tuple(self._moves.transfers[i] for i in late)
        self._balancer.is_late(self, self._moves, len(late))
        if routing is None:  # no token went by the plan
            return None
        here = self._balancer.group.position
        whole_PE = np.zeros_like(self.number_PE, dtype=bool)
        part_E = np.zeros(len(self.home_E), dtype=bool)
        for t in self._late:
            if t.parts == 1:
                whole_PE[t.destination, t.expert] = True
            else:
                part_E[t.expert] = True
        slot_E = self._nearest_slot_PE[here]
        return instead(routing, whole_PE, part_E, self.nearest_PE[here], slot_E, slot_E + self._numbers.table_slots)

    def chunks_for(self, rows_P: torch.Tensor) -> int:
        """In how many chunks the ranks have memory for so many rows that arrive."""
        assert self._made is not None
        return chunks_needed(self._made[0], rows_P.numpy())

    def late_parts(self) -> list[tuple[int, Guest]]:
        """The parts that came late anywhere, of experts that are here too, and the numbers of those experts."""
        slot_E = self._slot_PE[self._balancer.group.position]
        return [
            (int(slot_E[t.expert]) + self._numbers.table_slots, self._part(int(slot_E[t.expert]), t))
            for t in self._late
            if t.parts > 1 and slot_E[t.expert] >= 0
        ]

    def _part(self, slot: int, t: Transfer) -> Guest:
        return self.cutter.unpack(self.cutter.pack(slot, t.part, t.parts), t.part, t.parts)

    def finish(self) -> None:
        """The end of the layer: what left this rank is not needed any more; what came may stay."""
        if self._moves is not None and not self._late:
            self._moves.finish()
        self._moves = None
        if self._made is not None:
            problem, plan, newcomers = self._made
            # Late weights are still to come into the room: nothing else may lie there, and nobody stays in it.
            whole = () if self._late else newcomers.whole
            self._made, self._late = None, ()
            if whole or self._balancer.leases.held(self.index):
                self._balancer.record(self, problem, plan, whole, self._runs)
