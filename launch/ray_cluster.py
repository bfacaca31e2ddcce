"""The ranks as actors on a Ray cluster: a placement group with one bundle per rank, and a rank's process in each."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..kernels.environment import ENVIRONMENT, usable_cores
from .local import TERMINATE_TIMEOUT_S, _how

REACH_TIMEOUT_S = 5.0
"""How long a cluster's address may take to answer."""
PLACE_TIMEOUT_S = 60.0
"""How long an existing cluster may take to find room: nodes may still be joining, or another job ending."""
LOOK_S = 1
"""How often it is seen whether a start that waits is to be stopped; Ray counts whole seconds."""
KILL_TIMEOUT_S = 2.0
"""How long an actor may take to kill its rank, before the actor is killed itself."""

_OBJECT_STORE_BYTES = 100 * 2**20  # near Ray's least: nothing of ours goes through it
_THREAD_VARIABLES = (*ENVIRONMENT, "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")

log = logging.getLogger("moeyard.ray")


class RayLauncher:
    """Starts ranks 0 to `ep` - 1, each with `cores_per_rank` CPUs (default 1) and, for `device` "cuda", one GPU.

    The cluster is the one that this process is already connected to, else the one at `address` or $RAY_ADDRESS
    ("local": a new one), else the one that `ray start` or `ray symmetric-run` made on this machine, else a new one on
    this machine alone. Ranks are numbered node by node, this node first. They connect to `port` (None: a free one) of
    this node. What they print appears here.

    A rank is a process of its own below its actor, so that it starts the same way as anywhere else and that its death
    is not the actor's: `python -P -m worker_module`, in the node's environment with this process's thread settings and
    `env` laid over it. Ray's record of CPUs only decides where ranks go: how many threads each uses is for the options.
    """

    can_restart = slow_start = True

    def __init__(
        self,
        ep: int,
        *,
        device: str = "cpu",
        cores_per_rank: int | None = None,
        port: int | None = None,
        address: str | None = None,
        env: Mapping[str, str] | None = None,
        worker_module: str = "moeyard.engine.worker",
    ) -> None:
        assert ep >= 1 and device in ("cpu", "cuda")
        self.ranks = tuple(range(ep))
        self._bundle = {"GPU": 1, "CPU": cores_per_rank or 1} if device == "cuda" else {"CPU": cores_per_rank or 1}
        self._port = port
        self._address = address or os.environ.get("RAY_ADDRESS") or None
        self._env = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ} | dict(env or {})
        self._module = worker_module
        self._lock = threading.RLock()  # held by `start` and by `stop`
        self._stopping = threading.Event()
        self._ray: Any = None  # the module, from `start` to `stop`
        self._connected = False  # by us
        self._group: Any = None
        self._bundle_of: list[int] = []  # by rank
        self._endpoint = ""
        self._actors: dict[int, Any] = {}
        self._runs: dict[int, Any] = {}  # what each actor's `run` will return
        self._ended: dict[int, str] = {}
        self._kill_by: dict[int, float] = {}  # when a rank that is being killed must have ended

    def start(self) -> str:
        """Starts the ranks and returns the endpoint for the caller to bind. Blocks for seconds.

        Raises ValueError when Ray is not installed, the cluster does not answer or lacks what was asked for, or the
        port is in use, and when `stop` is called meanwhile.
        """
        assert self._ray is None, "started twice"
        # Ray reads this when it is imported. Lines of different ranks that look alike are not repetitions.
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        with self._lock:
            try:
                import ray
            except ImportError as error:
                raise ValueError(f'launcher ray needs Ray ({error}); pip install "moeyard[ray]"') from None
            self._go_on()
            self._ray = ray
            try:
                alone = self._connect()
                self._place(alone)
                self._endpoint = _endpoint("127.0.0.1" if alone else ray.util.get_node_ip_address(), self._port)
                for rank in self.ranks:
                    self._spawn(rank)
                self._go_on()
            except BaseException:
                self._stop(0)
                raise
            return self._endpoint

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise ValueError("ray: the start was stopped")

    def ended(self) -> dict[int, str]:
        """How each rank ended that did. Does not block."""
        self._collect(0)
        now = time.monotonic()
        for rank in [rank for rank, deadline in self._kill_by.items() if deadline <= now]:
            log.error("the Ray actor of rank %d did not kill it within %g s; killing the actor", rank, KILL_TIMEOUT_S)
            self._ray.kill(self._actors[rank])
            del self._kill_by[rank]
        return dict(self._ended)

    def kill(self, rank: int) -> None:
        """SIGKILL, at once; nothing for a rank that ended."""
        if rank in self._actors and rank not in self._ended:
            self._actors[rank].signal.remote(signal.SIGKILL)
            self._kill_by.setdefault(rank, time.monotonic() + KILL_TIMEOUT_S)

    def restart(self, rank: int) -> None:
        """Starts a rank that ended again, in its bundle: on another node when Ray moved that after the loss of one."""
        assert rank in self._ended, f"rank {rank} still runs"
        self._ray.kill(self._actors[rank])
        self._spawn(rank)

    def stop(self, timeout: float) -> None:
        """Waits `timeout` seconds for all to end, then makes them end; removes what they left. Again is nothing.

        In another thread than `start`, waits for that: it ends at its next look, or when Ray has connected.
        """
        self._stopping.set()
        with self._lock:
            self._stop(timeout)

    def _stop(self, timeout: float) -> None:
        ray = self._ray
        if ray is None:
            return
        if ray.is_initialized():
            self._end(timeout)
            for actor in self._actors.values():
                ray.kill(actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
            if self._connected:
                ray.shutdown()
        self._ray, self._group, self._connected = None, None, False
        self._actors, self._runs, self._kill_by = {}, {}, {}

    def _end(self, timeout: float) -> None:
        for wait, then in ((timeout, signal.SIGTERM), (TERMINATE_TIMEOUT_S, signal.SIGKILL)):
            if self._collect(wait):
                return
            for rank in self._runs.keys() - self._ended.keys():
                self._actors[rank].signal.remote(then)
        self._collect(TERMINATE_TIMEOUT_S)

    def _connect(self) -> bool:
        """Connects to a cluster; whether it is one of our own, which nobody can join."""
        if self._ray.is_initialized():
            return False
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.ERROR}
        own = {
            # As many as are asked for: on one machine ranks may share cores, as they do without Ray.
            "num_cpus": max(usable_cores(), len(self.ranks) * self._bundle["CPU"]),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        with _own_signal_handlers():
            alone = self._init(options, own)
        self._connected = True
        return alone

    def _init(self, options: dict[str, Any], own: dict[str, Any]) -> bool:
        init, address = self._ray.init, self._address
        if address is not None and "://" in address:
            raise ValueError(f"ray: {address} is for Ray's remote clients; run moeyard on a node of the cluster")
        try:
            if address not in (None, "local"):
                _reach(_noted_address() if address == "auto" else address)
                init(address=address, **options)
                return False
            try:
                init(address=address, **own, **options)
                return True
            except ValueError:  # there is a cluster: only who starts one says what it has
                _reach(_noted_address())
                init(address=None, **options)
                return False
        except ConnectionError as error:
            remedy = "see `ray status`; `ray stop` forgets one that is gone, RAY_ADDRESS=local starts a new one"
            raise ValueError(f"ray: no cluster answers: {_short(str(error))}; {remedy}") from None

    def _place(self, alone: bool) -> None:
        """Reserves a bundle for each rank, and numbers the ranks."""
        ray = self._ray
        total = ray.cluster_resources()
        if any(total.get(name, 0) < amount * len(self.ranks) for name, amount in self._bundle.items()):
            if alone:
                raise ValueError(self._lack())
            log.warning("%s; waiting %g s for more", self._lack(), PLACE_TIMEOUT_S)
        self._group = ray.util.placement_group([self._bundle] * len(self.ranks), strategy="PACK")
        deadline = time.monotonic() + PLACE_TIMEOUT_S
        while not self._group.wait(LOOK_S):
            self._go_on()
            if time.monotonic() > deadline:
                raise ValueError(self._lack())
        nodes = _nodes(self._group)
        here = ray.get_runtime_context().get_node_id()
        self._bundle_of = sorted(range(len(nodes)), key=lambda bundle: (nodes[bundle] != here, nodes[bundle], bundle))

    def _lack(self) -> str:
        """What was asked for and what there is."""
        asked = " and ".join(f"{amount} {name}" for name, amount in self._bundle.items())
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        there = " and ".join(f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in self._bundle)
        return f"ray: {len(self.ranks)} bundles of {asked} were asked for, the cluster has {there}"

    def _spawn(self, rank: int) -> None:
        ray = self._ray
        actor = ray.remote(_RankActor).options(
            num_cpus=self._bundle["CPU"],
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                self._group, self._bundle_of[rank]
            ),
            max_concurrency=4,  # `signal` while `run` waits
        )
        self._actors[rank] = actor.remote(rank)
        self._runs[rank] = self._actors[rank].run.remote(
            self._module, self._endpoint, self._group, self._bundle_of, self._env
        )
        self._ended.pop(rank, None)
        self._kill_by.pop(rank, None)

    def _collect(self, timeout: float) -> bool:
        """Notes which ranks ended; whether all did within `timeout` seconds."""
        rank_of = {run: rank for rank, run in self._runs.items() if rank not in self._ended}
        if not rank_of:
            return True
        errors = self._ray.exceptions.RayError
        try:
            done, _ = self._ray.wait(list(rank_of), num_returns=len(rank_of), timeout=timeout)
        except errors as error:
            self._ended |= dict.fromkeys(rank_of.values(), f"the Ray cluster is gone: {_short(str(error))}")
            return True
        for run in done:
            rank = rank_of[run]
            try:
                self._ended[rank] = self._ray.get(run)
            except errors as error:
                self._ended[rank] = f"the Ray actor died: {_short(str(error))}"
                self._ray.kill(self._actors[rank])  # one that only could not be reached must not come back
            self._kill_by.pop(rank, None)
        return len(done) == len(rank_of)


class _RankActor:
    """Runs one rank's process on the node where Ray put it, for as long as the actor lives."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._signalled = False

    def __repr__(self) -> str:
        return f"rank {self._rank}"  # Ray puts this before each line that the rank prints

    def run(self, module: str, endpoint: str, group: Any, bundle_of: Sequence[int], env: Mapping[str, str]) -> str:
        """Starts the process and waits until it ends; how it did. This thread lives on: a child dies with it."""
        node_of = _nodes(group)
        index, count = local_position(self._rank, [node_of[bundle] for bundle in bundle_of])
        command = [sys.executable, "-P", "-m", module, "--connect", endpoint, "--parent", str(os.getpid())]
        command += ["--rank", str(self._rank), "--local-rank", str(index), "--local-ranks", str(count)]
        # Ray sets OMP_NUM_THREADS to the actor's CPUs, which only say where it goes.
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with self._lock:
            if self._signalled:
                return "ended before it began"
            self._process = subprocess.Popen(command, env={**ENVIRONMENT, **inherited, **env}, stdin=subprocess.DEVNULL)
        return _how(self._process.wait())

    def signal(self, number: int) -> None:
        """Sends the process a signal; one that has not begun does not."""
        with self._lock:
            self._signalled = True
            if self._process is not None:
                self._process.send_signal(number)


def local_position(rank: int, nodes: Sequence[str]) -> tuple[int, int]:
    """A rank's index among those of its node, and how many they are, from every rank's node."""
    here = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    return here.index(rank), len(here)


def _nodes(group: Any) -> list[str]:
    """The node of each bundle."""
    from ray.util import placement_group_table

    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[bundle] for bundle in range(len(nodes))]


def _endpoint(host: str, port: int | None) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ does: not those that closed just now
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise ValueError(f"cluster_port {port or ''} on {host}: {error.strerror}; choose another") from None
        number = probe.getsockname()[1]
    return f"tcp://[{host}]:{number}" if family == socket.AF_INET6 else f"tcp://{host}:{number}"


def _noted_address() -> str | None:
    """The address of the cluster that `ray start` made or joined on this machine, where it leaves that."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return None


def _reach(address: str | None) -> None:
    """Raises ConnectionError when nothing listens at `host:port`: `ray.init` would try for a quarter of an hour."""
    if address is None:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"{address} ({error})") from None


def _short(text: str) -> str:
    """The reason in Ray's account of an error, which has a page of advice, as one line."""
    _, found, reason = text.partition("The actor is dead because ")
    if not found:
        reason = next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")
    reason = " ".join(reason.split())
    for advice in (" Some common causes", " The task may or may not"):
        reason = reason.partition(advice)[0]
    return reason.rstrip(".")[:300]


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """`ray.init` makes SIGTERM end the process on the spot: what was to happen on it stays."""
    if threading.current_thread() is not threading.main_thread():
        yield  # there Ray leaves it alone
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
