"""Thread counts of PyTorch and of the compiled kernels, set together.

Both pools are OpenMP's or numba's own; a process that runs both must not let the idle one spin while the other works.
"""

from __future__ import annotations

import os

import torch

ENVIRONMENT = {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}
"""To be set before a process starts: idle OpenMP workers sleep at once, and do not take the cores from the other pool."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int | None) -> int:
    """Sets both pools to `count` threads (None: the usable cores); returns the count."""
    import numba

    count = count or usable_cores()
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    return count
