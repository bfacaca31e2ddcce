"""The server's process: address, loading, signals, drain, and an engine that fails. No engine runs here."""

import asyncio
import concurrent.futures
import errno
import os
import signal
import socket
import threading

import httpx
import pytest

from moeyard.engine.config import ServeConfig
from moeyard.launch import server as server_module
from moeyard.launch.frontend import EngineError

from .fake_frontend import FakeFrontEnd, error_of, until

TIMEOUT = 20.0  # a bound for what should come at once
TEXT = {"prompt": "a", "max_tokens": 1}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class StartedFrontEnd(FakeFrontEnd):
    """A front end that loads when it is told, and drains as the real one does."""

    latest: "StartedFrontEnd"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.loaded_ready, self.ready, self.alive = self.ready, None, False
        self.load = threading.Event()
        self.drained = None
        self.closed = []
        StartedFrontEnd.latest = self

    async def start(self):
        while not self.load.is_set():
            await asyncio.sleep(0.005)
        self.ready, self.alive = self.loaded_ready, True

    async def close(self, drain):
        self.draining = True
        self.closed.append(drain)
        loop = asyncio.get_running_loop()
        end = loop.time() + drain
        while self.running and loop.time() < end:
            await asyncio.sleep(0.005)
        self.drained = not self.running
        self.alive = False


@pytest.fixture
def process(monkeypatch):
    """Runs `run` here, with a script for a thread that plays the client and the operator."""
    monkeypatch.setattr(server_module, "FrontEnd", StartedFrontEnd)

    def go(script, **options):
        port = free_port()

        def play():
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT) as http:
                try:
                    until(lambda: answers(http))
                    return script(http, StartedFrontEnd.latest)
                except BaseException:
                    os.kill(os.getpid(), signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            played = pool.submit(play)
            code = server_module.run(ServeConfig(port=port, **options))
            return code, played.result()

    return go


def answers(http):
    try:
        return http.get("/version").status_code == 200
    except httpx.TransportError:
        return False


def signal_self(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_life_of_the_process(process, capfd):
    def script(http, frontend):
        assert http.get("/health").json()["status"] == "loading"
        error_of(http.get("/ready"), 503)
        assert "curl" not in capfd.readouterr().out
        frontend.load.set()
        until(lambda: http.get("/ready").status_code == 200)
        frontend.gate = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            url = str(http.base_url)
            running = pool.submit(httpx.post, f"{url}/v1/completions", json=TEXT | {"max_tokens": 4}, timeout=TIMEOUT)
            until(lambda: frontend.running)
            signal_self()
            until(lambda: frontend.draining)
            error_of(http.get("/ready"), 503)
            refused = http.post("/v1/completions", json=TEXT)
            assert error_of(refused, 503)["code"] == "shutting_down" and refused.headers["retry-after"]
            frontend.gate.set()
            assert running.result().json()["usage"]["completion_tokens"] == 4
        return frontend

    code, frontend = process(script, drain_timeout=TIMEOUT)
    assert code == 0
    assert frontend.drained and frontend.closed == [TIMEOUT]
    out = capfd.readouterr().out
    assert "http://127.0.0.1:" in out and "curl http://127.0.0.1:" in out and "Authorization" not in out


def test_a_second_signal_ends_at_once(process):
    def script(http, frontend):
        frontend.load.set()
        until(lambda: http.get("/ready").status_code == 200)
        frontend.gate = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            url = str(http.base_url)
            running = pool.submit(httpx.post, f"{url}/v1/completions", json=TEXT | {"max_tokens": 4}, timeout=TIMEOUT)
            until(lambda: frontend.running)
            signal_self(signal.SIGINT)
            until(lambda: frontend.draining)
            signal_self(signal.SIGINT)
            assert running.exception() is not None or running.result().status_code >= 500
        return frontend

    code, frontend = process(script, drain_timeout=1000.0)
    assert code == 0 and frontend.closed == [1000.0, 0.0]


def test_a_signal_while_loading(process):
    code, frontend = process(lambda http, frontend: (signal_self(), frontend)[1])
    assert code == 0 and frontend.closed == [0.0]


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("model: no such directory"), 2), (EngineError("the engine was killed by SIGKILL"), 1)],
)
def test_an_engine_that_does_not_start(monkeypatch, capfd, error, code):
    class Failing(StartedFrontEnd):
        async def start(self):
            raise error

    monkeypatch.setattr(server_module, "FrontEnd", Failing)
    assert server_module.run(ServeConfig(port=0)) == code
    assert capfd.readouterr().err.splitlines() == [f"moeyard: error: {error}"]


def test_the_death_of_the_engine_is_told_once(process, capfd, monkeypatch):
    monkeypatch.setattr(server_module, "WATCH_S", 0.01)

    def script(http, frontend):
        frontend.load.set()
        until(lambda: http.get("/ready").status_code == 200)
        frontend.alive, frontend.dead_reason = False, "killed by SIGKILL"
        error_of(http.get("/health"), 503)
        told = ""

        def heard():
            nonlocal told
            told += capfd.readouterr().err
            return told

        until(heard)
        http.get("/health")
        signal_self()
        return told

    code, told = process(script)
    told += capfd.readouterr().err
    assert code == 0 and told.count("killed by SIGKILL") == 1


def test_a_port_in_use_is_one_line(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert server_module.run(ServeConfig(port=port)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and f"127.0.0.1:{port}" in lines[0] and os.strerror(errno.EADDRINUSE) in lines[0]


def test_a_wrong_host_is_one_line(capfd):
    assert server_module.run(ServeConfig(host="no.such.host.invalid", port=0)) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_the_curl_line_can_be_pasted(host, shown):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        text = server_module._welcome(ServeConfig(host=host, api_key="k"), "name", listener)
    assert shown in text and '"Authorization: Bearer $MOEYARD_API_KEY"' in text and "k'" not in text
