"""A world of ranks in processes of their own, for tests: each runs one function and sends back what it returns."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from typing import Any

BOUND_S = 120


def _main(function: Any, rank: int, size: int, address_of_store: Any, pipe: Any, args: tuple[Any, ...]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from moeyard.engine.group import RankGroup, make_store
    from moeyard.engine.progress import Progress

    torch.set_num_threads(1)
    try:
        store = None
        if rank == 0:
            store, address = make_store("127.0.0.1")
            for _ in range(size - 1):
                address_of_store.put(address)
        else:
            address = address_of_store.get(timeout=BOUND_S)
        group = RankGroup(
            epoch=1,
            members=range(size),
            rank=rank,
            address=address,
            device=torch.device("cpu"),
            timeout_s=60,
            progress=Progress(),
            store=store,
        )
        pipe.send(("ok", function(group, *args)))
        # The store's host stays until all are done with it.
        group.put("done", 1)
        if rank == 0:
            group.get_all("done", BOUND_S)
        group.close()
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        raise


def run_world(size: int, function: Any, *args: Any) -> list[Any]:
    """`function(group, *args)` on every rank of a gloo world; what each returned, in order of ranks.

    Raises AssertionError with the traceback of the first rank that failed.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["world_preload"])
    addresses = context.Queue()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_main, args=(function, rank, size, addresses, pipes[rank][1], args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results = []
    try:
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(BOUND_S), f"rank {rank} of {size} said nothing within {BOUND_S} s"
            state, value = receiver.recv()
            assert state == "ok", f"rank {rank} of {size}:\n{value}"
            results.append(value)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    return results
