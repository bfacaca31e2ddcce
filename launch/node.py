"""What `moeyard serve` runs on a node that is not the first: it starts this node's ranks and ends with them.

The ranks talk to the front end, on the first node, by themselves. This process has a connection of its own there: it
tells how ranks ended, and ends a rank on demand.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import zmq

from .. import __version__
from ..engine.messages import (
    MAX_BYTES,
    Ended,
    Kill,
    MessageError,
    NodeHello,
    Ping,
    Pong,
    Shutdown,
    VersionError,
    decode,
    encode,
)
from ..engine.wire import set_heartbeat
from .local import Launcher, LocalLauncher
from .membership import ranks_text
from .rendezvous import Place

POLL_MS = 200
"""How often the processes are looked at."""
PING_INTERVAL_S = 2.0
LEADER_TIMEOUT_S = 60.0
"""Silence after which the first node counts as gone, once it has answered; before, it is `start_timeout`."""
SHUTDOWN_TIMEOUT_S = 5.0
"""How long the ranks may take to end by themselves, after the front end's `Shutdown`."""
LINGER_MS = 1000
"""How long the last messages may take to leave."""

log = logging.getLogger("moeyard.node")


def run(
    place: Place,
    start_timeout: float,
    drain_timeout: float = 0.0,
    *,
    command: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Starts the ranks of `place` and stays until they end, the first node says so, or SIGTERM or SIGINT.

    What stops a job signals all its nodes at once, and the front end then lets requests finish, for `drain_timeout`
    seconds. They need these ranks: so the first signal only bounds the wait for the front end's word, once it has
    answered, and the second ends at once.

    Returns the exit code: 0 when told to stop, 1 when the ranks ended by themselves or the first node does not answer:
    for `start_timeout` seconds before its first answer, later for `LEADER_TIMEOUT_S`. `command` and `env` are
    `LocalLauncher`'s. Belongs to the main thread, for the signals.
    """
    assert not place.leader
    launcher = LocalLauncher(
        ranks=place.ranks,
        local_ranks=place.local_ranks,
        local_count=place.local_count,
        connect=f"tcp://{place.endpoint}",
        command=command,
        env=env,
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, f"node-{place.node}".encode())
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    set_heartbeat(socket, "tcp://")
    try:
        with _signals() as stopped:
            socket.connect(f"tcp://{place.endpoint}")
            launcher.start()
            log.info("node %d of %d: %s, for the front end at %s", place.node, place.nodes, _of(place), place.endpoint)
            return Node(socket, launcher, place, start_timeout, drain_timeout, stopped).run()
    finally:
        launcher.stop(0)
        socket.close()
        context.term()


class Node:
    """The loop between the front end's messages and the processes here. `stopped` gets the signals that come."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        launcher: Launcher,
        place: Place,
        start_timeout: float,
        drain_timeout: float,
        stopped: list[int],
    ) -> None:
        self._socket = socket
        self._launcher = launcher
        self._place = place
        self._stopped = stopped
        self._told: dict[int, str] = {}  # the ends that the front end knows
        self._heard_at = time.monotonic()
        self._answered = False
        self._patience = start_timeout
        self._drain_timeout = drain_timeout
        self._stop_at: float | None = None
        self._pinged_at = -float("inf")
        self._code: int | None = None

    def run(self) -> int:
        """Works until the end and returns the exit code."""
        self._send(NodeHello(node=self._place.node, version=__version__, ranks=list(self._place.ranks)))
        while self._code is None:
            if self._stopped:
                self._obey_signals()
            self._ping()
            self._tell_ends()
            if self._socket.poll(POLL_MS):
                self._take(self._socket.recv())
        return self._code

    def _obey_signals(self) -> None:
        name, now = signal.Signals(self._stopped[-1]).name, time.monotonic()
        if self._stop_at is None:
            # Past the front end's own wait, so that its word comes first.
            wait = self._drain_timeout + SHUTDOWN_TIMEOUT_S if self._answered and self._drain_timeout else 0.0
            self._stop_at = now + wait
            if wait:
                log.info(
                    "%s: %s may work for %g s more, while requests finish; a second signal ends at once",
                    name,
                    _of(self._place),
                    wait,
                )
        if len(self._stopped) > 1 or now >= self._stop_at:
            log.info("%s: ending %s", name, _of(self._place))
            self._launcher.stop(0)
            self._code = 0

    def _ping(self) -> None:
        now = time.monotonic()
        if now - self._pinged_at >= PING_INTERVAL_S:
            # What would have come while this process was stopped is not the other side's silence.
            if now - self._pinged_at < 2 * PING_INTERVAL_S and now - self._heard_at >= self._patience:
                self._end(1, f"the front end at {self._place.endpoint} has not answered for {self._patience:g} s")
            self._pinged_at = now
            self._send(Ping(number=0))

    def _tell_ends(self) -> None:
        ended = self._launcher.ended()
        for rank, how in ended.items():
            if rank not in self._told:
                self._told[rank] = how
                log.info("rank %d ended (%s)", rank, how)
                self._send(Ended(rank=rank, how=how))
        if self._code is None and len(ended) == len(self._launcher.ranks):
            orderly = all(how == "exit code 0" for how in ended.values())
            self._end(0 if orderly else 1, f"{_of(self._place)} of this node ended")

    def _take(self, data: bytes) -> None:
        try:
            message: Any = decode(data)
        except VersionError as error:
            self._end(1, f"the front end at {self._place.endpoint} is of another build: {error}")
            return
        except MessageError as error:
            log.error("dropped a message: %s", error)
            return
        self._heard_at = time.monotonic()
        if isinstance(message, Pong):
            self._answered = True
            self._patience = LEADER_TIMEOUT_S
        elif isinstance(message, Kill) and message.rank in self._launcher.ranks:
            log.error("the front end ends rank %d", message.rank)
            self._launcher.kill(message.rank)
        elif isinstance(message, Shutdown):
            log.info("the front end ended this node")
            self._launcher.stop(SHUTDOWN_TIMEOUT_S)
            self._code = 0
        else:
            log.error("dropped %r, which a node does not take", message)

    def _send(self, message: Any) -> None:
        # Without a connection messages wait for one; past the socket's limit of 1,000 there is none, and `_ping` ends.
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(message), zmq.NOBLOCK)

    def _end(self, code: int, why: str) -> None:
        (log.error if code else log.info)("%s", why)
        self._code = code


def _of(place: Place) -> str:
    return ranks_text(place.ranks)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that gets the SIGTERM and SIGINT that come."""
    came: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
