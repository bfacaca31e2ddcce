"""Many ranks over real processes that speak the messages without an engine: start, signals, recovery, what is sent."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import zmq
from fake_rank import LAYER, STEP

from moeyard.engine.config import EngineConfig
from moeyard.engine.messages import Hello, Place, Placed, Submit, Tokens, encode
from moeyard.launch import group as module
from moeyard.launch.group import EngineError, EngineGroup
from moeyard.launch.local import LocalLauncher

BOUND_S = 10.0
WHERE = f"at layer {LAYER} of step {STEP}"
PROGRAM = [sys.executable, "-P", str(Path(__file__).with_name("fake_rank.py"))]


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.1)
    monkeypatch.setattr(module, "SHUTDOWN_TIMEOUT_S", 2.0)


class Running:
    """A group of fake ranks, and what its callbacks heard."""

    def __init__(self, tmp_path, ep, ranks=None, endpoint=None, **options):
        self.path = tmp_path
        behave = options.pop("behave", {})
        env = {"FAKE_DIR": str(tmp_path), "FAKE_RANKS": json.dumps(behave)}
        self.launcher = LocalLauncher(ranks=ranks or range(ep), command=PROGRAM, env=env, connect=endpoint)
        self.timeout = options.pop("start_timeout", BOUND_S)
        limits = {"rank_timeout": 1.0, "collective_timeout": 1.5} if ep > 1 else {}
        self.config = EngineConfig(**{"ep": ep} | limits | options)
        self.heard = []
        self.group = EngineGroup(
            self.launcher,
            lambda rank, message: self.heard.append((rank, message)),
            lambda rank: self.heard.append(("lost", rank)),
            lambda rank: self.heard.append(("joined", rank)),
            lambda reason: self.heard.append(("dead", reason)),
        )

    async def __aenter__(self):
        self.ready = await self.group.start(self.config, self.timeout)
        self.served = 1
        assert self.group.state == "serving" and self.group.members == tuple(range(self.config.ep))
        return self

    async def __aexit__(self, *exc):
        await self.group.close()
        assert self.group.state == "dead" and self.group.dead_reason
        assert all(not psutil.pid_exists(pid) for pid in self.launcher.pids.values())

    async def until(self, condition):
        async with asyncio.timeout(BOUND_S):
            while not condition():
                await asyncio.sleep(0.01)

    async def serving_again(self):
        """In an epoch after the one that this was last known of: it may come and go between two looks."""
        membership = self.group._membership
        await self.until(lambda: self.group.state == "dead" or self.served < membership.epoch == membership.served)
        assert self.group.state == "serving", self.group.dead_reason
        self.served = membership.epoch

    def signal(self, rank, number=signal.SIGKILL):
        os.kill(self.launcher.pids[rank], number)

    def tell(self, rank, words):
        (self.path / f"do-{rank}").write_text(words)

    def at(self, rank):
        """Names of the messages that a rank took, counted."""
        file = self.path / f"heard-{rank}"
        return Counter(file.read_text().split()) if file.exists() else Counter()

    async def answers(self):
        """Each member answers a request, and nobody else does."""
        before = len(self.heard)
        for rank in range(self.config.ep):
            self.group.send(rank, Submit(request_id=f"r{rank}", prompt_ids=[1], params={}))
        members = self.group.members
        await self.until(lambda: len(self.heard) >= before + len(members))
        await asyncio.sleep(0.05)
        answers = self.heard[before:]
        assert {rank: message.deltas[0][1] for rank, message in answers} == {rank: [rank] for rank in members}
        assert len(answers) == len(members) and all(isinstance(message, Tokens) for _, message in answers)


def in_loop(test):
    def run(tmp_path, monkeypatch, caplog):
        names = test.__code__.co_varnames[: test.__code__.co_argcount]
        available = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, "caplog": caplog}
        asyncio.run(test(**{name: available[name] for name in names}))

    run.__doc__, run.__name__ = test.__doc__, test.__name__
    return run


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "moeyard.frontend"]


# Start and end


@in_loop
async def test_one_rank_needs_no_group(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PING_INTERVAL_S", 0.1)
    async with Running(tmp_path, 1) as it:
        await it.answers()
        it.group.wake()
        await it.until(lambda: it.at(0)["Ping"] >= 2)
        assert set(it.at(0)) == {"Configure", "Submit", "Ping"}
    assert it.launcher.ended() == {0: "exit code 0"}


@in_loop
async def test_several_ranks_form_a_group(tmp_path):
    async with Running(tmp_path, 3) as it:
        assert {rank: ready.kv_tokens for rank, ready in it.ready.items()} == dict.fromkeys(range(3), 50)
        assert it.group.tables == [[[0]]] and it.group.lost == {} and it.group.trouble == ""
        assert [it.at(rank)["Form"] for rank in range(3)] == [2, 1, 1]
        await it.answers()
        await it.until(lambda: len(it.group.positions) == 3)
        assert (it.group.positions[2].step, it.group.positions[2].layer) == (STEP, LAYER)
        # One machine, one clock: the offset is how long a message takes.
        assert all(0 <= offset < 10**9 for offset in it.group.clock_offset_ns.values())
        it.group.broadcast(Place(version=1, tables=[[[5]]]))
        await it.until(lambda: it.group.tables == [[[5]]])
        await it.until(lambda: sum(isinstance(message, Placed) for _, message in it.heard) == 3)
    assert it.launcher.ended() == dict.fromkeys(range(3), "exit code 0")
    await it.group.close()


@in_loop
async def test_wakes_of_one_round_are_one_message(tmp_path):
    async with Running(tmp_path, 2) as it:
        for _ in range(5):
            it.group.wake()
        await it.until(lambda: it.at(0)["Wake"] and it.at(1)["Wake"])
        it.group.wake()
        await it.until(lambda: it.at(0)["Wake"] == it.at(1)["Wake"] == 2)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        (
            {"behave": {"1": {"die_at": "configure"}}},
            EngineError,
            r"^rank 1 was lost before it had loaded \(exit code",
        ),
        ({"behave": {"0": {"die_at": "store"}}}, EngineError, r"^rank 0 was lost before it had loaded \(exit code"),
        ({"behave": {"2": {"die_at": "form"}}}, EngineError, r"^rank 2 was lost before it had loaded \(exit code"),
        ({"behave": {"2": {"die_at": "load"}}}, EngineError, r"^rank 2 was lost before it had loaded \(exit code"),
        ({"behave": {"1": {"refuse": True}}}, ValueError, "^model: the checkpoint is not good; get another$"),
        ({"behave": {"1": {"version": "0.0.0"}}}, EngineError, r"^rank 1 is version 0\.0\.0, the front end \d"),
        ({"behave": {"1": {"old_wire": True}}}, EngineError, "^rank 1 is of another build: message version 2; this"),
        ({"behave": {"1": {"no_hello": True}}, "start_timeout": 1.0}, EngineError, "^rank 1 did not come within start"),
        ({"behave": {"1": {"number": 2}}, "start_timeout": 1.0}, EngineError, "^rank 1 did not come within start"),
        ({"behave": {"0": {"no_store": True}}, "start_timeout": 1.0}, EngineError, "^ranks 0, 1, 2 did not load"),
        ({"behave": {"2": {"no_join": True}}, "start_timeout": 1.0}, EngineError, "^rank 2 did not load within start"),
        ({"ranks": (0, 1)}, ValueError, "^ep is 3, but only ranks 0, 1 can come to ipc:"),
        ({"ranks": (0, 3)}, ValueError, "^ep is 3, but this process is to start ranks 0, 3"),
        ({"ranks": (0, 1), "on_rank_loss": "restart"}, ValueError, "restart needs ranks that this process started"),
    ],
)
def test_a_start_that_fails(tmp_path, monkeypatch, options, kind, text):
    monkeypatch.setattr(module, "SHUTDOWN_TIMEOUT_S", 0.3)

    async def start():
        it = Running(tmp_path, 3, **options)
        with pytest.raises(kind, match=text) as caught:
            await it.group.start(it.config, it.timeout)
        assert "\n" not in str(caught.value)
        assert all(not psutil.pid_exists(pid) for pid in it.launcher.pids.values())
        assert it.group.state == "dead" and not any(it.heard)

    asyncio.run(start())


@in_loop
async def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        it = Running(tmp_path, 2, endpoint=endpoint)
        with pytest.raises(ValueError, match=f"ranks on {endpoint[6:]}: .*in use; choose .* --cluster-port$"):
            await it.group.start(it.config, BOUND_S)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_ranks_come_over_tcp(tmp_path, host):
    if host == "[::1]" and not has_ipv6():
        pytest.skip("this machine has no IPv6")

    async def go():
        async with Running(tmp_path, 2, endpoint=f"tcp://{host}:{free_port()}") as it:
            await it.answers()
            it.signal(0)
            await it.serving_again()
            assert it.group.members == (1,)
            await it.answers()

    asyncio.run(go())


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@in_loop
async def test_strangers_are_told_once_and_do_no_harm(tmp_path, caplog):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    async with Running(tmp_path, 2, endpoint=endpoint) as it:
        context = zmq.Context()
        for identity in (b"rank-9", b"rank-x", b"beat-1000000", b"node-7", b"\xff"):
            with context.socket(zmq.DEALER) as stranger:
                stranger.setsockopt(zmq.IDENTITY, identity)
                stranger.setsockopt(zmq.LINGER, 500)
                stranger.connect(endpoint)
                for data in (b"", b"garbage", encode(Hello(pid=1, version="0", rank=0)), b"x" * 1000):
                    stranger.send(data)
                stranger.send_multipart([b"several", b"parts"])
        context.term()
        await it.until(lambda: len([line for line in lines(caplog) if "are ignored" in line]) >= 4)
        assert it.group.state == "serving"
        await it.answers()
    told = Counter(lines(caplog))
    assert max(told.values()) == 1, told


class SlowLauncher:
    """Blocks in `start` until it is stopped or may go on, as Ray does while it looks for room."""

    can_restart = slow_start = True

    def __init__(self, launcher):
        self.launcher, self.ranks = launcher, launcher.ranks
        self.begun, self.go, self.stopping = threading.Event(), threading.Event(), threading.Event()
        self.threads = []
        self.lock = threading.Lock()

    def start(self):
        with self.lock:
            self.threads.append(threading.current_thread())
            self.begun.set()
            deadline = time.monotonic() + BOUND_S
            while not self.go.wait(0.01):
                if self.stopping.is_set():
                    raise ValueError("it was stopped")
                assert time.monotonic() < deadline
            return self.launcher.start()

    def stop(self, timeout):
        self.stopping.set()
        with self.lock:
            self.launcher.stop(timeout)

    def __getattr__(self, name):
        return getattr(self.launcher, name)


def slow(tmp_path, ep=2):
    it = Running(tmp_path, ep)
    it.group._launcher = SlowLauncher(it.launcher)
    return it, it.group._launcher


@in_loop
async def test_a_launcher_that_is_slow_does_not_hold_up_the_loop(tmp_path):
    it, launcher = slow(tmp_path)
    start = asyncio.create_task(it.group.start(it.config, BOUND_S))
    await it.until(launcher.begun.is_set)
    assert it.group.state == "loading"  # and this test goes on
    launcher.go.set()
    assert sorted(await start) == [0, 1]
    assert launcher.threads != [threading.current_thread()]
    await it.group.close()
    assert it.launcher.ended() == dict.fromkeys(range(2), "exit code 0")


@pytest.mark.parametrize("how", ["cancel", "close", "cancel at the last moment"])
def test_the_end_while_a_slow_launcher_starts_leaves_nothing(tmp_path, how):
    async def go():
        it, launcher = slow(tmp_path)
        start = asyncio.create_task(it.group.start(it.config, BOUND_S))
        await it.until(launcher.begun.is_set)
        if how == "close":
            await it.group.close()
            with pytest.raises(EngineError, match="the engine is stopped"):
                await start
        else:
            if how != "cancel":
                launcher.go.set()
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start
        assert launcher.stopping.is_set() and not launcher.lock.locked() and it.group.state == "dead"
        await it.group.close()
        assert all(not psutil.pid_exists(pid) for pid in it.launcher.pids.values())

    asyncio.run(go())


# When a rank dies


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("policy", ["continue", "restart"])
def test_a_killed_rank(tmp_path, caplog, rank, policy):
    async def go():
        async with Running(tmp_path, 3, on_rank_loss=policy) as it:
            old = it.launcher.pids[rank]
            wakes = {r: it.at(r)["Wake"] for r in range(3)}
            it.signal(rank)
            await it.serving_again()
            others = [r for r in range(3) if r != rank]
            told = f"rank {rank} was lost (killed by SIGKILL) {WHERE}"
            first, last = lines(caplog)
            assert last == it.group.trouble and it.heard[0] == ("lost", rank)
            if policy == "continue":
                names = ", ".join(map(str, others))
                assert first == f"{told}; recovering on ranks {names}"
                assert re.fullmatch(re.escape(f"{told}; ranks {names} took over ") + r"\d\.\d s later", last)
                assert it.group.members == tuple(others) and it.group.lost == {rank: f"killed by SIGKILL {WHERE}"}
                assert it.group.tables == [[others]] and len(it.heard) == 1
            else:
                assert first == f"{told}; starting it again" and "; ranks 0, 1, 2 serve again " in last
                assert it.group.members == (0, 1, 2) and it.group.lost == {} and it.launcher.pids[rank] != old
                assert it.heard[1:] == [("joined", rank)]
                assert it.group._ready[rank].info["again"] == [[[0]]]  # it was told where the experts are
            await it.until(lambda: all(it.at(r)["Wake"] > wakes[r] for r in it.group.members))
            await it.answers()

    asyncio.run(go())


@pytest.mark.parametrize("policy", ["continue", "restart"])
def test_a_stopped_rank_is_killed(tmp_path, caplog, policy):
    async def go():
        async with Running(tmp_path, 2, on_rank_loss=policy) as it:
            process = psutil.Process(it.launcher.pids[0])
            it.signal(0, signal.SIGSTOP)
            await it.serving_again()
            assert f"rank 0 was lost (no sign of life for 1 s) {WHERE}" in it.group.trouble
            assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
            assert it.group.members == ((1,) if policy == "continue" else (0, 1))
            await it.answers()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("hush deaf stuck", "no sign of life for 1 s"),
        ("fatal", "RuntimeError: no luck"),
        ("exit", "exit code 5"),
        ("garbage", "it sent what this front end cannot read: not msgpack"),
    ],
)
def test_a_rank_that_fails_alive(tmp_path, words, why):
    async def go():
        async with Running(tmp_path, 3) as it:
            it.tell(1, words)
            await it.serving_again()
            assert it.group.lost[1].startswith(why) and it.group.lost[1].endswith(WHERE)
            assert it.group.members == (0, 2)
            await it.until(lambda: 1 in it.launcher.ended())
            await it.answers()

    asyncio.run(go())


@in_loop
async def test_ranks_that_do_not_notice_are_told(tmp_path):
    """As when a machine vanishes: their connections to it do not end."""
    async with Running(tmp_path, 3, collective_timeout=1000.0) as it:
        for rank in (0, 2):
            it.tell(rank, "numb")
        it.signal(1)
        await it.serving_again()
        assert it.group.members == (0, 2) and f"rank 1 was lost (killed by SIGKILL) {WHERE}" in it.group.trouble
        await it.answers()


@in_loop
async def test_a_hung_rank_is_found_when_the_others_have_left(tmp_path, caplog):
    """It beats and reads nothing; the others ran out of patience with it."""
    async with Running(tmp_path, 3) as it:
        it.tell(1, "stuck")
        for rank in (0, 2):
            it.tell(rank, "break")
        await it.serving_again()
        assert "rank 1 was lost (it did not leave the broken group within 2.5 s)" in it.group.trouble
        assert "looking for the rank that failed" in lines(caplog)[0] and "I was told so" in lines(caplog)[0]
        await it.answers()


@in_loop
async def test_a_group_that_breaks_by_itself_is_formed_again(tmp_path):
    async with Running(tmp_path, 2) as it:
        for rank in range(2):
            it.tell(rank, "break")
        await it.serving_again()
        assert it.group.members == (0, 1) and "ranks 0, 1 serve again" in it.group.trouble and it.heard == []
        await it.answers()


@in_loop
async def test_one_after_the_other_until_none_is_left(tmp_path):
    async with Running(tmp_path, 3) as it:
        it.signal(0)
        await it.serving_again()
        it.signal(1)
        await it.serving_again()
        assert it.group.members == (2,)
        await it.answers()
        it.signal(2)
        await it.until(lambda: it.group.state == "dead")
        assert it.group.dead_reason == f"rank 2 was lost (killed by SIGKILL) {WHERE}; no rank is left"
        assert it.heard[-1] == ("dead", it.group.dead_reason)
        it.group.send(2, Submit(request_id="r", prompt_ids=[1], params={}))
        it.group.wake()


@pytest.mark.parametrize("policy", ["continue", "restart"])
def test_two_at_once(tmp_path, policy):
    async def go():
        async with Running(tmp_path, 4, on_rank_loss=policy) as it:
            it.signal(0)
            it.signal(2)
            await it.serving_again()
            assert it.group.members == ((1, 3) if policy == "continue" else (0, 1, 2, 3))
            await it.answers()

    asyncio.run(go())


def test_all_at_once_can_be_started_again(tmp_path):
    async def go():
        async with Running(tmp_path, 2, on_rank_loss="restart") as it:
            it.signal(0)
            it.signal(1)
            await it.serving_again()
            assert sorted(event for event in it.heard if event[0] == "joined") == [("joined", 0), ("joined", 1)]
            await it.answers()

    asyncio.run(go())


@pytest.mark.parametrize("moment", ["store", "load"])
def test_a_restart_that_fails_is_bounded(tmp_path, moment):
    async def go():
        async with Running(tmp_path, 2, on_rank_loss="restart") as it:
            # From now on processes of rank 0 die at this moment.
            it.launcher._env["FAKE_RANKS"] = json.dumps({"0": {"die_at": moment}})
            it.signal(0)
            await it.until(lambda: it.group.state == "dead")
            assert it.group.dead_reason.startswith("rank 0 was lost again (exit code 9)")
            assert it.group.dead_reason.endswith(": 4 times in 10 minutes")

    asyncio.run(go())


@in_loop
async def test_the_end_while_recovering_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHUTDOWN_TIMEOUT_S", 0.3)
    monkeypatch.setattr("moeyard.launch.local.TERMINATE_TIMEOUT_S", 0.3)
    async with Running(tmp_path, 3) as it:
        it.tell(1, "deaf stuck")
        it.signal(0)
        it.signal(2, signal.SIGSTOP)
        await it.until(lambda: it.group.state == "recovering")


@in_loop
async def test_a_front_end_that_was_stopped_blames_nobody(tmp_path):
    async with Running(tmp_path, 2) as it:
        time.sleep(2.5)  # more than rank_timeout, and the beats of that time wait
        await asyncio.sleep(0.3)
        assert it.group.state == "serving" and it.heard == []


@in_loop
async def test_an_error_in_a_callback_is_the_end_and_no_wait(tmp_path):
    async with Running(tmp_path, 2) as it:

        def fail(rank):
            raise RuntimeError("a bug")

        it.group._on_lost = fail
        it.signal(0)
        await it.until(lambda: it.group.state == "dead")
        assert it.group.dead_reason == "the front end failed: RuntimeError: a bug"
        assert it.heard == [("dead", it.group.dead_reason)]
