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
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist

from .arrivals import Arrival, Watchers
from .progress import Progress
from .sockets import connected_to, cut, open_sockets, opened_since

log = logging.getLogger("moeyard.group")

# Torch 2.13 renames these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

STORE_TIMEOUT_S = 60.0
"""How long the others may take to come to the store when a group forms."""
CONNECT_TIMEOUT_S = 5.0
"""How long one attempt to reach the store may take; then messages are looked at."""
ABORT_TIMEOUT_S = 10.0
"""How long leaving the group may wait for another thread that is aborting it."""
IDLE_TIMEOUT_S = 0.1
"""How long threads that wait for nothing may take to end."""


class RankLost(RuntimeError):
    """The group is broken: an exchange failed or took too long. `phase` names it; `step` and `layer` say where.

    `told`: this rank did not find out itself, `RankGroup.abort` ended its exchange.
    """

    def __init__(self, progress: Progress, error: BaseException, told: bool = False) -> None:
        self.told = told
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
    `on_begin` gets this object before the first wait, so that another thread can `abort` a group that is being formed;
    connections at `spared_ports` are then not the group's. Every method that talks to the others raises `RankLost` when
    one of them does not answer, and once the group is `aborted`.
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
        on_begin: Callable[[RankGroup], None] = lambda group: None,
        spared_ports: Collection[int] = (),
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
        self.sent_weight_bytes = 0
        self.while_waiting = while_waiting
        self.aborted = False
        self._closed = False
        self._leaving = threading.Lock()  # held by whoever aborts or closes
        self._before = open_sockets()
        self._store_port = int(address.rpartition(":")[2]) if store is None else store.port
        self._spared_ports = {*spared_ports, self._store_port}
        self._sockets: Collection[tuple[int, int]] | None = None  # of the exchanges, once all are connected
        self._process_group: Any = None
        self._weights_group: Any = None
        self._watchers = Watchers()
        on_begin(self)
        _choose_interface(host)
        if device.type == "cuda":
            # Otherwise torch ends the process when an exchange fails, is aborted or takes too long.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        try:
            self._store = _reach_store(address, self._look) if store is None else store
            # Torch's own wait for the others begins once all are here.
            self.put("here", 1)
            self.get_all("here", STORE_TIMEOUT_S)
            self._connect()
        except RankLost:
            raise
        except Exception as error:
            if not self.aborted and not isinstance(error, (RuntimeError, OSError, dist.DistError)):
                raise
            progress.phase = "forming the group"
            raise self._lost(error) from error
        self._run(lambda: None)  # aborted just now

    def _connect(self) -> None:
        device = self.device
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"epoch{self.epoch}", self._store),
            rank=self.position,
            world_size=self.size,
            timeout=datetime.timedelta(seconds=self.timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        self._process_group = dist.group.WORLD
        # Weights travel beside the tokens' exchanges, not behind them.
        self._weights_group = dist.new_group(timeout=datetime.timedelta(seconds=self.timeout_s))
        self._sockets = opened_since(self._before, self._spared_ports)

    def _look(self) -> None:
        self._run(self.while_waiting)

    def abort(self) -> None:
        """Ends what another thread waits for in this group, now and from now on: it gets `RankLost`.

        For any thread, and as often as it likes. Never raises, and waits for nobody: only NCCL may take its time.
        """
        if not self._leaving.acquire(blocking=False):
            return  # it is being left
        try:
            if self._closed:
                return
            first, self.aborted = not self.aborted, True
            if first and self.device.type == "cuda":
                self._abort_nccl()
            sockets = self._sockets
            if sockets is None:  # still connecting: what that has opened so far, and its way to the store
                sockets = opened_since(self._before, self._spared_ports) | connected_to(self._store_port)
            number = cut(sockets)
            if first:
                log.debug("left the group of epoch %d: %d connections cut", self.epoch, number)
        except Exception:
            log.warning("the group of epoch %d was not aborted; its own time limit ends it", self.epoch, exc_info=True)
        finally:
            self._leaving.release()

    def _abort_nccl(self) -> None:
        """Makes its kernels end. Only the backend: torch's lists of groups are the main thread's."""
        for group in (self._process_group, self._weights_group):
            if group is not None:
                group._get_backend(self.device).abort()

    def close(self) -> None:
        """Leaves the group, broken or not. Again is nothing."""
        if self._closed:
            return
        self._closed = True
        if not self._leaving.acquire(timeout=ABORT_TIMEOUT_S):
            log.warning("the group of epoch %d is still being aborted", self.epoch)
            return
        try:
            if not self._watchers.close(IDLE_TIMEOUT_S):  # weights are still on their way
                cut(self._sockets or ())
                if not self._watchers.close(ABORT_TIMEOUT_S):
                    log.warning("the threads that wait for weights of epoch %d do not end", self.epoch)
            # With a peer gone, destroying would wait for NCCL kernels that never end. Aborted, they have.
            abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
            if self.device.type == "cuda" and not self.aborted and abort is not None:
                abort()
            else:
                dist.destroy_process_group()
        except Exception as error:
            log.debug("the group of epoch %d did not close cleanly: %s", self.epoch, error)
        finally:
            self._leaving.release()

    def settle(self) -> None:
        """On a GPU: waits for all that is enqueued, and raises RankLost when it cannot be trusted.

        There an exchange that was aborted is no error: what follows goes on, with anything in its buffers. Call it
        before results leave the device. On a CPU the exchange itself has raised.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._run(lambda: None)

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

    def send_weights(self, position: int, packed: torch.Tensor) -> Pending:
        """Starts sending a vector, beside other exchanges; sends and receives between two ranks keep their order."""
        self.sent_weight_bytes += packed.nbytes
        return self._start(lambda: dist.isend(packed, position, group=self._weights_group))

    def receive_weights(self, position: int, packed: torch.Tensor, then: Callable[[], None] = lambda: None) -> Arrival:
        """Starts receiving what `send_weights` sends here; `packed` may be read when it came. On a CPU another thread
        calls `then` at that moment.
        """
        work = self._run(lambda: dist.irecv(packed, position, group=self._weights_group))
        arrival = Arrival(self, self._run, work, then)
        if packed.device.type == "cpu":
            self._watchers.watch(position, arrival)
        return arrival

    def all_gather_beside(self, values_N: torch.Tensor) -> tuple[torch.Tensor, Pending]:
        """Starts an exchange of small CPU vectors, [size, N], beside the tokens' exchanges."""
        out = values_N.new_empty(self.size, values_N.shape[0])
        return out, self._start(lambda: _all_gather(out, values_N[None], group=self._weights_group, async_op=True))

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
        self.settle()

    def _start(self, operation: Callable[[], Any]) -> Pending:
        return Pending(self, self._run(operation))

    def _run(self, operation: Callable[[], Any]) -> Any:
        """`operation()`, with its failure, and an abort, as RankLost."""
        try:
            if not self.aborted:
                value = operation()
                if not self.aborted:
                    return value
        except Exception as error:
            # Torch has several words for a group that another thread has aborted.
            if not self.aborted and not isinstance(error, (RuntimeError, dist.DistError)):
                raise
            raise self._lost(error) from error
        raise self._lost(None)

    def _lost(self, error: BaseException | None) -> RankLost:
        if self.aborted or error is None:
            error = RuntimeError("the front end said that the group is broken")
        return RankLost(self.progress, error, told=self.aborted)


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
