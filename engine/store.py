"""The expert store: which of a rank's experts have a place in memory, and how the others get there from the checkpoint.

All layers share one set of places. A residency policy (`scheduler.residency`) decides which experts keep theirs; those
that are missing are read by a few threads into places that are free, run there, and make room for the next ones. An
admitted expert is read right into the place of the one that it drives out, so nothing is copied in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ..scheduler.residency.slots import Context, Place, Policy
from .config import format_size

READS_IN_FLIGHT = 4
"""Most reads at a time: each takes a place and a buffer from the budget."""
READ_TIMEOUT_S = 60.0
"""How long a layer may wait for one expert."""


class ExpertLate(RuntimeError):
    """The disk did not give an expert in time."""


class Source(Protocol):
    """Where experts that have no place are: a checkpoint, or a stand-in for tests. Called from several threads."""

    def read_into(self, layer: int, expert: int, place: int) -> int:
        """Writes an expert of MoE layer `layer` into a place; the bytes that were read for it.

        What it raises, `expert_files.ExpertUnreadable`, ends the visit; the place's contents are not used then.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StoreSize:
    """How a budget in bytes is shared out: `slots` places for experts that stay, `staging` for those that pass
    through, and what `readers` reads need beside their places, `scratch` each.
    """

    expert: int
    scratch: int
    slots: int
    staging: int
    readers: int

    @property
    def places(self) -> int:
        return self.slots + self.staging

    @property
    def reading(self) -> int:
        """Bytes that reads take beside the places."""
        return self.readers * self.scratch

    @property
    def nbytes(self) -> int:
        return self.places * self.expert + self.reading


def share_out(budget: int, expert: int, scratch: int) -> StoreSize:
    """The division of `budget` bytes: as many reads in flight as half of it allows, the rest for experts that stay.

    With n reads in flight n + 1 experts pass through: one is computed meanwhile. The least budget is one place and one
    read. Raises ValueError for less.
    """
    least = expert + scratch
    if budget < least:
        raise ValueError(
            f"expert_memory gives {format_size(budget)}, and one expert of {format_size(expert)} with"
            f" {format_size(scratch)} to read it through needs {format_size(least)}; set --expert-memory to as much"
        )
    for readers in range(READS_IN_FLIGHT, 0, -1):
        staging = readers + 1
        if 2 * (staging * expert + readers * scratch) <= budget:
            break
    else:
        readers = 1
        staging = 2 if 3 * expert + scratch <= budget else 1
    slots = (budget - readers * scratch) // expert - staging
    return StoreSize(expert=expert, scratch=scratch, slots=slots, staging=staging, readers=readers)


@dataclass(kw_only=True)
class StoreFigures:
    """Counts since the start, in experts and bytes; `resident_bytes` is now.

    `read_bytes` were read from the checkpoint, `admitted_bytes` are of the experts that were given a slot thereby.
    """

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    admitted_bytes: int = 0
    resident_bytes: int = 0


@dataclass(kw_only=True)
class _Read:
    """A read on its way to a place, which is given back after it unless the expert stays."""

    place: int
    stays: bool
    result: Future[int]


class Visit:
    """A layer's experts in the order in which they run: `experts`, and groups of their places as they become ready.

    Each group goes on in `experts` where the last one ended. Its places are the caller's until the next group is asked
    for.
    """

    def __init__(self, experts: Sequence[int], groups: Iterator[list[int]]) -> None:
        self.experts = experts
        self._groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        return self._groups


class ExpertStore:
    """Places of experts, decided by `policy`, filled from `source`. It starts empty.

    Not for several threads: the layers run one after the other. After a visit that failed, the next one works as if
    that had read nothing of what was on its way.
    """

    def __init__(self, size: StoreSize, policy: Policy, source: Source) -> None:
        assert policy.budget.slots <= size.slots and size.staging >= 1
        self.size = size
        self.figures = StoreFigures()
        self.step = -1
        self.most_used = 0
        """Most bytes that were in use at once: places with an expert in them or on the way, and reads."""
        self._policy = policy
        self._source = source
        self._slot: dict[Place, int] = {}
        self._ready: set[Place] = set()
        self._free = list(reversed(range(size.places)))
        self._reads: dict[int, _Read] = {}
        self._threads = ThreadPoolExecutor(size.readers, thread_name_prefix="moeyard-experts")

    @property
    def resident(self) -> frozenset[Place]:
        """Layers and experts that are in their slots."""
        return frozenset(self._ready)

    def begin_step(self) -> None:
        """A step of the engine: to the policy, all layers until the next one are of the same time."""
        self.step += 1

    def forget(self, policy: Policy) -> None:
        """Starts again: empty, with another policy, and all counts at 0."""
        self._settle()
        assert policy.budget == self._policy.budget
        self._policy, self.figures, self.step = policy, StoreFigures(), -1
        self._free += self._slot.values()
        self._free.sort(reverse=True)
        self._slot.clear()
        self._ready.clear()

    def visit(self, layer: int, experts: Iterable[int]) -> Visit:
        """One event: a layer needs these experts. Those that are here run first, then the others as they come.

        The groups raise what the source does, and ExpertLate.
        """
        self._settle()
        need = sorted(set(experts))
        decision = self._policy.step(layer, need, Context(step=self.step))
        for at in decision.evicted:
            self._free.append(self._slot.pop(at))
            self._ready.discard(at)
        for at in decision.admitted:
            assert at[0] == layer, "a policy that admits when a step is over needs experts that are still in memory"
            self._slot[at] = self._free.pop()
        here = [expert for expert in need if (layer, expert) in self._ready]
        gone = [expert for expert in need if (layer, expert) not in self._ready]
        gone.sort(key=lambda expert: ((layer, expert) not in self._slot, expert))  # those that stay first
        self.figures.hits += len(here)
        self.figures.misses += len(gone)
        self._account()
        return Visit((*here, *gone), self._groups(layer, here, gone))

    def close(self) -> bool:
        """Ends the threads; what has not started is not read. False if a read did not end in time."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        started = [read.result for read in self._reads.values() if not read.result.cancelled()]
        return not futures.wait(started, READ_TIMEOUT_S).not_done

    def _groups(self, layer: int, here: Sequence[int], gone: Sequence[int]) -> Iterator[list[int]]:
        waiting = deque(gone)
        reading: deque[tuple[int, _Read]] = deque()

        def start_reads() -> None:
            while waiting:
                slot = self._slot.get((layer, waiting[0]))
                if slot is None and not self._free:
                    break
                expert, place = waiting.popleft(), self._free.pop() if slot is None else slot
                result = self._threads.submit(self._source.read_into, layer, expert, place)
                self._reads[place] = read = _Read(place=place, stays=slot is not None, result=result)
                reading.append((expert, read))
            self._account()

        start_reads()
        if here:
            yield [self._slot[layer, expert] for expert in here]
        while reading:
            group = [reading.popleft()]
            while reading and reading[0][1].result.done():
                group.append(reading.popleft())
            for expert, read in group:
                self._arrive(layer, expert, read)
            yield [read.place for _, read in group]
            self._free += [read.place for _, read in group if not read.stays]
            for _, read in group:
                del self._reads[read.place]
            start_reads()

    def _arrive(self, layer: int, expert: int, read: _Read) -> None:
        """Waits for a read."""
        try:
            self.figures.read_bytes += read.result.result(READ_TIMEOUT_S)
        except futures.TimeoutError as error:
            raise ExpertLate(
                f"expert {expert} of MoE layer {layer} was not read within {READ_TIMEOUT_S:g} s"
            ) from error
        if read.stays:
            self._ready.add((layer, expert))
            self.figures.admitted_bytes += self.size.expert
            self._account()

    def _settle(self) -> None:
        """After a visit that was broken off: waits for its reads, which write into places, and takes these back."""
        if not self._reads:
            return
        started = [read.result for read in self._reads.values() if not read.result.cancel()]
        late = futures.wait(started, READ_TIMEOUT_S).not_done
        if late:
            raise ExpertLate(f"{len(late)} reads of experts did not end within {READ_TIMEOUT_S:g} s")
        self._free += [read.place for read in self._reads.values() if not read.stays]
        self._reads.clear()

    def _account(self) -> None:
        size = self.size
        self.figures.resident_bytes = len(self._ready) * size.expert
        passing = sum(not read.stays for read in self._reads.values())
        places = len(self._slot) + passing
        assert places + len(self._free) == size.places and len(self._slot) <= size.slots
        reads = min(size.readers, len(self._reads))
        self.most_used = max(self.most_used, places * size.expert + reads * size.scratch)
