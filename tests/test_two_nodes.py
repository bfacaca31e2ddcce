"""Two nodes, each with its own `moeyard serve` of the same command line: on one machine, and in two networks of their
own that a cable joins."""

import collections
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import psutil
import pytest
import zmq

from moeyard import LLM, SamplingParams
from moeyard.engine import wire, worker
from moeyard.engine.config import ServeConfig
from moeyard.engine.messages import Pong, Shutdown, decode, encode
from moeyard.launch import node, server
from moeyard.launch.rendezvous import find

BOUND_S = 150.0
PROMPT, MAX_TOKENS = "def main(", 24
SERVE = (sys.executable, "-P", "-m", "moeyard", "serve", "--ep", "2", "--threads", "1", "--kv-memory", "16MiB")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def until(condition, what, bound=BOUND_S):
    deadline = time.monotonic() + bound
    while not (value := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)
    return value


def torchrun(node, address):
    return {
        "TORCHELASTIC_RUN_ID": "job",
        "RANK": str(node),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": "29500",
    }


def leaderworkerset(node, address):
    return {"LWS_LEADER_ADDRESS": address, "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": str(node)}


def slurm(node, hosts):
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(node),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": hosts,
        "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.99",
    }


class Node:
    """One `moeyard serve`. `prefix` is what runs it elsewhere, in another network namespace."""

    def __init__(self, environ, *options, prefix=()):
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "LWS_", "TORCHELASTIC_", "GLOO_"))
        }
        self.process = subprocess.Popen(
            [*prefix, *SERVE, *options],
            env=clean | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = collections.deque(maxlen=400)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def text(self):
        return "\n".join(self.lines)

    def end(self, bound=BOUND_S):
        """Exit code."""
        code = self.process.wait(bound)
        self._thread.join(10)
        return code

    def errors(self):
        """What it said on the way out; the rest is the log."""
        return [line for line in self.lines if line.startswith("moeyard: error: ")]

    def ranks(self):
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "moeyard.engine.worker" in child.cmdline()
        ]


class Job:
    """Both nodes, and a client of the HTTP server on the first. `prefixes` and `client` are those of a `Cable`."""

    def __init__(self, variables, address, *options, prefixes=((), ()), client=None):
        self.port, self.cluster_port = free_port(), free_port()
        self.nodes = {}
        self._prefixes = prefixes
        self._client = client or (lambda function: function())
        self._environ = [variables(node, address) for node in (0, 1)]
        # The same on both: only the first listens at --port.
        self._options = ["--port", str(self.port), "--cluster-port", str(self.cluster_port), *options]

    def start(self, node):
        self.nodes[node] = Node(self._environ[node], *self._options, prefix=self._prefixes[node])
        return self.nodes[node]

    def text(self):
        return "\n\n".join(f"node {node}:\n{it.text()}" for node, it in self.nodes.items())

    def kill(self):
        for it in self.nodes.values():
            it.process.kill()
            it.process.wait(BOUND_S)

    def request(self, method, path, **options):
        url = f"http://127.0.0.1:{self.port}{path}"
        return self._client(lambda: httpx.request(method, url, timeout=BOUND_S, **options))

    def health(self):
        return self.request("GET", "/health").json()

    def wait(self):
        def ready():
            assert all(node.process.poll() is None for node in self.nodes.values()), self.text()
            try:
                return self.request("GET", "/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(ready, self.text)

    def complete(self):
        body = {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = self.request("POST", "/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def stream(self, tokens, after_first):
        """A longer completion; `after_first()` is called when its first part has come."""
        body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        parts = []
        with httpx.stream("POST", url, json=body, timeout=BOUND_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    parts += [choice["text"] for choice in json.loads(line[6:])["choices"]]
                    if len(parts) == 1:
                        after_first()
        assert line == "data: [DONE]" or not line
        return "".join(parts)


@contextmanager
def job(*args, **kwargs):
    it = Job(*args, **kwargs)
    try:
        yield it
    finally:
        it.kill()


class Cable:
    """Two network namespaces that a pair of virtual cards joins, 10.77.0.1 and 10.77.0.2. They end with the block.

    `names` are each one's /etc/hosts. Raises OSError where this is not allowed.
    """

    def __init__(self, names=("", "")):
        self._names = names
        self._stack = ExitStack()

    def __enter__(self):
        try:
            self._holders = [self._stack.enter_context(self._hold()) for _ in range(2)]
            self.prefixes = [("nsenter", "-t", str(holder.pid), "-n", "-m") for holder in self._holders]
            peer = str(self._holders[1].pid)
            self.run(0, "ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1", "netns", peer)
            for node in (0, 1):
                self.run(node, "ip", "link", "set", "lo", "up")
                self.run(node, "ip", "address", "add", f"10.77.0.{node + 1}/24", "dev", f"veth{node}")
                self.run(node, "ip", "link", "set", f"veth{node}", "up")
                with tempfile.NamedTemporaryFile("w") as hosts:
                    hosts.write(f"127.0.0.1 localhost\n{self._names[node]}\n")
                    hosts.flush()
                    self.run(node, "mount", "--bind", hosts.name, "/etc/hosts")
            self._threads = self._stack.enter_context(ThreadPoolExecutor(1, initializer=self._enter_first))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error):
        self._stack.close()

    @contextmanager
    def _hold(self):
        """A process in namespaces of its own."""
        command = ["unshare", "--net", "--mount", "sh", "-c", "echo; exec sleep 600"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                if process.stdout.readline() != b"\n":
                    raise PermissionError(process.stderr.read().decode().strip())
                yield process
            finally:
                process.kill()

    def _enter_first(self):
        with open(f"/proc/{self._holders[0].pid}/ns/net") as file:
            assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) == 0, os.strerror(ctypes.get_errno())

    def run(self, node, *command):
        done = subprocess.run([*self.prefixes[node], *command], capture_output=True, text=True, timeout=10)
        if done.returncode:
            raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")

    def client(self, function):
        """`function()` from the first namespace: a thread's sockets are its own namespace's."""
        return self._threads.submit(function).result()


@pytest.fixture
def cable():
    """Makes cables; skips where a test may not."""
    if not sys.platform.startswith("linux"):
        pytest.skip("network namespaces are Linux's")
    with ExitStack() as stack:

        def make(*names):
            try:
                return stack.enter_context(Cable(names))
            except OSError as error:  # no such command, or no right
                pytest.skip(f"cannot make network namespaces: {error}")

        yield make


@pytest.fixture(scope="module")
def expected():
    """The completion of one rank alone."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with LLM(threads=1, kv_memory="16MiB", progress=False) as llm:
        return llm.generate(PROMPT, params)[0].outputs[0].text


def test_torchrun_and_a_rank_that_dies_on_the_other_node(expected):
    """The second node comes first."""
    with job(torchrun, "127.0.0.1") as two:
        other = two.start(1)
        until(other.ranks, two.text)
        leader = two.start(0)
        two.wait()
        assert two.complete() == expected
        (lost,) = other.ranks()
        lost.kill()
        assert other.end() == 1 and "rank 1 ended (killed by SIGKILL)" in other.text()
        until(lambda: two.health()["status"] == "ok", two.text)
        assert two.complete() == expected
        assert re.search(r"rank 1 was lost \(killed by SIGKILL\).*; recovering on rank 0", two.text()), two.text()
        leader.process.send_signal(signal.SIGTERM)
        assert leader.end() == 0


def test_the_end_of_the_first_node_is_the_end_of_the_other(expected):
    """The first node comes first, in a LeaderWorkerSet, and has an IPv6 address where there is one."""
    with job(leaderworkerset, "::1" if has_ipv6() else "localhost") as two:
        leader = two.start(0)
        until(leader.ranks, two.text)
        other = two.start(1)
        two.wait()
        assert two.complete() == expected

        def stop():  # as whatever stops a job does
            for it in (other, leader):
                it.process.send_signal(signal.SIGTERM)

        assert two.stream(120, stop).startswith(expected)
        assert (leader.end(), other.end()) == (0, 0), two.text()
        assert "rank 1 may work for 35 s more" in other.text() and "was lost" not in two.text(), two.text()


def test_a_node_that_never_comes_is_one_line():
    with job(slurm, "localhost", "--start-timeout", "2") as two:
        leader = two.start(0)
        assert leader.end() == 1
        assert leader.errors() == ["moeyard: error: rank 1 did not come within start_timeout (2 s)"]


def test_a_cluster_port_in_use_is_one_line():
    with job(leaderworkerset, "127.0.0.1") as two, socket.create_server(("127.0.0.1", two.cluster_port)):
        leader = two.start(0)
        assert leader.end() == 2
        (line,) = leader.errors()
        assert line.startswith(f"moeyard: error: cannot listen for ranks on 127.0.0.1:{two.cluster_port}: ")
        assert line.endswith("; choose another port with --cluster-port")


@pytest.mark.parametrize("number", [0, 1])
def test_what_the_first_node_refuses_the_others_refuse_too(monkeypatch, number):
    for name, value in torchrun(number, "127.0.0.1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^on_rank_loss restart needs ranks that this process starts"):
        server.run(ServeConfig(ep=2, on_rank_loss="restart"))


def test_a_rank_waits_for_a_first_node_that_comes_late(monkeypatch):
    """As long as its parent does, which knows --start-timeout."""
    monkeypatch.setattr(worker, "CONFIGURE_TIMEOUT_S", 0.01)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(worker.run, endpoint, lambda config: None, os.getppid())
        with pytest.raises(TimeoutError):
            code.result(0.5)
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(endpoint)
            assert router.poll(20_000) and decode(router.recv_multipart()[1]).rank == 0
            router.send_multipart([b"rank-0", encode(Shutdown())])
            assert code.result(BOUND_S) == 0


@pytest.mark.parametrize(
    ("events", "drain", "end"),
    [
        ({0: Pong, 10: signal.SIGTERM}, 30.0, 45),  # the front end's word does not come
        ({0: Pong, 10: signal.SIGTERM, 20: Shutdown}, 30.0, 20),
        ({0: Pong, 10: signal.SIGTERM, 12: signal.SIGINT}, 30.0, 12),
        ({0: Pong, 10: signal.SIGTERM}, 0.0, 10),
        ({3: signal.SIGTERM}, 30.0, 3),  # no front end: no requests
    ],
)
def test_when_a_signal_ends_a_node(monkeypatch, events, drain, end):
    """With a simulated clock: a look at the socket takes a second."""
    now, stopped, waiting, killed = 0, [], [], []

    def poll(milliseconds):
        nonlocal now
        event = events.get(now)
        if isinstance(event, signal.Signals):
            stopped.append(event)
        elif event is not None:
            waiting.append(encode(event(number=1) if event is Pong else event()))
        now += 1
        assert now < 100
        return bool(waiting)

    monkeypatch.setattr(node, "time", types.SimpleNamespace(monotonic=lambda: float(now)))
    place = find(torchrun(1, "127.0.0.1"), 2)
    ranks = types.SimpleNamespace(ranks=place.ranks, ended=dict, stop=lambda timeout: killed.append(now))
    front = types.SimpleNamespace(poll=poll, recv=waiting.pop, send=lambda *message: None)
    assert node.Node(front, ranks, place, 1000.0, drain, stopped).run() == 0
    assert killed == [end + 1]


CARDS = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.3", "ib0": "10.1.0.3"}
# Where names lead to, and this machine's end of the way there.
ROUTES = {"head": "127.0.1.1", "10.0.0.1": "10.0.0.3", "other": "10.1.0.3", "localhost": "127.0.0.1"}


@pytest.mark.parametrize(
    ("host", "route", "chosen", "expected"),
    [
        ("10.0.0.1", "10.0.0.3", "", "10.0.0.3"),
        ("other", "10.0.0.3", "", "10.1.0.3"),
        ("127.0.0.1", "10.0.0.3", "", "127.0.0.1"),  # so the user says that all is here
        ("localhost", "10.0.0.3", "", "127.0.0.1"),
        ("head", "10.0.0.3", "", "10.0.0.3"),
        ("head", None, "", "172.17.0.1"),  # no way out of this network, as in the test below
        ("head", "10.0.0.3", "ib0", "10.1.0.3"),
        ("head", "10.0.0.3", "no0", "127.0.1.1"),
        ("not yet", "10.0.0.3", "", "10.0.0.3"),
    ],
)
def test_the_address_of_this_machine(monkeypatch, host, route, chosen, expected):
    def source(to, port):
        return route if to == "203.0.113.1" else ROUTES.get(to, to if to.startswith("127.") else None)

    cards = {name: [types.SimpleNamespace(family=socket.AF_INET, address=it)] for name, it in CARDS.items()}
    monkeypatch.setattr(wire, "_source_address", source)
    monkeypatch.setattr("psutil.net_if_addrs", lambda: cards)
    monkeypatch.setattr("psutil.net_if_stats", lambda: dict.fromkeys(cards, types.SimpleNamespace(isup=True)))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    assert wire.address_of_this_machine(f"tcp://{host}:29577") == expected


# The one that is left does not wait for its exchange: that would take longer than this test may.
HALF_OPEN = ("--rank-timeout", "5", "--collective-timeout", "600")


@pytest.mark.parametrize(
    ("variables", "address", "names"),
    [
        # As Debian has it: a machine's own name is not its address.
        (torchrun, "head", ("127.0.1.1 head", "10.77.0.1 head")),
        pytest.param(slurm, "10.77.0.[1-2]", (), marks=pytest.mark.slow),
    ],
)
def test_two_networks_and_a_cable_that_is_pulled(expected, cable, variables, address, names):
    joined = cable(*(names or ("", "")))
    with job(variables, address, *HALF_OPEN, prefixes=joined.prefixes, client=joined.client) as two:
        other = two.start(1)
        two.start(0)
        two.wait()
        assert two.complete() == expected
        joined.run(1, "ip", "link", "set", "veth1", "down")  # nobody hears of it: no connection ends
        until(lambda: two.health()["status"] == "ok" and "took over" in two.text(), two.text)
        assert "rank 1 was lost (no sign of life for 5 s)" in two.text()
        assert two.complete() == expected
        joined.run(1, "ip", "link", "set", "veth1", "up")
        other.end()  # it comes again, and is told that it was replaced
        assert two.health()["status"] == "ok" and two.complete() == expected


def test_generate_on_two_ranks(expected):
    command = [sys.executable, "-P", "-m", "moeyard", "generate", PROMPT, "--ep", "2", "--threads", "1"]
    command += ["--kv-memory", "16MiB", "--temperature", "0", "--max-tokens", str(MAX_TOKENS), "--no-progress"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected.strip()
