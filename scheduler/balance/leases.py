"""Guests that stay: experts that a plan moved to a rank are kept there for the next steps as long as that pays.

The middle way between a placement, which lasts minutes, and a transfer, which lasts one layer. Who stays is decided by
ski rental, who gives way to whom after Landlord (Young, 1998). Pure: the same calls give the same state on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Keep:
    """A guest is copied from one slot of its rank to another, where it stays. The same slot twice: it stays there."""

    rank: int
    layer: int
    expert: int
    from_slot: int
    to_slot: int


@dataclass(frozen=True, order=True)
class Evict:
    """A guest gives its slot back."""

    rank: int
    layer: int
    expert: int
    slot: int


Action = Keep | Evict


@dataclass
class _Lease:
    rank: int
    layer: int
    expert: int
    slot: int
    seen: int
    """The step in which its layer was recorded last."""
    saved_ns: int
    steps: int = 1
    """From its arrival to its last use, both included: `saved_ns` is of these."""
    idle: int = 0
    regret_ns: int = 0

    @property
    def rent_ns(self) -> int:
        """What its slot is worth in a step: what it has saved, over the steps until its last use, rounded up."""
        return -(-self.saved_ns // self.steps)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Who goes first: least credit, then least worth."""
        return -self.regret_ns, self.rent_ns, self.layer, self.expert


class Leases:
    """The guest slots of all ranks, of one whole expert each, which all layers share.

    In each layer, transient guests lie in slots 0, 1, ... of their rank. Kept ones lie at the top end. Transient
    ones come first: a slot serves each layer of a step, and a kept guest only one, so a plan may use every slot that
    no guest of its own layer has (`room`), and guests of other layers that are in the way leave (`make_room`). In
    return no guest is kept where transient ones of any layer were last time. A layer keeps at most all slots of a rank
    but one (or the only one): there its newcomers can come and show what they save.

    A guest's regret is what its slot has missed: in each idle step its rent (what it saved per step so far, so that
    one that is used in every third step pays a third of what it saves each time), and what each newcomer saved that
    found no slot because of it. A use pays back what it saved. A guest goes when its regret would exceed what a
    transfer costs: before a step is charged that would, so that its slot is free for this step's newcomers. For one
    guest and uses that save a transfer or more, this is ski rental: at most twice the cost of the best that could
    have been done in hindsight.

    The calls for a layer of a step: `held` and `room` for the Problem, `make_room` before weights move, `record`
    after the experts ran. The copies of `Keep` must be done before the next layer's guests arrive; within the actions
    of one call evictions come before copies, and no copy writes where a later one reads.

    Rank 1 gets expert 5, which saves more than a transfer costs, and keeps it through one idle step, not two:

    >>> leases = Leases(ranks=2, slots_per_rank=2, move_ns=100)
    >>> leases.make_room(0, [0, 1]), leases.record(0, {(1, 5): 120}, [(1, 5, 0)], step=1)
    ([], [Keep(rank=1, layer=0, expert=5, from_slot=0, to_slot=1)])
    >>> leases.held(0), leases.free(1)
    ([(1, 5, 1)], 1)
    >>> leases.record(0, {}, [], step=2), leases.record(0, {}, [], step=3)
    ([], [Evict(rank=1, layer=0, expert=5, slot=1)])

    Args:
        ranks: P.
        slots_per_rank: guest slots of one expert each.
        move_ns: what a transfer of one expert costs, modelled, in ns.
    """

    def __init__(self, ranks: int, slots_per_rank: int, move_ns: int) -> None:
        for name, value, least in (("ranks", ranks, 1), ("slots_per_rank", slots_per_rank, 0), ("move_ns", move_ns, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.ranks, self.slots_per_rank, self.move_ns = ranks, slots_per_rank, move_ns
        self._leases_P: list[dict[tuple[int, int], _Lease]] = [{} for _ in range(ranks)]  # by (layer, expert)
        self._wanted_P: list[dict[int, int]] = [{} for _ in range(ranks)]  # layer -> transient guests, last time

    def held(self, layer: int) -> list[tuple[int, int, int]]:
        """(rank, expert, slot) of the guests kept for a layer, in that order: holders beside the placement's."""
        return sorted((x.rank, x.expert, x.slot) for x in self._of(layer))

    def free(self, rank: int) -> int:
        """Slots from 0 up to the lowest kept guest: transient guests that fit there disturb nobody."""
        return min((x.slot for x in self._leases_P[rank].values()), default=self.slots_per_rank)

    def room(self, layer: int, rank: int) -> int:
        """Slots that a plan for this layer may use on the rank: all but those of guests kept for this layer."""
        return self.slots_per_rank - sum(x.layer == layer for x in self._leases_P[rank].values())

    def make_room(self, layer: int, wanted_P: Sequence[int]) -> list[Action]:
        """Clears slots 0 .. wanted-1 of each rank for the transient guests of a layer's plan (parts of experts count
        by the slots that they lie in). Guests of other layers leave, those with least credit first; the others move up.

        To be called for each plan, also one without guests: `record` keeps clear of what each layer wanted last.
        """
        assert len(wanted_P) == self.ranks, f"{len(wanted_P)} ranks of {self.ranks}"
        actions: list[Action] = []
        for rank, wanted in enumerate(map(int, wanted_P)):
            assert 0 <= wanted <= self.room(layer, rank), f"rank {rank}: {wanted} slots of {self.room(layer, rank)}"
            self._wanted_P[rank][layer] = wanted
            leases = self._leases_P[rank]
            too_many = max(0, len(leases) - (self.slots_per_rank - wanted))
            others = sorted((x for x in leases.values() if x.layer != layer), key=lambda x: x.order)
            for lease in others[:too_many]:
                actions.append(self._evict(lease))
                self._wanted_P[rank][lease.layer] = self._wanted_P[rank].get(lease.layer, 0) + 1  # it will come again
            low = sorted((x for x in leases.values() if x.slot < wanted), key=lambda x: x.slot)
            for lease, slot in zip(low, self._empty(rank), strict=False):  # there are enough from the top down
                actions.append(Keep(rank, lease.layer, lease.expert, lease.slot, slot))
                lease.slot = slot
        return sorted(actions, key=lambda action: isinstance(action, Keep))

    def record(
        self,
        layer: int,
        used: Mapping[tuple[int, int], int],
        arrived: Iterable[tuple[int, int, int]],
        step: int,
    ) -> list[Action]:
        """After a layer ran: which guests stay, which go.

        Args:
            used: (rank, expert) -> what computing there has saved, modelled, in ns; of kept and of new guests.
            arrived: (rank, expert, slot) of whole experts that came for this layer.
            step: rises from call to call of a layer; a guest pays rent for each step since the last one, so count
                the steps in which it could have been used.
        """
        actions: list[Action] = []
        newcomers_P: dict[int, list[tuple[int, int, int]]] = {}
        for rank, expert, slot in arrived:
            assert (layer, expert) not in self._leases_P[rank], f"rank {rank} has expert {expert} already"
            assert 0 <= slot < self.free(rank), f"rank {rank}: expert {expert} arrived in slot {slot}, which is kept"
            saved = min(used.get((rank, expert), 0), self.move_ns)
            if saved > 0:
                newcomers_P.setdefault(rank, []).append((-saved, expert, slot))
        for lease in sorted(self._of(layer), key=lambda x: (x.rank, x.expert)):
            if not self._charge(lease, min(used.get((lease.rank, lease.expert), 0), self.move_ns), step):
                actions.append(self._evict(lease))
        for rank in sorted(newcomers_P):
            actions += self._admit(layer, rank, sorted(newcomers_P[rank]), step)
        return sorted(actions, key=lambda action: isinstance(action, Keep))

    def drop_layer(self, layer: int) -> None:
        """Forgets a layer's guests: its table has changed."""
        for leases, wanted in zip(self._leases_P, self._wanted_P, strict=True):
            wanted.pop(layer, None)
            for key in [key for key in leases if key[0] == layer]:
                del leases[key]

    def drop_all(self) -> None:
        """Forgets all guests: all tables have changed, or a rank is lost."""
        for leases, wanted in zip(self._leases_P, self._wanted_P, strict=True):
            leases.clear()
            wanted.clear()

    def _of(self, layer: int) -> list[_Lease]:
        return [x for leases in self._leases_P for x in leases.values() if x.layer == layer]

    def _empty(self, rank: int) -> list[int]:
        """Slots without a kept guest, from the top down."""
        taken = {x.slot for x in self._leases_P[rank].values()}
        return [slot for slot in reversed(range(self.slots_per_rank)) if slot not in taken]

    def _evict(self, lease: _Lease) -> Evict:
        del self._leases_P[lease.rank][lease.layer, lease.expert]
        return Evict(lease.rank, lease.layer, lease.expert, lease.slot)

    def _charge(self, lease: _Lease, saved: int, step: int) -> bool:
        """The steps since its layer's last record; False if they cost more than a transfer."""
        passed = step - lease.seen
        assert passed > 0, f"step {step} of layer {lease.layer} comes after step {lease.seen}"
        lease.seen = step
        if saved > 0:
            lease.saved_ns += saved
            lease.steps += lease.idle + passed
            lease.idle = 0
            lease.regret_ns = max(0, lease.regret_ns - saved)
        else:
            lease.idle += passed
            lease.regret_ns += lease.rent_ns * passed
        return lease.regret_ns <= self.move_ns

    def _admit(self, layer: int, rank: int, newcomers: list[tuple[int, int, int]], step: int) -> list[Action]:
        """Keeps newcomers (-saved, expert, slot), those that save most first, where there is a place or a victim."""
        leases, wanted = self._leases_P[rank], self._wanted_P[rank]
        others_want = max((n for other, n in wanted.items() if other != layer), default=0)
        actions: list[Action] = []
        kept: list[_Lease] = []
        slots: list[int] = []
        for minus_saved, expert, slot in newcomers:
            # One that stays need not be moved next time: its layer will want one slot less.
            tide = max(others_want, wanted.get(layer, 0) - len(kept) - 1)
            own = [x for x in leases.values() if x.layer == layer]
            alone = len(own) + len(kept) >= max(1, self.slots_per_rank - 1)
            if alone or len(leases) + len(kept) >= self.slots_per_rank - tide:
                victim = min(own if alone else leases.values(), key=lambda x: x.order, default=None)
                if victim is None:
                    continue
                victim.regret_ns -= minus_saved
                if victim.regret_ns <= self.move_ns:
                    continue
                actions.append(self._evict(victim))
            kept.append(_Lease(rank, layer, expert, slot, step, -minus_saved))
            slots.append(slot)
        if kept:
            wanted[layer] = max(0, wanted.get(layer, 0) - len(kept))
        targets = self._empty(rank)[: len(kept)]
        rest = iter([slot for slot in targets if slot not in slots])  # what lies in a target stays there
        for lease in kept:
            lease.slot = lease.slot if lease.slot in targets else next(rest)
            leases[layer, lease.expert] = lease
        return actions + [Keep(rank, layer, x.expert, slot, x.slot) for x, slot in zip(kept, slots, strict=True)]
