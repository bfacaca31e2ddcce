"""Measures what a missing expert costs: reading it from disk, with one or several reads in flight.

Whole experts in random order, as misses come; single blocks at the same places, for the time that a read takes
whatever its size; and the files from start to end, as the most that the disk gives. A case is some milliseconds of
reading, and cases take turns, so that a slow spell meets all of them.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Barrier

from tqdm import tqdm

from ..scheduler.cost import LinkCost
from ..scheduler.fit import fit_link
from .expert_files import BLOCK, PIECE_BYTES, AlignedBuffer, ExpertFiles, advise

IN_FLIGHT = (1, 2, 4, 8)
CASE_S = 0.25
ROUNDS = 3

Samples = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class DiskCost:
    """`reads[n]`: the share of one expert's read in the time of many of which n are in flight. `samples` are
    [bytes, ns] of one read, for each n, and of a piece from start to end for 0.
    """

    reads: dict[int, LinkCost]
    sequential_fs_per_byte: int
    expert_bytes: int
    samples: dict[int, Samples]

    def time_ns(self, experts: int, in_flight: int) -> int:
        return experts * self.reads[in_flight].time_ns(self.expert_bytes)

    @property
    def best(self) -> int:
        """How many reads should be in flight: the fewest of those that read an expert soonest."""
        return min(self.reads, key=lambda n: (self.time_ns(1, n), n))


def measure_disk(
    files: ExpertFiles,
    *,
    in_flight: Sequence[int] = IN_FLIGHT,
    case_s: float = CASE_S,
    rounds: int = ROUNDS,
    progress: bool = False,
) -> DiskCost:
    """Times reads of `files`. Raises ExpertUnreadable, and OSError when a file is gone."""
    experts = [(layer, e) for layer, n in enumerate(files.num_experts_L) for e in range(n)]
    random.Random(0).shuffle(experts)
    expert_bytes = sum(e.nbytes for which in experts for e in files.extents(*which)) // len(experts)
    order = itertools.cycle(experts)  # goes on from case to case: what was just read may be in some cache
    flags = os.O_RDONLY | (os.O_DIRECT if files.direct else 0)
    samples: dict[int, Samples] = {n: [] for n in (0, *in_flight)}
    pieces = itertools.cycle([(f, begin) for f in files.files for begin in range(0, f.stat().st_size, PIECE_BYTES)])

    def read_expert(buffer: AlignedBuffer) -> int:
        for _ in files.steps(*next(order), buffer):
            pass
        return expert_bytes

    def read_block(buffer: AlignedBuffer) -> int:
        extent = files.extents(*next(order))[0]
        return read_at(extent.file, extent.first, buffer.room[:BLOCK])

    def read_on(buffer: AlignedBuffer) -> int:
        return read_at(*next(pieces), buffer.room[:PIECE_BYTES])

    def read_at(file: Path, begin: int, room: memoryview) -> int:
        count = os.preadv(handles[file], [room], begin)
        if not files.direct:
            advise(handles[file], "POSIX_FADV_DONTNEED", begin, len(room))
        return count

    size = max(files.buffer_bytes, PIECE_BYTES)
    handles: dict[Path, int] = {}
    files.drop_cached_pages()
    try:
        for file in files.files:
            handles[file] = os.open(file, flags)
            if not files.direct:
                advise(handles[file], "POSIX_FADV_RANDOM")
        bar = tqdm(total=rounds * len(in_flight), desc="measuring the disk", leave=False, disable=not progress or None)
        with bar:
            for _ in range(rounds):
                for n in in_flight:
                    samples[n] += [_timed(read, n, case_s, size) for read in (read_expert, read_block)]
                    bar.update()
                samples[0].append(_timed(read_on, 1, case_s, size))
    finally:
        for handle in handles.values():
            os.close(handle)
    return DiskCost(
        reads={n: fit_link([(nbytes, ns) for nbytes, ns in samples[n]]) for n in in_flight},
        sequential_fs_per_byte=round(median(10**6 * ns / nbytes for nbytes, ns in samples[0])),
        expert_bytes=expert_bytes,
        samples=samples,
    )


def _timed(read: Callable[[AlignedBuffer], int], in_flight: int, case_s: float, size: int) -> list[int]:
    """[bytes, ns] of one read, on average, when so many threads read for about `case_s`, each at least once."""
    start = [0]
    barrier = Barrier(in_flight, action=lambda: start.__setitem__(0, time.perf_counter_ns()))

    def work(buffer: AlignedBuffer) -> tuple[int, int]:
        buffer.data_B.fill_(1)  # so that its pages are there
        barrier.wait()
        nbytes = reads = 0
        while not reads or time.perf_counter_ns() - start[0] < case_s * 1e9:
            nbytes += read(buffer)
            reads += 1
        return nbytes, reads

    with ThreadPoolExecutor(in_flight) as pool:
        done = list(pool.map(work, [AlignedBuffer(size) for _ in range(in_flight)]))
    ns = time.perf_counter_ns() - start[0]
    reads = sum(r for _, r in done)
    return [round(sum(b for b, _ in done) / reads), max(round(ns / reads), 1)]
