"""Variables that a process which runs the CPU kernels should start with, and its cores. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = {
    # Workers waiting for work sleep instead of spinning: a spinning worker takes the core from the process that the
    # others wait for, or from the one worker that a barrier lacks. On busy cores that is half the time of a layer;
    # on idle ones sleeping costs about 8 us per parallel loop. Values in between (GOMP_SPINCOUNT) spin and then sleep,
    # and are the worst of both.
    "OMP_WAIT_POLICY": "passive",
    # numba would otherwise prefer TBB, where that is installed, which is a second pool.
    "NUMBA_THREADING_LAYER_PRIORITY": "omp tbb workqueue",
    # oneDNN keeps a compiled primitive for each shape that it has seen, at least a quarter of a megabyte each and up to
    # a thousand, and so does the layer by which PyTorch calls it. Experts see many numbers of rows; to compile one
    # again takes a millisecond.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "24",
    "LRU_CACHE_CAPACITY": "24",
    # PyTorch asks for huge pages for large tensors: weights are read from end to end in each step, and a processor
    # otherwise looks up an address for every 4 KiB of them.
    "THP_MEM_ALLOC_ENABLE": "1",
}


def usable_cores() -> int:
    """Cores that this process may run on, and that its container's share of CPU time keeps busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def quota_cores(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores' worth of time that a Linux control group (a container) gives; None where there is no such limit."""
    try:
        quota = file.read_text().split()
    except OSError:
        return None
    return int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else None
