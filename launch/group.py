"""All ranks as the front end sees them: start, messages, a watch on their lives, recovery, stop.

What to do when is `membership`'s and the socket is `wires`'; this module carries out.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from .. import __version__
from ..engine.config import EngineConfig
from ..engine.messages import (
    Beat,
    Broken,
    Configure,
    Ended,
    Fatal,
    Heard,
    Hello,
    Joined,
    Kill,
    MessageError,
    NodeHello,
    Ping,
    Placed,
    Pong,
    Ready,
    Shutdown,
    Store,
    VersionError,
    Wake,
    decode,
    encode,
)
from . import membership
from .local import Launcher
from .membership import Membership, ranks_text
from .wires import Wires

TICK_S = 0.5
"""How often the processes are looked at."""
HASTE_S = 0.05
"""The same while a rank is known to be in trouble."""
PING_INTERVAL_S = 5.0
"""Silence after which an engine of one rank is asked whether it is there."""
SILENCE_TIMEOUT_S = 300.0
"""Silence after which an engine of one rank counts as dead. It answers between two steps, and one prefill step of a
large model on a slow machine takes minutes. Several ranks have heartbeats of their own, and `rank_timeout`."""
SHUTDOWN_TIMEOUT_S = 5.0
"""How long the ranks may take to end after `Shutdown`, before signals."""
NODE_LINGER_S = 1.0
"""How long `Shutdown` may take to reach other nodes, whose ends this process cannot see."""

log = logging.getLogger("moeyard.frontend")


class EngineError(RuntimeError):
    """The engine did not start, or ended, for a reason that is not the user's input."""


class EngineGroup:
    """Starts an engine of one or more ranks and talks to it. All methods belong to the event loop that `start` ran in.

    `on_message(rank, message)` gets what ranks that serve say: `Tokens`, `Stats`, `Placed`, `Spans`. `on_lost(rank)`
    comes as soon as a rank is known to be lost, `on_joined(rank)` when one that was lost serves again (not at the
    start), `on_death(reason)` once, when a loaded engine can no longer be used.

    `tables` is where the experts are, by the last word of the ranks; `positions` the last `Beat` of each rank;
    `clock_offset_ns` what to add to a rank's monotonic clock to get this process's.
    """

    def __init__(
        self,
        launcher: Launcher,
        on_message: Callable[[int, Any], None],
        on_lost: Callable[[int], None],
        on_joined: Callable[[int], None],
        on_death: Callable[[str], None],
        silence_timeout: float = SILENCE_TIMEOUT_S,
    ) -> None:
        self.tables: list[Any] | None = None
        self.positions: dict[int, Beat] = {}
        self.clock_offset_ns: dict[int, int] = {}
        self._launcher = launcher
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_joined = on_joined
        self._on_death = on_death
        self._silence_timeout = silence_timeout
        self._wires: Wires | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._membership: Membership | None = None
        self._config: EngineConfig | None = None
        self._loads: list[Any] | None = None
        self._closed = ""
        self._closing = False
        self._ready: dict[int, Ready] = {}
        self._nodes: dict[int, tuple[int, ...]] = {}
        self._wake_number = 0
        self._wake_due = False
        self._todo: deque[membership.Action] = deque()
        self._clock, self._looked = 0.0, time.monotonic()
        self._heard_at = self._asked_at = 0.0
        self._pings = 0
        self._doing = False
        self._uneasy = asyncio.Event()

    # State

    @property
    def state(self) -> str:
        """`loading`, `serving`, `recovering` or `dead`."""
        if self._closed:
            return "dead"
        return "loading" if self._membership is None else self._membership.state

    @property
    def dead_reason(self) -> str:
        """Why it is dead; "" until then, and while it is not started."""
        return (self._membership.dead_reason if self._membership else "") or self._closed

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that serve, in group order; while recovering those that will."""
        return () if self._membership is None else self._membership.members

    @property
    def lost(self) -> dict[int, str]:
        """Why and where each rank that does not serve was lost."""
        return {} if self._membership is None else dict(self._membership.lost)

    @property
    def trouble(self) -> str:
        """The last trouble and how it ended, for people; "" when there was none."""
        return "" if self._membership is None else self._membership.trouble

    # Life

    @property
    def ready(self) -> dict[int, Ready]:
        """What each rank said when it was loaded."""
        return dict(self._ready)

    async def start(self, config: EngineConfig, timeout: float, loads: list[Any] | None = None) -> dict[int, Ready]:
        """Starts the ranks and waits until all have loaded, at most `timeout` seconds.

        `config.ep` None means the ranks that the launcher starts. `loads` goes into each `Configure`. Raises ValueError
        with a rank's own words when the configuration or the checkpoint is refused, EngineError otherwise. After an
        error the processes are gone.
        """
        if self._closed:
            raise EngineError(self._closed)
        size = config.ep or max(self._launcher.ranks) + 1
        self._config = dataclasses.replace(config, ep=size)
        self._loads = loads
        self._membership = Membership(
            size,
            rank_timeout=config.rank_timeout if size > 1 else self._silence_timeout,
            exchange_timeout=config.collective_timeout,
            load_timeout=timeout,
            restart=config.on_rank_loss == "restart",
        )
        self._loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._check(config, size)
            endpoint = await self._launch()
            if endpoint.startswith("ipc:") and len(self._launcher.ranks) < size:
                raise ValueError(f"ep is {size}, but only {ranks_text(self._launcher.ranks)} can come to {endpoint}")
            self._wires = Wires(endpoint)
            self._looked = time.monotonic()
            self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]
            await asyncio.wait_for(self._loaded, timeout)
        except TimeoutError:
            late = "the engine did not load" if size == 1 else self._membership.missing()
            error = EngineError(f"{late} within start_timeout ({timeout:g} s)")
            await self.close()
            raise error from None
        except BaseException:
            await self.close()
            raise
        return dict(self._ready)

    async def _launch(self) -> str:
        if not self._launcher.slow_start:
            return self._launcher.start()
        try:
            endpoint = await asyncio.to_thread(self._launcher.start)
        except Exception as error:
            if self._closing:
                raise EngineError(self._closed or "the engine is stopped") from error
            raise
        if self._closing:  # it was done just before
            raise EngineError(self._closed or "the engine is stopped")
        return endpoint

    def send(self, rank: int, message: Any) -> None:
        """Sends now. Raises MessageError for what cannot be encoded; to a rank that is lost nothing is sent."""
        data = encode(message)
        if self._membership is not None and self._membership.speaks(rank) and not self.dead_reason:
            self._deliver(rank, data)

    def broadcast(self, message: Any) -> None:
        """Sends to all members."""
        for rank in self.members:
            self.send(rank, message)

    def wake(self) -> None:
        """Makes all members take part in steps until none has work. Call it after giving work to any of them.

        One message for all calls of one round of the event loop; with one member it is not needed and nothing is sent.
        """
        if len(self.members) > 1 and self.state == "serving" and not self._wake_due:
            self._wake_due = True
            asyncio.get_running_loop().call_soon(self._wake_members)

    async def close(self) -> None:
        """Ends the ranks: `Shutdown`, then signals. Again is nothing."""
        self._closing = True  # `wait_for` of Python 3.11 can swallow a cancellation
        for task in self._tasks:  # first: ranks that end now are not lost
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._wires is not None and self._membership is not None and not self._closed:
            told = set() if self.dead_reason else {*self._membership.present} & {*self._launcher.ranks}
            self._shut_down()
            deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
            while time.monotonic() < deadline and told - self._launcher.ended().keys():
                await asyncio.sleep(0.01)
        self._closed = self.dead_reason or "the engine is stopped"
        try:
            if self._launcher.slow_start:
                # Of a start in a thread, too, which cannot be cancelled. Nor can this be.
                await asyncio.shield(asyncio.to_thread(self._launcher.stop, 0))
            else:
                self._launcher.stop(0)
        finally:
            wires, self._wires = self._wires, None
            if wires is not None:
                wires.close(NODE_LINGER_S if self._nodes else 0)

    def _check(self, config: EngineConfig, size: int) -> None:
        own = self._launcher.ranks
        if size <= max(own):
            raise ValueError(f"ep is {size}, but this process is to start {ranks_text(own)}; raise --ep")
        if config.on_rank_loss == "restart" and (len(own) < size or not self._launcher.can_restart):
            raise ValueError(
                "on_rank_loss restart needs ranks that this process started; use --launcher local or ray, or"
                " --on-rank-loss continue"
            )

    def _shut_down(self) -> None:
        assert self._membership is not None
        data = encode(Shutdown())
        names = [f"rank-{rank}" for rank in self._membership.present] + [f"node-{node}" for node in self._nodes]
        for name in names:
            self._post(name, data)

    # Wires

    def _post(self, name: str, data: bytes) -> bool:
        """Whether there is a connection to take it."""
        return self._wires is not None and self._wires.post(name, data)

    def _deliver(self, rank: int, data: bytes) -> None:
        if not self._post(f"rank-{rank}", data):
            assert self._membership is not None
            self._do(self._membership.unreachable(rank, "the connection is gone", self._now()))

    def _wake_members(self) -> None:
        self._wake_due = False
        if len(self.members) > 1:
            self._rouse(self.members)

    def _rouse(self, ranks: Iterable[int]) -> None:
        self._wake_number += 1
        for rank in ranks:
            self.send(rank, Wake(number=self._wake_number))

    async def _receive(self) -> None:
        assert self._wires is not None
        while not self.dead_reason:
            kind, number, data = await self._wires.receive()
            # A message that already waits comes without a pause: this one lets what the last one brought be read.
            await asyncio.sleep(0)
            try:
                (self._take_from_node if kind == "node" else self._take_from_rank)(number, data)
            except Exception as error:  # a bug here; without this loop every request would wait for ever
                log.exception("a message of %s %d could not be handled", kind, number)
                self._die(f"the front end failed: {type(error).__name__}: {error}")

    def _take_from_rank(self, rank: int, data: bytes) -> None:
        assert self._membership is not None
        try:
            message = decode(data)
        except VersionError as error:
            self._do(self._membership.reject(rank, f"is of another build: {error}", self._now()))
            return
        except MessageError as error:
            if self._membership.speaks(rank):
                why = f"sent what this front end cannot read: {error}"
                self._do(self._membership.reject(rank, why, self._now()))
            else:
                self._ignore(f"rank-{rank}", str(error))
            return
        if isinstance(message, Hello):
            self._greet(rank, message)
            return
        counts = self._membership.speaks(rank)
        if counts:
            self._heard_at = self._now()
            self._note(rank, message)
        self._do(self._membership.message(rank, message, self._now()))
        if counts and not isinstance(message, Beat | Broken | Fatal | Joined | Pong | Ready | Store):
            self._on_message(rank, message)

    def _greet(self, rank: int, hello: Hello) -> None:
        assert self._membership is not None
        if hello.rank != rank:
            self._ignore(f"rank-{rank}", f"it calls itself rank {hello.rank}")
        elif hello.version != __version__:
            why = f"is version {hello.version}, the front end {__version__}"
            self._do(self._membership.reject(rank, why, self._now()))
        else:
            self.clock_offset_ns.pop(rank, None)
            self._do(self._membership.hello(rank, self._now()))

    def _note(self, rank: int, message: Any) -> None:
        """Keeps what a rank says of itself, before anybody acts on it."""
        if isinstance(message, Beat):
            heard = time.monotonic_ns()
            self.positions[rank] = message
            # The fastest message came with the least delay: the offset is at most this.
            offset = heard - message.clock
            self.clock_offset_ns[rank] = min(offset, self.clock_offset_ns.get(rank, offset))
            assert self._membership is not None
            answer = Heard(clock=message.clock, heard=heard, broken=self._membership.broken)
            self._post(f"beat-{rank}", encode(answer))
        elif isinstance(message, Ready):
            self._ready[rank] = message
            self.tables = message.info.get("tables") or self.tables
        elif isinstance(message, Placed | Joined):
            self.tables = message.tables or self.tables

    def _take_from_node(self, node: int, data: bytes) -> None:
        assert self._membership is not None
        try:
            message = decode(data)
        except VersionError as error:
            self._refuse_node(node, f"node {node} is of another build: {error}")
            return
        except MessageError as error:
            self._ignore(f"node-{node}", str(error))
            return
        if isinstance(message, NodeHello):
            if message.version != __version__:
                self._refuse_node(node, f"node {node} is version {message.version}, the front end {__version__}")
            elif node in self._nodes:
                self._refuse_node(node, f"node {node} came twice: is the command running twice there?")
            else:
                self._nodes[node] = tuple(message.ranks)
        elif node not in self._nodes:
            self._post(f"node-{node}", encode(Shutdown()))  # left over from another run
        elif isinstance(message, Ping):
            self._post(f"node-{node}", encode(Pong(number=message.number)))
        elif isinstance(message, Ended) and message.rank in self._nodes[node]:
            self._do(self._membership.ended({message.rank: message.how}, self._now()))

    def _refuse_node(self, node: int, why: str) -> None:
        self._post(f"node-{node}", encode(Shutdown()))
        if self.state == "loading":
            self._die(why)
        else:
            log.error("%s", why)

    def _ignore(self, name: str, why: str) -> None:
        if self._wires is not None:
            self._wires.ignore(name.encode(), why)

    # The watch

    def _now(self) -> float:
        """Seconds that this process was awake: when it was stopped for a while, that is not the ranks' silence."""
        now = time.monotonic()
        self._clock += min(now - self._looked, 2 * TICK_S)
        self._looked = now
        return self._clock

    async def _watch(self) -> None:
        """Notices processes that ended and waits that took too long; asks a single rank whether it is there."""
        assert self._membership is not None
        while not self.dead_reason and not self._closing:
            if self._membership.calm:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._uneasy.wait(), TICK_S)
                self._uneasy.clear()
            else:
                await asyncio.sleep(HASTE_S)
            now = self._now()
            try:
                self._do(self._membership.ended(self._launcher.ended(), now))
                self._ask(now)
            except Exception as error:  # a launcher that cannot start a rank again, or a bug here
                log.exception("the ranks cannot be watched")
                self._die(f"the front end failed: {type(error).__name__}: {error}")

    def _ask(self, now: float) -> None:
        """`Ping` to a single rank that is silent. It has no heartbeat; several have."""
        assert self._membership is not None
        if not self._membership.alone or self.state != "serving":
            return
        if now - max(self._heard_at, self._asked_at) >= PING_INTERVAL_S:
            self._asked_at, self._pings = now, self._pings + 1
            self.send(0, Ping(number=self._pings))

    # Actions

    def _do(self, actions: list[membership.Action]) -> None:
        """Carries out in order; what an action brings about comes after those that were there."""
        self._todo.extend(actions)
        if self._doing:
            return
        self._doing = True
        try:
            while self._todo:
                self._carry_out(self._todo.popleft())
        finally:
            self._doing = False
        if self._membership is not None and not self._membership.calm:
            self._uneasy.set()

    def _carry_out(self, action: membership.Action) -> None:
        match action:
            case membership.Welcome(rank, again):
                assert self._config is not None
                tables = self.tables if again else None
                self.send(rank, Configure(config=self._config.to_dict(), tables=tables, loads=self._loads))
            case membership.Send(rank, message):
                if self._membership is not None and self._membership.speaks(rank):
                    self.send(rank, message)
                else:
                    self._post(f"rank-{rank}", encode(message))
            case membership.Rouse(ranks):
                self._rouse(ranks)
            case membership.Kill(rank):
                self._kill(rank)
            case membership.Restart(rank):
                self._launcher.restart(rank)
            case membership.Lost(rank):
                self._on_lost(rank)
            case membership.Serving(back):
                self._serve(back)
            case membership.Say(text, bad):
                log.log(logging.ERROR if bad else logging.WARNING, "%s", text)
            case membership.Dead(reason, user):
                self._end(reason, ValueError(reason) if user else EngineError(reason))

    def _kill(self, rank: int) -> None:
        if rank in self._launcher.ranks:
            self._launcher.kill(rank)
            return
        for node, ranks in self._nodes.items():
            if rank in ranks:
                self._post(f"node-{node}", encode(Kill(rank=rank)))

    def _serve(self, back: tuple[int, ...]) -> None:
        if not self._loaded.done():
            self._loaded.set_result(None)
            return
        for rank in back:
            self._on_joined(rank)
        self._wake_members()

    def _die(self, reason: str) -> None:
        assert self._membership is not None
        self._do(self._membership.die(reason))

    def _end(self, reason: str, error: Exception) -> None:
        if self._loaded.done():
            log.error("%s", reason)
            self._on_death(reason)
        else:
            self._loaded.set_exception(error)
