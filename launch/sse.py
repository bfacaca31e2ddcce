"""Server-sent events: one `data:` line per JSON value, `: ping` in silence, an error event when a stream breaks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import dumps, error_body
from .frontend import RequestError

PING_SECONDS = 15.0
logger = logging.getLogger(__name__)
T = TypeVar("T")


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. Call it only once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientDisconnect when the client goes away first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect()
    finally:
        await _cancel(task, gone)


class EventStream(Response):
    """Streams the values of `events`; closes it when the client goes away.

    The status is 200 from the start, so an error inside the stream is an `{"error": ...}` event, followed by `[DONE]`
    like any other end.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            try:
                await _cancel(writer, gone)
            finally:
                await self.events.aclose()

    async def _write(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()

        async def emit(data: bytes, *, more: bool = True) -> None:
            nonlocal last
            last = loop.time()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def ping() -> None:
            while True:
                await asyncio.sleep(max(0.0, last + PING_SECONDS - loop.time()))
                if loop.time() - last >= PING_SECONDS:
                    await emit(b": ping\n\n")

        pinger = asyncio.create_task(ping())
        try:
            async for event in self.events:
                await emit(b"data: " + dumps(event) + b"\n\n")
        except RequestError as error:
            await emit(b"data: " + dumps(error_body(error)) + b"\n\n")
        except Exception:
            logger.exception("a stream failed")
            internal = RequestError("internal error; the server's log has the details", status=500)
            await emit(b"data: " + dumps(error_body(internal)) + b"\n\n")
        finally:
            await _cancel(pinger)
        await emit(b"data: [DONE]\n\n", more=False)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Ends tasks and waits for them, so that none is left behind with an exception that nobody reads."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
