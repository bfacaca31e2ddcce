"""The expert store: which of a rank's experts have a place in memory, and how the others get there.

All layers share one set of places. A residency policy (`scheduler.residency`) decides which experts keep theirs. Every
read goes to a free place; an admitted expert stays where it was read, and the place of the one that it drives out
becomes free, so nothing is copied in memory. What is left free is for experts that pass through, and for those that are
read ahead of the router's choice: these are the first to go when a place is needed. Slots that are empty after the
start are filled while the disk has nothing else to do.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..scheduler.residency.slots import Context, Place, Policy
from .readers import Priority
from .source import Source
from .store_size import StoreSize
from .wants import Outcome, Want

EARLY = 8
"""Experts that are read at a time into empty slots: enough that the disk need not wait for the next call of `tend`."""
READ_TIMEOUT_S = 60.0
"""How long a layer may wait for one expert."""


class ExpertLate(RuntimeError):
    """The disk did not give an expert in time."""


@dataclass(kw_only=True)
class StoreFigures:
    """Counts since the start, in experts and bytes; `resident_bytes` is now.

    `read_bytes` were read from the checkpoint, `admitted_bytes` are of the experts that were given a slot thereby. Of
    the misses, `ahead` had been asked for before the router chose, and `ahead_ready` of these were there by then.
    `ahead_bytes` were read ahead, `ahead_used_bytes` of them for experts that were then used. `preloaded` were given a
    slot that was empty before a router asked for them.
    """

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    admitted_bytes: int = 0
    resident_bytes: int = 0
    ahead: int = 0
    ahead_ready: int = 0
    ahead_bytes: int = 0
    ahead_used_bytes: int = 0
    preloaded: int = 0
    idle_layers: int = 0
    """Layers at whose beginning nothing was being read though there was room for more that is read ahead."""
    waited_ns: int = 0
    """Time in which layers waited for experts and computed nothing."""


@dataclass(kw_only=True, eq=False)
class _Held:
    """An expert that has a place: it is there, or `read` is under way. With `want` no router has asked for it yet."""

    at: Place
    place: int
    read: Future[Any] | None
    want: Want | None = None


Choose = Callable[[Sequence[int], Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
"""Of a layer's experts those that are here, those on their way, and those that are missing: which of the last are read,
in this order, and which are computed elsewhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """What a router has asked for last, in the order in which it comes: `waiting` have no place yet."""

    layer: int
    need: list[int]
    order: list[int]
    elsewhere: Sequence[int]
    waiting: deque[Place]


class Visit:
    """A layer's experts in the order in which they run: `experts`, and groups of their places as they become ready.

    Each group goes on in `experts` where the last one ended. Its places are the caller's until the next group is asked
    for. `elsewhere` are not among them: the caller said that they are computed somewhere else.
    """

    def __init__(self, experts: Sequence[int], groups: Iterator[list[int]], elsewhere: Sequence[int] = ()) -> None:
        self.experts = experts
        self.elsewhere = elsewhere
        self._groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        return self._groups


class ExpertStore:
    """Places of experts, decided by `policy`, filled from `source`. It starts empty.

    Not for several threads: the layers run one after the other. After a visit that failed, the next one works as if
    that had read nothing of what was on its way.
    """

    def __init__(self, size: StoreSize, policy: Policy, source: Source) -> None:
        assert policy.budget.slots <= size.slots
        self.size = size
        self.figures = StoreFigures()
        self.step = -1
        self.timeout_s = READ_TIMEOUT_S
        """How long a layer may wait for one expert."""
        self.most_used = 0
        """Most bytes that were in use at once: places with an expert in them or on the way, and reads' buffers."""
        self.heard: Callable[[Want, Outcome], None] = lambda want, outcome: None
        """Is told on whose word bytes were read ahead, and what became of them."""
        self._policy = policy
        self._source = source
        self._stays: set[Place] = set()
        """Whom the policy gives a slot, also when they are still on their way."""
        self._resident: set[Place] = set()
        self._held: dict[Place, _Held] = {}
        self._ahead: list[_Held] = []
        self._early: list[_Held] = []
        """On their way to slots that are empty, those given first before the others."""
        self._order: deque[Place] = deque()
        """Who comes after them."""
        self._wanted: deque[Want] = deque()
        """What there was no room to read ahead when it was asked for."""
        self._in_use: list[_Held] = []
        """Of the layer that runs."""
        self._asked: _Asked | None = None
        self._later: dict[Place, None] = {}
        """Who has a slot and was computed elsewhere, in order: they are read when no layer waits for reads."""
        self._behind: list[_Held] = []
        """Those of them whose reads have begun, as many as pass through at once."""
        self._leaving: list[_Held] = []
        """Nobody wants them any more, but their reads may still write to their places."""
        self._free = list(reversed(range(size.places)))

    @property
    def resident(self) -> frozenset[Place]:
        """Layers and experts that are in their slots."""
        return frozenset(self._resident)

    def here(self, layer: int) -> Any:
        """[E] whom the policy gives a slot: a view, for reading."""
        return self._policy.residents_of(layer)

    def has(self, layer: int, expert: int) -> bool:
        """Whether an expert has a place: it is there, or on its way."""
        return (layer, expert) in self._held

    def begin_step(self) -> None:
        """A step of the engine: to the policy, all layers until the next one are of the same time."""
        self.step += 1

    def forget(self, policy: Policy) -> None:
        """Starts again: empty, with another policy, and all counts at 0."""
        assert policy.budget == self._policy.budget
        for held in list(self._held.values()):
            self._drop(held)
        self._in_use.clear()
        self._later.clear()
        self._behind.clear()
        self._order.clear()
        while self._leaving:
            self._wait_for_a_place()
        self._policy, self.figures, self.step = policy, StoreFigures(), -1
        self._free.sort(reverse=True)
        self._stays.clear()

    def ask(self, layer: int, experts: Iterable[int], choose: Choose | None = None) -> None:
        """The router of a layer has chosen these experts: reads begin, for as many as there is room for now. `visit`
        follows, with the same; what is worked out in between costs no time while the disk is at work.

        With `choose` some of the missing ones are not waited for; those of them that the policy gives a slot are read
        when the layer has all others.
        """
        self._break_off()
        self._settle_behind()
        self._wanted.clear()
        need = sorted(set(experts))
        self.figures.idle_layers += len(self._ahead) < self.size.ahead and not any(map(_under_way, self._ahead))
        delays = [
            (held.want, self._source.in_the_way(held.read))
            for held in self._ahead
            if held.read is not None and not held.read.done()
        ]
        for held in [h for h in (*self._ahead, *self._early) if h.at[0] == layer]:
            if not _fine(held) or (held.at[1] not in need and held in self._ahead):
                self._drop(held)
            elif held.at[1] in need:
                self._claim(held)
        known = [expert for expert in need if (layer, expert) in self._held]
        self._in_use += [self._held[layer, expert] for expert in known]
        for held in [held for held in self._behind if held in self._in_use]:
            assert held.read is not None
            self._behind.remove(held)
            self._source.promote(held.read, Priority.DEMAND)
        missing: Sequence[int] = [expert for expert in need if expert not in known]
        elsewhere: Sequence[int] = ()
        if choose is not None:
            here = [expert for expert in known if self._held[layer, expert].read is None]
            missing, elsewhere = choose(here, [expert for expert in known if expert not in here], missing)
        waiting = deque((layer, expert) for expert in missing)
        if waiting or any(map(_under_way, self._in_use)):
            for want, delay in delays:
                if delay and want is not None and not (want.layer == layer and want.expert in need):
                    self.heard(want, Outcome(delay=delay))
        self._asked = _Asked(layer=layer, need=need, order=[*known, *missing], elsewhere=elsewhere, waiting=waiting)
        self._start(waiting)

    def visit(self, layer: int, experts: Iterable[int], scores_LE: Any = None) -> Visit:
        """One event: a layer needs these experts. Those that are here run first, then the others as they come.

        `scores_LE` are for a policy that goes by predicted use. The groups raise what the source does, and ExpertLate.
        """
        need = sorted(set(experts))
        if self._asked is None or (self._asked.layer, self._asked.need) != (layer, need):
            self.ask(layer, need)
        assert self._asked is not None
        asked, self._asked = self._asked, None
        decision = self._policy.step(layer, need, Context(step=self.step, scores_LE=scores_LE))
        self._stays.difference_update(decision.evicted)
        for at in decision.evicted:
            if at in self._held:
                self._drop(self._held[at])
        assert all(at[0] == layer for at in decision.admitted), "only who is in memory now can stay"
        self._stays.update(decision.admitted)
        for at in decision.admitted:
            if (held := self._held.get(at)) is not None and held.read is None:
                self._settle(at)
        self._later |= {(layer, expert): None for expert in asked.elsewhere if (layer, expert) in self._stays}
        while self._early and len(self._stays) + len(self._early) > self.size.slots:
            self._drop(self._early[-1])
        self._start(asked.waiting)
        reading = [expert for expert in need if expert not in asked.elsewhere]
        here = [e for e in reading if (held := self._held.get((layer, e))) is not None and held.read is None]
        gone = [expert for expert in asked.order if expert not in here]
        hits = len(set(decision.hits) & set(here))  # who was computed elsewhere may have a slot and not be there yet
        self.figures.hits += hits
        self.figures.misses += len(need) - hits
        return Visit((*here, *gone), self._groups(layer, here, gone, asked.waiting), asked.elsewhere)

    def fetch_ahead(self, wants: Iterable[Want]) -> None:
        """Reads experts before a router asks for them, those given first before the others, as many as there is room
        for; what has a smaller chance makes room. They wait for all that a router has asked for. What there is no
        room for now is read when the layer that runs gives up places, up to the next visit.
        """
        self._wanted.clear()
        for want in wants:
            at = want.layer, want.expert
            if (held := self._held.get(at)) is not None:
                if held in self._early:
                    assert held.read is not None
                    self._source.promote(held.read, want.priority)
                elif held.want is not None:
                    held.want = dataclasses.replace(want, ahead=max(want.ahead, held.want.ahead))
                    if held.read is not None:
                        self._source.promote(held.read, want.priority)
                continue
            if len(self._ahead) >= self.size.ahead:
                least = min(self._ahead, key=_chance, default=None)
                if least is None or _chance(least) >= want.chance:
                    self._wanted.append(want)
                    continue
                self._drop(least)
            if len(self._free) < 2:  # one is for those that a layer waits for
                self._reclaim()
            if len(self._free) > 1:
                self._ahead.append(self._read(at, want))
            else:
                self._wanted.append(want)
        self._account()

    def stream(self, wants: Iterable[Want]) -> None:
        """Begins to read these too, which no predictor named, as many as pass through at once, less one."""
        for want in wants:
            if len(self._free) < 2:
                self._reclaim()
            if len(self._free) < 2 or len(self._ahead) >= self.size.staging - 1:
                break
            if (want.layer, want.expert) not in self._held:
                self._ahead.append(self._read((want.layer, want.expert), want))
        self._account()

    def preload(self, order: Iterable[Place]) -> None:
        """Reads these into slots that are empty while nobody waits for the disk; `tend` does it."""
        self._order = deque(order)

    def tend(self) -> bool:
        """Goes on with preloading: between steps, and now and then while there are none. Whether there is more."""
        for held in [held for held in self._early if held.read is not None and held.read.done()]:
            if not _fine(held):
                self._order.clear()  # those who need it will say why
                self._drop(held)
            elif not self._policy.place(*held.at):
                self._drop(held)
            else:
                self._early.remove(held)
                held.want = None
                self._stays.add(held.at)
                self.figures.preloaded += 1
                self._arrived(held)
        while self._order and len(self._early) < EARLY:
            if len(self._stays) + len(self._early) >= self.size.slots or len(self._free) < 2:
                break
            if self._order[0] not in self._held:
                want = Want(layer=self._order[0][0], expert=self._order[0][1], chance=0.0, priority=Priority.BACKGROUND)
                self._early.append(self._read(self._order[0], want))
            self._order.popleft()
        if len(self._stays) >= self.size.slots:
            self._order.clear()
        self._account()
        return bool(self._order or self._early)

    def close(self) -> bool:
        """Ends reading; what has not started is not read. False if a read did not end in time."""
        try:
            self._source.close(READ_TIMEOUT_S)
        except TimeoutError:
            return False
        return True

    def _groups(
        self, layer: int, here: Sequence[int], gone: Sequence[int], waiting: deque[Place]
    ) -> Iterator[list[int]]:
        if here:
            group = [self._held[layer, expert] for expert in here]
            yield [held.place for held in group]
            self._release(group)
            self._start(waiting)
        coming = deque((layer, expert) for expert in gone)
        while coming:
            while coming[0] not in self._held:
                self._wait_for_a_place(coming[0])
                self._start(waiting)
            group = [self._arrive(coming.popleft())]
            while coming and (held := self._held.get(coming[0])) and held.read is not None and held.read.done():
                group.append(self._arrive(coming.popleft()))
            yield [held.place for held in group]
            self._release(group)
            self._start(waiting)
        self._read_behind()

    def _start(self, waiting: deque[Place]) -> None:
        """Begins reads that a layer waits for, as many as there are places."""
        while waiting:
            if not self._free:
                self._reclaim()
            if not self._free and self._early:
                self._drop(self._early[-1])
            if not self._free and self._ahead:
                self._drop(min(self._ahead, key=lambda held: (_runs(held), _chance(held))))
            if not self._free:
                break
            self._in_use.append(self._read(waiting.popleft()))
        while not waiting and self._wanted and len(self._ahead) < self.size.ahead and len(self._free) > 1:
            want = self._wanted.popleft()
            if (want.layer, want.expert) not in self._held:
                self._ahead.append(self._read((want.layer, want.expert), want))
        self._account()

    def _read_behind(self) -> None:
        """Begins to read those that were computed elsewhere and stay."""
        while self._later and self._free and len(self._behind) < self.size.staging:
            at = next(iter(self._later))
            del self._later[at]
            if at in self._stays and at not in self._held:
                self._behind.append(self._read(at, priority=Priority.BACKGROUND))
        self._account()

    def _settle_behind(self) -> None:
        """What became of those that were read behind the layers."""
        for held in list(self._behind):
            assert held.read is not None
            if held.read.done():
                self._behind.remove(held)
                if _fine(held):
                    self._arrived(held)
                else:
                    self._drop(held)

    def _read(self, at: Place, want: Want | None = None, priority: Priority = Priority.DEMAND) -> _Held:
        place = self._free.pop()
        if want is not None:
            priority = want.priority
        held = self._held[at] = _Held(at=at, place=place, read=self._source.fetch(*at, place, priority), want=want)
        return held

    def _claim(self, held: _Held) -> None:
        """A router asks for what was read ahead."""
        assert held.want is not None and held.read is not None
        if held in self._early:
            self._early.remove(held)
        else:
            nbytes = self._source.nbytes(*held.at)
            hidden = nbytes if held.read.done() else self._source.bytes_read(held.read)
            self.figures.ahead += 1
            self.figures.ahead_ready += held.read.done()
            self.figures.ahead_bytes += nbytes
            self.figures.ahead_used_bytes += nbytes
            self.heard(held.want, Outcome(nbytes=nbytes, used=True, hidden=hidden))
            self._ahead.remove(held)
        held.want = None
        if held.read.done():
            self._arrived(held)
        else:
            self._source.promote(held.read, Priority.DEMAND)

    def _arrive(self, at: Place) -> _Held:
        """Waits for an expert."""
        held = self._held[at]
        assert held.read is not None
        begun = time.monotonic_ns()
        try:
            held.read.result(self.timeout_s)
        except futures.TimeoutError as error:
            raise self._late(at) from error
        finally:
            self.figures.waited_ns += time.monotonic_ns() - begun
        self._arrived(held)
        return held

    def _arrived(self, held: _Held) -> None:
        held.read = None
        self.figures.read_bytes += self._source.nbytes(*held.at)
        if held.at in self._stays:
            self._settle(held.at)
        self._account()

    def _settle(self, at: Place) -> None:
        """It is there, and stays."""
        self._resident.add(at)
        self.figures.admitted_bytes += self.size.expert

    def _release(self, group: Sequence[_Held]) -> None:
        """A layer has computed them."""
        for held in group:
            self._in_use.remove(held)
            if held.at not in self._stays:
                self._drop(held)

    def _drop(self, held: _Held) -> None:
        """Nobody wants it any more."""
        del self._held[held.at]
        self._resident.discard(held.at)
        if held.read is not None and not held.read.done():
            self._source.abandon(held.read)
        if held in self._behind:
            self._behind.remove(held)
        if held in self._early:
            self._early.remove(held)
            assert held.read is not None
            if not held.read.cancelled():
                self.figures.read_bytes += self._source.nbytes(*held.at)
        elif held.want is not None:
            self._ahead.remove(held)
            assert held.read is not None
            if not held.read.cancelled():
                nbytes = self._source.nbytes(*held.at)
                self.figures.read_bytes += nbytes
                self.figures.ahead_bytes += nbytes
                self.heard(held.want, Outcome(nbytes=nbytes))
        if held.read is None or held.read.done():
            self._free.append(held.place)
        else:
            self._leaving.append(held)

    def _reclaim(self) -> None:
        """Places that nothing is written to any more."""
        still = []
        for held in self._leaving:
            assert held.read is not None
            if held.read.done():
                self._free.append(held.place)
            else:
                still.append(held)
        self._leaving = still

    def _wait_for_a_place(self, at: Place | None = None) -> None:
        """Until a read that was abandoned has ended, for the sake of an expert or of nobody."""
        begun = time.monotonic_ns()
        reads = [held.read for held in self._leaving if held.read is not None]
        if not futures.wait(reads, self.timeout_s, futures.FIRST_COMPLETED).done:
            raise self._late(at or self._leaving[0].at)
        self.figures.waited_ns += time.monotonic_ns() - begun
        self._reclaim()

    def _late(self, at: Place) -> ExpertLate:
        return ExpertLate(f"expert {at[1]} of MoE layer {at[0]} was not read within {self.timeout_s:g} s")

    def _break_off(self) -> None:
        """After a visit that did not come to its end: only what stays and is there remains."""
        self._asked = None
        for held in self._in_use:
            if held.read is not None or held.at not in self._stays:
                self._drop(held)
        self._in_use.clear()

    def _account(self) -> None:
        size = self.size
        self.figures.resident_bytes = len(self._resident) * size.expert
        used = len(self._held) + len(self._leaving)
        assert used + len(self._free) == size.places and len(self._stays) <= size.slots
        self.most_used = max(self.most_used, used * size.place + size.reading)


def _fine(held: _Held) -> bool:
    """Whether a read has not failed so far; one that was ahead and has failed is done again by those that need it."""
    return held.read is None or not held.read.done() or (not held.read.cancelled() and held.read.exception() is None)


def _under_way(held: _Held) -> bool:
    return held.read is not None and not held.read.done()


def _runs(held: _Held) -> bool:
    """Whether its place is not free at once when it is dropped."""
    return held.read is not None and held.read.running()


def _chance(held: _Held) -> float:
    assert held.want is not None
    return held.want.chance
