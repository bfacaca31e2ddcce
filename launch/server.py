"""The OpenAI-compatible HTTP server: the application, and the process that runs it beside the front end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from .. import __version__
from ..engine.config import ServeConfig
from . import node
from .admin import FIELDS
from .errors import JSON, ErrorBody, body_error, error_response
from .frontend import FrontEnd, RequestError
from .metrics import Metrics
from .middleware import Gate
from .protocol import KNOWN_FIELDS
from .routes import Routes
from .start import find_place

WATCH_S = 1.0  # how often a running server looks whether its engine still lives
FLUSH_S = 5  # what open connections get to send their last bytes, once the engine has closed


def build_app(frontend: FrontEnd, config: ServeConfig) -> FastAPI:
    """The application over a front end, which may still be loading. Becomes the front end's observer."""
    app = FastAPI(
        title="moeyard",
        version=__version__,
        description="OpenAI-compatible inference for Mixture-of-Experts models.",
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        default_response_class=JSON,
        responses={"default": {"model": ErrorBody}},
    )
    app.add_middleware(Gate, api_key=config.api_key)
    _handle_errors(app)
    metrics = Metrics()
    frontend.observer = metrics
    Routes(frontend, metrics).add_to(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return error_response(body_error(error.errors(), request, {**KNOWN_FIELDS, **FIELDS}))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{message}: {request.method} {request.url.path}"
        return error_response(RequestError(message, status=error.status_code), error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it


def run(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT; the exit code. On a node that is not the leader's: runs this node's ranks.

    0 after a signal, 2 when the user's input is at fault (address, options, checkpoint), 1 when the engine is. Raises
    ValueError for an environment that contradicts itself or the options.
    """
    _log_to_stderr()
    place = find_place(config, os.environ)
    if not place.leader:
        return node.run(place, config.start_timeout, config.drain_timeout)
    try:
        listener = _listen(config.host, config.port)
    except OSError as error:
        reason = error.strerror or str(error)
        return _fail(f"cannot listen on {config.host}:{config.port}: {reason}; choose with --host and --port", 2)
    with listener:
        return asyncio.run(_serve(config, listener))


def _log_to_stderr() -> None:
    """Lines as the ranks write them; of libraries, whose progress is not the operator's, only warnings."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("moeyard").setLevel(logging.INFO)


def _fail(message: str, code: int) -> int:
    print(f"moeyard: error: {message}", file=sys.stderr, flush=True)
    return code


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. It takes connections at once, so that `/ready` can answer 503 while the model loads."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.create_server(address[:2], family=family, backlog=2048)
    listener.setblocking(False)
    return listener


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `_serve`'s: uvicorn would close the listener at once, and a drain must answer 503."""
        yield


async def _serve(config: ServeConfig, listener: socket.socket) -> int:
    frontend = FrontEnd(config)
    options = uvicorn.Config(
        build_app(frontend, config),
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=FLUSH_S,
    )
    server = _Server(options)
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    http = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    starting = asyncio.create_task(frontend.start(), name="engine start")
    stopping = asyncio.create_task(stop.wait(), name="signal")
    code = 0
    await asyncio.wait({http, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done() and (error := starting.exception()) is not None:
        if not isinstance(error, Exception):
            raise error
        code = _fail(str(error) or type(error).__name__, 2 if isinstance(error, ValueError) else 1)
    elif starting.done():
        print(_welcome(config, frontend.model_name, listener, len(frontend.rank_states())), flush=True)
        await _watch(frontend, {http, stopping})
    starting.cancel()
    await _close(frontend, config.drain_timeout if starting.done() else 0.0, stop_now)
    server.should_exit = True
    server.force_exit = stop_now.is_set()
    stopping.cancel()
    await asyncio.gather(starting, stopping, return_exceptions=True)
    await http
    return code


async def _watch(frontend: FrontEnd, ends: set[asyncio.Task]) -> None:
    """Until one of `ends` is done. A dead engine is told once; `/health` then says why."""
    told = False
    while not any(task.done() for task in ends):
        if not frontend.alive and not told:
            told = True
            _fail(f"the engine is dead: {frontend.dead_reason}; requests get 503 until a restart", 1)
        await asyncio.wait(ends, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)


async def _close(frontend: FrontEnd, drain: float, stop_now: asyncio.Event) -> None:
    """Lets running requests finish for `drain` seconds, or until a second signal."""
    closing = asyncio.create_task(frontend.close(drain), name="drain")
    hurry = asyncio.create_task(stop_now.wait(), name="second signal")
    await asyncio.wait({closing, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not closing.done():
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await frontend.close(0.0)
    else:
        closing.result()


def _welcome(config: ServeConfig, model: str, listener: socket.socket, ranks: int = 1) -> str:
    """Where the server is, and a command to try it that can be pasted."""
    port = listener.getsockname()[1]
    local = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"
    key = ' -H "Authorization: Bearer $MOEYARD_API_KEY"' if config.api_key else ""
    body = '{"prompt": "def main(", "max_tokens": 32}'
    on = f" on {ranks} ranks" if ranks > 1 else ""
    return (
        f"moeyard {__version__} serves {model}{on} at {url}\n"
        f"try: curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
