"""Variables that a process which runs the CPU kernels should start with, and its cores. Imports nothing heavy."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # Workers waiting for work sleep instead of spinning. A spinning worker takes the core from the process that
    # the others wait for, or from the one worker a barrier lacks. Measured on 2 cores with two other busy
    # processes, a layer of 64 experts at 16 tokens: median 25 ms spinning, 12.5 ms sleeping; at one token 3.4-25 ms
    # against 2.2 ms. On idle cores sleeping costs about 8 us per parallel loop, of which a layer has two. Values
    # in between (GOMP_SPINCOUNT=1000 or 10000) cost 50-500 us per loop: they spin and then sleep.
    "OMP_WAIT_POLICY": "passive",
    # numba would otherwise prefer TBB, where that is installed, which is a second pool.
    "NUMBA_THREADING_LAYER_PRIORITY": "omp tbb workqueue",
}


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
