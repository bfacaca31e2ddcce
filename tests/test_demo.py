"""The demo's bounded waits, with stand-ins for the server. The demo itself is run by `.ci/run`."""

import sys

import pytest

from moeyard.launch import demo
from moeyard.launch.demo import Answer, DemoError, Server, table

SERVE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *a: sys.exit({code}))
print("loading", flush=True)
print("listening on http://127.0.0.1:4321 now", flush=True)
time.sleep(60)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("http://host:1", flush=True)
time.sleep(60)
"""


@pytest.fixture
def start():
    servers = []

    def start(program):
        servers.append(Server(command=[sys.executable, "-c", program]))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def test_the_address_is_found_and_the_end_is_clean(start):
    server = start(SERVE.format(code=0))
    assert server.url(30) == "http://127.0.0.1:4321"
    server.stop(30)
    assert server.process.returncode == 0


def test_an_unclean_end_is_an_error_with_the_output(start):
    server = start(SERVE.format(code=3))
    server.url(30)
    with pytest.raises(DemoError, match=r"(?s)ended with code 3.*loading"):
        server.stop(30)


def test_a_server_that_ends_early(start):
    with pytest.raises(DemoError, match=r"(?s)ended with code 9.*no model"):
        start("import sys; print('no model'); sys.exit(9)").url(30)


def test_a_server_that_says_nothing(start):
    with pytest.raises(DemoError, match="printed no address in 0 s"):
        start("import time; time.sleep(60)").url(0.3)


def test_a_server_that_does_not_stop(start):
    server = start(DEAF)
    server.url(30)
    with pytest.raises(DemoError, match="did not stop in 0 s"):
        server.stop(0.3)
    assert server.process.poll() is not None


def test_a_failure_is_reported_and_gives_1(monkeypatch, capsys):
    monkeypatch.setattr(demo, "Server", lambda: Server(command=[sys.executable, "-c", "print('no weights')"]))
    assert demo.main() == 1
    assert "no weights" in capsys.readouterr().err


def test_table():
    answer = Answer(prompt="p", text="t", prompt_tokens=7, output_tokens=11, first_token_s=0.05, total_s=0.55)
    assert answer.tokens_per_s == pytest.approx(20)
    assert table([answer]).splitlines() == [
        "request  prompt tokens  output tokens  first token  tokens/s",
        "      1              7             11        50 ms      20.0",
    ]
