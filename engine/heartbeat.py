"""A rank's sign of life: a thread that goes on while the main one computes or waits, and hears when the group broke."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import zmq

from .messages import MAX_BYTES, Beat, Heard, MessageError, decode, encode
from .progress import Progress
from .wire import set_heartbeat

BEAT_INTERVAL_S = 0.5
FRONT_END_SILENCE_S = 30.0
"""How long the front end may leave beats unanswered before a rank gives up on it."""

log = logging.getLogger("moeyard.worker")


class Heartbeat(threading.Thread):
    """Tells the front end twice a second that this process runs and where its main loop is.

    A process that is stopped is silent here; one that computes for long, or waits for another rank, is not. When the
    front end does not answer for `FRONT_END_SILENCE_S` the process ends: nobody is left to work for. `on_broken(epoch)`
    is called, in this thread, with each answer that says that the group of an epoch is broken.
    """

    def __init__(self, endpoint: str, rank: int, progress: Progress, on_broken: Callable[[int], None]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._endpoint = endpoint
        self._rank = rank
        self._progress = progress
        self._on_broken = on_broken

    def run(self) -> None:
        # A context of its own: the main one is ended by the main thread, which must not wait for this one.
        connection: zmq.Socket[bytes] = zmq.Context().socket(zmq.DEALER)
        connection.setsockopt(zmq.IDENTITY, f"beat-{self._rank}".encode())
        connection.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        connection.setsockopt(zmq.LINGER, 0)
        set_heartbeat(connection, self._endpoint)
        connection.connect(self._endpoint)
        heard = last = time.monotonic()
        while True:
            here = self._progress
            beat = Beat(rank=self._rank, step=here.step, layer=here.layer, phase=here.phase, clock=time.monotonic_ns())
            if connection.poll(0, zmq.POLLOUT):
                connection.send(encode(beat))
            until = time.monotonic() + BEAT_INTERVAL_S
            while (left := until - time.monotonic()) > 0:
                if connection.poll(int(left * 1000) + 1):
                    try:
                        answer = decode(connection.recv())
                    except MessageError as error:
                        log.error("dropped an answer to a beat: %s", error)
                        continue
                    if isinstance(answer, Heard):
                        heard = time.monotonic()
                        if answer.broken:
                            self._on_broken(answer.broken)
            now = time.monotonic()
            if now - last > 4 * BEAT_INTERVAL_S:  # this process was stopped: that is not the front end's silence
                heard = now
            last = now
            if now - heard > FRONT_END_SILENCE_S:
                log.error("the front end at %s has not answered for %g s", self._endpoint, FRONT_END_SILENCE_S)
                os._exit(1)
