"""Real ranks that die or stop under load: who is named, who goes on, and that every answer stays the same."""

import asyncio
import errno
import functools
import json
import logging
import os
import random
import re
import signal
import threading
import time
from contextlib import asynccontextmanager

import httpx
import openai
import psutil
import pytest

from moeyard.engine.config import EngineConfig
from moeyard.engine.params import SamplingParams
from moeyard.launch import membership, recorded
from moeyard.launch.demo import KEY, SERVE, Server
from moeyard.launch.demo import _until_ready as until_ready
from moeyard.launch.frontend import FrontEnd, RequestError
from moeyard.launch.local import LocalLauncher

NOTICED_S = 10.0
"""Within this a lost rank is named."""
BOUND_S = 100.0
"""Within this everything ends, on a machine that does much else besides."""
WHERE = r"(at layer \d+ of step \d+|in step \d+|after step \d+)"
OPTIONS = {"threads": 1, "dtype": "float32", "kv_memory": "16MiB", "progress": False}

SCHEMA = json.dumps({"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 4, "maxItems": 4})
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
REQUESTS = [
    ("def main(", GREEDY),
    ("import os\nimport sys\n" * 40, GREEDY),
    ("x = 1\n", GREEDY | {"max_tokens": 32}),
    ("class Stack:\n", {"n": 2, "temperature": 0.8, "seed": 7, "max_tokens": 24, "ignore_eos": True}),
    ("for name in", {"temperature": 1.0, "top_p": 0.9, "seed": 11, "max_tokens": 32, "ignore_eos": True}),
    ("colours = ", {"temperature": 0.7, "seed": 3, "max_tokens": 48, "json_schema": SCHEMA}),
    ("def read(path):\n", GREEDY | {"stop": ("no such", "path_with_path"), "max_tokens": 48}),
    ("while True:", {"n": 2, "temperature": 0.6, "seed": 2**64 - 1, "max_tokens": 20, "ignore_eos": True}),
    ("@property\ndef size(self):", GREEDY | {"stop": ("number of",), "include_stop_str_in_output": True}),
]


def in_loop(test):
    @functools.wraps(test)
    def run(**fixtures):
        asyncio.run(test(**fixtures))

    return run


class Unreachable(LocalLauncher):
    """Ranks on a machine that vanishes: not to be killed, and nobody hears how they end."""

    def __init__(self, **options):
        super().__init__(**options)
        self.vanished = set()

    def kill(self, rank):
        if rank not in self.vanished:
            super().kill(rank)

    def ended(self):
        return {rank: how for rank, how in super().ended().items() if rank not in self.vanished}

    def stop(self, timeout):
        for rank in self.vanished:
            super().kill(rank)
        super().stop(timeout)


class Yard:
    """A front end with real ranks, and the requests that were sent there."""

    def __init__(self, ranks, **options):
        self.launcher = Unreachable(ranks=range(ranks))
        if ranks > 1:
            options["router"] = "round_robin"
        self.frontend = FrontEnd(EngineConfig(ep=ranks, **OPTIONS, **options), launcher=self.launcher)
        self.group = self.frontend._group
        self.tokens = 0
        self.number = 0

    def ask(self, text, values):
        """A request as a task that gives each output's ids, text and end."""
        self.number += 1
        ids = self.frontend.tokenize(text)
        stream = self.frontend.generate(ids, SamplingParams(**values), request_id=f"r{self.number}")

        async def run():
            seen = 0
            async with asyncio.timeout(BOUND_S):
                async for output in stream:
                    now = sum(len(one.token_ids) for one in output.outputs)
                    self.tokens, seen = self.tokens + now - seen, now
            return [(one.token_ids, one.text, one.finish_reason) for one in output.outputs]

        return asyncio.create_task(run())

    def ask_all(self):
        self.tokens = 0
        return [self.ask(*request) for request in REQUESTS]

    def signal(self, rank, number=signal.SIGKILL):
        os.kill(self.launcher.pids[rank], number)

    async def until(self, condition, bound=BOUND_S):
        async with asyncio.timeout(bound):
            while not condition():
                await asyncio.sleep(0.005)

    async def named(self, rank, why="killed by SIGKILL"):
        """A loss is told: by the state of the rank, and in words."""
        await self.until(lambda: rank in self.group.lost or f"rank {rank} was lost" in self.frontend.trouble, NOTICED_S)
        assert re.search(rf"rank {rank} was lost \({why}\) {WHERE}", self.frontend.trouble), self.frontend.trouble
        if rank in self.group.lost:
            assert re.fullmatch(rf"lost: {why} {WHERE}", self.frontend.rank_states()[rank])

    async def serving(self, *members):
        await self.until(lambda: self.group.state == "serving" and self.group.members == members)
        assert self.frontend.alive and not self.frontend.recovering

    async def answers(self, wanted):
        """New requests are served as the undisturbed ones were."""
        assert await asyncio.gather(*self.ask_all()) == wanted


@asynccontextmanager
async def running(ranks, **options):
    it = Yard(ranks, **options)
    try:
        async with asyncio.timeout(BOUND_S):
            await it.frontend.start()
        yield it
    finally:
        await it.frontend.close()
    assert all(not psutil.pid_exists(pid) for pid in it.launcher.pids.values())


@pytest.fixture(scope="module")
def wanted():
    """What one rank answers when nothing happens to it."""

    async def go():
        async with running(1) as it:
            return await asyncio.gather(*it.ask_all())

    answers = asyncio.run(go())
    assert [end for outputs in answers for _, _, end in outputs].count("stop") == 3
    return answers


def total(wanted):
    return sum(len(ids) for outputs in wanted for ids, _, _ in outputs)


# Killed, one after the other


async def idle(it, wanted):
    """Nobody asks for anything, and still the loss is noticed."""
    await it.until(lambda: not it.frontend.stats.running)
    it.signal(2)
    await it.named(2)
    await it.serving(1)


async def placement(it, wanted):
    """In the middle of a move of most experts, a few at a time."""
    place = asyncio.create_task(it.frontend.placements.wait()) if it.frontend.place(planner="round_robin") else None
    await asyncio.sleep(0.05)
    assert it.frontend.placements.moving
    it.signal(0)
    with pytest.raises(RequestError, match="rank"):
        await place
    await it.named(0)
    await it.serving(2)
    assert not it.frontend.placements.moving


async def stopped(it, wanted):
    """It does not die: it says nothing any more."""
    tasks = it.ask_all()
    await it.until(lambda: it.tokens > total(wanted) // 3)
    it.signal(0, signal.SIGSTOP)
    await it.named(0, "no sign of life for 2 s")
    assert await asyncio.gather(*tasks) == wanted
    await it.serving(1)


@pytest.mark.parametrize(
    ("rank", "then", "options"),
    [(0, idle, {}), (1, placement, {"move_bytes": "200KiB"}), (2, stopped, {"rank_timeout": 2.0})],
)
@in_loop
async def test_killed_under_load(rank, then, options, wanted, tmp_path, monkeypatch, caplog):
    """First one of three under load, then one of the two that are left."""
    survivors = tuple(other for other in range(3) if other != rank)
    async with running(3, placement=str(tmp_path / "loads"), **options) as it:
        with monkeypatch.context() as patch:
            patch.setattr(recorded.os, "fsync", full)
            tasks = it.ask_all()
            moment = random.Random(rank).randrange(1, total(wanted) * 2 // 3)
            await it.until(lambda: it.tokens >= moment)
            it.signal(rank)
            await it.named(rank)
            late = it.ask(*REQUESTS[0])
            assert await asyncio.gather(*tasks) == wanted
            assert await late == wanted[0]
            await it.serving(*survivors)
            assert {r: s for r, s in it.frontend.rank_states().items() if s == "ok"} == dict.fromkeys(survivors, "ok")
            assert re.search(rf"ranks {survivors[0]}, {survivors[1]} took over [\d.]+ s later", it.frontend.trouble)
            told = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR and "was lost" in r.message]
            assert len(told) == 1 and re.match(rf"rank {rank} was lost \(killed by SIGKILL\) {WHERE}; rec", told[0])

            await then(it, wanted)
            await it.answers(wanted)
            assert len(it.group.members) == 1
            it.frontend._save_loads()
    disk = [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()]
    assert len(disk) == 1 and "No space left on device" in disk[0]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@in_loop
async def test_a_second_loss_while_the_first_is_made_good_and_then_the_last(wanted):
    async with running(3) as it:
        tasks = it.ask_all()
        await it.until(lambda: it.tokens > total(wanted) // 4)
        it.signal(1)
        await it.named(1)
        # Rank 0 has made the store at which the two are to meet, and rank 2 may be on its way there.
        await it.until(lambda: it.group._membership._phase == "join", NOTICED_S)
        it.signal(0)
        await it.named(0)
        assert await asyncio.gather(*tasks) == wanted
        await it.serving(2)
        assert "rank 2 took over" in it.frontend.trouble

        tasks = it.ask_all()
        await it.until(lambda: it.tokens > total(wanted) // 4)
        it.signal(2)
        for task in tasks:
            with pytest.raises(RequestError, match=r"rank 2 was lost \(killed by SIGKILL\).*no rank is left"):
                await task
        assert not it.frontend.alive and "no rank is left" in it.frontend.dead_reason
        with pytest.raises(RequestError, match="the engine is dead: rank 2 was lost"):
            await it.ask(*REQUESTS[0])


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@in_loop
async def test_a_machine_that_vanishes(rank, wanted, monkeypatch):
    """No connection ends: the others wait in an exchange, which may last ten times as long as all may take here."""
    heard = []
    take = membership.Membership._broke
    monkeypatch.setattr(membership.Membership, "_broke", lambda it, *args: heard.append(args[:2]) or take(it, *args))
    survivors = tuple(other for other in range(3) if other != rank)
    async with running(3, rank_timeout=2.5, collective_timeout=10 * BOUND_S) as it:
        tasks = it.ask_all()
        await it.until(lambda: it.tokens > total(wanted) // 3)
        it.launcher.vanished.add(rank)
        it.signal(rank, signal.SIGSTOP)
        await it.named(rank, "no sign of life for 2.5 s")
        assert await asyncio.gather(*tasks) == wanted
        await it.serving(*survivors)
        await it.answers(wanted)
    left = {rank: broken for rank, broken in heard if broken.epoch == 1}
    assert set(left) == set(survivors)
    told = [broken.error for broken in left.values() if broken.told]  # another may see that its connections end
    assert told and set(told) == {"the front end said that the group is broken"}


# Started again


@in_loop
async def test_a_loss_while_another_rank_is_started_again(wanted):
    """The one that loads meanwhile is not at fault: its process stays."""
    async with running(3, on_rank_loss="restart") as it:
        tasks = it.ask_all()
        await it.until(lambda: it.tokens > total(wanted) // 3)
        it.signal(1)
        await it.named(1)
        state = it.group._membership._ranks
        await it.until(lambda: 1 in it.group.lost and state[1].joined and not state[1].ready)
        pid = it.launcher.pids[1]
        it.signal(2)
        assert await asyncio.gather(*tasks) == wanted
        await it.serving(0, 1, 2)
        assert it.launcher.pids[1] == pid
        lost = re.findall(r"rank (\d) was lost (again )?", it.frontend.trouble)
        assert lost == [("1", ""), ("2", "")]
        await it.answers(wanted)


@in_loop
async def test_a_rank_that_is_started_again(wanted):
    async with running(2, on_rank_loss="restart") as it:
        tasks = it.ask_all()
        await it.until(lambda: it.tokens > total(wanted) // 3)
        pid = it.launcher.pids[0]
        it.signal(0)
        await it.named(0)
        assert "starting it again" in it.frontend.trouble
        assert await asyncio.gather(*tasks) == wanted
        await it.serving(0, 1)
        assert it.launcher.pids[0] != pid and it.frontend.rank_states() == {0: "ok", 1: "ok"}
        await it.answers(wanted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSTOP, "no sign of life for 3 s")],
    ids=["kill", "stop"],
)
@in_loop
async def test_each_rank_in_turn_twenty_times(number, why, wanted, monkeypatch):
    monkeypatch.setattr(membership, "RESTARTS", 20)
    chance = random.Random(number)
    async with running(3, on_rank_loss="restart", rank_timeout=3.0) as it:
        for turn in range(60):
            rank = turn % 3
            tasks = it.ask_all()
            moment = chance.randrange(total(wanted) * 3 // 4)
            await it.until(lambda moment=moment: it.tokens >= moment)
            it.signal(rank, number)
            await it.until(lambda rank=rank: rank in it.group.lost, NOTICED_S)
            await it.named(rank, why)
            assert await asyncio.gather(*tasks) == wanted
            await it.serving(0, 1, 2)


# Through HTTP


class Streams:
    """Streaming requests of the real client, each in a thread."""

    def __init__(self, url):
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=BOUND_S, max_retries=0)
        self.model = self.client.models.list().data[0].id

    def start(self, *numbers):
        """Once there is text."""
        self.texts, self.failed, self.begun = {}, {}, threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in numbers]
        for thread in self.threads:
            thread.start()
        assert self.begun.wait(BOUND_S)

    def join(self):
        for thread in self.threads:
            thread.join(BOUND_S)
            assert not thread.is_alive()

    def _run(self, i):
        prompt, values = REQUESTS[i]
        values = {k: v for k, v in values.items() if k != "ignore_eos"} | {"extra_body": {"ignore_eos": True}}
        got = [""] * values.get("n", 1)
        try:
            for chunk in self.client.completions.create(model=self.model, prompt=prompt, stream=True, **values):
                for choice in chunk.choices:
                    got[choice.index] += choice.text
                    if len(got[choice.index]) > 10:
                        self.begun.set()
            self.texts[i] = got
        except openai.OpenAIError as error:
            self.failed[i] = error


def poll(get, bound):
    """What `get` gives once it gives something."""
    deadline = time.monotonic() + bound
    while not (found := get()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_through_http(wanted):
    """Streams go on when a rank dies and `/health` says what happened, then all die. The trace has a full disk."""
    options = ["--ep", "3", "--threads", "1", "--dtype", "float32", "--kv-memory", "16MiB", "--router", "round_robin"]
    server = Server(command=(*SERVE, *options, "--trace", "/dev/full"))
    try:
        url = server.url(BOUND_S)
        until_ready(url, BOUND_S)
        streams = Streams(url)

        def health():
            return httpx.get(f"{url}/health", timeout=BOUND_S)

        def kill(*ranks):
            for process in psutil.Process(server.process.pid).children():
                line = process.cmdline()
                if "--rank" in line and int(line[line.index("--rank") + 1]) in ranks:
                    process.kill()

        chosen = [0, 2, 3, 4, 6]
        streams.start(*chosen)
        kill(1)
        told = poll(lambda: (body := health().json())["ranks"]["1"] != "ok" and body, NOTICED_S)
        assert re.fullmatch(rf"lost: killed by SIGKILL {WHERE}", told["ranks"]["1"])
        assert re.match(rf"rank 1 was lost \(killed by SIGKILL\) {WHERE}; ", told["trouble"])
        streams.join()
        assert not streams.failed and streams.texts == {i: [text for _, text, _ in wanted[i]] for i in chosen}
        body = health().json()
        assert body["status"] == "ok" and "ranks 0, 2 took over" in body["trouble"]

        streams.start(*chosen)
        assert streams.begun.is_set(), "new requests are served"
        kill(0, 2)
        dead = poll(lambda: (answer := health()).status_code == 503 and answer.json(), NOTICED_S)
        assert re.search(rf"rank [02] was lost .*{WHERE}.*no rank is left", dead["error"]["message"])
        streams.join()
        assert streams.failed
        with pytest.raises(openai.InternalServerError, match="the engine is dead"):
            streams.client.completions.create(model=streams.model, prompt="a")
        server.stop()
    finally:
        server.kill()
    output = server.output()
    assert re.search(rf"rank 1 was lost \(killed by SIGKILL\) {WHERE}; recovering on ranks 0, 2", output)
    assert output.count("trace: cannot write /dev/full: No space left on device; tracing stops") == 1
