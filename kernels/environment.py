"""Variables that a process which runs the CPU kernels should start with, and its cores. Imports nothing heavy."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # Workers waiting for work sleep instead of spinning: a spinning worker takes the core from the process that the
    # others wait for, or from the one worker that a barrier lacks. On busy cores that is half the time of a layer;
    # on idle ones sleeping costs about 8 us per parallel loop. Values in between (GOMP_SPINCOUNT) spin and then sleep,
    # and are the worst of both.
    "OMP_WAIT_POLICY": "passive",
    # numba would otherwise prefer TBB, where that is installed, which is a second pool.
    "NUMBA_THREADING_LAYER_PRIORITY": "omp tbb workqueue",
}


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
