"""The ranks as processes on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..kernels.environment import ENVIRONMENT

TERMINATE_TIMEOUT_S = 3.0
"""How long the processes may take to end after SIGTERM, before SIGKILL, and how long after that."""

_MAX_SOCKET_PATH = 100  # the system's limit is 107 bytes, 103 on macOS


class Launcher(Protocol):
    """How the front end gets the processes of ranks, wherever they run.

    `ranks` are those that this launcher starts; the others of the group come by themselves, from other nodes.
    `can_restart` says whether `restart` works. `slow_start`: `start` may take long, and is made to be called in a
    thread; `stop` in another makes it end soon, and waits for that.
    """

    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def can_restart(self) -> bool: ...
    @property
    def slow_start(self) -> bool: ...

    def start(self) -> str:
        """Starts the ranks and returns the endpoint for the caller to bind."""

    def ended(self) -> dict[int, str]:
        """How each of its ranks ended that did, for people ("killed by SIGKILL"). Does not block."""

    def kill(self, rank: int) -> None:
        """SIGKILL, at once; nothing for a rank that ended."""

    def restart(self, rank: int) -> None:
        """Starts a rank that ended again, under the same number."""

    def stop(self, timeout: float) -> None:
        """Waits `timeout` seconds for all to end, then makes them end; removes what they left. Again is nothing."""


class LocalLauncher:
    """Runs `python -m moeyard.engine.worker` once for each of `ranks`.

    Alone, the ranks meet the front end at a socket in a directory that only this user can enter. Otherwise they connect
    to `connect`, and `start` returns `bind` (None: `connect`). `local_ranks` gives each rank's index among the
    `local_count` ranks of this machine, when this launcher does not start all of those. `command` replaces the program
    (tests); `env` is laid over this process's environment, and that over what the kernels should start with
    (`kernels.environment`).
    """

    can_restart = True
    slow_start = False  # a rank dies with the thread that started it

    def __init__(
        self,
        *,
        ranks: Sequence[int] = (0,),
        local_ranks: Sequence[int] | None = None,
        local_count: int | None = None,
        connect: str | None = None,
        bind: str | None = None,
        command: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        assert ranks and (local_ranks is None or len(local_ranks) == len(ranks))
        assert bind is None or connect is not None, "an endpoint to bind needs one to connect to"
        self.ranks = tuple(ranks)
        self._local = dict(zip(self.ranks, range(len(ranks)) if local_ranks is None else local_ranks, strict=True))
        self._local_count = local_count or max(self._local.values()) + 1
        self._connect = connect
        self._bind = bind
        # -P: the current directory is not a place to import from
        self._command = list(command or [sys.executable, "-P", "-m", "moeyard.engine.worker"])
        self._env = dict(env or {})
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._directory: Path | None = None

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank that was started, running or not."""
        return {rank: process.pid for rank, process in self._processes.items()}

    @property
    def pid(self) -> int | None:
        """The first rank's process."""
        return self.pids.get(self.ranks[0])

    def start(self) -> str:
        assert not self._processes, "started twice"
        if self._connect is None:
            self._connect = f"ipc://{self._make_socket_path()}"
        try:
            for rank in self.ranks:
                self._spawn(rank)
        except OSError:
            self.stop(0)
            raise
        return self._bind or self._connect

    def ended(self) -> dict[int, str]:
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: _how(code) for rank, code in codes.items() if code is not None}

    def poll(self) -> str | None:
        """None while the first rank runs, else how it ended."""
        return self.ended().get(self.ranks[0])

    def kill(self, rank: int) -> None:
        if rank in self._processes:
            self._processes[rank].kill()  # looks first whether it ended: never another process of the same number

    def restart(self, rank: int) -> None:
        assert self._processes[rank].poll() is not None, f"rank {rank} still runs"
        self._spawn(rank)

    def stop(self, timeout: float) -> None:
        for wait, then in ((timeout, signal.SIGTERM), (TERMINATE_TIMEOUT_S, signal.SIGKILL)):
            if self._wait(wait):
                break
            for process in self._processes.values():
                process.send_signal(then)
        else:
            self._wait(TERMINATE_TIMEOUT_S)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _wait(self, timeout: float) -> bool:
        """Whether all ended within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        return True

    def _spawn(self, rank: int) -> None:
        assert self._connect is not None
        options = {"connect": self._connect, "parent": os.getpid(), "rank": rank}
        options |= {"local-rank": self._local[rank], "local-ranks": self._local_count}
        self._processes[rank] = subprocess.Popen(
            [*self._command, *(text for name, value in options.items() for text in (f"--{name}", str(value)))],
            env={**ENVIRONMENT, **os.environ, **self._env},
            stdin=subprocess.DEVNULL,
        )

    def _make_socket_path(self) -> Path:
        self._directory = Path(tempfile.mkdtemp(prefix="moeyard-"))  # mode 0700
        socket = self._directory / "engine"
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            self.stop(0)
            raise ValueError(f"{socket} is too long for a socket's name; set TMPDIR to a shorter directory")
        return socket


def _how(code: int) -> str:
    """A return code of `subprocess`, for people."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
