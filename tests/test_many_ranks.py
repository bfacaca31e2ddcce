"""The front end over several ranks: who gets a request, ranks that are lost, sums over ranks, and placements."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest
from fake_frontend import error_of
from fake_group import EXPERTS, KV_TOKENS, LAYERS, MAX_MODEL_LEN, FakeGroup, FakeLauncher, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine.config import EngineConfig, ServeConfig
from moeyard.engine.messages import Abort, Place, Spans, Stats, Submit
from moeyard.engine.params import SamplingParams
from moeyard.launch import frontend as frontend_module
from moeyard.launch import placing
from moeyard.launch.admission import PrefillQueue
from moeyard.launch.detokenize import Vocabulary
from moeyard.launch.flight import MAX_LOSSES, Flights
from moeyard.launch.frontend import FrontEnd, RequestError
from moeyard.launch.metrics import Metrics
from moeyard.launch.placing import Placements, changed_slots, plan, read_tables
from moeyard.launch.sequences import Output, Request, SilentObserver, split
from moeyard.launch.server import build_app
from moeyard.launch.totals import COUNTERS, Totals
from moeyard.scheduler.moves import plan_moves
from moeyard.scheduler.placement import linear, round_robin

BOUND_S = 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


class Running:
    def __init__(self, ranks, **options):
        self.frontend = FrontEnd(EngineConfig(**options), tokenizer=None, launcher=FakeLauncher(ranks))
        self.group = self.frontend._group
        self.observer = self.frontend.observer = Metrics()
        self.number = 0

    def request(self, ids, params=GREEDY):
        """A request as a task: its outputs' token ids."""
        self.number += 1
        stream = self.frontend.generate(ids, params, request_id=f"r{self.number}")

        async def run():
            async with asyncio.timeout(BOUND_S):
                async for output in stream:
                    last = output
            return [one.token_ids for one in last.outputs]

        return asyncio.create_task(run())

    async def finish(self, *tasks):
        async with asyncio.timeout(BOUND_S):
            while not all(task.done() for task in tasks):
                self.group.step()
                await asyncio.sleep(0.001)
        return [task.result() for task in tasks]

    def metric(self, name, **labels):
        return self.observer.registry.get_sample_value(f"moeyard:{name}", labels)


@asynccontextmanager
async def running(monkeypatch, ranks=2, **options):
    monkeypatch.setattr(frontend_module, "EngineGroup", FakeGroup)
    monkeypatch.setattr(frontend_module, "load_tokenizer", lambda *_, **__: None)
    it = Running(ranks, **options)
    await it.frontend.start()
    try:
        yield it
        assert it.frontend._queue.waiting == 0 and it.frontend._flights.waiting == 0
    finally:
        await it.frontend.close()


def in_loop(test):
    def run(monkeypatch, tmp_path, caplog):
        names = test.__code__.co_varnames[: test.__code__.co_argcount]
        available = {"monkeypatch": monkeypatch, "tmp_path": tmp_path, "caplog": caplog}
        asyncio.run(test(**{name: available[name] for name in names}))

    return run


# Requests


@pytest.mark.parametrize("router", ["dualmap", "round_robin", "least_loaded"])
def test_all_ranks_work_and_are_woken(monkeypatch, router):
    async def script():
        async with running(monkeypatch, 3, router=router) as it:
            tasks = [it.request([i] * 64) for i in range(12)]
            await settle()
            submits = it.group.messages(Submit)
            assert {rank for rank, _ in submits} == {0, 1, 2} and it.group.wakes >= 1
            assert await it.finish(*tasks) == [[[i] * 6] for i in range(12)]
            assert len(it.group.messages(Submit)) == 12 and not it.group.messages(Abort)

    asyncio.run(script())


@in_loop
async def test_a_rank_gets_no_more_than_it_can_begin_with(monkeypatch):
    async with running(monkeypatch, 2, router="round_robin", max_batched_tokens=128) as it:
        tasks = [it.request([1] * 128) for _ in range(6)]
        await settle()
        assert sorted(rank for rank, _ in it.group.messages(Submit)) == [0, 1]
        assert it.frontend._flights.waiting == 4
        it.group.report(0, running=1)
        assert it.frontend.stats.waiting == 4, "what waits here counts as well"
        it.group.step(1)
        assert [rank for rank, _ in it.group.messages(Submit)] == [0, 1, 1]
        tasks[-1].cancel()  # it waits here, so nobody else has to know
        await settle()
        assert not it.group.messages(Abort) and it.frontend._flights.waiting == 2
        await it.finish(*tasks[:-1])
        assert len(it.group.messages(Submit)) == 5


@in_loop
async def test_the_limits_are_those_of_the_smallest_rank(monkeypatch):
    async with running(monkeypatch, 3) as it:
        ready = it.frontend.ready
        assert (ready.max_model_len, ready.kv_tokens) == (MAX_MODEL_LEN - 2, KV_TOKENS - 32)
        assert it.frontend.config.ep == 3


@in_loop
async def test_aborts_go_to_the_rank_that_has_it(monkeypatch):
    async with running(monkeypatch, 2, router="round_robin") as it:
        tasks = [it.request([i]) for i in range(2)]
        two = it.request([5], SamplingParams(temperature=0.0, max_tokens=9, n=2))
        await settle()
        tasks[1].cancel()
        two.cancel()
        await settle()
        where = {message.request_id: rank for rank, message in it.group.messages(Submit)}
        told = {request_id: rank for rank, message in it.group.messages(Abort) for request_id in message.request_ids}
        assert len(told) == 3 and all(where[request_id] == rank for request_id, rank in told.items())
        await it.finish(tasks[0])


@in_loop
async def test_deltas_count_only_from_the_rank_that_has_it(monkeypatch):
    async with running(monkeypatch, 2, router="round_robin") as it:
        task = it.request([7, 8, 9])
        await settle()
        ((rank, submit),) = it.group.messages(Submit)
        zombie = 1 - rank
        it.group.running[zombie]["x"] = it.group.running[rank][submit.request_id]
        it.group.running[zombie][submit.request_id] = it.group.running[zombie].pop("x")
        it.group.step(zombie)
        it.group.running[zombie].clear()
        it.group.running[rank][submit.request_id] = (submit, [])
        assert await it.finish(task) == [[[7, 8, 9, 7, 8, 9]]]


# Ranks that are lost


@in_loop
async def test_requests_of_a_lost_rank_go_on_elsewhere_with_their_tokens(monkeypatch):
    async with running(monkeypatch, 2, router="round_robin") as it:
        params = SamplingParams(temperature=0.0, max_tokens=6)
        tasks = [it.request([10 * i, 10 * i + 1, 10 * i + 2, 10 * i + 3], params) for i in range(4)]
        await settle()
        it.group.step()
        it.group.step()
        seeds = {m.request_id: m.params["seed"] for _, m in it.group.messages(Submit)}
        before = len(it.group.sent)
        it.group.lose(0)
        assert it.frontend.recovering and it.frontend.alive
        assert it.frontend.rank_states() == {0: "lost: killed by SIGKILL at layer 3 of step 17", 1: "ok"}
        late = it.request([3])
        await asyncio.sleep(0.25)
        assert len(it.group.sent) == before, "requests wait while the others take over"
        assert not any(task.done() for task in [*tasks, late])
        it.group.recover()
        await asyncio.sleep(0.25)
        again = it.group.messages(Submit)[4:]
        assert {rank for rank, _ in again} == {1} and len(again) == 3
        assert [message.output_ids for _, message in again] == [[0, 1], [20, 21], []]
        assert all(
            message.params["seed"] == seeds.get(message.request_id, message.params["seed"]) for _, message in again
        )
        assert await it.finish(*tasks, late) == [[[a, a + 1, a + 2, a + 3, a, a + 1]] for a in (0, 10, 20, 30)] + [
            [[3] * 6]
        ]
        assert it.metric("time_to_first_token_seconds_count") == 5, "reported once for each request"
        assert it.metric("request_success_total", finished_reason="length") == 5
        assert it.metric("rank_losses_total") == 1 and it.metric("ranks") == 1


@in_loop
async def test_a_rank_that_comes_back_gets_requests_again(monkeypatch):
    async with running(monkeypatch, 2, router="round_robin", on_rank_loss="restart") as it:
        tasks = [it.request([i + 1]) for i in range(4)]
        await settle()
        it.group.lose(1)
        it.group.recover(1)
        await it.finish(*tasks)
        before = len(it.group.messages(Submit))
        more = [it.request([i]) for i in range(4)]
        await settle()
        assert {rank for rank, _ in it.group.messages(Submit)[before:]} == {0, 1}
        await it.finish(*more)
        assert it.frontend.rank_states() == {0: "ok", 1: "ok"} and it.metric("ranks") == 2


@in_loop
async def test_while_no_rank_is_left_requests_wait_for_one(monkeypatch):
    async with running(monkeypatch, 2, on_rank_loss="restart") as it:
        monkeypatch.setattr(it.group, "die", lambda reason: None)
        tasks = [it.request([i + 1]) for i in range(3)]
        await settle()
        it.group.step(0)
        it.group.lose(0)
        it.group.lose(1)
        tasks += [it.request([9]), it.request([8])]
        await settle()
        assert it.frontend._flights.waiting == 5
        tasks.pop().cancel()
        await settle()
        assert it.frontend._flights.waiting == 4
        it.group.recover(0, 1)
        assert await it.finish(*tasks) == [[[1] * 6], [[2] * 6], [[3] * 6], [[9] * 6]]


@in_loop
async def test_a_request_that_ends_its_ranks_is_not_sent_for_ever(monkeypatch):
    async with running(monkeypatch, 2, router="round_robin", on_rank_loss="restart") as it:
        monkeypatch.setattr(it.group, "die", lambda reason: None)
        task, rank = it.request([1]), 0
        await settle()
        for i in range(MAX_LOSSES):
            ((rank, _),) = it.group.messages(Submit)[i:]
            it.group.lose(rank)
            it.group.recover(rank)
            await settle()
        with pytest.raises(RequestError, match="lost 3 times") as caught:
            await task
        assert (caught.value.status, caught.value.code) == (500, "rank_lost")
        assert len(it.group.messages(Submit)) == MAX_LOSSES


@in_loop
async def test_a_request_that_gives_tokens_survives_any_number_of_losses(monkeypatch):
    async with running(monkeypatch, 2, router="round_robin", on_rank_loss="restart") as it:
        task = it.request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=12))
        await settle()
        for _ in range(10):
            it.group.step()
            rank = it.group.messages(Submit)[-1][0]
            it.group.lose(rank)
            it.group.recover(rank)
            await settle()
        assert await it.finish(task) == [[[1, 2, 3] * 4]]


@in_loop
async def test_an_engine_that_is_dead_fails_what_waits(monkeypatch):
    async with running(monkeypatch, 2, max_batched_tokens=128) as it:
        tasks = [it.request([1] * 128) for _ in range(5)]
        await settle()
        it.group.lose(0)
        it.group.lose(1)
        for task in tasks:
            with pytest.raises(RequestError, match="no rank is left"):
                await task
        with pytest.raises(RequestError, match="the engine is dead"):
            await it.request([1])


class Machine:
    """Requests, steps and losses in any order, over the router and the outputs alone."""

    def __init__(self, ranks, router):
        self.queue = PrefillQueue(None)
        self.group = FakeGroup(FakeLauncher(ranks), self.take, self.lost, self.joined, self.died)
        self.flights = Flights(self.group, self.queue, SilentObserver())
        self.flights.open(EngineConfig(router=router, max_batched_tokens=128), self.group.members, KV_TOKENS)
        self.group.state = "serving"
        self.requests = []

    def take(self, rank, message):
        self.flights.take(rank, message)
        for request in self.requests:  # what `generate` does with the news
            if request in self.flights.requests and (request.result.finished or request.error):
                self.flights.remove(request)

    def lost(self, rank):
        self.flights.lose(rank)

    def joined(self, rank):
        self.flights.join(rank)

    def died(self, reason):
        pass

    def add(self, length, n):
        ids = [(7 * len(self.requests) + i) % 50 for i in range(length)]
        params = SamplingParams(temperature=0.0, max_tokens=1 + length % 5, n=n)
        name = str(len(self.requests))
        submits = split(len(self.requests), name, ids, params, "")
        outputs = [Output(submit, i, params, Vocabulary(None), frozenset()) for i, submit in enumerate(submits)]
        request = Request(name, None, ids, outputs)
        self.requests.append(request)
        self.flights.add(request)

    def do(self, action, number):
        ranks = range(len(self.group.running))
        rank = ranks[number % len(ranks)]
        running = [request for request in self.requests if request in self.flights.requests]
        if action == "add":
            self.add(1 + number % 150, 1 + number % 2)
        elif action == "step" and self.group.state == "serving" and rank in self.group.members:
            self.group.step(rank)
        elif action == "lose" and rank in self.group.members:
            self.group.lose(rank)
        elif action == "recover" and self.group.state != "serving":
            lost = sorted(self.group.lost)
            self.group.recover(*(lost if not self.group.members else lost[: number % (len(lost) + 1)]))
            self.flights.route()
        elif action == "abort" and running:
            request = running[number % len(running)]
            request.fail(RequestError("gone"))
            self.flights.remove(request)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 4),
    st.sampled_from(["dualmap", "round_robin", "least_loaded"]),
    st.lists(
        st.tuples(st.sampled_from(["add", "add", "step", "step", "lose", "recover", "abort"]), st.integers(0, 1000))
    ),
)
def test_no_request_is_lost_or_mixed_up(ranks, router, actions):
    async def script():
        machine = Machine(ranks, router)
        for action in actions:
            machine.do(*action)
        machine.do("recover", 0)
        for _ in range(3000):
            if not machine.flights.requests:
                break
            for rank in range(ranks):
                machine.do("step", rank)
        assert not machine.flights.requests and machine.flights.waiting == 0 and machine.queue.waiting == 0
        for request in machine.requests:
            if request.error is not None:
                assert str(request.error) == "gone" or request.error.code == "rank_lost"
                continue
            ids = request.result.prompt_token_ids
            for output in request.result.outputs:
                count = 1 + len(ids) % 5
                assert output.token_ids == [ids[i % len(ids)] for i in range(count)]
        machine.flights.close()

    asyncio.run(script())


# Sums over ranks


def test_totals_of_ranks_that_come_and_go():
    totals = Totals()
    totals.take(0, Stats(running=2, kv_blocks_used=3, kv_blocks_total=10, steps=5, expert_counts=[[1, 2], [3, 4, 5]]))
    totals.take(1, Stats(running=1, kv_blocks_used=1, kv_blocks_total=8, steps=7, expert_counts=[[10, 0], [0, 0, 1]]))
    totals.take(0, Stats(running=1, kv_blocks_used=3, kv_blocks_total=10, steps=6))
    total = totals.total
    assert (total.running, total.kv_blocks_used, total.kv_blocks_total, total.steps) == (2, 4, 18, 13)
    assert total.expert_counts == [[11, 2], [3, 4, 6]]
    totals.lose(1)
    total = totals.total
    assert (total.running, total.kv_blocks_total, total.steps) == (1, 10, 13)
    assert total.expert_counts == [[11, 2], [3, 4, 6]]
    totals.take(1, Stats(running=4, steps=1, expert_counts=[[1, 0], [0, 0, 0]]))
    total = totals.total
    assert (total.running, total.steps, total.expert_counts) == (5, 14, [[12, 2], [3, 4, 6]])
    totals.take(1, Stats(running=4, steps=3, sent_rows=9))
    totals.take(1, Stats(running=4, steps=4, sent_rows=2))  # what a group counts begins again with the next group
    assert (totals.total.steps, totals.total.sent_rows) == (17, 11)
    totals.take(1, Stats(steps=4, expert_counts=[[0, 7], [1, 0, 0]]))
    assert totals.total.expert_counts == [[12, 9], [4, 4, 6]]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["work", "report", "lose"]), st.integers(0, 9))))
def test_counters_never_go_down_and_nothing_reported_is_forgotten(events):
    totals, reported = Totals(), 0
    now, last = [0, 0, 0], [0, 0, 0]
    for rank, what, amount in events:
        before = totals.total
        if what == "work":
            now[rank] += amount
        elif what == "report":
            totals.take(rank, Stats(steps=now[rank], prompt_tokens=2 * now[rank], expert_counts=[[now[rank], 1]]))
            reported += now[rank] - last[rank]
            last[rank] = now[rank]
        else:
            totals.lose(rank)
            now[rank] = last[rank] = 0
        after = totals.total
        assert (after.steps, after.prompt_tokens) == (reported, 2 * reported)
        assert all(getattr(after, name) >= getattr(before, name) for name in COUNTERS)
        assert (after.expert_counts or [[0]])[0][0] == reported


@in_loop
async def test_metrics_of_all_ranks_and_of_each(monkeypatch):
    async with running(monkeypatch, 2) as it:
        it.group.report(0, running=3, waiting=1, kv_blocks_used=1, kv_blocks_total=4, prompt_tokens=10, sent_rows=5)
        it.group.report(1, running=1, kv_blocks_used=3, kv_blocks_total=4, prompt_tokens=20, least_rows=4, sent_bytes=9)
        assert it.metric("num_requests_running") == 4 and it.metric("num_requests_waiting") == 1
        assert it.metric("kv_cache_usage_perc") == 0.5 and it.metric("prompt_tokens_total") == 30
        assert it.metric("rank_num_requests_running", rank="0") == 3
        assert it.metric("rank_num_requests_waiting", rank="0") == 1
        assert it.metric("rank_kv_cache_usage_perc", rank="1") == 0.75
        assert (it.metric("moe_sent_rows_total"), it.metric("moe_least_rows_total")) == (5, 4)
        assert (it.metric("moe_sent_bytes_total"), it.metric("moe_expert_bytes_moved_total")) == (9, 0)
        assert it.metric("ranks") == 2 and it.metric("rank_losses_total") == 0
        it.group.lose(1)
        it.group.recover()
        assert it.metric("rank_kv_cache_usage_perc", rank="1") == 0 and it.metric("ranks") == 1
        assert it.metric("prompt_tokens_total") == 30 and it.metric("num_requests_running") == 3


@in_loop
async def test_imbalance_between_ranks(monkeypatch):
    async with running(monkeypatch, 2) as it:
        it.observer.render()
        assert it.metric("moe_rank_load_imbalance") == 1
        half = EXPERTS // 2
        it.group.report(0, expert_counts=[[3] * half + [1] * half, [0] * EXPERTS])
        it.observer.render()
        assert it.metric("moe_rank_load_imbalance") == 1.5, "the second layer has seen nothing"
        it.group.report(1, expert_counts=[[1] * half + [3] * half, [1] * half + [0] * half])
        it.observer.render()
        assert it.metric("moe_rank_load_imbalance") == (1.0 + 2.0) / 2


# Placement


def test_planners_keep_what_stays_in_its_slot():
    old = linear(EXPERTS, 2, 5)
    for planner in ("linear", "round_robin", "replicated", "incremental"):
        new = plan(old, planner, [8, 1, 1, 1, 1, 1, 1, 1], 1)
        new.check()
        assert (new.ranks, new.slots) == (2, 5)
        for before, after in zip(old.slots_PS, new.slots_PS, strict=True):
            for slot, expert in enumerate(before):
                assert expert not in after or after[slot] == expert
        assert changed_slots([old], [new]) >= sum(len(unit) for unit in plan_moves(old, new)) // 2
    assert plan(old, "linear") == old and changed_slots([old], [plan(old, "incremental", [9] * 8, 0)]) == 0
    for planner in ("replicated", "incremental"):
        for loads in (None, [0] * EXPERTS):
            with pytest.raises(ValueError, match="nothing was computed yet"):
                plan(old, planner, loads, 1)


def test_tables_that_are_given_are_checked():
    group = FakeGroup(FakeLauncher(2), None, None, None, None)
    group.state = "serving"
    placements = Placements(group)
    good = [round_robin(EXPERTS, 2).to_lists()] * LAYERS
    assert placements.new_tables(None, rows=good)[0] == round_robin(EXPERTS, 2, 5)
    for rows, field, text in (
        (good[:1], "tables", "has 1 layers; the model has 2"),
        ([good[0], good[0][:1]], "tables[1]", "has 1 ranks; there are 2"),
        ([good[0], [[0] * 6, []]], "tables[1][0]", "has 6 experts; a rank has 5 slots"),
        ([good[0], [[0, 1, 2, 3], [4, 5, 6]]], "tables[1]", "expert 7 has no home"),
        ([good[0], [[0, 1, 2, 3], [4, 5, 6, 8]]], "tables[1]", "has expert 8"),
        ([[[0, 1, 2, 3, 3], [4, 5, 6, 7]], good[0]], "tables[0]", "rank 0 has expert 3 in slot 3 and in slot 4"),
    ):
        with pytest.raises(RequestError) as caught:
            placements.new_tables(None, rows=rows)
        assert (caught.value.status, caught.value.param) == (400, field) and text in str(caught.value)


@asynccontextmanager
async def admin(monkeypatch, ranks=2, api_key=None, **options):
    async with running(monkeypatch, ranks, **options) as it:
        app = build_app(it.frontend, ServeConfig(api_key=api_key))
        it.observer = it.frontend.observer
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as it.http:
            yield it


async def placing_task(it, **body):
    """A POST, and the `Place` that it led to."""
    task = asyncio.create_task(it.http.post("/admin/placement", json=body))
    async with asyncio.timeout(BOUND_S):
        before = len(it.group.messages(Place))
        while len(it.group.messages(Place)) == before and not task.done():
            await asyncio.sleep(0.001)
    return task


@in_loop
async def test_a_placement_from_request_to_answer(monkeypatch):
    async with admin(monkeypatch) as it:
        state = (await it.http.get("/admin/placement")).json()
        assert {name: state[name] for name in ("version", "moving", "moved_bytes", "ranks")} == {
            "version": 0,
            "moving": False,
            "moved_bytes": None,
            "ranks": [0, 1],
        }
        assert [layer["table"] for layer in state["layers"]] == it.group.tables
        assert state["layers"][1] == {"layer": 1, "experts": EXPERTS, "imbalance": None, "table": it.group.tables[1]}

        wakes = it.group.wakes
        task = await placing_task(it, planner="round_robin", layers=[1])
        (_, place), (_, same) = it.group.messages(Place)
        assert place == same and place.version == 1 and it.group.wakes > wakes
        assert place.tables[0] == it.group.tables[0] and sorted(place.tables[1][0][:4]) == [0, 2, 4, 6]
        assert (await it.http.get("/admin/placement")).json()["moving"] and not task.done()
        it.group.place(place)
        assert (await task).json() == {"version": 1, "changed_slots": 4}
        state = (await it.http.get("/admin/placement")).json()
        assert (state["version"], state["moving"], state["moved_bytes"]) == (1, False, 1000)
        assert state["layers"][1]["table"] == place.tables[1]

        it.group.report(0, expert_counts=[[40, 0, 0, 0, 1, 1, 1, 1]] * LAYERS)
        answer = await it.http.post("/admin/placement", json={"planner": "replicated", "wait": False})
        assert answer.json()["version"] == 2
        place = it.group.messages(Place)[-1][1]
        assert all(sum(row.count(0) for row in table) == 2 for table in place.tables), "the hot expert has two copies"
        it.group.place(place)
        state = (await it.http.get("/admin/placement")).json()
        assert state["version"] == 2 and not state["moving"] and state["layers"][0]["imbalance"] < 1.2


@in_loop
async def test_what_a_placement_is_refused_for(monkeypatch):
    async with admin(monkeypatch) as it:
        for body, param, text in (
            ({}, "planner", "either planner or tables"),
            ({"planner": "linear", "tables": []}, "planner", "either"),
            ({"planner": "best"}, "planner", "linear"),
            ({"planner": "incremental"}, "max_moves", "required"),
            ({"planner": "incremental", "max_moves": -1}, "max_moves", "greater than or equal"),
            ({"planner": "linear", "max_moves": 1}, "max_moves", "belongs to planner incremental"),
            ({"planner": "replicated"}, "planner", "nothing was computed yet"),
            ({"planner": "incremental", "max_moves": 3}, "planner", "nothing was computed yet"),
            ({"planner": "linear", "layers": [0, 2]}, "layers", "layers[1] is 2; MoE layers go from 0 to 1"),
            ({"tables": [[[0], [1]]], "layers": [0]}, "layers", "belongs to planner"),
            ({"tables": [[[0, "1"], [1]]]}, "tables[0][0][1]", "integer"),
            ({"tables": [[[0], [1]]]}, "tables", "has 1 layers"),
            ({"planer": "linear"}, "planer", "did you mean planner?"),
        ):
            error = error_of(await it.http.post("/admin/placement", json=body), 400)
            assert error["param"] == param and text in error["message"], (body, error)
        assert not it.group.messages(Place)


@in_loop
async def test_a_placement_that_is_not_completed(monkeypatch):
    async with admin(monkeypatch) as it:
        first = await placing_task(it, planner="round_robin")
        second = await placing_task(it, planner="round_robin")
        assert error_of(await first, 409)["code"] == "placement_replaced"
        it.group.lose(1)
        assert error_of(await second, 503)["code"] == "recovering"
        assert error_of(await it.http.post("/admin/placement", json={"planner": "linear"}), 503)["code"] == "recovering"
        it.group.place(it.group.messages(Place)[-1][1])  # too late
        assert not it.frontend.placements.moving
        it.group.recover()
        error = error_of(await it.http.post("/admin/placement", json={"planner": "linear"}), 400)
        assert "nothing to place" in error["message"]

    async with admin(monkeypatch) as it:
        monkeypatch.setattr(placing, "PLACEMENT_TIMEOUT_S", 0.05)
        late = await it.http.post("/admin/placement", json={"planner": "round_robin"})
        assert error_of(late, 503)["code"] == "placement_timeout" and int(late.headers["retry-after"]) > 0
        assert it.frontend.placements.moving

    async with admin(monkeypatch, 1) as it:
        assert (
            "nothing to place"
            in error_of(await it.http.post("/admin/placement", json={"planner": "linear"}), 400)["message"]
        )


@in_loop
async def test_the_placement_is_behind_the_key(monkeypatch):
    async with admin(monkeypatch, api_key="secret") as it:
        error_of(await it.http.get("/admin/placement"), 401)
        error_of(await it.http.post("/admin/placement", json={"planner": "linear"}), 401)
        headers = {"authorization": "Bearer secret"}
        assert (await it.http.get("/admin/placement", headers=headers)).status_code == 200


@in_loop
async def test_health_while_a_rank_is_lost(monkeypatch):
    async with admin(monkeypatch, 3) as it:
        assert (await it.http.get("/health")).json() == {
            "status": "ok",
            "ranks": {"0": "ok", "1": "ok", "2": "ok"},
            "trouble": "",
        }
        it.group.lose(2)
        health = await it.http.get("/health")
        assert health.status_code == 200 and health.json() == {
            "status": "recovering",
            "ranks": {"0": "ok", "1": "ok", "2": "lost: killed by SIGKILL at layer 3 of step 17"},
            "trouble": "rank 2 was lost (killed by SIGKILL at layer 3 of step 17)",
        }
        ready = await it.http.get("/ready")
        error = error_of(ready, 503)
        assert error["code"] == "recovering" and "rank 2" in error["message"] and int(ready.headers["retry-after"]) > 0
        assert (await it.http.get("/v1/models")).status_code == 200
        it.group.recover()
        health = (await it.http.get("/health")).json()
        assert health["status"] == "ok" and health["ranks"]["2"].startswith("lost: ")
        assert (await it.http.get("/ready")).status_code == 200
        it.group.die("the last rank is gone")
        assert "the last rank is gone" in error_of(await it.http.get("/health"), 503)["message"]


# Files


@in_loop
async def test_recorded_loads_over_two_runs(monkeypatch, tmp_path, caplog):
    file = tmp_path / "loads.json"
    counts = [[4, 2, 0, 0, 0, 0, 0, 0]] * LAYERS
    async with admin(monkeypatch, placement=str(file)) as it:
        assert it.group.loads is None and not file.exists()
        it.group.report(0, expert_counts=counts, prompt_tokens=5, generated_tokens=1)
        task = await placing_task(it, planner="replicated")
        it.group.place(it.group.messages(Place)[-1][1])
        await task
        async with asyncio.timeout(BOUND_S):
            while not file.exists():
                await asyncio.sleep(0.001)
    saved = json.loads(file.read_text())
    assert saved == {"version": 1, "model": "reference_model", "tokens": 6, "experts": [EXPERTS] * 2, "loads": counts}
    async with running(monkeypatch, 3, placement=str(file)) as it:
        assert it.group.loads == [[2, 1, 0, 0, 0, 0, 0, 0]] * LAYERS
        assert it.frontend.loads == it.group.loads, "enough for a plan before anything is computed"
        it.group.report(2, expert_counts=[[0, 5, 0, 0, 0, 0, 0, 0]] * LAYERS, generated_tokens=2)
        assert it.frontend.loads[0][:3] == [2, 6, 0]
    saved = json.loads(file.read_text())
    assert saved["tokens"] == 5 and saved["loads"][0][:3] == [2, 6, 0]
    async with running(monkeypatch, 2, placement=str(file)):
        pass
    assert json.loads(file.read_text()) == saved, "a run that counts nothing leaves it alone"


@in_loop
async def test_recorded_loads_of_another_model(monkeypatch, tmp_path):
    file = tmp_path / "loads.json"
    file.write_text('{"version": 1, "model": "m", "tokens": 1, "experts": [4], "loads": [[1, 0, 0, 0]]}')
    monkeypatch.setattr(frontend_module, "EngineGroup", FakeGroup)
    with pytest.raises(ValueError, match=r"loads\.json: expected loads of 2 layers of 8 experts.*found 1 layers of 4"):
        await Running(2, placement=str(file)).frontend.start()


@in_loop
async def test_spans_are_put_on_one_clock(monkeypatch, tmp_path):
    file = tmp_path / "trace.json"
    async with running(monkeypatch, 2, trace=str(file)) as it:
        it.group.clock_offset_ns = {1: 5_000_000}
        it.group.on_message(0, Spans(spans=[["experts", 3, 1, 7_000_000, 2_000]]))
        it.group.on_message(1, Spans(spans=[["wait", 3, 1, 2_000_000, 1_000]]))
    events = [event for event in json.loads(file.read_text()) if event["ph"] == "X"]
    assert [(event["pid"], event["name"]) for event in events] == [(0, "experts"), (1, "wait")]
    assert events[0]["ts"] == events[1]["ts"] and events[0]["dur"] == 2.0


def test_a_table_without_layers():
    assert read_tables(None) == read_tables([]) == ()
