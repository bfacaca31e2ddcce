"""How fast a checkpoint's files are read when experts are fetched from them: several reads of an expert's size in
flight, past the page cache.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

READERS = 4
"""Reads in flight."""
SECONDS = 1.5
ALIGN = 4096
"""What reading past the page cache asks of offsets, lengths and memory."""


def disk_rate(files: Sequence[Path], expert_bytes: int) -> float:
    """Bytes per second. Raises ValueError when a file cannot be read."""
    size = max(ALIGN, expert_bytes // ALIGN * ALIGN)
    places = [(file, begin) for file in files for begin in range(0, max(1, file.stat().st_size - size + 1), size)]
    places = places[::2] + places[1::2]  # not in order: the system would read ahead
    read = [0] * READERS
    failures: list[OSError] = []
    end = time.perf_counter() + SECONDS

    def run(number: int) -> None:
        try:
            for turn in range(number, 2**62, READERS):
                if time.perf_counter() > end:
                    return
                read[number] += _read(*places[turn % len(places)], size)
        except OSError as error:
            failures.append(error)

    start = time.perf_counter()
    readers = [threading.Thread(target=run, args=(number,)) for number in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    if failures:
        raise ValueError(f"checkpoint: it cannot be read: {failures[0].strerror}; give --bandwidth")
    return sum(read) / (time.perf_counter() - start)


def _read(file: Path, begin: int, size: int) -> int:
    """Bytes of one read: direct where the file system can, else after telling it to forget the pages."""
    with mmap.mmap(-1, size) as room:
        try:
            handle = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:
            handle = os.open(file, os.O_RDONLY)
        try:
            return os.preadv(handle, [room], begin)
        except OSError:  # opened, and refused only now
            os.close(handle)
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, begin, size, os.POSIX_FADV_DONTNEED)
            return os.preadv(handle, [room], begin)
        finally:
            os.close(handle)
