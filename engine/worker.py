"""One rank's process: takes messages from the front end, steps the engine, sends what each step gave.

`python -m moeyard.engine.worker --connect ENDPOINT` connects a DEALER socket and speaks `messages`. Between two steps
it takes every message that waits; without work it sleeps in a poll. It ends on `Shutdown`, when an error makes the
engine unusable (after `Fatal`), on SIGTERM, and when the process that started it dies. One of several ranks also ends
when the front end is silent, and goes on in a new group when one of the others is lost.
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import zmq

from .config import EngineConfig
from .connection import Connection, LostFrontEnd
from .messages import (
    MAX_BYTES,
    Abort,
    Configure,
    Fatal,
    Form,
    Hello,
    Ping,
    Place,
    Pong,
    Ready,
    Shutdown,
    Stats,
    Submit,
    TokenDelta,
    Tokens,
    VersionError,
    Wake,
    pack_delta,
)
from .wire import address_of_this_machine, set_heartbeat

if TYPE_CHECKING:
    from .seating import Seating

CONFIGURE_TIMEOUT_S = 60.0
"""How long the front end may take to answer `Hello`."""
FATAL_LINGER_S = 5.0
"""How long the last message may take to leave."""
STATS_INTERVAL_S = 0.25
EXPERT_STATS_INTERVAL_S = 2.0
"""Expert counts are larger, and may cost a copy from the device."""

TEND_MS = 5
"""How soon an engine is called again that has something to do in the background."""

log = logging.getLogger("moeyard.worker")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which rank this process is, and its place among the ranks on this machine."""

    number: int = 0
    local: int = 0
    locals: int = 1


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


EngineFactory = Callable[..., EngineLike]
"""Called with the configuration, and with `seat=` for one of several ranks; then it also has what `Ranked` has."""


class Ranked(EngineLike, Protocol):
    """What the loop needs of an engine that is one of several ranks."""

    def wake(self, number: int) -> None: ...
    def place(self, version: int, tables: Sequence[Any]) -> None: ...
    def join(self, group: Any) -> list[Any]: ...
    def take_reports(self) -> list[Any]: ...


class Worker:
    """The loop between a connection and an engine made by `factory`.

    `patient`: wait for the front end as long as it takes, as its parent will end this process when that does not come.
    """

    def __init__(self, connection: Connection, factory: EngineFactory, patient: bool, rank: Rank | None = None) -> None:
        self._connection = connection
        self._factory = factory
        self._patient = patient
        self._rank = rank or Rank()
        self._seating: Seating | None = None
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
        try:
            engine = self._start()
        except VersionError:
            raise
        except ValueError as error:  # the user's: a bad checkpoint, an option that this machine cannot honour
            log.debug("the engine was refused", exc_info=True)
            self._fatal(str(error), user=True)
            return 1
        if engine is None:
            return 0
        self._send(
            Ready(
                max_model_len=engine.max_model_len,
                vocab_size=engine.vocab_size,
                kv_tokens=engine.kv_tokens,
                info=engine.info,
            )
        )
        while True:
            while (message := self._connection.receive(0)) is not None:
                if isinstance(message, Shutdown):
                    getattr(engine, "remember", _nothing)()
                    return 0
                self._handle(engine, message)
            self._connection.check()
            if self._seating is not None and self._seating.form is not None:
                self._changed = True
                if not self._seating.go_on(cast(Ranked, engine), lambda message: self._handle(engine, message)):
                    return 0
            if engine.has_work:
                self._changed = True
                if not self._step(engine):
                    return 0
                self._report(engine, idle=not engine.has_work)
            else:
                self._report(engine, idle=True)
                more = getattr(engine, "tend", _nothing)()
                self._connection.idle(TEND_MS if more else None)

    def _start(self) -> EngineLike | None:
        """The engine as the front end configures it; None when that says `Shutdown` meanwhile."""
        from .. import __version__

        endpoint = self._connection.endpoint
        host = address_of_this_machine(endpoint)
        self._send(Hello(pid=os.getpid(), version=__version__, rank=self._rank.number, host=host))
        first = self._connection.receive(CONFIGURE_TIMEOUT_S)
        while first is None and self._patient:  # the first node may come much later
            first = self._connection.receive(CONFIGURE_TIMEOUT_S)
        if isinstance(first, Shutdown):
            return None
        if not isinstance(first, Configure):
            raise LostFrontEnd(f"no configuration from the front end within {CONFIGURE_TIMEOUT_S:g} s")
        config = EngineConfig(**first.config)
        if (config.ep or 1) == 1:
            return self._factory(config)
        from .seating import Seating

        # Only now: before the front end is there its name may be unknown, as of a pod that does not run yet.
        host = address_of_this_machine(endpoint)
        self._seating = Seating(config, self._rank, host, self._connection)
        self._seating.start_heartbeat()
        return self._seating.load(self._factory, first)

    def _step(self, engine: EngineLike) -> bool:
        """One step; False when the end has come while a broken group waited for the next."""
        if self._seating is None:
            self._send_deltas(engine.step())
            for report in getattr(engine, "take_reports", list)():
                self._send(report)
            return True
        from .group import RankLost

        try:
            self._send_deltas(engine.step())
        except RankLost as lost:
            return self._seating.leave(cast(Ranked, engine), lost, lambda message: self._handle(engine, message))
        for report in engine.take_reports():  # type: ignore[attr-defined]
            self._send(report)
        return True

    def _send_deltas(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self._send(Tokens(deltas=[pack_delta(delta) for delta in deltas]))

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
        elif self._seating is not None and isinstance(message, Form):
            self._seating.form = message
        elif self._seating is not None and isinstance(message, Wake):
            engine.wake(message.number)  # type: ignore[attr-defined]
        elif self._seating is not None and isinstance(message, Place):
            try:
                engine.place(message.version, message.tables)  # type: ignore[attr-defined]
            except ValueError as error:
                log.error("a placement was refused: %s", error)
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

    def _send(self, message: Any) -> None:
        self._connection.send(message)

    def _fatal(self, error: str, user: bool = False) -> None:
        try:
            self._send(Fatal(error=error, user=user))
        except LostFrontEnd as lost:
            log.error("%s; it does not know that: %s", lost, error)


def run(endpoint: str, factory: EngineFactory, parent: int | None = None, rank: Rank | None = None) -> int:
    """Connects to `endpoint` and works until the end; returns the process's exit code."""
    rank = rank or Rank()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, f"rank-{rank.number}".encode())
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
    socket.setsockopt(zmq.LINGER, int(FATAL_LINGER_S * 1000))
    set_heartbeat(socket, endpoint)
    try:
        socket.connect(endpoint)
        connection = Connection(socket, parent, endpoint)
        try:
            return Worker(connection, factory, patient=parent is not None, rank=rank).run()
        finally:
            connection.close()
    finally:
        socket.close()
        context.term()


def main(argv: Sequence[str] | None = None, factory: EngineFactory | None = None) -> int:
    """The process: signals, logging, then `run` with the engine (or another `factory`, for tests)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the front end decides
    parser = argparse.ArgumentParser(prog="moeyard.engine.worker")
    parser.add_argument("--connect", required=True, metavar="ENDPOINT", help="the front end's ZeroMQ address")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process, the parent, is gone")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="which of the ranks this is")
    parser.add_argument("--local-rank", type=int, default=0, metavar="N", help="which of this machine's ranks")
    parser.add_argument("--local-ranks", type=int, default=1, metavar="N", help="ranks on this machine")
    args = parser.parse_args(argv)
    if args.parent is not None:
        _die_with_parent()
    # A store whose host was lost is told in one line of ours; torch would add its C++ stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    rank = Rank(number=args.rank, local=args.local_rank, locals=args.local_ranks)
    return run(args.connect, factory or _make_engine, args.parent, rank)


def _nothing() -> bool:
    """What an engine without a background does there."""
    return False


def _make_engine(config: EngineConfig, seat: Any = None) -> EngineLike:
    from .engine import Engine  # heavy: after Hello, so that a slow import is not a silent start

    return Engine(config, seat)


def _die_with_parent() -> None:
    """Linux kills this process when its parent dies, even in the middle of a step; elsewhere the loop looks itself."""
    pr_set_pdeathsig = 1
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
