"""One rank's process: takes messages from the front end, steps the engine, sends what each step gave.

`python -m moeyard.engine.worker --connect ENDPOINT` connects a DEALER socket and speaks `messages`. Between two steps
it takes every message that waits; without work it sleeps in a poll. It ends on `Shutdown`, when an error makes the
engine unusable (after `Fatal`), on SIGTERM, and when the process that started it dies.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq

from .config import EngineConfig
from .messages import (
    MAX_BYTES,
    Abort,
    Configure,
    Fatal,
    Hello,
    MessageError,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Stats,
    Submit,
    TokenDelta,
    Tokens,
    VersionError,
    decode,
    encode,
    pack_delta,
)

CONFIGURE_TIMEOUT_S = 60.0
"""How long the front end may take to answer `Hello`."""
IDLE_POLL_MS = 1000
"""Longest sleep without work; then the parent process is looked at."""
SEND_TIMEOUT_S = 60.0
"""How long a message may wait for a front end that does not read."""
FATAL_LINGER_S = 5.0
"""How long the last message may take to leave."""
STATS_INTERVAL_S = 0.25
EXPERT_STATS_INTERVAL_S = 2.0
"""Expert counts are larger, and may cost a copy from the device."""

log = logging.getLogger("moeyard.worker")


class EngineLike(Protocol):
    """What the loop needs of an engine (`engine.Engine`)."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def kv_tokens(self) -> int: ...
    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def has_work(self) -> bool: ...
    def submit(self, submit: Submit) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[TokenDelta]: ...
    def stats(self, with_experts: bool) -> Stats: ...


EngineFactory = Callable[[EngineConfig], EngineLike]


class LostFrontEnd(RuntimeError):
    """The front end is gone or does not answer: nobody is left to work for."""


class Worker:
    """The loop between a connected socket and an engine made by `factory`. `parent` is the pid to live as long as."""

    def __init__(self, socket: zmq.Socket[bytes], factory: EngineFactory, parent: int | None) -> None:
        self._socket = socket
        self._factory = factory
        self._parent = parent
        self._changed = False  # since the last Stats
        self._stats_at = self._experts_at = -float("inf")

    def run(self) -> int:
        """Works until the end and returns the exit code: 0 after `Shutdown`, 1 after an error."""
        try:
            return self._serve()
        except LostFrontEnd as error:
            log.error("%s", error)
        except VersionError as error:
            self._fatal(f"{error}: front end and engine must be of one build")
        except Exception as error:
            log.debug("the engine failed", exc_info=True)
            self._fatal(f"{type(error).__name__}: {error}")
        return 1

    def _serve(self) -> int:
        from .. import __version__

        self._send(Hello(pid=os.getpid(), version=__version__))
        first = self._receive(CONFIGURE_TIMEOUT_S)
        if isinstance(first, Shutdown):
            return 0
        if not isinstance(first, Configure):
            raise LostFrontEnd(f"no configuration from the front end within {CONFIGURE_TIMEOUT_S:g} s")
        try:
            engine = self._factory(EngineConfig(**first.config))
        except ValueError as error:  # the user's: a bad checkpoint, an option that this machine cannot honour
            log.debug("the engine was refused", exc_info=True)
            self._fatal(str(error), user=True)
            return 1
        self._send(
            Ready(
                max_model_len=engine.max_model_len,
                vocab_size=engine.vocab_size,
                kv_tokens=engine.kv_tokens,
                info=engine.info,
            )
        )
        while True:
            while (message := self._receive(0)) is not None:
                if isinstance(message, Shutdown):
                    return 0
                self._handle(engine, message)
            self._check_parent()
            if engine.has_work:
                self._changed = True
                if deltas := engine.step():
                    self._send(Tokens(deltas=[pack_delta(delta) for delta in deltas]))
                self._report(engine, idle=not engine.has_work)
            else:
                self._report(engine, idle=True)
                self._socket.poll(IDLE_POLL_MS)

    def _handle(self, engine: EngineLike, message: Any) -> None:
        if isinstance(message, Submit):
            self._changed = True
            try:
                engine.submit(message)
            except ValueError as error:
                self._end(message.request_id, "refused", str(error))
            except Exception as error:  # nothing is queued yet: the other requests are well
                log.exception("request %s could not be taken", message.request_id)
                self._end(message.request_id, "error", f"{type(error).__name__}: {error}")
        elif isinstance(message, Abort):
            self._changed = True
            for request_id in message.request_ids:
                engine.abort(request_id)
        elif isinstance(message, Ping):
            self._send(Pong(number=message.number))
        else:
            log.error("dropped a %s, which a rank does not take", type(message).__name__)

    def _end(self, request_id: str, reason: str, error: str) -> None:
        self._send(
            Tokens(
                deltas=[pack_delta(TokenDelta(request_id=request_id, token_ids=[], finish_reason=reason, error=error))]
            )
        )

    def _report(self, engine: EngineLike, *, idle: bool) -> None:
        """`Stats`, every now and then while working and once when the work is done."""
        now = time.monotonic()
        if self._changed and (idle or now - self._stats_at >= STATS_INTERVAL_S):
            experts = idle or now - self._experts_at >= EXPERT_STATS_INTERVAL_S
            self._send(engine.stats(with_experts=experts))
            self._stats_at = now
            self._experts_at = now if experts else self._experts_at
            self._changed = not idle

    def _receive(self, timeout_s: float) -> Any:
        """The next message, or None when there is none in time. What cannot be read is logged and dropped."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            if not self._socket.poll(min(left_ms, IDLE_POLL_MS)):
                self._check_parent()
                if left_ms <= IDLE_POLL_MS:
                    return None
                continue
            try:
                return decode(self._socket.recv())
            except VersionError:
                raise
            except MessageError as error:
                log.error("dropped a message: %s", error)

    def _send(self, message: Any) -> None:
        data = encode(message)
        deadline = time.monotonic() + SEND_TIMEOUT_S
        while not self._socket.poll(IDLE_POLL_MS, zmq.POLLOUT):
            self._check_parent()
            if time.monotonic() > deadline:
                raise LostFrontEnd(f"the front end has read nothing for {SEND_TIMEOUT_S:g} s")
        self._socket.send(data)

    def _fatal(self, error: str, user: bool = False) -> None:
        try:
            self._send(Fatal(error=error, user=user))
        except LostFrontEnd as lost:
            log.error("%s; it does not know that: %s", lost, error)

    def _check_parent(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            raise LostFrontEnd(f"the process that started this one ({self._parent}) is gone")


def run(endpoint: str, factory: EngineFactory, parent: int | None = None) -> int:
    """Connects to `endpoint` and works until the end; returns the process's exit code."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
    socket.setsockopt(zmq.LINGER, int(FATAL_LINGER_S * 1000))
    try:
        socket.connect(endpoint)
        return Worker(socket, factory, parent).run()
    finally:
        socket.close()
        context.term()


def main(argv: Sequence[str] | None = None, factory: EngineFactory | None = None) -> int:
    """The process: signals, logging, then `run` with the engine (or another `factory`, for tests)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the front end decides
    parser = argparse.ArgumentParser(prog="moeyard.engine.worker")
    parser.add_argument("--connect", required=True, metavar="ENDPOINT", help="the front end's ZeroMQ address")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process, the parent, is gone")
    args = parser.parse_args(argv)
    if args.parent is not None:
        _die_with_parent()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    return run(args.connect, factory or _make_engine, args.parent)


def _make_engine(config: EngineConfig) -> EngineLike:
    from .engine import Engine  # heavy: after Hello, so that a slow import is not a silent start

    return Engine(config)


def _die_with_parent() -> None:
    """Linux kills this process when its parent dies, even in the middle of a step; elsewhere the loop looks itself."""
    pr_set_pdeathsig = 1
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
