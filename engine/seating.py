"""A rank's way into groups: the answers to `Form`, the store of the first member, and the sign of life meanwhile."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

from .config import EngineConfig
from .group import RankGroup, make_store
from .memory import choose_device
from .messages import MAX_BYTES, Beat, Configure, Form, Heard, MessageError, Store, decode, encode
from .progress import Progress
from .wire import set_heartbeat

if TYPE_CHECKING:
    from .parallel import Seat
    from .worker import Rank

BEAT_INTERVAL_S = 0.5
FRONT_END_SILENCE_S = 30.0
"""How long the front end may leave beats unanswered before a rank gives up on it."""
FORM_TIMEOUT_S = 300.0
"""How long a rank outside of a group waits for the next `Form`, at least: others may load meanwhile."""

log = logging.getLogger("moeyard.worker")


class Seating:
    """Where this rank sits: `group` once it is in one, `form` while a `Form` waits to be followed."""

    def __init__(self, config: EngineConfig, rank: Rank, host: str, endpoint: str) -> None:
        self.config = config
        self.rank = rank
        self.progress = Progress(recording=config.trace is not None)
        self.form: Form | None = None
        self.group: Any = None
        self.while_waiting: Callable[[], None] = lambda: None
        self.form_timeout_s = max(FORM_TIMEOUT_S, 4 * config.collective_timeout)
        self._host = host
        self._endpoint = endpoint
        self._stores: dict[int, Any] = {}

    def start_heartbeat(self) -> None:
        Heartbeat(self._endpoint, self.rank.number, self.progress).start()

    def take(self, form: Form) -> Store | None:
        """Follows a `Form`: the answer to send, or None when this rank is in the group now.

        Raises RankLost when the others do not come.
        """
        if self.group is not None:
            self.group.close()
            self.group = None
        if not form.address:
            store, address = make_store(self._host)
            self._stores = {form.epoch: store}
            return Store(epoch=form.epoch, address=address)
        self.group = RankGroup(
            epoch=form.epoch,
            members=form.members,
            rank=self.rank.number,
            address=form.address,
            device=choose_device(self.config.device, self.rank.local, self.rank.locals),
            timeout_s=self.config.collective_timeout,
            progress=self.progress,
            store=self._stores.get(form.epoch),
            host=self._host,
            while_waiting=self.while_waiting,
        )
        return None

    def seat(self, configure: Configure) -> Seat:
        from .parallel import Seat

        return Seat(
            group=self.group,
            local_rank=self.rank.local,
            local_ranks=self.rank.locals,
            tables=configure.tables,
            loads=configure.loads,
        )


class Heartbeat(threading.Thread):
    """Tells the front end twice a second that this process runs and where its main loop is.

    A process that is stopped is silent here; one that computes for long, or waits for another rank, is not. When the
    front end does not answer for `FRONT_END_SILENCE_S` the process ends: nobody is left to work for.
    """

    def __init__(self, endpoint: str, rank: int, progress: Progress) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._endpoint = endpoint
        self._rank = rank
        self._progress = progress

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
                        if isinstance(decode(connection.recv()), Heard):
                            heard = time.monotonic()
                    except MessageError as error:
                        log.error("dropped an answer to a beat: %s", error)
            now = time.monotonic()
            if now - last > 4 * BEAT_INTERVAL_S:  # this process was stopped: that is not the front end's silence
                heard = now
            last = now
            if now - heard > FRONT_END_SILENCE_S:
                log.error("the front end at %s has not answered for %g s", self._endpoint, FRONT_END_SILENCE_S)
                os._exit(1)
