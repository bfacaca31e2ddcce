"""A few threads that read experts from disk, the most urgent first."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future
from enum import IntEnum
from typing import Protocol

import torch

from .expert_files import AlignedBuffer

CLOSE_S = 30.0
"""Longest wait of `close` for the reads under way."""


class Priority(IntEnum):
    """Why an expert is read; lower ones go first. The classes of ProMoE's and FineMoE's copy queues, for reads."""

    DEMAND = 0
    """The router has asked for it: a layer waits."""
    NEXT_LAYER = 1
    LATER = 2
    """Predicted, for the layer after this one or one further on."""
    BACKGROUND = 3
    """Nobody waits: what is to become resident."""


class Source(Protocol):
    """What readers read from: `ExpertFiles`, or a fake."""

    def steps(self, layer: int, expert: int, buffer: AlignedBuffer) -> Iterator[None]: ...

    def tensors(self, layer: int, expert: int, buffer: AlignedBuffer) -> dict[str, torch.Tensor]: ...

    def copy(self, layer: int, expert: int, buffer: AlignedBuffer, into: Mapping[str, torch.Tensor]) -> None: ...


class ReadersFull(RuntimeError):
    """So many reads are waiting that one more prediction is not worth its place."""


class Read(Future[Mapping[str, torch.Tensor]]):
    """One expert being read. Its result is the expert's tensors: those to copy into, or views of the buffer.

    `cancel()` succeeds until the read starts. The buffer is the read's own until `done()`.
    """

    def __init__(self, layer: int, expert: int, priority: Priority):
        super().__init__()
        self.layer, self.expert, self.priority = layer, expert, priority
        self._place = 0
        self._waits = True
        self._steps: Iterator[None] | None = None


class Readers:
    """`threads` reads in flight, and at most `depth` waiting; demand is let in always, its callers' buffers bound it.

    A read that has started is set aside between two pieces when a more urgent one waits, and goes on after it.
    """

    def __init__(self, source: Source, *, threads: int, depth: int = 256):
        if threads < 1:
            raise ValueError(f"threads is {threads}; at least 1 must read")
        self._source = source
        self._depth = depth
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Read]] = []
        self._buffers: dict[Read, tuple[AlignedBuffer, Mapping[str, torch.Tensor] | None]] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"moeyard-reader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        layer: int,
        expert: int,
        buffer: AlignedBuffer,
        priority: Priority = Priority.DEMAND,
        *,
        into: Mapping[str, torch.Tensor] | None = None,
    ) -> Read:
        """Reads an expert into `buffer` and, if given, copies it on into the tensors `into` (see `ExpertFiles.copy`),
        after which the buffer is free again. Nothing is written there if the read fails.

        Raises ReadersFull for what is not demand, and RuntimeError after `close`. The read itself raises what the
        source does, `ExpertUnreadable`.
        """
        read = Read(layer, expert, priority)
        with self._changed:
            if self._closed:
                raise RuntimeError("readers: closed")
            if priority != Priority.DEMAND and self._num_waiting() >= self._depth:
                raise ReadersFull(f"readers: {self._depth} reads are waiting")
            self._buffers[read] = (buffer, into)
            read._place = next(self._order)
            self._push(read)
        return read

    def promote(self, read: Read, priority: Priority = Priority.DEMAND) -> None:
        """Makes a read more urgent: a predicted expert that the router now asks for."""
        with self._changed:
            if priority < read.priority:
                read.priority = priority
                if read._waits and read in self._buffers:
                    self._push(read)  # its old place in the queue is passed over

    @property
    def waiting(self) -> int:
        """Reads that no thread is at."""
        with self._changed:
            return self._num_waiting()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Cancels what waits and ends the threads after the piece that each is reading.

        Raises TimeoutError naming the experts whose reads have not ended by then; their threads do not keep the
        process alive.
        """
        with self._changed:
            self._closed = True
            left = [read for read in self._buffers if read._waits]
            for read in left:
                del self._buffers[read]
            self._waiting.clear()
            self._changed.notify_all()
        for read in left:
            if read.cancel():
                read.set_running_or_notify_cancel()
            else:  # set aside after it had started
                read.set_exception(CancelledError("readers: closed while reading"))
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        if any(thread.is_alive() for thread in self._threads):
            with self._changed:
                stuck = ", ".join(f"expert {r.expert} of MoE layer {r.layer}" for r in self._buffers)
            raise TimeoutError(f"readers: after {timeout_s:g} s the disk has not given {stuck or 'its last read'}")

    def _push(self, read: Read) -> None:
        """Into the queue, at the place among its class that it was given when it was submitted."""
        read._waits = True
        heapq.heappush(self._waiting, (read.priority, read._place, read))
        self._changed.notify()

    def _tidy(self) -> None:
        """Takes cancelled reads, and places that reads have left for better ones, from the head of the queue."""
        while self._waiting:
            priority, _, read = self._waiting[0]
            if read.cancelled():
                if self._buffers.pop(read, None) is not None:
                    read.set_running_or_notify_cancel()
            elif read._waits and read.priority == priority:
                return
            heapq.heappop(self._waiting)

    def _num_waiting(self) -> int:
        return len({r for _, _, r in self._waiting if r._waits and not r.cancelled()})

    def _work(self) -> None:
        while (read := self._next()) is not None:
            self._advance(read)

    def _next(self) -> Read | None:
        """The most urgent read, the oldest of them; None when there will be no more."""
        with self._changed:
            while not self._closed:
                self._tidy()
                if not self._waiting:
                    self._changed.wait()
                    continue
                read = heapq.heappop(self._waiting)[2]
                if read._steps is None and not read.set_running_or_notify_cancel():
                    del self._buffers[read]  # cancelled just now
                    continue
                read._waits = False
                return read
            return None

    def _advance(self, read: Read) -> None:
        """Reads until the read has ended or is set aside."""
        buffer, into = self._buffers[read]
        result: Mapping[str, torch.Tensor] | None = None
        failure: BaseException | None = None
        try:
            if read._steps is None:
                read._steps = self._source.steps(read.layer, read.expert, buffer)
            for _ in read._steps:
                if self._set_aside(read):
                    return
            if into is None:
                result = self._source.tensors(read.layer, read.expert, buffer)
            else:
                self._source.copy(read.layer, read.expert, buffer, into)
                result = into
        except BaseException as error:  # for the one who waits for the read, whatever it is
            failure = error
        with self._changed:
            del self._buffers[read]
        if result is not None:
            read.set_result(result)
        else:
            read.set_exception(failure)

    def _set_aside(self, read: Read) -> bool:
        """After each piece: whether this thread has something better to do."""
        with self._changed:
            if self._closed:
                raise CancelledError("readers: closed while reading")
            self._tidy()
            if not self._waiting or self._waiting[0][0] >= read.priority:
                return False
            self._push(read)
            return True
