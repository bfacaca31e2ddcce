"""A node beside the first, as a process with fake ranks: what it tells, what it obeys, and when it ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zmq

import moeyard
from moeyard.engine.config import EngineConfig
from moeyard.engine.messages import (
    Ended,
    Kill,
    NodeHello,
    Ping,
    Pong,
    Shutdown,
    Submit,
    Tokens,
    decode,
    encode,
)
from moeyard.launch.group import EngineError, EngineGroup
from moeyard.launch.local import LocalLauncher

BOUND_S = 15.0
FAKE = Path(__file__).with_name("fake_rank.py")

PROGRAM = """
import json, logging, os, sys
from moeyard.launch import node
from moeyard.launch.rendezvous import Place
logging.basicConfig(format="%(message)s", level=logging.INFO)
options = json.loads(sys.argv[1])
for name, value in options["constants"].items():
    setattr(node, name, value)
place = Place(**{name: tuple(value) if isinstance(value, list) else value for name, value in options["place"].items()})
sys.exit(node.run(place, options["start_timeout"], command=[sys.executable, "-P", options["fake"]]))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition):
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


class Node:
    """Node 1 of 2 with two fake ranks, and the address of the first node, where nobody listens yet."""

    def __init__(self, path, ranks=(2, 3), behave=None, start_timeout=BOUND_S, address="127.0.0.1", **constants):
        self.path = path
        self.ranks = ranks
        self.port = free_port()
        host = f"[{address}]" if ":" in address else address
        self.endpoint = f"tcp://{host}:{self.port}"
        place = {"source": "slurm", "ep": 4, "ranks": ranks, "local_ranks": (0, 1), "leader": False, "node": 1}
        place |= {"nodes": 2, "address": address, "port": self.port}
        options = {"place": place, "start_timeout": start_timeout, "fake": str(FAKE), "constants": constants}
        env = os.environ | {"FAKE_DIR": str(path), "FAKE_RANKS": json.dumps(behave or {})}
        command = [sys.executable, "-P", "-c", PROGRAM, json.dumps(options)]
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    def pid(self, rank):
        file = self.path / f"pid-{rank}"
        until(lambda: file.exists() and file.read_text())
        return int(file.read_text())

    def end(self):
        """Exit code and log; the ranks are gone as well."""
        _, log = self.process.communicate(timeout=BOUND_S)
        for rank in self.ranks:
            file = self.path / f"pid-{rank}"
            until(lambda file=file: not file.exists() or not psutil.pid_exists(int(file.read_text())))
        return self.process.returncode, log


@pytest.fixture
def start(tmp_path):
    nodes = []

    def make(**options):
        nodes.append(Node(tmp_path, **options))
        return nodes[-1]

    yield make
    for node in nodes:
        node.process.kill()
        node.process.wait()
        node.process.stderr.close()


class Leader:
    """The first node's socket, without a front end behind it."""

    def __init__(self, endpoint):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.bind(endpoint)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.socket.close()
        self.context.term()

    def next(self, kind, sender=b"node-1"):
        """The next message of that kind; pings are answered meanwhile."""
        deadline = time.monotonic() + BOUND_S
        while True:
            assert self.socket.poll(int((deadline - time.monotonic()) * 1000)), f"no {kind.__name__}"
            identity, data = self.socket.recv_multipart()
            message = decode(data)
            if identity == b"node-1" and isinstance(message, Ping):
                self.say(Pong(number=message.number))
            if identity == sender and isinstance(message, kind):
                return message

    def say(self, message, to=b"node-1"):
        self.socket.send_multipart([to, encode(message)])


def test_a_node_tells_and_obeys(start):
    node = start()
    time.sleep(0.3)  # the front end may come later
    with Leader(node.endpoint) as leader:
        assert leader.next(NodeHello) == NodeHello(node=1, version=moeyard.__version__, ranks=[2, 3])
        pids = {rank: node.pid(rank) for rank in (2, 3)}
        assert psutil.Process(pids[3]).cmdline()[-6:] == ["--rank", "3", "--local-rank", "1", "--local-ranks", "2"]
        os.kill(pids[2], signal.SIGSTOP)
        leader.say(Kill(rank=2))
        assert leader.next(Ended) == Ended(rank=2, how="killed by SIGKILL")
        leader.say(Kill(rank=0))  # not here
        leader.socket.send_multipart([b"node-1", b"garbage"])
        leader.next(Ping)
        leader.say(Shutdown(), to=b"rank-3")
        leader.say(Shutdown())
        code, log = node.end()
    assert code == 0
    assert "node 1 of 2: ranks 2, 3, for the front end at 127.0.0.1:" in log
    assert "dropped Kill(rank=0)" in log and "dropped a message: " in log and "the front end ended this node" in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_node_and_its_ranks(start, number):
    node = start()
    with Leader(node.endpoint) as leader:
        leader.next(NodeHello)
        assert node.pid(2) and node.pid(3)
        node.process.send_signal(number)
        assert {leader.next(Ended).rank, leader.next(Ended).rank} == {2, 3}
        assert node.end()[0] == 0


def test_a_node_without_ranks_ends(start):
    node = start(behave={"2": {"die_at": "configure"}})
    with Leader(node.endpoint) as leader:
        leader.next(NodeHello)
        for rank in (2, 3):
            os.kill(node.pid(rank), signal.SIGKILL)
        assert {leader.next(Ended).rank, leader.next(Ended).rank} == {2, 3}
        code, log = node.end()
    assert code == 1 and "rank 3 ended (killed by SIGKILL)" in log and "ranks 2, 3 of this node ended" in log


def test_a_node_whose_front_end_does_not_come_ends(start):
    node = start(start_timeout=0.5, POLL_MS=20, PING_INTERVAL_S=0.2)
    code, log = node.end()
    assert code == 1 and f"the front end at 127.0.0.1:{node.port} has not answered for 0.5 s" in log


def test_a_node_whose_front_end_falls_silent_ends(start):
    node = start(POLL_MS=20, PING_INTERVAL_S=0.1, LEADER_TIMEOUT_S=0.6)
    with Leader(node.endpoint) as leader:
        leader.next(NodeHello)
        leader.next(Ping)
        code, log = node.end()  # the connection stays open, and nothing comes
    assert code == 1 and "has not answered for 0.6 s" in log


def test_a_killed_node_takes_its_ranks_with_it(start):
    node = start()
    pids = [node.pid(rank) for rank in (2, 3)]
    node.process.kill()
    node.end()
    until(lambda: not any(map(psutil.pid_exists, pids)))


class TwoNodes:
    """A group of ranks 0 and 1 here and 2 and 3 on the node."""

    def __init__(self, node, tmp_path):
        env = {"FAKE_DIR": str(tmp_path)}
        self.launcher = LocalLauncher(
            ranks=(0, 1), command=[sys.executable, "-P", str(FAKE)], env=env, connect=node.endpoint
        )
        self.heard = []
        hear = self.heard.append
        self.group = EngineGroup(
            self.launcher, lambda rank, message: hear((rank, message)), hear, hear, lambda reason: None
        )

    async def start(self):
        await self.group.start(EngineConfig(ep=4, rank_timeout=2.0, collective_timeout=3.0), BOUND_S)

    async def until(self, condition):
        async with asyncio.timeout(BOUND_S):
            while not condition():
                await asyncio.sleep(0.01)

    async def answers(self, *members):
        await self.until(lambda: self.group.state == "serving" and self.group.members == members)
        self.heard.clear()
        for rank in range(4):
            self.group.send(rank, Submit(request_id="r", prompt_ids=[1], params={}))
        await self.until(lambda: len(self.heard) == len(members))
        assert {rank for rank, message in self.heard if isinstance(message, Tokens)} == set(members)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_two_nodes_are_one_group(start, tmp_path, address):
    if address == "::1":
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")

    async def go():
        node = start(address=address)
        two = TwoNodes(node, tmp_path)
        try:
            await two.start()
            await two.answers(0, 1, 2, 3)
            os.kill(node.pid(3), signal.SIGKILL)
            await two.answers(0, 1, 2)
            assert two.group.lost == {3: "killed by SIGKILL at layer 3 of step 17"}
            os.kill(node.pid(2), signal.SIGSTOP)  # killed through the node, which then has none left
            await two.answers(0, 1)
            assert two.group.lost[2].startswith("no sign of life for 2 s")
            assert (await asyncio.to_thread(node.end))[0] == 1
        finally:
            await two.group.close()

    asyncio.run(go())


def test_a_node_that_is_gone_is_all_its_ranks(start, tmp_path):
    async def go():
        node = start()
        two = TwoNodes(node, tmp_path)
        try:
            await two.start()
            node.process.kill()
            await two.answers(0, 1)
            assert set(two.group.lost) == {2, 3}
        finally:
            await two.group.close()

    asyncio.run(go())


def test_the_end_of_the_front_end_is_the_end_of_the_node(start, tmp_path):
    async def go():
        node = start()
        two = TwoNodes(node, tmp_path)
        await two.start()
        await two.group.close()
        assert (await asyncio.to_thread(node.end))[0] == 0

    asyncio.run(go())


def test_a_node_of_another_version_is_one_line(tmp_path):
    """So is one that comes twice, and one of another run is told to end."""

    async def go(hellos, line):
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        launcher = LocalLauncher(
            command=[sys.executable, "-P", str(FAKE)], env={"FAKE_DIR": str(tmp_path)}, connect=endpoint
        )
        group = EngineGroup(launcher, *[lambda *values: None] * 4)
        context = zmq.Context()
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, b"node-1")
            socket.setsockopt(zmq.LINGER, 500)
            socket.connect(endpoint)
            for hello in hellos:
                socket.send(hello)
            if line:
                with pytest.raises(EngineError, match=line):
                    await group.start(EngineConfig(ep=2), BOUND_S)
            else:
                with pytest.raises(EngineError, match="rank 1 did not come"):
                    await group.start(EngineConfig(ep=2), 1.5)
            assert socket.poll(5000) and decode(socket.recv()) == Shutdown()
        context.term()

    hello = NodeHello(node=1, version=moeyard.__version__, ranks=[1])
    other = NodeHello(node=1, version="0.0.0", ranks=[1])
    asyncio.run(go([encode(other)], r"^node 1 is version 0\.0\.0, the front end"))
    asyncio.run(go([encode(hello), encode(hello)], "^node 1 came twice"))
    asyncio.run(go([encode(Ping(number=1))], ""))
