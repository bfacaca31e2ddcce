"""A few threads that read experts from disk, the most urgent first."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from enum import IntEnum
from typing import Any, Protocol

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

    def pieces(self, layer: int, expert: int) -> Sequence[Any]:
        """What is read one by one, in this order and several at a time; there may be nothing to read."""
        ...

    def read_piece(self, layer: int, expert: int, piece: Any, buffer: AlignedBuffer) -> int:
        """Reads one of them, and gives its bytes."""
        ...

    def check(self, layer: int, expert: int) -> None:
        """Raises when what has been read is not to be used."""
        ...

    def copy(self, layer: int, expert: int, buffer: AlignedBuffer, into: Mapping[str, torch.Tensor]) -> None: ...


class ReadersFull(RuntimeError):
    """So many reads are waiting that one more prediction is not worth its place."""


class Read(Future[Mapping[str, torch.Tensor]]):
    """One expert being read into the tensors `into`, which are its result too. `cancel()` succeeds until it starts."""

    def __init__(
        self,
        layer: int,
        expert: int,
        into: Mapping[str, torch.Tensor],
        priority: Priority,
        number: int,
        own: AlignedBuffer | None = None,
    ):
        super().__init__()
        self.layer, self.expert, self.into, self.priority = layer, expert, into, priority
        self._number = number
        self._waits = True
        """There are pieces that no thread has taken, or it has not begun."""
        self._unwanted = False
        self._begun = False
        self.bytes_read = 0
        """While it goes on."""
        self._own = own
        self._buffer: AlignedBuffer | None = None  # from its first piece to its last
        self._pieces: deque[Any] = deque()
        """That no thread has taken."""
        self._threads = 0
        """At its pieces, or at its end."""
        self._failure: BaseException | None = None


class Readers:
    """`threads` pieces of reads in flight, and at most `depth` reads waiting; demand is let in always, those who wait
    for it bound it.

    All threads read pieces of the most urgent expert, and of the next one when none are left: a layer that waits for
    one expert gets all that the disk can give, and of two it can compute the first while the second is read. The disk
    is demand's while there is any: other reads go on when it has ended, and at most `behind` pieces of them at a time,
    so that few are in the way of the next.

    Every read goes through one of `buffers`, and all memory is theirs; or each comes with a buffer of its own, and
    there are no others. When a more urgent read waits and a buffer is free for it, one that has begun is set aside
    between two pieces and goes on later: buffers beyond one for each thread are for that.
    """

    def __init__(
        self, source: Source, buffers: Sequence[AlignedBuffer], *, threads: int, depth: int = 256, behind: int = 1
    ):
        if threads < 1 or (buffers and threads > len(buffers)):
            raise ValueError(f"threads is {threads}; expected at least 1, and a buffer for each (here {len(buffers)})")
        self._source = source
        self._free = list(buffers)
        self._depth = depth
        self._behind = behind
        self._running: set[Read] = set()
        """Reads that a thread is at."""
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Read]] = []
        self._unfinished: set[Read] = set()
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
        into: Mapping[str, torch.Tensor],
        priority: Priority = Priority.DEMAND,
        buffer: AlignedBuffer | None = None,
    ) -> Read:
        """Reads an expert into tensors as `ExpertFiles.copy` takes them. Nothing is written there if the read fails.
        With `buffer` it is read into that alone, of which `into` are views; where there are no others.

        Raises ReadersFull for what is not demand, and RuntimeError after `close`. The read itself raises what the
        source does, `ExpertUnreadable`.
        """
        pieces = self._source.pieces(layer, expert)
        with self._changed:
            if self._closed:
                raise RuntimeError("readers: closed")
            if priority != Priority.DEMAND and self._num_waiting() >= self._depth:
                raise ReadersFull(f"readers: {self._depth} reads are waiting")
            read = Read(layer, expert, into, priority, next(self._order), buffer)
            read._pieces.extend(pieces)
            self._unfinished.add(read)
            self._push(read)
        return read

    def promote(self, read: Read, priority: Priority = Priority.DEMAND) -> None:
        """Makes a read more urgent: a predicted expert that the router now asks for."""
        with self._changed:
            if priority < read.priority:
                read.priority = priority
                if read._waits and read in self._unfinished:
                    self._push(read)  # its old place in the queue is passed over

    def abandon(self, read: Read) -> None:
        """Ends a read that nobody wants any more: at once if it waits, else after the pieces that are being read. It is
        cancelled, or raises CancelledError.
        """
        with self._changed:
            read._unwanted = True
            if read.cancel() or read not in self._unfinished or not read._waits:
                return
            read._waits = False  # its place in the queue is passed over
            if read._threads:
                return
            self._unfinished.remove(read)  # set aside after it had begun
            self._give_back(read)
            self._changed.notify()
        read.set_exception(CancelledError("readers: abandoned"))

    def in_flight(self, read: Read) -> int:
        """How many threads are at it now."""
        return read._threads

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
            left = [read for read in self._unfinished if read._waits and not read._threads]
            self._unfinished.difference_update(left)
            self._waiting.clear()
            self._changed.notify_all()
        for read in left:
            if read.cancel():
                read.set_running_or_notify_cancel()
            else:  # set aside after it had begun
                read.set_exception(CancelledError("readers: closed while reading"))
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        if any(thread.is_alive() for thread in self._threads):
            with self._changed:
                stuck = ", ".join(f"expert {r.expert} of MoE layer {r.layer}" for r in self._unfinished)
            raise TimeoutError(f"readers: after {timeout_s:g} s the disk has not given {stuck or 'its last read'}")

    def _push(self, read: Read) -> None:
        """Into the queue, where it was submitted among the reads of its class."""
        heapq.heappush(self._waiting, (read.priority, read._number, read))
        self._changed.notify(max(len(read._pieces), 1))

    def _tidy(self) -> None:
        """Takes cancelled reads, and places that reads have left for better ones, from the head of the queue."""
        while self._waiting:
            priority, _, read = self._waiting[0]
            if read.cancelled():
                if read in self._unfinished:
                    self._unfinished.remove(read)
                    read.set_running_or_notify_cancel()
            elif read in self._unfinished and read._waits and read.priority == priority:
                return
            heapq.heappop(self._waiting)

    def _num_waiting(self) -> int:
        left = {r for _, _, r in self._waiting if r._waits and not r._threads and not r.cancelled()}
        return len(left & self._unfinished)

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            self._advance(*taken)

    def _next(self) -> tuple[Read, Any] | None:
        """A piece of the most urgent read that has a buffer or can have one, the oldest of them (None as its piece:
        there is nothing to read); None when there will be none.
        """
        with self._changed:
            while not self._closed:
                self._tidy()
                if not self._waiting or not self._may_go_on(self._waiting[0][2]):
                    self._changed.wait()
                    continue
                read = self._waiting[0][2]
                if not self._can_begin(read):
                    # There are more buffers than other threads: some are with reads that were set aside.
                    read = min(at for at in self._waiting if at[2]._buffer is not None and at[2]._waits)[2]
                if not read._begun:
                    if not read.set_running_or_notify_cancel():  # cancelled just now
                        self._unfinished.remove(read)
                        continue
                    read._begun = True
                    read._buffer = read._own or self._free.pop()
                piece = read._pieces.popleft() if read._pieces else None
                read._waits = bool(read._pieces)  # else its place in the queue is passed over
                read._threads += 1
                self._running.add(read)
                return read, piece
            return None

    def _can_begin(self, read: Read) -> bool:
        """Whether it has a buffer, or there is one."""
        return read._buffer is not None or read._own is not None or bool(self._free)

    def _give_back(self, read: Read) -> None:
        assert read._buffer is not None
        if read._own is None:
            self._free.append(read._buffer)
        read._buffer = None

    def _may_go_on(self, read: Read) -> bool:
        """Whether the disk is this read's now."""
        if read.priority == Priority.DEMAND:
            return True
        if any(other.priority == Priority.DEMAND for other in self._running):
            return False
        return sum(other._threads for other in self._running) < self._behind

    def _advance(self, read: Read, piece: Any) -> None:
        """Reads a piece, and ends the read when it was the last one."""
        assert read._buffer is not None
        nbytes, failure = 0, None
        try:
            if piece is not None:
                nbytes = self._source.read_piece(read.layer, read.expert, piece, read._buffer)
        except BaseException as error:  # for the one who waits for the read, whatever it is
            failure = error
        with self._changed:
            read.bytes_read += nbytes
            if failure is None and (self._closed or read._unwanted):
                failure = CancelledError("readers: closed while reading" if self._closed else "readers: abandoned")
            read._failure = read._failure or failure
            if read._failure is not None:
                read._waits = False
            if read._waits or read._threads > 1:
                read._threads -= 1
                if not read._threads:
                    self._running.remove(read)
                return  # this thread takes the next piece
        failure = read._failure
        if failure is None:
            try:
                self._source.check(read.layer, read.expert)
                if read._own is None:
                    self._source.copy(read.layer, read.expert, read._buffer, read.into)
            except BaseException as error:
                failure = error
        with self._changed:
            read._threads -= 1
            self._running.remove(read)
            self._unfinished.remove(read)
            self._give_back(read)
            self._changed.notify(self._behind)  # others may go on
        if failure is None:
            read.set_result(read.into)
        else:
            read.set_exception(failure)
