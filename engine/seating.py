"""A rank's way through groups: joining the first, leaving one that broke, joining the next."""

from __future__ import annotations

import gc
import logging
import os
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .config import EngineConfig
from .connection import Connection, LostFrontEnd
from .group import RankGroup, RankLost, make_store
from .heartbeat import Heartbeat
from .memory import choose_device
from .messages import Broken, Configure, Form, Joined, Ping, Pong, Shutdown, Store, Wake
from .parallel import Seat
from .progress import Progress

if TYPE_CHECKING:
    from .worker import Rank

FORM_TIMEOUT_S = 300.0
"""How long a rank outside of a group waits for the next `Form`, at least: others may load meanwhile."""

log = logging.getLogger("moeyard.worker")

Engine = TypeVar("Engine")


class Joins(Protocol):
    """What the way through groups needs of an engine."""

    def join(self, group: Any) -> list[Any]: ...


class Seating:
    """Where this rank sits: `group` once it is in one or forms it, `form` while a `Form` waits to be followed.

    `broken` is the newest epoch that the front end called broken, as the heartbeat heard.
    """

    def __init__(self, config: EngineConfig, rank: Rank, host: str, connection: Connection) -> None:
        self.config = config
        self.rank = rank
        self.progress = Progress(recording=config.trace is not None)
        self.form: Form | None = None
        self.group: RankGroup | None = None
        self.broken = 0
        self.form_timeout_s = max(FORM_TIMEOUT_S, 4 * config.collective_timeout)
        self._host = host
        self._connection = connection
        self._stores: dict[int, Any] = {}

    def start_heartbeat(self) -> None:
        Heartbeat(self._connection.endpoint, self.rank.number, self.progress, self.hear_broken).start()

    def hear_broken(self, epoch: int) -> None:
        """The front end says that the group of `epoch` is broken: the main thread leaves it. For any thread."""
        self.broken = max(self.broken, epoch)
        self._leave_if_broken()

    def _leave_if_broken(self) -> None:
        # Either this is called after `group` was set, or whoever sets it calls this afterwards.
        group = self.group
        if group is not None and group.epoch <= self.broken:
            group.abort()

    # What the worker's loop calls

    def load(self, factory: Callable[..., Engine], configure: Configure) -> Engine | None:
        """Joins the first group and loads with `factory(config, seat=...)`; None when `Shutdown` comes meanwhile.

        Another rank may be lost before this one has loaded: that is no failure of this one, which begins again.
        """
        while self._join(None):
            group = self._group
            self._connection.send(Joined(epoch=group.epoch))
            seat = Seat(
                group=group,
                local_rank=self.rank.local,
                local_ranks=self.rank.locals,
                tables=configure.tables,
                loads=configure.loads,
            )
            try:
                return factory(self.config, seat=seat)
            except RankLost as lost:
                self._say_broken(lost)
            gc.collect()  # what was loaded makes room for the next
        return None

    def leave(self, engine: Joins, lost: RankLost, handle: Callable[[Any], None]) -> bool:
        """The group broke in a step: goes on in the next one. False when the end has come."""
        while (message := self._connection.receive_new(0)) is not None:
            self._connection.deferred.append(message)
        if any(isinstance(message, Shutdown) for message in self._connection.deferred):
            return False  # the others were told to end, too
        self._say_broken(lost)
        return self.go_on(engine, handle)

    def go_on(self, engine: Joins, handle: Callable[[Any], None]) -> bool:
        """Goes on in the next group, or the one after when that breaks too; False on `Shutdown`.

        `handle` gets the messages that are not about groups.
        """
        while self._join(handle):
            try:
                tables = engine.join(self._group)
            except RankLost as lost:
                self._say_broken(lost)
                continue
            self._connection.send(Joined(epoch=self._group.epoch, tables=tables))
            return True
        return False

    # The way in and out

    @property
    def _group(self) -> RankGroup:
        assert self.group is not None
        return self.group

    def _join(self, handle: Callable[[Any], None] | None) -> bool:
        """Follows `Form` messages until this rank is in a group. False on `Shutdown`."""
        deadline = time.monotonic() + self.form_timeout_s
        while True:
            while self.form is None:
                message = self._connection.receive(1.0)
                if isinstance(message, Shutdown):
                    return False
                if isinstance(message, Form):
                    self.form = message
                elif message is not None and handle is not None:
                    handle(message)
                elif message is not None and not isinstance(message, Wake):
                    log.error("dropped a %s before the group was formed", type(message).__name__)
                if time.monotonic() > deadline:
                    raise LostFrontEnd(f"no group was formed within {self.form_timeout_s:g} s")
            form, self.form = self.form, None
            try:
                answer = self.take(form)
            except RankLost as lost:
                self._send_broken(form.epoch, lost)
                continue
            if answer is None:
                return True
            self._connection.send(answer)

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
        _, _, port = self._connection.endpoint.rpartition(":")
        try:
            RankGroup(
                epoch=form.epoch,
                members=form.members,
                rank=self.rank.number,
                address=form.address,
                device=choose_device(self.config.device, self.rank.local, self.rank.locals),
                timeout_s=self.config.collective_timeout,
                progress=self.progress,
                store=self._stores.get(form.epoch),
                host=self._host,
                while_waiting=self._while_waiting,
                on_begin=self._sit,
                spared_ports=[int(port)] if port.isdecimal() else [],
            )
        except RankLost:
            self._group.close()
            self.group = None
            raise
        return None

    def _sit(self, group: RankGroup) -> None:
        self.group = group
        self._leave_if_broken()

    def _while_waiting(self) -> None:
        """In the middle of a long wait for another rank: news of yet another loss ends the wait."""
        while (message := self._connection.receive_new(0)) is not None:
            if isinstance(message, Shutdown):
                log.info("told to stop while waiting for the other ranks")
                os._exit(0)
            if isinstance(message, Ping):
                self._connection.send(Pong(number=message.number))
            else:
                self._connection.deferred.append(message)
                if isinstance(message, Wake | Form):
                    raise RuntimeError("another rank was lost while this one waited")
        self._connection.check()

    def _say_broken(self, lost: RankLost) -> None:
        """Leaves the group, so that no other rank waits for this one, and tells the front end.

        Gloo closes the connections when nothing holds an exchange any more, and the error's frames do: with four ranks
        in a ring, two would otherwise wait for each other until their timeout.
        """
        log.warning("%s", lost)
        error: BaseException | None = lost
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        self._group.close()
        self._send_broken(self._group.epoch, lost)

    def _send_broken(self, epoch: int, lost: RankLost) -> None:
        self._connection.send(
            Broken(epoch=epoch, step=lost.step, layer=lost.layer, phase=lost.phase, error=lost.reason, told=lost.told)
        )
