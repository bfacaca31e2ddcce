"""The ranks that compute together: a `torch.distributed` group that is formed, breaks when a rank is lost, and is
formed again from the others.

Positions are 0 .. size-1 within the group; a rank's number never changes, its position does when a lower rank is lost.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist

from .progress import Progress

log = logging.getLogger("moeyard.group")

# Torch 2.13 renames these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

STORE_TIMEOUT_S = 60.0
"""How long the others may take to come to the store when a group forms."""
CONNECT_TIMEOUT_S = 5.0
"""How long one attempt to reach the store may take; then messages are looked at."""


class RankLost(RuntimeError):
    """The group is broken: an exchange failed or took too long. `phase` names it; `step` and `layer` say where."""

    def __init__(self, progress: Progress, error: BaseException) -> None:
        text = str(error).strip().splitlines()
        self.step, self.layer, self.phase = progress.step, progress.layer, progress.phase
        words = text[0] if text else type(error).__name__
        # Of gloo's neither the place in its source nor the general advice.
        self.reason = re.sub(r"^\[\S+:\d+\] |\. This is typically caused .*", "", words)
        where = f"layer {self.layer} of step {self.step}" if self.layer >= 0 else f"step {self.step}"
        super().__init__(f"the exchange with the other ranks broke in {self.phase!r} at {where}: {self.reason}")


def make_store(host: str) -> tuple[dist.TCPStore, str]:
    """A store for a group that forms, on a free port of this machine, and its address `host:port`.

    Raises ValueError when `host` is not an address of this machine.
    """
    try:
        store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=STORE_TIMEOUT_S)
        )
    except (RuntimeError, dist.DistError) as error:
        raise ValueError(f"the group's store cannot listen on {host}: {str(error).splitlines()[0]}") from error
    return store, f"{host}:{store.port}"


def _reach_store(address: str, while_waiting: Callable[[], None]) -> dist.TCPStore:
    """A connection to the first member's store. Raises OSError when it is gone: torch would try for a minute."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    deadline = time.monotonic() + STORE_TIMEOUT_S
    while True:
        while_waiting()
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
            break
        except TimeoutError:  # a refusal is final: it listened before anybody was told of it
            if time.monotonic() > deadline:
                raise
    store = dist.TCPStore(
        host,
        int(port),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=CONNECT_TIMEOUT_S),
    )
    store.set_timeout(datetime.timedelta(seconds=STORE_TIMEOUT_S))
    return store


class RankGroup:
    """This process's place in the group of one epoch, and the exchanges with the others.

    `store` is the one that `make_store` gave on the first member, None elsewhere. `timeout_s` bounds every exchange.
    `while_waiting` is called every few milliseconds of a wait that may be long; it raises RuntimeError to end it.
    Every method that talks to the others raises `RankLost` when one of them does not answer.
    """

    def __init__(
        self,
        *,
        epoch: int,
        members: Sequence[int],
        rank: int,
        address: str,
        device: torch.device,
        timeout_s: float,
        progress: Progress,
        store: dist.TCPStore | None = None,
        host: str = "127.0.0.1",
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.epoch = epoch
        self.members = tuple(members)
        self.rank = rank
        self.size = len(self.members)
        self.position = self.members.index(rank)
        self.device = device
        self.timeout_s = timeout_s
        self.progress = progress
        self.sent_bytes = 0
        self.while_waiting = while_waiting
        self._closed = False
        _choose_interface(host)
        try:
            self._store = _reach_store(address, while_waiting) if store is None else store
            # Torch's own wait for the others cannot be ended: it begins once all are here.
            self.put("here", 1)
            self.get_all("here", STORE_TIMEOUT_S)
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"epoch{epoch}", self._store),
                rank=self.position,
                world_size=self.size,
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
        except RankLost:
            raise
        except (RuntimeError, OSError, dist.DistError) as error:
            progress.phase = "forming the group"
            raise RankLost(progress, error) from error

    def close(self) -> None:
        """Leaves the group, broken or not. Again is nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.device.type == "cuda":
                # With a peer gone, destroying would wait for kernels that never end.
                abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
                if abort is not None:
                    abort()
                    return
            dist.destroy_process_group()
        except Exception as error:
            log.debug("the group of epoch %d did not close cleanly: %s", self.epoch, error)

    # Small exchanges of plain values

    def all_gather_ints(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> list[list[int]]:
        """Every position's values, the same number from each."""
        mine = torch.tensor(list(values), dtype=dtype)
        return self.all_gather_counts(mine).tolist()

    def all_gather_counts(self, counts_N: torch.Tensor) -> torch.Tensor:
        """[size, N] of every position's small CPU vector."""
        out = counts_N.new_empty(self.size, counts_N.shape[0])
        with self.progress.span("wait"):
            self._run(lambda: _all_gather(out, counts_N[None]))
        return out

    def put(self, key: str, value: Any) -> None:
        """Leaves a value (JSON) for the others at the group's store."""
        self._run(lambda: self._store.set(f"{self.epoch}/{key}/{self.position}", json.dumps(value)))

    def get_all(self, key: str, timeout_s: float) -> list[Any]:
        """What every position has `put` under `key`; waits for it at most `timeout_s`."""
        names = [f"{self.epoch}/{key}/{position}" for position in range(self.size)]
        deadline = time.monotonic() + timeout_s
        with self.progress.span("wait"):
            # Not one long wait: the store's own does not end when its host is gone for good.
            while not self._run(lambda: self._store.check(names)):
                if time.monotonic() > deadline:
                    there = self._run(lambda: [self._store.check([name]) for name in names])
                    absent = [rank for rank, here in zip(self.members, there, strict=True) if not here]
                    text = f"no {key!r} from rank {', '.join(map(str, absent))} within {timeout_s:g} s"
                    raise RankLost(self.progress, TimeoutError(text))
                self._run(self.while_waiting)
                time.sleep(0.01)
            return [json.loads(value) for value in self._run(lambda: self._store.multi_get(names))]

    # Tensors on the device

    def all_gather(self, rows_RB: torch.Tensor) -> tuple[torch.Tensor, Pending]:
        """Starts an all-gather of equally many rows from each position: [size * R, B]."""
        out = rows_RB.new_empty(self.size * rows_RB.shape[0], rows_RB.shape[1])
        if not rows_RB.numel():  # then on every rank
            return out, Pending(self, None)
        self.sent_bytes += (self.size - 1) * rows_RB.nbytes
        return out, self._start(lambda: _all_gather(out, rows_RB, async_op=True))

    def reduce_scatter(self, rows_RB: torch.Tensor) -> tuple[torch.Tensor, Pending]:
        """Starts a sum over positions, of which each keeps its own equal part: [R / size, B]."""
        out = rows_RB.new_empty(rows_RB.shape[0] // self.size, rows_RB.shape[1])
        if not rows_RB.numel():
            return out, Pending(self, None)
        self.sent_bytes += (self.size - 1) * out.nbytes
        return out, self._start(lambda: _reduce_scatter(out, rows_RB, async_op=True))

    def all_to_all(
        self, rows_RB: torch.Tensor, sends: Sequence[int], receives: Sequence[int]
    ) -> tuple[torch.Tensor, Pending]:
        """Starts an exchange of rows: `sends[p]` consecutive ones go to position p, `receives[p]` come from it."""
        out = rows_RB.new_empty(sum(receives), rows_RB.shape[1])
        self.sent_bytes += (rows_RB.shape[0] - sends[self.position]) * rows_RB.shape[1] * rows_RB.element_size()
        return out, self._start(
            lambda: dist.all_to_all_single(out, rows_RB, list(receives), list(sends), async_op=True)
        )

    def exchange_flat(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        """Point-to-point: each tensor to or from a position; waits for all of them."""
        ops = [dist.P2POp(dist.isend, tensor, position) for position, tensor in sends]
        ops += [dist.P2POp(dist.irecv, tensor, position) for position, tensor in receives]
        if not ops:
            return
        with self.progress.span("wait"):
            works = self._run(lambda: dist.batch_isend_irecv(ops))
            for work in works:
                self._run(work.wait)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start(self, operation: Callable[[], Any]) -> Pending:
        return Pending(self, self._run(operation))

    def _run(self, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except (RuntimeError, dist.DistError) as error:
            raise RankLost(self.progress, error) from error


class Pending:
    """An exchange that is under way."""

    def __init__(self, group: RankGroup, work: Any) -> None:
        self._group = group
        self._work = work

    def wait(self) -> None:
        """Until its result may be read (on a GPU: by what is enqueued next)."""
        if self._work is None:
            return
        with self._group.progress.span("wait"):
            self._group._run(self._work.wait)


def _choose_interface(host: str) -> None:
    """Tells gloo which network interface to use, unless the user has: it would take what the host name resolves to."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == host for a in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
