"""The front end's end of the wire to one engine process: start, messages, a watch on its life, stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from .. import __version__
from ..engine.config import EngineConfig
from ..engine.messages import (
    MAX_BYTES,
    Configure,
    Fatal,
    Hello,
    MessageError,
    Ping,
    Pong,
    Ready,
    Shutdown,
    decode,
    encode,
)
from .local import Launcher

TICK_S = 0.5
"""How often the process is looked at."""
PING_INTERVAL_S = 5.0
"""Silence after which the engine is asked whether it is there."""
SILENCE_TIMEOUT_S = 300.0
"""Silence after which the engine counts as dead. It answers between two steps, and one prefill step of a large model on
a slow machine takes minutes."""
LAST_WORDS_S = 0.3
"""How long messages of a process that ended may still be on the way."""
SHUTDOWN_TIMEOUT_S = 5.0
"""How long the engine may take to end after `Shutdown`, before signals."""

log = logging.getLogger("moeyard.frontend")


class EngineError(RuntimeError):
    """The engine did not start, or ended, for a reason that is not the user's input."""


class EngineLink:
    """Starts an engine through `launcher` and talks to it. All methods belong to the event loop that `start` ran in.

    `on_message` gets each `Tokens` and `Stats`; `on_death` gets the reason, once, when a loaded engine can no longer be
    used. `dead_reason` is "" until then, and while the engine is not started.
    """

    def __init__(
        self,
        launcher: Launcher,
        on_message: Callable[[Any], None],
        on_death: Callable[[str], None],
        silence_timeout: float = SILENCE_TIMEOUT_S,
    ) -> None:
        self.dead_reason = ""
        self._launcher = launcher
        self._on_message = on_message
        self._on_death = on_death
        self._silence_timeout = silence_timeout
        self._silent_s = 0.0
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._config: EngineConfig | None = None

    async def start(self, config: EngineConfig, timeout: float) -> Ready:
        """Starts the process and waits until the model is loaded, at most `timeout` seconds.

        Raises ValueError with the engine's own words when the configuration or the checkpoint is refused, EngineError
        otherwise. After an error the process is gone.
        """
        if self.dead_reason:
            raise EngineError(self.dead_reason)
        self._config = config
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        try:
            endpoint = self._launcher.start()
            self._context = zmq.asyncio.Context()
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
            self._socket.setsockopt(zmq.SNDHWM, 0)  # what is sent is bounded by the queue of requests
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.bind(endpoint)
            self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]
            return await asyncio.wait_for(self._ready, timeout)
        except TimeoutError:
            error = EngineError(f"the engine did not load within start_timeout ({timeout:g} s)")
            await self.close()
            raise error from None
        except BaseException:
            await self.close()
            raise

    def send(self, message: Any) -> None:
        """Sends now. Raises MessageError for what cannot be encoded; to a dead engine nothing is sent."""
        data = encode(message)
        if self._socket is None or self.dead_reason:
            return
        # With NOBLOCK and no high-water mark the future is done: it failed only when there is no connection left.
        sent: Any = self._socket.send(data, zmq.NOBLOCK)
        if sent.exception() is not None:
            self._die("the engine: the connection is gone")

    async def close(self) -> None:
        """Ends the process: `Shutdown`, then signals. Again is nothing."""
        if self._socket is not None and not self.dead_reason:
            self.send(Shutdown())
            deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
            while self._launcher.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
        self.dead_reason = self.dead_reason or "the engine is stopped"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._launcher.stop(0)
        socket, context, self._socket, self._context = self._socket, self._context, None, None
        if socket is not None and context is not None:
            socket.close()
            context.term()

    async def _receive(self) -> None:
        assert self._socket is not None
        while not self.dead_reason:
            data = await self._socket.recv()
            self._silent_s = 0.0
            # A message that already waits comes without a pause: this one lets what the last one brought be read.
            await asyncio.sleep(0)
            try:
                self._take(decode(data))
            except MessageError as error:
                self._die(f"the engine sent what this front end cannot read: {error}")
            except Exception as error:  # a bug here; without this loop every request would wait for ever
                log.exception("a message of the engine could not be handled")
                self._die(f"the front end failed: {type(error).__name__}: {error}")

    def _take(self, message: Any) -> None:
        if isinstance(message, Hello):
            if message.version != __version__:
                self._die(f"the engine is version {message.version}, the front end {__version__}")
                return
            assert self._config is not None
            self.send(Configure(config=self._config.to_dict()))
        elif isinstance(message, Ready):
            if not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, Fatal):
            reason = message.error if message.user else f"the engine failed: {message.error}"
            self._die(reason, ValueError(reason) if message.user else EngineError(reason))
        elif not isinstance(message, Pong):
            self._on_message(message)

    async def _watch(self) -> None:
        """Notices a process that ended and, once it is loaded, one that no longer answers."""
        asked, last, number = 0.0, time.monotonic(), 0
        while not self.dead_reason:
            await asyncio.sleep(TICK_S)
            if (end := self._launcher.poll()) is not None:
                await asyncio.sleep(LAST_WORDS_S)  # a Fatal on the way says more than an exit code
                self._die(f"the engine process ended ({end})")
                return
            now = time.monotonic()
            # At most one tick: when this process itself was stopped for a while, that is not the engine's silence.
            self._silent_s += min(now - last, 2 * TICK_S)
            last = now
            if not self._ready.done():
                continue
            if self._silent_s >= self._silence_timeout:
                self._die(f"the engine has not answered for {self._silence_timeout:g} s")
            elif self._silent_s >= PING_INTERVAL_S and now - asked >= PING_INTERVAL_S:
                asked, number = now, number + 1
                self.send(Ping(number=number))

    def _die(self, reason: str, error: Exception | None = None) -> None:
        if self.dead_reason:
            return
        self.dead_reason = reason
        if self._ready.done():
            log.error("%s", reason)
            self._on_death(reason)
        else:
            self._ready.set_exception(error or EngineError(reason))
