"""Threads of the CPU kernels.

torch and numba share one pool of OpenMP threads (torch loads its OpenMP library for the whole process, and
numba's "omp" layer finds that one), and every kernel uses at most torch's number of threads. So there is one
number to set, and nothing is oversubscribed. `environment.ENVIRONMENT` has the variables to start such a process with.
"""

import torch
from numba import config, get_num_threads


def set_threads(n: int) -> None:
    """Use n threads in torch and in the kernels. ValueError if n is not in 1..the most numba was started with."""
    most = config.NUMBA_NUM_THREADS
    if not 1 <= n <= most:
        raise ValueError(
            f"threads: {n} is not in 1..{most}; numba takes its limit from the cores of this process, or from "
            "NUMBA_NUM_THREADS"
        )
    # numba sets OpenMP's number to its own limit when it starts its threads: after torch's, that would undo it.
    get_num_threads()
    torch.set_num_threads(n)
