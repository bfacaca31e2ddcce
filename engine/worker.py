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
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from .config import EngineConfig
from .messages import (
    MAX_BYTES,
    Abort,
    Broken,
    Configure,
    Fatal,
    Form,
    Hello,
    Joined,
    MessageError,
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
    decode,
    encode,
    pack_delta,
)
from .wire import address_of_this_machine, set_heartbeat

if TYPE_CHECKING:
    from .seating import Seating

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


class LostFrontEnd(RuntimeError):
    """The front end is gone or does not answer: nobody is left to work for."""


class Worker:
    """The loop between a connected socket and an engine made by `factory`. `parent` is the pid to live as long as."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        factory: EngineFactory,
        parent: int | None,
        rank: Rank | None = None,
        endpoint: str = "",
    ) -> None:
        self._socket = socket
        self._factory = factory
        self._parent = parent
        self._rank = rank or Rank()
        self._endpoint = endpoint
        self._seating: Seating | None = None
        self._deferred: deque[Any] = deque()
        # Between machines a lost connection comes back by itself, but what was on it is gone: that is the end.
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) if endpoint.startswith("tcp://") else None
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

    def close(self) -> None:
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)

    def _serve(self) -> int:
        from .. import __version__

        host = address_of_this_machine(self._endpoint)
        self._send(Hello(pid=os.getpid(), version=__version__, rank=self._rank.number, host=host))
        first = self._receive(CONFIGURE_TIMEOUT_S)
        while first is None and self._parent is not None:
            # The first node may come much later. The parent waits for it, `start_timeout`, and then ends this process.
            first = self._receive(CONFIGURE_TIMEOUT_S)
        if isinstance(first, Shutdown):
            return 0
        if not isinstance(first, Configure):
            raise LostFrontEnd(f"no configuration from the front end within {CONFIGURE_TIMEOUT_S:g} s")
        try:
            config = EngineConfig(**first.config)
            if (config.ep or 1) > 1:
                engine = self._start_ranked(config, first)
                if engine is None:
                    return 0
            else:
                engine = self._factory(config)
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
            if self._seating is not None and self._seating.form is not None and not self._regroup(engine):
                return 0
            if engine.has_work:
                self._changed = True
                if not self._step(engine):
                    return 0
                self._report(engine, idle=not engine.has_work)
            else:
                self._report(engine, idle=True)
                self._socket.poll(IDLE_POLL_MS)

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
            return self._broken(engine, lost)
        for report in engine.take_reports():  # type: ignore[attr-defined]
            self._send(report)
        return True

    def _send_deltas(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self._send(Tokens(deltas=[pack_delta(delta) for delta in deltas]))

    # One of several ranks

    def _start_ranked(self, config: EngineConfig, configure: Configure) -> EngineLike | None:
        """Joins the first group and loads; None when the front end says `Shutdown` meanwhile."""
        from .seating import Seating

        # Only now: before the front end is there its name may be unknown, as of a pod that does not run yet.
        host = address_of_this_machine(self._endpoint)
        self._seating = seating = Seating(config, self._rank, host, self._endpoint)
        seating.while_waiting = self._while_waiting
        seating.start_heartbeat()
        if not self._wait_for_group(None):
            return None
        self._send(Joined(epoch=seating.group.epoch))
        return self._factory(config, seat=seating.seat(configure))

    def _while_waiting(self) -> None:
        """In the middle of a long wait for another rank: news of yet another loss ends the wait."""
        while self._socket.poll(0):
            message = self._receive(0, deferred=False)
            if isinstance(message, Shutdown):
                log.info("told to stop while waiting for the other ranks")
                os._exit(0)
            if isinstance(message, Ping):
                self._send(Pong(number=message.number))
            elif message is not None:
                self._deferred.append(message)
                if isinstance(message, Wake | Form):
                    raise RuntimeError("another rank was lost while this one waited")
        self._check_parent()

    def _broken(self, engine: EngineLike, lost: Any) -> bool:
        seating = self._seating
        assert seating is not None
        while (message := self._receive(0, deferred=False)) is not None:
            self._deferred.append(message)
        if any(isinstance(message, Shutdown) for message in self._deferred):
            return False  # the others were told to end, too
        log.warning("%s", lost)
        self._say_broken(seating.group, lost)
        return self._regroup(engine)

    def _say_broken(self, group: Any, lost: Any) -> None:
        """Leaves the group, so that no other rank waits for this one, and tells the front end.

        Gloo closes the connections when nothing holds an exchange any more, and the error's frames do: with four ranks
        in a ring, two would otherwise wait for each other until their timeout.
        """
        error: BaseException | None = lost
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        group.close()
        self._send(Broken(epoch=group.epoch, step=lost.step, layer=lost.layer, phase=lost.phase, error=lost.reason))

    def _regroup(self, engine: EngineLike) -> bool:
        """Goes on in the next group, or the one after when that breaks too; False on `Shutdown`."""
        from .group import RankLost

        seating = self._seating
        assert seating is not None
        while True:
            if not self._wait_for_group(engine):
                return False
            try:
                tables = engine.join(seating.group)  # type: ignore[attr-defined]
            except RankLost as lost:
                self._say_broken(seating.group, lost)
                continue
            self._changed = True
            self._send(Joined(epoch=seating.group.epoch, tables=tables))
            return True

    def _wait_for_group(self, engine: EngineLike | None) -> bool:
        """Takes `Form` messages until this rank is in a group; other messages as usual. False on `Shutdown`."""
        from .group import RankLost

        seating = self._seating
        assert seating is not None
        deadline = time.monotonic() + seating.form_timeout_s
        while True:
            while seating.form is None:
                message = self._receive(1.0)
                if isinstance(message, Shutdown):
                    return False
                if isinstance(message, Form):
                    seating.form = message
                elif message is not None and engine is not None:
                    self._handle(engine, message)
                elif message is not None and not isinstance(message, Wake):
                    log.error("dropped a %s before the group was formed", type(message).__name__)
                if time.monotonic() > deadline:
                    raise LostFrontEnd(f"no group was formed within {seating.form_timeout_s:g} s")
            form, seating.form = seating.form, None
            try:
                answer = seating.take(form)
            except RankLost as lost:
                self._send(
                    Broken(epoch=form.epoch, step=lost.step, layer=lost.layer, phase=lost.phase, error=lost.reason)
                )
                continue
            if answer is None:
                return True
            self._send(answer)

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

    def _receive(self, timeout_s: float, deferred: bool = True) -> Any:
        """The next message, or None when there is none in time. What cannot be read is logged and dropped."""
        if deferred and self._deferred:
            return self._deferred.popleft()
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
        if self._monitor is not None and self._monitor.poll(0):
            raise LostFrontEnd(f"the connection to the front end at {self._endpoint} was lost")


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
        worker = Worker(socket, factory, parent, rank, endpoint)
        try:
            return worker.run()
        finally:
            worker.close()
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
