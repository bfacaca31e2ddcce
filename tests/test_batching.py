"""The scheduler with a fake engine whose KV cache holds plain integers, so that every read can be checked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.batching import Picker, Scheduler, Step
from moeyard.scheduler.blocks import BlockPool
from moeyard.scheduler.requests import Request, Status

Slots = dict[tuple[int, int], int]  # (block, offset) -> state


def mix(state: int, token: int) -> int:
    return (state * 6364136223846793005 + token * 2 + 1442695040888963407) % 2**64


def seed(salt: str) -> int:
    return int.from_bytes(salt.encode()[:7], "little")


def sample(state: int) -> int:
    return (state >> 40) % 3  # few tokens, so that outputs often begin alike


def alone(request: Request) -> list[int]:
    """All tokens of a request, generated without any cache."""
    tokens, state = request.tokens[: request.prompt_len], seed(request.cache_salt)
    for token in tokens:
        state = mix(state, token)
    while len(tokens) < request.max_total:
        tokens.append(sample(state))
        state = mix(state, tokens[-1])
    return tokens


class FakeEngine:
    """Runs steps as a model would: writes KV through the block tables, reads all of it, samples."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 32,
        prefix_cache: bool = True,
        picker: Picker | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_cache)
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_batched_tokens, picker)
        self.kv: Slots = {}
        self.requests: dict[str, Request] = {}
        self.steps: list[Step] = []
        self.scheduled: dict[str, int] = {}  # tokens computed per request, in all

    def add(self, id: str, prompt: list[int], outputs: int, salt: str = "") -> Request:
        request = Request(id, prompt, len(prompt) + outputs, cache_salt=salt)
        self.scheduler.add(request)
        self.requests[id] = request
        return request

    def step(self, abort: tuple[str, ...] = (), abort_late: tuple[str, ...] = ()) -> Step:
        """One step; aborts `abort` before the model runs and `abort_late` before tokens are appended."""
        scheduler = self.scheduler
        step = scheduler.schedule()
        self.check(step)
        self.steps.append(step)
        for request_id in abort:
            scheduler.abort(request_id)
        states = {i: self.compute(self.requests[i], n) for i, n in step.tokens.items() if i not in abort}
        scheduler.commit(step)
        for request_id in abort_late:
            scheduler.abort(request_id)
        for request_id in step.samples:
            if request_id in abort or request_id in abort_late:
                assert not scheduler.append(request_id, 0)
                continue
            request = scheduler.get(request_id)
            assert scheduler.append(request_id, sample(states[request_id]))
            if request.num_tokens == request.max_total:
                assert scheduler.finish(request_id)
        scheduler.check_integrity()
        return step

    def compute(self, request: Request, n: int) -> int:
        """Write the KV of `n` tokens, then read it all as attention would; the last state."""
        size, table = self.pool.block_size, request.block_table
        assert len(table) * size >= request.computed + n
        shared = {b for r in self.scheduler.running if r is not request for b in r.block_table}
        state = seed(request.cache_salt)
        for at, token in enumerate(request.tokens[: request.computed + n]):
            state = mix(state, token)
            slot = (table[at // size], at % size)
            if at >= request.computed:
                assert slot[0] not in shared, f"{request!r} writes to block {slot[0]}, which others read"
                self.kv[slot] = state
            assert self.kv[slot] == state, f"{request!r} reads foreign KV at token {at}"
        self.scheduled[request.id] = self.scheduled.get(request.id, 0) + n
        return state

    def check(self, step: Step) -> None:
        scheduler, counts = self.scheduler, list(step.tokens.values())
        assert counts or not scheduler.has_work
        assert sum(counts) <= scheduler.max_batched_tokens and len(scheduler.running) <= scheduler.max_num_seqs
        assert all(n >= 1 for n in counts)
        first_chunk = sum(n == 1 for n in counts)
        assert all(n == 1 for n in counts[:first_chunk]), "single tokens come first"
        assert not (step.preempted and step.admitted)
        running = {r.id: r for r in scheduler.running}
        assert set(step.tokens) <= set(running) and not set(step.preempted) & set(running)
        assert set(step.admitted) <= set(step.tokens)
        finished = [i for i, n in step.tokens.items() if running[i].computed + n == running[i].num_tokens]
        assert list(step.samples) == finished

    def drain(self, limit: int = 100_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"{len(self.scheduler.running)} requests still run after {limit} steps"
        assert self.pool.used == 0
        self.pool.check_integrity()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_200_random_requests_with_aborts_leave_nothing(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32), label="seed"))
    block_size = rng.choice([1, 2, 4, 16])
    num_blocks = rng.randint(4, 40)
    max_num_seqs = rng.randint(1, 12)
    engine = FakeEngine(num_blocks, block_size, max_num_seqs, max_num_seqs + rng.randint(0, 40), rng.random() < 0.8)
    longest = num_blocks * block_size
    families = [[rng.randrange(2) for _ in range(90)] for _ in range(3)]
    arrivals = list(range(200))
    aborted: set[str] = set()
    for _ in range(20_000):
        while arrivals and rng.random() < 0.4:
            total = rng.randint(2, min(longest, 90))
            prompt = rng.choice(families)[: rng.randint(1, total - 1)]
            prompt = prompt[: rng.randint(1, len(prompt))] + [rng.randrange(2)] * rng.randint(0, 3)
            prompt = prompt[: total - 1]
            engine.add(str(arrivals.pop(0)), prompt, total - len(prompt), rng.choice(["", "", "salt"]))
        alive = [*engine.scheduler.running, *engine.scheduler.waiting]
        pairs: list[tuple[str, ...]] = [(), ()]
        for _ in range(rng.choice([0] * 60 + [1, 2])):
            if alive:
                pairs[rng.randrange(2)] += (alive.pop(rng.randrange(len(alive))).id,)
        aborted.update(*pairs)
        engine.step(*pairs)
        if not arrivals and not engine.scheduler.has_work:
            break
    assert engine.pool.used == 0 and not engine.scheduler.has_work and not arrivals
    engine.pool.check_integrity()
    assert engine.scheduler.preemptions == sum(len(step.preempted) for step in engine.steps)
    admitted = [i for step in engine.steps for i in step.admitted]
    assert len(set(admitted)) == len(admitted)
    for request in engine.requests.values():
        assert request.status is Status.FINISHED and request.block_table == []
        if request.id not in aborted:
            assert request.tokens == alone(request), f"{request!r} has other tokens than alone"


def test_chunks_and_decode_share_a_step() -> None:
    engine = FakeEngine(max_batched_tokens=8)
    engine.add("short", [1, 2, 3], 4)
    engine.add("long", [5] * 20, 2)
    assert engine.step().tokens == {"short": 3, "long": 5}
    step = engine.step()
    assert list(step.tokens.items()) == [("short", 1), ("long", 7)]
    assert (step.samples, step.admitted) == (("short",), ())
    step = engine.step()
    assert step.tokens == {"short": 1, "long": 7} and step.samples == ("short",)
    step = engine.step()
    assert list(step.tokens.items()) == [("short", 1), ("long", 1)] and step.samples == ("short", "long")
    engine.drain()


def test_requests_start_in_order_of_arrival() -> None:
    engine = FakeEngine(num_blocks=12, max_num_seqs=3, prefix_cache=False)
    rng = random.Random(1)
    for i in range(50):
        engine.add(str(i), [i] * rng.randint(1, 30), rng.randint(1, 12))
    engine.drain()
    assert [i for step in engine.steps for i in step.admitted] == [str(i) for i in range(50)]


def test_no_request_starves_under_a_stream_of_new_ones() -> None:
    engine = FakeEngine(num_blocks=10, max_num_seqs=4, max_batched_tokens=16)
    big = engine.add("big", [1, 2] * 15, 10)  # takes the whole pool
    for i in range(400):
        engine.add(f"before{i}", [1, 2] * 3, 3)
        engine.step()
        if big.status is Status.FINISHED:
            break
    assert big.status is Status.FINISHED and len(engine.steps) < 40
    late = engine.add("late", [1, 2] * 15, 10)
    ahead = len(engine.scheduler.waiting)
    for i in range(1000):
        engine.add(f"after{i}", [1, 2] * 3, 3)
        engine.step()
        if late.status is Status.FINISHED:
            break
    assert late.status is Status.FINISHED
    assert sum(r.status is Status.FINISHED for r in engine.requests.values()) <= ahead + 20


def test_preemption_takes_the_newest_and_loses_no_token() -> None:
    engine = FakeEngine(num_blocks=8, block_size=2, max_num_seqs=4, prefix_cache=False)
    requests = [engine.add(str(i), [i, 1], 10) for i in range(4)]
    preempted: list[str] = []
    while engine.scheduler.has_work:
        before = [r.id for r in engine.scheduler.running]
        step = engine.step()
        newest_first = before[::-1][: len(step.preempted)]
        assert list(step.preempted) == newest_first
        preempted += step.preempted
        if step.preempted:
            waiting = [r.id for r in engine.scheduler.waiting]
            assert waiting[: len(newest_first)] == newest_first[::-1]
    assert preempted and engine.scheduler.preemptions == len(preempted)
    assert "0" not in preempted
    for request in requests:
        assert request.tokens == alone(request)
        recomputed = engine.scheduled[request.id] > request.max_total - 1
        assert recomputed == (request.id in preempted)


def test_prefix_cache_restores_part_of_a_preempted_request() -> None:
    def scheduled(prefix_cache: bool) -> int:
        engine = FakeEngine(num_blocks=12, block_size=2, prefix_cache=prefix_cache)
        requests = [engine.add(str(i), [i] * 5, 11) for i in range(3)]
        engine.drain()
        assert engine.scheduler.preemptions > 0
        assert all(r.tokens == alone(r) and r.cached_tokens == 0 for r in requests)
        return sum(engine.scheduled.values())

    assert scheduled(True) < scheduled(False)


def test_admission_leaves_each_running_request_a_block() -> None:
    engine = FakeEngine(num_blocks=8, block_size=4, prefix_cache=False)
    engine.add("old", [1] * 15, 17)
    engine.add("new", [2] * 14, 2)
    assert engine.step().admitted == ("old",)
    engine.drain()
    assert engine.scheduler.preemptions == 0


def test_a_request_as_large_as_the_pool_runs_alone() -> None:
    engine = FakeEngine(num_blocks=4, block_size=4)
    request = engine.add("all", [1] * 3, 13)
    engine.drain()
    assert request.tokens == alone(request)


def test_a_request_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    engine = FakeEngine(num_blocks=4, block_size=4)
    with pytest.raises(ValueError, match=r"17 tokens \(5 KV blocks of 4\).* holds 16 \(4 blocks\)"):
        engine.add("big", [1] * 3, 14)
    assert not engine.scheduler.has_work


def test_prefix_hit_saves_computation() -> None:
    engine = FakeEngine()
    first = engine.add("first", list(range(18)), 2)
    engine.drain()
    second = engine.add("second", list(range(18)), 2)
    step = engine.step()
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)
    assert step.tokens == {"second": 2} and step.samples == ("second",)
    assert (engine.pool.queried_tokens, engine.pool.hit_tokens) == (36, 16)
    engine.drain()


def test_a_next_turn_reuses_prompt_and_output() -> None:
    engine = FakeEngine()
    first = engine.add("first", [1] * 6, 6)
    engine.drain()
    second = engine.add("second", [*first.tokens, 9, 9], 2)
    engine.drain()
    assert second.cached_tokens == 8  # the last output token has no KV, so the third block never was full


def test_prefix_cache_off_shares_nothing() -> None:
    engine = FakeEngine(prefix_cache=False)
    for i in range(3):
        engine.add(str(i), list(range(18)), 2)
    engine.drain()
    assert set(engine.scheduled.values()) == {19}


def test_other_salt_shares_nothing() -> None:
    engine = FakeEngine()
    for salt in ("", "a", "b"):
        request = engine.add(f"salt {salt}", list(range(18)), 2, salt)
        engine.drain()
        assert request.cached_tokens == 0 and engine.scheduled[request.id] == 19
    again = engine.add("again", list(range(18)), 2, "a")
    engine.drain()
    assert again.cached_tokens == 16


@pytest.mark.parametrize("budget", [16, 200, 2000])
def test_n_samples_of_one_prompt_prefill_it_once(budget: int) -> None:
    engine = FakeEngine(num_blocks=200, max_num_seqs=16, max_batched_tokens=budget)
    for i in range(16):
        engine.add(str(i), list(range(102)), 1)
    engine.drain()
    assert engine.scheduled == {"0": 102} | {str(i): 2 for i in range(1, 16)}


def test_others_pass_those_that_wait_for_a_prefix() -> None:
    engine = FakeEngine(max_batched_tokens=24)
    engine.add("first", [1] * 18, 1)
    same = engine.add("same", [1] * 18, 1)
    engine.add("same too", [1] * 18, 1)
    engine.add("other", [2] * 6, 1)
    engine.add("last", [3] * 6, 1)
    assert engine.step().tokens == {"first": 18, "other": 6}
    assert [r.id for r in engine.scheduler.waiting] == ["same", "same too", "last"]
    assert engine.step().tokens == {"same": 2, "same too": 2, "last": 6} and same.cached_tokens == 16


def test_waiting_for_a_prefix_ends_when_its_request_does() -> None:
    engine = FakeEngine(max_batched_tokens=8)
    engine.add("first", [1] * 30, 1)
    same = engine.add("same", [1] * 30, 1)
    engine.step()
    engine.step(abort=("first",))
    step = engine.step()
    assert step.tokens == {"same": 8} and same.cached_tokens == 8
    engine.drain()
    assert same.tokens == alone(same)


def test_a_prefix_that_cannot_be_reused_is_not_waited_for() -> None:
    """Prompts of exactly one block: the cache could give none of it, since one token must be computed."""
    engine = FakeEngine()
    engine.add("a", [1] * 4, 1)
    engine.add("b", [1] * 4, 1)
    assert engine.step().tokens == {"a": 4, "b": 4}


def test_abort_in_every_state() -> None:
    engine = FakeEngine(max_num_seqs=1)
    running = engine.add("running", [1] * 6, 4)
    waiting = engine.add("waiting", [2] * 6, 4)
    engine.step()
    assert engine.scheduler.abort("waiting") and waiting.status is Status.FINISHED
    assert engine.scheduler.abort("running") and running.status is Status.FINISHED
    assert engine.pool.used == 0
    for unknown in ("running", "waiting", "never"):
        assert not engine.scheduler.abort(unknown)
        assert not engine.scheduler.finish(unknown)
        assert not engine.scheduler.append(unknown, 0)
        with pytest.raises(KeyError):
            engine.scheduler.get(unknown)


def test_an_id_that_was_aborted_and_came_back_gets_nothing_of_the_old_step() -> None:
    engine = FakeEngine()
    engine.add("a", [1] * 6, 4)
    step = engine.scheduler.schedule()
    engine.scheduler.abort("a")
    new = engine.add("a", [2] * 6, 4)
    engine.scheduler.commit(step)
    assert not engine.scheduler.append("a", 7)
    assert new.computed == 0 and new.num_tokens == 6
    engine.drain()
    assert new.tokens == alone(new)


def test_ids_in_use_and_bad_limits_are_refused() -> None:
    engine = FakeEngine()
    engine.add("a", [1], 1)
    with pytest.raises(ValueError, match="in use"):
        engine.add("a", [1], 1)
    for limits, text in (((0, 1), "max_num_seqs is 0"), ((4, 3), r"max_batched_tokens \(3\) is below")):
        with pytest.raises(ValueError, match=text):
            Scheduler(engine.pool, *limits)


def test_output_ids_is_a_copy_of_the_generated_tokens() -> None:
    engine = FakeEngine()
    request = engine.add("a", [1, 2, 3], 4)
    engine.step()
    engine.step()
    assert request.output_ids == request.tokens[3:] and len(request.output_ids) == 2
    request.output_ids.clear()
    assert request.num_tokens == 5
