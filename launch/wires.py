"""The front end's socket for ranks and nodes: a ROUTER, whose frames are `[identity, data]`.

`rank-N` is a rank's main loop, `beat-N` its heartbeat, `node-N` a process that starts ranks on another machine. Beyond
one machine it is open to whoever can reach the port: keep that inside the cluster, as the ranks' own exchanges.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import zmq
import zmq.asyncio

from ..engine.messages import MAX_BYTES
from ..engine.wire import set_heartbeat

MAX_STRANGERS = 1000
"""How many unknown senders are told of in the log; more are ignored without a word."""

_NAME = re.compile(rb"(rank|beat|node)-(\d{1,9})")

log = logging.getLogger("moeyard.frontend")


class Wires:
    """A socket bound to `endpoint`. Raises ValueError, one line, when that is not possible."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = socket = self._context.socket(zmq.ROUTER)
        self._strangers: set[bytes] = set()
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        socket.setsockopt(zmq.SNDHWM, 0)  # what is sent is bounded by the queue of requests
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a rank that was started again, or connects again, is itself
        set_heartbeat(socket, endpoint)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close(0)
            raise ValueError(
                f"cannot listen for ranks on {endpoint.removeprefix('tcp://')}: {os.strerror(error.errno or 0)};"
                " choose another port with --cluster-port"
            ) from None

    def post(self, name: str, data: bytes) -> bool:
        """Sends now. False when there is no connection to take it."""
        # With NOBLOCK and no high-water mark the future is done: it failed only when there is no connection.
        sent: Any = self._socket.send_multipart([name.encode(), data], zmq.NOBLOCK)
        return sent.exception() is None

    async def receive(self) -> tuple[str, int, bytes]:
        """The next message's kind ("rank", "beat" or "node"), number and data."""
        while True:
            identity, *frames = await self._socket.recv_multipart()
            name = _NAME.fullmatch(identity)
            if name is not None and len(frames) == 1:
                return name[1].decode(), int(name[2]), frames[0]
            self.ignore(identity, "it is no rank")

    def ignore(self, identity: bytes, why: str) -> None:
        """What came from `identity` is nothing of ours; told once for each."""
        if identity not in self._strangers and len(self._strangers) < MAX_STRANGERS:
            self._strangers.add(identity)
            log.error("messages of %r are ignored: %s", identity, why)

    def close(self, linger_s: float) -> None:
        """What was sent gets `linger_s` seconds to leave."""
        self._socket.close(linger=int(linger_s * 1000))
        self._context.term()
