"""The front end over a real process with a fake engine: life, limits, errors and text of requests."""

import asyncio
import json
import sys
import time
from contextlib import aclosing, asynccontextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from fake_worker import KV_TOKENS, MAX_MODEL_LEN, VOCAB_SIZE, Command

from moeyard.engine.config import EngineConfig, ServeConfig
from moeyard.engine.messages import MAX_BYTES
from moeyard.engine.params import SamplingParams
from moeyard.engine.resolve import EMBEDDED
from moeyard.launch import group
from moeyard.launch.admission import MAX_RETRY_AFTER_S, PrefillQueue
from moeyard.launch.frontend import EngineError, FrontEnd, RequestError
from moeyard.launch.local import LocalLauncher
from moeyard.launch.tokenizer import end_token_ids, load_tokenizer, sampling_defaults

BOUND_S = 30
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


@cache
def tokenizer():
    return load_tokenizer(EMBEDDED)


def ids_of(text):
    return tokenizer()(text).input_ids


class Recorder:
    """An observer that keeps what it hears."""

    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        return lambda *values: self.events.append((name, *values))

    def named(self, name):
        return [values for event, *values in self.events if event == name]


class Running:
    """A started front end, the calls that reached its engine, and what its observer heard."""

    def __init__(self, tmp_path, config, **env):
        self.log = tmp_path / "calls"
        program = [sys.executable, "-P", str(Path(__file__).with_name("fake_worker.py"))]
        self.launcher = LocalLauncher(command=program, env={"FAKE_LOG": str(self.log)} | env)
        self.observer = Recorder()
        self.frontend = FrontEnd(
            config or EngineConfig(), tokenizer=tokenizer(), launcher=self.launcher, observer=self.observer
        )

    def calls(self, name):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]

    async def until(self, condition):
        async with asyncio.timeout(BOUND_S):
            while not condition():
                await asyncio.sleep(0.02)

    async def run(self, ids, params=GREEDY, request_id="r", **options):
        """All outputs' state at the end."""
        async with asyncio.timeout(BOUND_S):
            async for output in self.frontend.generate(ids, params, request_id=request_id, **options):
                last = output
        assert last.finished
        return last

    async def started(self, ids, params=GREEDY, request_id="r"):
        """A request that is at the engine, as a task."""
        before = len(self.calls("submit"))
        task = asyncio.create_task(self.run(ids, params, request_id))
        await self.until(lambda: len(self.calls("submit")) >= before + params.n)
        return task


@asynccontextmanager
async def running(tmp_path, config=None, **env):
    it = Running(tmp_path, config, **env)
    async with asyncio.timeout(BOUND_S):
        await it.frontend.start()
    try:
        yield it
    finally:
        await it.frontend.close()
        assert it.launcher.ended()


def in_loop(test):
    """Runs an async test; what pytest passes stays visible."""

    def run(tmp_path, monkeypatch):
        names = test.__code__.co_varnames[: test.__code__.co_argcount]
        available = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
        asyncio.run(test(**{name: available[name] for name in names}))

    run.__doc__ = test.__doc__
    return run


# One request


@in_loop
async def test_text_ids_and_reason(tmp_path):
    async with running(tmp_path) as it:
        ids = ids_of("def main(")
        output = await it.run(ids, SamplingParams(temperature=0.0, max_tokens=6), prompt="def main(", cache_salt="salt")
        assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "def main(", ids)
        (one,) = output.outputs
        assert one.token_ids == (ids * 6)[:6]
        assert one.text == tokenizer().decode(one.token_ids)
        assert (one.index, one.finish_reason, one.stop_reason, one.logprobs) == (0, "length", None, None)
        assert output.num_cached_tokens == 1
        ((rank_id, params, salt),) = it.calls("submit")
        assert rank_id.startswith("r#") and salt == "salt" and params["max_tokens"] == 6
        assert it.calls("abort") == []


@in_loop
async def test_outputs_grow(tmp_path):
    async with running(tmp_path, FAKE_STEP_S="0.02") as it:
        ids = ids_of("a😀b")  # a character of several tokens
        seen = []
        async for output in it.frontend.generate(
            ids, SamplingParams(temperature=0.0, max_tokens=2 * len(ids)), request_id="r"
        ):
            seen.append((output.outputs[0].text, len(output.outputs[0].token_ids), output.finished))
        assert seen[-1] == ("a😀ba😀b", 2 * len(ids), True)
        assert not any("\ufffd" in text for text, _, _ in seen)
        for (text, count, _), (longer, more, _) in pairwise(seen):
            assert longer.startswith(text) and more > count
        assert len(seen) > 2


@in_loop
async def test_a_fast_engine_does_not_keep_its_readers_waiting(tmp_path):
    async with running(tmp_path) as it:
        params = SamplingParams(temperature=0.0, max_tokens=200)
        count = 0
        async for _ in it.frontend.generate([1], params, request_id="r"):
            count += 1
            time.sleep(0.005)  # slower than the engine, so that messages always wait
        assert count > 50


@in_loop
async def test_stop_string_over_tokens_ends_it_here_and_there(tmp_path):
    async with running(tmp_path, FAKE_STEP_S="0.02") as it:
        ids = ids_of("one two three four")
        shown = []
        params = SamplingParams(temperature=0.0, max_tokens=100, stop=("o thr", "never"))
        async for output in it.frontend.generate(ids, params, request_id="r"):
            shown.append(output.outputs[0].text)
        (one,) = output.outputs
        assert (one.text, one.finish_reason, one.stop_reason) == ("one tw", "stop", "o thr")
        assert all("one tw".startswith(text) for text in shown)
        assert len(one.token_ids) < len(ids)
        await it.until(lambda: len(it.calls("abort")) == 1)
        assert it.calls("submit")[0][1]["stop"] == []
        included = await it.run(
            ids, SamplingParams(temperature=0.0, max_tokens=100, stop=("o thr",), include_stop_str_in_output=True)
        )
        assert included.outputs[0].text == "one two thr"
        late = await it.run(ids, SamplingParams(temperature=0.0, max_tokens=10, min_tokens=9, stop=("o thr",)))
        assert late.outputs[0].finish_reason == "length"


@in_loop
async def test_stop_token_is_among_the_ids_and_not_in_the_text(tmp_path):
    async with running(tmp_path) as it:
        a, b, c = ids_of("a"), ids_of("b"), ids_of("c")
        for token, reason, kept, text in (
            (b[0], b[0], False, "a"),
            (b[0], b[0], True, "ab"),
            (tokenizer().eos_token_id, tokenizer().eos_token_id, False, "a"),
        ):
            params = SamplingParams(
                temperature=0.0, max_tokens=9, stop_token_ids=(token,), include_stop_str_in_output=kept
            )
            (one,) = (await it.run([*a, token, *c], params)).outputs
            assert (one.token_ids, one.text) == ([*a, token], text)
            assert (one.finish_reason, one.stop_reason) == ("stop", reason)


@in_loop
async def test_logprobs_have_texts(tmp_path):
    async with running(tmp_path) as it:
        ids = ids_of("x def")
        output = await it.run(ids, SamplingParams(temperature=0.0, max_tokens=2, logprobs=2))
        _, second = output.outputs[0].logprobs
        assert (second.token_id, second.logprob, second.token) == (ids[1], -0.5, " def")
        assert second.top == [(ids[1], -0.5, " def"), (1, -2.0, "!")]
        alone = await it.run(ids, SamplingParams(temperature=0.0, max_tokens=2, logprobs=0))
        assert [entry.top for entry in alone.outputs[0].logprobs] == [[], []]


@in_loop
async def test_n_outputs_differ_and_are_reproducible(tmp_path):
    async with running(tmp_path) as it:
        params = SamplingParams(temperature=1.0, max_tokens=5, n=3, seed=2**64 - 2)
        one = await it.run([1, 2], params)
        two = await it.run([1, 2], params)
        ids = [output.token_ids for output in one.outputs]
        assert [output.index for output in one.outputs] == [0, 1, 2]
        assert len({tuple(i) for i in ids}) == 3 and ids == [output.token_ids for output in two.outputs]
        submits = it.calls("submit")
        assert [params["seed"] for _, params, _ in submits[:3]] == [2**64 - 2, 2**64 - 1, 0]
        assert {params["n"] for _, params, _ in submits} == {1}
        assert len({rank_id for rank_id, _, _ in submits}) == 6
        await it.run([1, 2], SamplingParams(temperature=1.0, max_tokens=1, n=2))
        free = [params["seed"] for _, params, _ in it.calls("submit")[6:]]
        assert len(set(free)) == 2 and None not in free


@in_loop
async def test_requests_with_one_id_do_not_mix(tmp_path):
    async with running(tmp_path, FAKE_STEP_S="0.02") as it:
        results = await asyncio.gather(*(it.run([i], request_id="same") for i in range(1, 9)))
        assert [r.outputs[0].token_ids for r in results] == [[i] * 4 for i in range(1, 9)]


# The end of a request


@in_loop
async def test_closing_the_generator_aborts_all_its_outputs(tmp_path):
    async with running(tmp_path, FAKE_STEP_S="0.02") as it:
        params = SamplingParams(temperature=0.0, max_tokens=200, n=2)
        async with aclosing(it.frontend.generate([1], params, request_id="r")) as stream:
            await anext(stream)
        await it.until(lambda: len(it.calls("abort")) == 2)
        assert it.observer.named("on_finished")[0][0] == "abort"
        await it.until(lambda: it.frontend.stats.steps and not it.frontend.stats.running)


@in_loop
async def test_cancelling_the_task_aborts(tmp_path):
    async with running(tmp_path) as it:
        task = await it.started([Command.NEVER])
        task.cancel()
        await it.until(lambda: len(it.calls("abort")) == 1)
        await it.run([1])  # the engine goes on


@in_loop
async def test_errors_of_one_request(tmp_path):
    async with running(tmp_path) as it:
        with pytest.raises(RequestError, match="not today") as caught:
            await it.run([Command.REFUSE])
        assert caught.value.status == 400
        with pytest.raises(RequestError, match="broken") as caught:
            await it.run([Command.FAIL_REQUEST])
        assert caught.value.status == 500
        assert [values[0] for values in it.observer.named("on_finished")] == ["error", "error"]
        await it.run([1])


@in_loop
async def test_an_engine_that_fails_in_a_step(tmp_path):
    async with running(tmp_path) as it:
        other = await it.started([Command.NEVER])
        with pytest.raises(RequestError, match="a step went wrong") as caught:
            await it.run([Command.FAIL_STEP])
        assert caught.value.status == 500
        with pytest.raises(RequestError, match="a step went wrong"):
            await other
        assert not it.frontend.alive and "a step went wrong" in it.frontend.dead_reason
        with pytest.raises(RequestError, match="the engine is dead") as caught:
            await it.run([1])
        assert caught.value.status == 503


@in_loop
async def test_an_engine_process_that_ends(tmp_path):
    async with running(tmp_path) as it:
        with pytest.raises(RequestError, match=r"the engine process ended \(exit code 3\)"):
            await it.run([Command.EXIT])
        assert not it.frontend.alive


@in_loop
async def test_an_engine_that_is_killed(tmp_path):
    async with running(tmp_path) as it:
        task = await it.started([Command.NEVER])
        psutil.Process(it.launcher.pid).kill()
        with pytest.raises(RequestError, match="killed by SIGKILL"):
            await task


@in_loop
async def test_an_engine_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(group, "TICK_S", 0.05)
    monkeypatch.setattr(group, "PING_INTERVAL_S", 0.1)
    monkeypatch.setattr(group, "SHUTDOWN_TIMEOUT_S", 0.1)
    it = Running(tmp_path, None)
    it.frontend = FrontEnd(EngineConfig(), tokenizer=tokenizer(), launcher=it.launcher, silence_timeout=2.0)
    await it.frontend.start()
    await asyncio.sleep(2.5)  # idle for longer than the bound: pings are answered
    assert it.frontend.alive
    with pytest.raises(RequestError, match="has not answered for 2 s"):
        await it.run([Command.HANG])
    await it.frontend.close()
    assert it.launcher.ended()


# Limits


@in_loop
async def test_what_is_refused_before_it_is_sent(tmp_path):
    async with running(tmp_path) as it:
        long = MAX_MODEL_LEN
        cases = [
            ([], GREEDY, "empty", "prompt", None),
            ([VOCAB_SIZE], GREEDY, f"0 to {VOCAB_SIZE - 1}", "prompt", None),
            ([-1], GREEDY, "token ids", "prompt", None),
            ([1, True], GREEDY, "token ids", "prompt", None),
            ([1] * long, GREEDY, f"has {long} tokens; at most {long - 1}", "prompt", "context_length_exceeded"),
            ([1] * (long - 3), GREEDY, f"are {long + 1}; the limit is {long}", "max_tokens", "context_length_exceeded"),
            (
                [1] * (long - 3),
                SamplingParams(max_tokens=None, min_tokens=9),
                r"min_tokens \(9\)",
                "min_tokens",
                None,
            ),
        ]
        for ids, params, text, param, code in cases:
            with pytest.raises(RequestError, match=text) as caught:
                await it.run(ids, params)
            assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
        with pytest.raises(RequestError, match="cannot be sent"):
            await it.run([1], cache_salt="\ud800")
        with pytest.raises(RequestError, match=f"the limit is {MAX_BYTES}"):
            await it.run([1], cache_salt="x" * MAX_BYTES)
        assert it.calls("submit") == [] and it.frontend._queue.waiting == 0


@in_loop
async def test_max_tokens_none_is_the_rest(tmp_path):
    async with running(tmp_path) as it:
        output = await it.run([1] * 250, SamplingParams(temperature=0.0, max_tokens=None))
        assert len(output.outputs[0].token_ids) == MAX_MODEL_LEN - 250
        whole = await it.run([1] * (MAX_MODEL_LEN - 1), SamplingParams(temperature=0.0, max_tokens=1))
        assert len(whole.outputs[0].token_ids) == 1


@in_loop
async def test_a_kv_cache_smaller_than_the_model(tmp_path, monkeypatch):
    async with running(tmp_path) as it:
        it.frontend.ready = type(it.frontend.ready)(max_model_len=10**6, vocab_size=VOCAB_SIZE, kv_tokens=KV_TOKENS)
        with pytest.raises(RequestError, match=f"{KV_TOKENS}.*KV cache") as caught:
            it.frontend.check([1] * KV_TOKENS, GREEDY)
        assert caught.value.code == "context_length_exceeded"


@in_loop
async def test_the_queue_is_bounded(tmp_path):
    async with running(tmp_path, ServeConfig(max_queued_tokens=100)) as it:
        large = await it.started([Command.NEVER] * 200)  # nothing waits: let in
        with pytest.raises(RequestError, match="200 prompt tokens wait already") as caught:
            await it.run([1])
        assert caught.value.status == 503 and caught.value.retry_after >= 1
        large.cancel()
        await it.until(lambda: it.frontend._queue.waiting == 0)
        waiting = await it.started([Command.NEVER] * 60)
        await it.run([1] * 40)  # just fits, and leaves the queue with its first token
        await it.run([1] * 40)
        with pytest.raises(RequestError):
            await it.run([1] * 21, SamplingParams(n=2, max_tokens=1))  # each output is prefilled
        waiting.cancel()


def test_retry_after_follows_the_measured_rate():
    queue = PrefillQueue(100)
    assert queue.retry_after(10**9) is None
    queue.enter(100, now=50.0)
    assert queue.retry_after(1) == 1  # nothing measured yet
    queue.leave(50, now=52.0, prefilled=True)  # 25 tokens a second
    queue.enter(50, now=52.0)
    assert queue.retry_after(99) == 4
    queue.leave(50, now=52.0, prefilled=False)  # given up: no work done, and none measured
    assert queue.retry_after(50) is None and queue.retry_after(100) == 2
    queue.leave(50, now=54.0, prefilled=True)
    queue.enter(100, now=1000.0)  # idle time is not slowness
    assert queue.retry_after(100) == 4
    queue.enter(10**9, now=1000.0)
    assert queue.retry_after(1) == MAX_RETRY_AFTER_S
    assert PrefillQueue(None).retry_after(10**9) is None


# Start and end


@in_loop
async def test_drain_lets_running_requests_finish(tmp_path):
    async with running(tmp_path, FAKE_STEP_S="0.05") as it:
        task = await it.started([1], SamplingParams(temperature=0.0, max_tokens=8))
        closing = asyncio.create_task(it.frontend.close(BOUND_S))
        await it.until(lambda: it.frontend.draining)
        with pytest.raises(RequestError, match="shutting down") as caught:
            await it.run([1])
        assert caught.value.status == 503
        assert len((await task).outputs[0].token_ids) == 8
        await closing
        assert it.launcher.ended() == {0: "exit code 0"}


@in_loop
async def test_drain_is_bounded(tmp_path):
    async with running(tmp_path) as it:
        task = await it.started([Command.NEVER])
        await it.frontend.close(0.1)
        with pytest.raises(RequestError, match="shutting down"):
            await task
        assert not it.frontend.alive


@pytest.mark.parametrize(
    ("env", "kind", "text"),
    [
        ({"FAKE_START": "refuse"}, ValueError, "^model: the checkpoint is not good; get another$"),
        ({"FAKE_START": "fail"}, EngineError, "no luck"),
        ({"FAKE_START": "exit"}, EngineError, r"ended \(exit code 7\)"),
        ({"FAKE_START": "hang"}, EngineError, r"within start_timeout \(1.5 s\)"),
    ],
)
def test_an_engine_that_does_not_start(tmp_path, monkeypatch, env, kind, text):
    monkeypatch.setattr(group, "SHUTDOWN_TIMEOUT_S", 0.2)

    async def start():
        it = Running(tmp_path, ServeConfig(start_timeout=1.5 if env["FAKE_START"] == "hang" else BOUND_S), **env)
        assert it.frontend.ready is None and not it.frontend.alive
        with pytest.raises(RequestError, match="still loading") as caught:
            it.frontend.check([1], GREEDY)
        assert caught.value.status == 503
        with pytest.raises(kind, match=text):
            await it.frontend.start()
        assert it.launcher.ended() and not it.frontend.alive
        await it.frontend.close()

    asyncio.run(start())


def test_cancelling_the_start_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(group, "SHUTDOWN_TIMEOUT_S", 0.2)

    async def start():
        it = Running(tmp_path, None, FAKE_START="hang")
        task = asyncio.create_task(it.frontend.start())
        await it.until(lambda: it.calls("config"))
        task.cancel()
        await it.frontend.close()  # at the same time, as the server does
        with pytest.raises(asyncio.CancelledError):
            await task
        assert it.launcher.ended()

    asyncio.run(start())


@in_loop
async def test_the_engine_gets_the_options_and_the_directory(tmp_path):
    async with running(tmp_path, ServeConfig(dtype="float32", served_model_name="name")) as it:
        assert it.calls("config") == [[str(EMBEDDED), "float32"]]
        assert (it.frontend.model_name, it.frontend.model_path) == ("name", str(EMBEDDED))
        assert it.frontend.max_model_len == MAX_MODEL_LEN and it.frontend.alive and it.frontend.dead_reason == ""


@in_loop
async def test_the_observer_hears_it_all(tmp_path):
    async with running(tmp_path, FAKE_STEP_S="0.05") as it:
        before = time.monotonic()
        await it.run([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=5))
        elapsed = time.monotonic() - before
        assert it.observer.named("on_submitted") == [[3]]
        ((queue, prefill, ttft, cached),) = it.observer.named("on_first_token")
        assert (queue, prefill, cached) == (0.25, 0.5, 1) and 0 < ttft <= elapsed
        gaps = it.observer.named("on_token")
        assert [n for _, n in gaps] == [1] * 4 and all(gap > 0 for gap, _ in gaps)
        ((reason, e2e, prompt, output),) = it.observer.named("on_finished")
        assert (reason, prompt, output) == ("length", 3, 5)
        assert ttft + sum(gap for gap, _ in gaps) <= e2e <= elapsed
        await it.until(lambda: it.frontend.stats.generated_tokens == 5 and not it.frontend.stats.running)
        stats = [values[0] for values in it.observer.named("on_stats")]
        assert stats[-1] == it.frontend.stats and stats[-1].expert_counts == [[5, 1]]


@in_loop
async def test_a_checkpoint_without_a_tokenizer(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    it = Running(tmp_path, None)
    it.frontend = FrontEnd(EngineConfig(model=str(tmp_path / "model")), launcher=it.launcher)
    await it.frontend.start()
    try:
        output = await it.run([5, 6], SamplingParams(temperature=0.0, max_tokens=2, logprobs=1))
        assert (output.outputs[0].token_ids, output.outputs[0].text) == ([5, 6], "")
        with pytest.raises(RequestError, match="no tokenizer") as caught:
            await it.run([5], SamplingParams(stop=("x",)))
        assert caught.value.param == "stop"
        with pytest.raises(RequestError, match="send token ids"):
            it.frontend.tokenize("x")
    finally:
        await it.frontend.close()


# Files of the checkpoint


def test_sampling_defaults(tmp_path):
    assert sampling_defaults(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": null, "do_sample": false, "max_new_tokens": 7}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9}
    for bad in ('{"temperature": -1}', '{"top_p": "high"}', "[]", "{"):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            sampling_defaults(tmp_path)


def test_end_token_ids(tmp_path):
    assert end_token_ids(tmp_path, None) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert end_token_ids(tmp_path, None) == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert end_token_ids(tmp_path, tokenizer()) == {0, 4, 5}


@in_loop
async def test_generation_config_none(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    for choice, wanted in (("model", {"temperature": 0.6}), ("none", {})):
        async with running(tmp_path, EngineConfig(model=str(model), generation_config=choice)) as it:
            assert it.frontend.default_params() == wanted


def test_a_tokenizer_that_cannot_be_read(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path)
