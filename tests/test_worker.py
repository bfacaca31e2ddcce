"""The engine's process over a real socket, with a fake engine inside."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import msgpack
import psutil
import pytest
import zmq
from fake_worker import Command

from moeyard.engine import messages, worker
from moeyard.engine.config import EngineConfig
from moeyard.engine.messages import VERSION, Abort, Configure, Fatal, Ping, Pong, Ready, Shutdown, Stats, Submit, Tokens
from moeyard.engine.params import SamplingParams
from moeyard.launch.local import LocalLauncher

FAKE = Path(__file__).with_name("fake_worker.py")
BOUND_S = 30  # for what must happen at all; a busy machine is slow


class Peer:
    """The front end's side of one worker process."""

    def __init__(self, tmp_path, **env):
        self.log = tmp_path / "calls"
        self.launcher = LocalLauncher(command=[sys.executable, "-P", str(FAKE)], env={"FAKE_LOG": str(self.log)} | env)
        self.endpoint = self.launcher.start()
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(self.endpoint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.launcher.stop(0)
        self.socket.close()
        self.context.term()

    def configure(self, **options):
        hello = self.receive()
        assert hello.pid == self.launcher.pid
        self.send(Configure(config=EngineConfig(**options).to_dict()))
        return self.receive()

    def send(self, message):
        self.socket.send(message if isinstance(message, bytes) else messages.encode(message))

    def receive(self):
        assert self.socket.poll(BOUND_S * 1000), "nothing from the worker"
        return messages.decode(self.socket.recv())

    def until(self, kind):
        """The next message of a kind, and those before it."""
        before = []
        while not isinstance(message := self.receive(), kind):
            before.append(message)
        return message, before

    def exit_code(self):
        return self.launcher._processes[0].wait(BOUND_S)

    def calls(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def submit(request_id, ids, **params):
    params = SamplingParams(**{"temperature": 0.0} | params).to_dict()
    return Submit(request_id=request_id, prompt_ids=ids, params=params)


def tokens_of(message):
    return [messages.unpack_delta(delta) for delta in message.deltas]


def gone(pid):
    """Whether a process ended; one that nobody waits for is a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition):
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_request_from_hello_to_shutdown(tmp_path):
    with Peer(tmp_path, FAKE_TEND="60") as peer:
        ready = peer.configure(dtype="float32", model="m")
        assert ready == Ready(max_model_len=256, vocab_size=4096, kv_tokens=4096, info={"model": "fake"})
        peer.send(submit("a", [5, 6, 7], max_tokens=4))
        deltas = []
        while not (deltas and deltas[-1].finish_reason):
            message, _ = peer.until(Tokens)
            deltas += tokens_of(message)
        assert [d.token_ids for d in deltas] == [[5], [6], [7], [5]]
        assert deltas[-1].finish_reason == "length"
        wait_for(lambda: ["tend", 1] in peer.calls())  # without work, much sooner than once a second
        peer.send(Shutdown())
        assert peer.exit_code() == 0
        calls = peer.calls()
        assert calls[0] == ["config", "m", "float32"] and calls[-1] == ["remember"]


def test_all_waiting_messages_are_taken_between_two_steps(tmp_path):
    with Peer(tmp_path, FAKE_STEP_S="0.2") as peer:
        peer.configure()
        peer.send(submit("first", [Command.NEVER]))  # keeps the engine in steps
        for i in range(20):
            peer.send(submit(f"r{i}", [i], max_tokens=1))
        per_step = []
        while sum(per_step) < 20:
            per_step.append(len(tokens_of(peer.until(Tokens)[0])))
        assert len(per_step) < 10  # not one step for each message


def test_stats_while_working_and_once_when_idle(tmp_path):
    with Peer(tmp_path, FAKE_STEP_S="0.1") as peer:
        peer.configure()
        peer.send(submit("a", [1, 2], max_tokens=12))
        seen = []
        while not (seen and isinstance(seen[-1], Stats) and seen[-1].running == 0):
            seen.append(peer.receive())
        stats = [message for message in seen if isinstance(message, Stats)]
        steps = sum(isinstance(message, Tokens) for message in seen)
        assert steps == 12 and 2 <= len(stats) < steps
        assert stats[-1] == Stats(steps=12, prompt_tokens=2, generated_tokens=12, expert_counts=[[12, 1]])
        peer.send(Ping(number=1))
        assert peer.receive() == Pong(number=1)  # and no further Stats meanwhile


def test_idle_costs_no_processor_time(tmp_path):
    with Peer(tmp_path) as peer:
        peer.configure()
        process = psutil.Process(peer.launcher.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(1.5)
        assert sum(process.cpu_times()[:2]) - before < 0.5


def test_abort_and_refusal(tmp_path):
    with Peer(tmp_path) as peer:
        peer.configure()
        peer.send(submit("bad", [Command.REFUSE]))
        (delta,) = tokens_of(peer.until(Tokens)[0])
        assert (delta.request_id, delta.finish_reason, delta.error) == ("bad", "refused", "logit_bias: not today")
        peer.send(submit("a", [Command.NEVER]))
        peer.send(Abort(request_ids=["a", "unknown"]))
        wait_for(lambda: ["abort", "unknown"] in peer.calls())
        while peer.until(Stats)[0].running:
            pass


def test_malformed_messages_are_dropped(tmp_path):
    with Peer(tmp_path) as peer:
        peer.configure()
        unknown, wrong = msgpack.packb([VERSION, 99]), msgpack.packb([VERSION, 4, "x"])
        for bad in (b"", b"\xc1", unknown, wrong, messages.encode(Pong(number=3))):
            peer.send(bad)
        peer.send(Ping(number=7))
        assert peer.receive() == Pong(number=7)


def test_another_version_is_fatal(tmp_path):
    with Peer(tmp_path) as peer:
        peer.configure()
        peer.send(msgpack.packb([VERSION + 1, 4, 1]))
        fatal = peer.receive()
        assert isinstance(fatal, Fatal)
        assert f"message version {VERSION + 1}" in fatal.error and "one build" in fatal.error
        assert peer.exit_code() == 1


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        ("refuse", Fatal(error="model: the checkpoint is not good; get another", user=True)),
        ("fail", Fatal(error="RuntimeError: no luck")),
    ],
)
def test_an_engine_that_does_not_start(tmp_path, start, wanted):
    with Peer(tmp_path, FAKE_START=start) as peer:
        assert peer.configure() == wanted
        assert peer.exit_code() == 1


def test_a_step_that_fails_is_fatal(tmp_path):
    with Peer(tmp_path) as peer:
        peer.configure()
        peer.send(submit("a", [Command.FAIL_STEP]))
        fatal, _ = peer.until(Fatal)
        assert fatal == Fatal(error="RuntimeError: a step went wrong")
        assert peer.exit_code() == 1


def test_signals(tmp_path):
    with Peer(tmp_path) as peer:
        peer.configure()
        os.kill(peer.launcher.pid, signal.SIGINT)
        peer.send(Ping(number=1))
        assert peer.receive() == Pong(number=1)
        os.kill(peer.launcher.pid, signal.SIGTERM)
        assert peer.exit_code() == -signal.SIGTERM


@pytest.mark.parametrize("prompt", [None, Command.HANG], ids=["idle", "in a step"])
def test_it_ends_when_its_parent_is_killed(tmp_path, prompt):
    parent_of_worker = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_worker import Peer, submit
        peer = Peer(Path(sys.argv[2]))
        peer.configure()
        if sys.argv[3] != "None":
            peer.send(submit("a", [int(sys.argv[3])]))
        print(peer.launcher.pid, flush=True)
        sys.stdin.read()
        """
    )
    command = [sys.executable, "-c", parent_of_worker, str(FAKE.parent), str(tmp_path), str(prompt)]
    with tempfile.TemporaryDirectory() as left:  # a killed process does not clean up after itself
        env = {**os.environ, "TMPDIR": left}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as parent:
            pid = int(parent.stdout.readline())
            assert not gone(pid)
            parent.kill()
        wait_for(lambda: gone(pid))


@pytest.fixture
def endpoint():
    """An in-process address with a socket that never answers."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    yield f"tcp://127.0.0.1:{port}"
    socket.close()
    context.term()


def test_without_a_death_signal_it_looks_for_its_parent(endpoint):
    assert worker.run(endpoint, lambda config: None, parent=os.getppid() + 1) == 1


def test_a_front_end_that_says_nothing(endpoint, monkeypatch, caplog):
    monkeypatch.setattr(worker, "CONFIGURE_TIMEOUT_S", 0.05)
    assert worker.run(endpoint, lambda config: None) == 1
    assert "no configuration from the front end within 0.05 s" in caplog.text


class TestLocalLauncher:
    def test_its_directory_is_private_and_goes_away(self, tmp_path):
        with Peer(tmp_path) as peer:
            directory = Path(peer.endpoint.removeprefix("ipc://")).parent
            assert directory.stat().st_mode & 0o777 == 0o700
            assert peer.launcher.poll() is None
        assert not directory.exists()
        assert peer.launcher.poll() == "killed by SIGTERM"
        peer.launcher.stop(0)

    def test_a_process_that_ignores_sigterm_is_killed(self, monkeypatch):
        monkeypatch.setattr("moeyard.launch.local.TERMINATE_TIMEOUT_S", 0.1)
        program = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
        )
        launcher = LocalLauncher(command=[sys.executable, "-c", program])
        launcher.start()
        launcher.stop(1)
        assert launcher.poll() in ("killed by SIGKILL", "killed by SIGTERM")  # TERM when it had no time to ignore it

    def test_a_program_that_is_not_there_leaves_no_directory(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        launcher = LocalLauncher(command=["/nonexistent/program"])
        with pytest.raises(OSError):
            launcher.start()
        assert list(tmp_path.iterdir()) == [] and launcher.poll() is None

    def test_a_name_too_long_for_a_socket(self, tmp_path, monkeypatch):
        deep = tmp_path / ("d" * 100)
        deep.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(deep))
        with pytest.raises(ValueError, match="set TMPDIR to a shorter directory"):
            LocalLauncher().start()
        assert list(deep.iterdir()) == []
