"""Measures what a missing expert costs: reading it from disk, with one or several reads in flight. `moeyard profile`
does, and who needs it where there is no fresh file of constants.

Whole experts in random order, as misses come; single blocks at the same places, for the time that a read takes
whatever its size; and the files from start to end, as the most that the disk gives. A case is some milliseconds of
reading, and cases take turns, so that a slow spell meets all of them.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Barrier
from typing import Any

from tqdm import tqdm

from ..scheduler.fit import fit_link
from ..scheduler.offload_cost import DiskCost
from . import constants
from .constants import Record
from .expert_files import BLOCK, PIECE_BYTES, AlignedBuffer, ExpertFiles, advise

IN_FLIGHT = (1, 2, 4, 8)
CASE_S = 0.1
"""Of reading; each case reads at least one expert for each read in flight."""
ROUNDS = 3
_BUDGET_S = 10.0
"""No round of `disk_constants` begins after so long: on a slow disk the first may be all."""

Samples = list[list[int]]

log = logging.getLogger("moeyard.measure")

_unsaved: dict[Path, Record[DiskCost]] = {}
"""What was measured by this process and could not be written."""


# The file of constants


def disk_constants(files: ExpertFiles, *, force: bool = False, progress: bool = False) -> Record[DiskCost]:
    """What reading one of these experts takes, from the file or measured now; `force` does not look at the file.

    Raises what `measure_disk` does.
    """
    key = key_of(files)
    path = constants.path_of("disk", key)
    if force:
        constants.forget("disk", **key)
    elif (record := constants.load("disk", key) or _unsaved.get(path)) is not None:
        return record
    log.info("measuring how fast experts are read from %s; kept for the next starts", key["disk"])
    cost, samples = measure_disk(files, case_s=CASE_S, rounds=ROUNDS, budget_s=_BUDGET_S, progress=progress)
    made = constants.save("disk", key, cost, {str(n) if n else "sequential": rows for n, rows in samples.items()})
    if not path.exists():
        _unsaved[path] = made
    return made


def key_of(files: ExpertFiles) -> dict[str, Any]:
    """The machine and the disk, and what is read for an expert of the first layer."""
    reader = files.readers[0]
    extents = files.extents(0, 0)
    hidden, width = reader.matrix("down_proj")
    return {
        "cpu": constants.cpu_name(),
        "disk": " and ".join(sorted({disk_of(file) for file in files.files})),
        "direct": files.direct,
        "experts": reader.spec.num_experts,
        "hidden": hidden,
        "width": width,
        "expert_bytes": sum(extent.nbytes for extent in extents),
        "parts": len(extents),
    }


def disk_of(file: Path) -> str:
    """The file system that a file is on: its type, device and where it is mounted. Without Linux's table of mounts only
    the device's number.
    """
    path = file.resolve()
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return f"device {path.stat().st_dev}"
    found, name = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = Path(_unescaped(left.split()[4]))
        if path.is_relative_to(mount) and len(mount.parts) >= found:  # the last mount at a place hides the others
            kind, source, *_ = right.split()
            found, name = len(mount.parts), f"{kind} ({_unescaped(source)} at {mount})"
    return name or f"device {path.stat().st_dev}"


def _unescaped(text: str) -> str:
    """Of a field of the table of mounts, which has spaces and the like in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


# Measuring


def measure_disk(
    files: ExpertFiles,
    *,
    in_flight: Sequence[int] = IN_FLIGHT,
    case_s: float = CASE_S,
    rounds: int = ROUNDS,
    budget_s: float = float("inf"),
    progress: bool = False,
) -> tuple[DiskCost, dict[int, Samples]]:
    """Times reads of `files`: fewer rounds, but one, where they take more than `budget_s`. Raises ExpertUnreadable, and
    OSError when a file is gone.

    The samples are [bytes, ns] of one read, for each number in flight, and of a piece from start to end for 0.
    """
    experts = [(layer, e) for layer, n in enumerate(files.num_experts_L) for e in range(n)]
    random.Random(0).shuffle(experts)
    expert_bytes = sum(e.nbytes for which in experts for e in files.extents(*which)) // len(experts)
    order = itertools.cycle(experts)  # goes on from case to case: what was just read may be in some cache
    flags = os.O_RDONLY | (os.O_DIRECT if files.direct else 0)
    samples: dict[int, Samples] = {n: [] for n in (0, *in_flight)}
    pieces = itertools.cycle([(f, begin) for f in files.files for begin in range(0, f.stat().st_size, PIECE_BYTES)])

    def read_expert(buffer: AlignedBuffer) -> int:
        files.load(*next(order), buffer)
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
    began = time.perf_counter()
    try:
        for file in files.files:
            handles[file] = os.open(file, flags)
            if not files.direct:
                advise(handles[file], "POSIX_FADV_RANDOM")
        bar = tqdm(total=rounds * len(in_flight), desc="measuring the disk", leave=False, disable=not progress or None)
        with bar:
            for done in range(rounds):
                if done and time.perf_counter() - began > budget_s:
                    break
                for n in in_flight:
                    samples[n] += [_timed(read, n, case_s, size) for read in (read_expert, read_block)]
                    bar.update()
                samples[0].append(_timed(read_on, 1, case_s, size))
    finally:
        for handle in handles.values():
            os.close(handle)
    cost = DiskCost(
        reads={n: fit_link([(nbytes, ns) for nbytes, ns in samples[n]]) for n in in_flight},
        sequential_fs_per_byte=max(round(median(10**6 * ns / nbytes for nbytes, ns in samples[0])), 1),
        expert_bytes=expert_bytes,
    )
    return cost, samples


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
