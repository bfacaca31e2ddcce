"""Weights on their way to this rank, waited for with a bound: gloo's own bound ends all of its connections.

For each rank that some come from, a thread waits for them one after the other, which is how they come. On a GPU the
exchange is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .group import RankGroup

POLL_S = 20e-6
"""Between two questions."""


class Arrival:
    """One vector that comes. `at_ns` is when it was found to be here, by the monotonic clock; 0 before.

    `run` calls a function, and raises RankLost where that fails or the group is broken. A thread that waits calls
    `then` afterwards.
    """

    def __init__(
        self, group: RankGroup, run: Callable[[Callable[[], Any]], Any], work: Any, then: Callable[[], None]
    ) -> None:
        self._group = group
        self._run = run
        self._then = then
        self._work = work
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._begun_ns = time.monotonic_ns()
        self.at_ns = 0

    def came(self, until_ns: int) -> bool:
        """Whether it may be read, on a GPU by what is enqueued next; waits for that until then. Raises RankLost when
        it did not come within the group's time limit.
        """
        with self._group.progress.span("wait"):
            if self._group.device.type == "cuda":
                return self._asked(until_ns)
            if not self._ended.wait(max(0, until_ns - time.monotonic_ns()) / 1e9):
                return False
            self._run(self._raise)
            return True

    def watch(self) -> None:
        """For the thread."""
        try:
            self._work.wait()
            self.at_ns = time.monotonic_ns()
            self._then()
        except Exception as error:  # the main thread's to raise
            self._error = error
        self._ended.set()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _asked(self, until_ns: int) -> bool:
        limit_ns = self._begun_ns + int(self._group.timeout_s * 1e9)
        now = self._begun_ns  # when it came before the first question is not known
        while not self._run(self._work.is_completed):
            now = time.monotonic_ns()
            if now >= limit_ns:
                self._error = RuntimeError(f"weights did not come within {self._group.timeout_s:g} s")
                self._run(self._raise)
            if now >= until_ns:
                return False
            time.sleep(POLL_S)
        self._run(self._work.wait)
        self.at_ns = self.at_ns or now
        return True


class Watchers:
    """The threads of one group, each made when first needed."""

    def __init__(self) -> None:
        self._queues: dict[int, SimpleQueue[Arrival | None]] = {}
        self._threads: list[threading.Thread] = []

    def watch(self, position: int, arrival: Arrival) -> None:
        if position not in self._queues:
            queue = self._queues[position] = SimpleQueue()
            thread = threading.Thread(target=_watch, args=(queue,), name=f"weights from {position}", daemon=True)
            thread.start()
            self._threads.append(thread)
        self._queues[position].put(arrival)

    def close(self, timeout_s: float) -> bool:
        """Ends the threads that wait for nothing; whether all have ended in this time."""
        for queue in self._queues.values():
            queue.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


@torch.inference_mode()  # as the main thread, whose tensors could not be used otherwise
def _watch(queue: SimpleQueue[Arrival | None]) -> None:
    while (arrival := queue.get()) is not None:
        arrival.watch()
