"""The engine as a process on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..kernels.environment import ENVIRONMENT

TERMINATE_TIMEOUT_S = 3.0
"""How long the process may take to end after SIGTERM, before SIGKILL."""

_MAX_SOCKET_PATH = 100  # the system's limit is 107 bytes, 103 on macOS


class Launcher(Protocol):
    """How the front end gets an engine process, wherever it runs."""

    def start(self) -> str:
        """Starts it and returns the endpoint that it connects to, for the caller to bind."""

    def poll(self) -> str | None:
        """None while it runs, else how it ended, for people."""

    def stop(self, timeout: float) -> None:
        """Waits `timeout` seconds for it to end, then makes it end; removes what it left."""


class LocalLauncher:
    """Runs `python -m moeyard.engine.worker` with a socket in a directory that only this user can enter.

    `command` replaces the program (tests); `env` is laid over this process's environment, and that over what the
    kernels should start with (`kernels.environment`).
    """

    def __init__(self, *, command: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> None:
        # -P: the current directory is not a place to import from
        self._command = list(command or [sys.executable, "-P", "-m", "moeyard.engine.worker"])
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> str:
        assert self._process is None, "started twice"
        self._directory = Path(tempfile.mkdtemp(prefix="moeyard-"))  # mode 0700
        socket = self._directory / "engine"
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            self._remove_directory()
            raise ValueError(f"{socket} is too long for a socket's name; set TMPDIR to a shorter directory")
        endpoint = f"ipc://{socket}"
        try:
            self._process = subprocess.Popen(
                [*self._command, "--connect", endpoint, "--parent", str(os.getpid())],
                env={**ENVIRONMENT, **os.environ, **self._env},
                stdin=subprocess.DEVNULL,
            )
        except OSError:
            self._remove_directory()
            raise
        return endpoint

    def poll(self) -> str | None:
        code = None if self._process is None else self._process.poll()
        if code is None:
            return None
        if code < 0:
            try:
                return f"killed by {signal.Signals(-code).name}"
            except ValueError:
                return f"killed by signal {-code}"
        return f"exit code {code}"

    def stop(self, timeout: float) -> None:
        process = self._process
        if process is not None:
            for wait, then in ((timeout, process.terminate), (TERMINATE_TIMEOUT_S, process.kill)):
                try:
                    process.wait(wait)
                    break
                except subprocess.TimeoutExpired:
                    then()
            else:
                process.wait(TERMINATE_TIMEOUT_S)
        self._remove_directory()

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
