"""A rank's connection to the front end: messages in and out, and the signs that nobody is there to work for."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import Any

import zmq

from .messages import MessageError, VersionError, decode, encode

IDLE_POLL_MS = 1000
"""Longest sleep without work; then the parent process is looked at."""
SEND_TIMEOUT_S = 60.0
"""How long a message may wait for a front end that does not read."""

log = logging.getLogger("moeyard.worker")


class LostFrontEnd(RuntimeError):
    """The front end is gone or does not answer: nobody is left to work for."""


class Connection:
    """Messages over a connected DEALER `socket`. `parent` is the pid to live as long as.

    `deferred` are messages that came while they could not be followed: they are received before any other.
    """

    def __init__(self, socket: zmq.Socket[bytes], parent: int | None, endpoint: str) -> None:
        self.endpoint = endpoint
        self.deferred: deque[Any] = deque()
        self._socket = socket
        self._parent = parent
        # Between machines a lost connection comes back by itself, but what was on it is gone: that is the end.
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) if endpoint.startswith("tcp://") else None

    def close(self) -> None:
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)

    def receive(self, timeout_s: float) -> Any:
        """The next message, or None when there is none in time."""
        return self.deferred.popleft() if self.deferred else self.receive_new(timeout_s)

    def receive_new(self, timeout_s: float) -> Any:
        """The same without those that are deferred. What cannot be read is logged and dropped."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            if not self._socket.poll(min(left_ms, IDLE_POLL_MS)):
                self.check()
                if left_ms <= IDLE_POLL_MS:
                    return None
                continue
            try:
                return decode(self._socket.recv())
            except VersionError:
                raise
            except MessageError as error:
                log.error("dropped a message: %s", error)

    def idle(self, most_ms: int | None = None) -> None:
        """Sleeps until there is a message, at most `most_ms`, or `IDLE_POLL_MS`."""
        self._socket.poll(IDLE_POLL_MS if most_ms is None else most_ms)

    def send(self, message: Any) -> None:
        data = encode(message)
        deadline = time.monotonic() + SEND_TIMEOUT_S
        while not self._socket.poll(IDLE_POLL_MS, zmq.POLLOUT):
            self.check()
            if time.monotonic() > deadline:
                raise LostFrontEnd(f"the front end has read nothing for {SEND_TIMEOUT_S:g} s")
        self._socket.send(data)

    def check(self) -> None:
        """Raises LostFrontEnd when the front end or the parent is known to be gone."""
        if self._parent is not None and os.getppid() != self._parent:
            raise LostFrontEnd(f"the process that started this one ({self._parent}) is gone")
        if self._monitor is not None and self._monitor.poll(0):
            raise LostFrontEnd(f"the connection to the front end at {self.endpoint} was lost")
