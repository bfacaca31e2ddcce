"""A world of ranks in processes of their own, for tests: each runs one function and sends back what it returns."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import os
import sys
import traceback
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

BOUND_S = 120


def _make_tests_importable() -> None:
    """Functions of test modules come by name, as `tests.test_x.function`; the repository itself is not on the path."""
    if "tests" not in sys.modules:
        tests = types.ModuleType("tests")
        tests.__path__ = [str(Path(__file__).parent)]
        sys.modules["tests"] = tests


def _main(
    rank: int, size: int, device: str, leavers: Collection[int], addresses: Any, commands: Any, results: Any
) -> None:
    _make_tests_importable()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from moeyard.engine.group import RankGroup, make_store
    from moeyard.engine.progress import Progress

    torch.set_num_threads(1)
    here = torch.device(device) if device == "cpu" else torch.device(device, rank)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    try:
        store = None
        if rank == 0:
            store, address = make_store("127.0.0.1")
            for _ in range(size - 1):
                addresses.put(address)
        else:
            address = addresses.get(timeout=BOUND_S)
        epoch = 1
        while (command := commands.recv()) is not None:
            function, args = command
            group = RankGroup(
                epoch=epoch,
                members=range(size),
                rank=rank,
                address=address,
                device=here,
                timeout_s=60,
                progress=Progress(),
                store=store,
            )
            epoch += 1000  # a function may form groups of its own
            store = group._store
            results.send(("ok", function(group, *args)))
            group.close()
        # The store's host stays until all are done with it.
        if store is not None:
            store.set(f"done/{rank}", "")
            if rank == 0:
                names = [f"done/{other}" for other in range(size) if other not in leavers]
                store.wait(names, datetime.timedelta(seconds=BOUND_S))
    except BaseException:
        results.send(("error", traceback.format_exc()))
        raise


def next_group(group: Any, members: Sequence[int] | None = None) -> Any:
    """The group of the next epoch, of these members or of the same ones; each of them calls it. The old one closes."""
    from moeyard.engine.group import RankGroup

    group.close()
    return RankGroup(
        epoch=group.epoch + 1,
        members=group.members if members is None else members,
        rank=group.rank,
        address="",
        device=group.device,
        timeout_s=group.timeout_s,
        progress=group.progress,
        store=group._store,
    )


class World:
    """Ranks that wait for functions to run: starting one takes seconds, so that tests share them.

    They talk over gloo; with `device` cuda over NCCL, each on the device of its number. `leavers` are ranks that end
    their process. After a failure the next `run` starts anew.
    """

    def __init__(self, size: int, *, device: str = "cpu", leavers: Collection[int] = ()) -> None:
        self.size = size
        self._device, self._leavers = device, leavers
        self._processes: list[Any] = []
        self._commands: list[Any] = []
        self._results: list[Any] = []
        self._addresses: Any = None  # kept, or it is gone before the ranks open it

    def run(self, function: Any, *args: Any) -> list[Any]:
        """`function(group, *args)` on every rank, each time in a new group; what each returned, in order of ranks.

        None stands for what leavers return. Raises AssertionError with the traceback of the first rank that failed.
        """
        if not self._processes:
            self._start()
        values: list[Any] = []
        try:
            for commands in self._commands:
                commands.send((function, args))
            for rank, results in enumerate(self._results):
                if rank in self._leavers:
                    values.append(None)
                    continue
                assert results.poll(BOUND_S), f"rank {rank} of {self.size} said nothing within {BOUND_S} s"
                try:
                    state, value = results.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} of {self.size} ended without a word") from None
                assert state == "ok", f"rank {rank} of {self.size}:\n{value}{self._others_said(rank)}"
                values.append(value)
        except BaseException:
            self.close(at_once=True)
            raise
        return values

    def _others_said(self, failed: int) -> str:
        """The errors of the ranks after one that failed: it may only be the first to notice another's."""
        texts = []
        for rank, results in enumerate(self._results[failed + 1 :], start=failed + 1):
            if rank not in self._leavers and results.poll(2):
                with contextlib.suppress(EOFError):
                    state, value = results.recv()
                    texts += [f"\nrank {rank}:\n{value}"] if state == "error" else []
        return "".join(texts)

    def close(self, at_once: bool = False) -> None:
        for rank, (process, commands) in enumerate(zip(self._processes, self._commands, strict=True)):
            if at_once:
                process.kill()
            elif rank not in self._leavers:
                commands.send(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._processes, self._commands, self._results = [], [], []

    def _start(self) -> None:
        # A process that is forked cannot use CUDA if what it was forked from has.
        context: Any = mp.get_context("forkserver" if self._device == "cpu" else "spawn")
        if self._device == "cpu":
            context.set_forkserver_preload(["world_preload"])
        self._addresses = context.Queue()
        for rank in range(self.size):
            commands, results = context.Pipe(duplex=False), context.Pipe(duplex=False)
            process = context.Process(
                target=_main,
                args=(rank, self.size, self._device, self._leavers, self._addresses, commands[0], results[1]),
                daemon=True,
            )
            process.start()
            self._processes.append(process)
            self._commands.append(commands[1])
            self._results.append(results[0])


def run_world(size: int, function: Any, *args: Any, device: str = "cpu", leavers: Collection[int] = ()) -> list[Any]:
    """One `run` of a `World` of its own."""
    world = World(size, device=device, leavers=leavers)
    try:
        return world.run(function, *args)
    finally:
        world.close()
