"""A front end without an engine: the real tokenizer, and output tokens that repeat the prompt's.

Output j of a prompt is its tokens, from the j-th on, round and round: deterministic, readable, and, when the prompt has
characters that take several tokens, full of them. `FakeServer` puts the real HTTP server over it, in a thread.
"""

import asyncio
import contextlib
import functools
import threading
from typing import Any

import uvicorn
from transformers import AutoTokenizer

from moeyard.engine.config import ServeConfig
from moeyard.engine.messages import Ready, Stats
from moeyard.engine.resolve import resolve_model
from moeyard.launch.frontend import RequestError
from moeyard.launch.outputs import CompletionOutput, RequestOutput, TokenLogprob
from moeyard.launch.placing import Placements
from moeyard.launch.server import build_app

MAX_MODEL_LEN = 512
VOCAB_SIZE = 4096


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model(""))


class OneRank:
    """A group between whose ranks nothing can move."""

    members, state, tables = (0,), "serving", None


class FakeFrontEnd:
    def __init__(self, *, model_name="fake", defaults=None):
        self.tokenizer = tokenizer()
        self.model_name = model_name
        self.model_path = "models/fake"
        self.max_model_len = MAX_MODEL_LEN
        self.ready: Ready | None = Ready(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, kv_tokens=4096)
        self.stats = Stats()
        self.alive = True
        self.dead_reason = ""
        self.recovering = False
        self.trouble = ""
        self.lost = {}  # rank -> reason
        self.loads = None
        self.placements = Placements(OneRank())
        self.draining = False
        self.observer: Any = None
        self.defaults = defaults or {}
        # What the tests turn
        self.refusal = None  # a RequestError for every request
        self.fail_after = None  # tokens after which a request breaks
        self.pause = 0.0  # seconds before each token after the first
        self.gate = None  # a threading.Event to wait for before token number `gate_at`
        self.gate_at = 1
        # What the tests look at
        self.admissions = []  # prompt tokens times n, per call
        self.calls = []  # (request_id, params, cache_salt, prompt)
        self.running = set()
        self.aborted = []
        self.abort_seen = threading.Event()

    def default_params(self):
        return dict(self.defaults)

    def rank_states(self):
        return {0: "loading" if self.ready is None else "ok"} | {r: f"lost: {why}" for r, why in self.lost.items()}

    def place(self, **options):
        return self.placements.begin(self.placements.new_tables(self.loads, **options))

    async def start(self):
        pass

    async def close(self, drain):
        self.draining = True

    def check(self, prompt_ids, params):
        return params

    def admit(self, tokens):
        self.admissions.append(tokens)

    async def generate(self, prompt_ids, params, *, request_id, cache_salt="", prompt=None, admitted=False):
        assert request_id not in self.running, "request ids must be unique"
        self.calls.append((request_id, params, cache_salt, prompt))
        if self.refusal is not None:
            raise self.refusal
        if not prompt_ids or len(prompt_ids) >= self.max_model_len:
            message = f"the prompt has {len(prompt_ids)} tokens; it must have 1 to {self.max_model_len - 1}"
            raise RequestError(message, status=400, param="prompt", code="context_length_exceeded")
        self.running.add(request_id)
        if self.observer is not None:
            self.observer.on_submitted(len(prompt_ids))
        try:
            async for output in self._generate(list(prompt_ids), params, request_id, prompt):
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            self.abort_seen.set()
            raise
        finally:
            self.running.discard(request_id)

    async def _generate(self, prompt_ids, params, request_id, prompt):
        room = self.max_model_len - len(prompt_ids)
        limit = min(room, params.max_tokens or room)
        tokens: list[list[int]] = [[] for _ in range(params.n)]
        for k in range(limit):
            if self.fail_after is not None and k >= self.fail_after:
                raise RequestError("the engine died", status=503, code="engine_dead")
            await asyncio.sleep(self.pause if k else 0)
            while k >= self.gate_at and self.gate is not None and not self.gate.is_set():
                await asyncio.sleep(0.005)
            for j, ids in enumerate(tokens):
                ids.append(prompt_ids[(j + k) % len(prompt_ids)])
            outputs = [self._output(j, ids, params, last=k == limit - 1) for j, ids in enumerate(tokens)]
            done = all(o.finish_reason for o in outputs)
            if self.observer is not None:
                if k == 0:
                    self.observer.on_first_token(0.001, 0.002, 0.003, 1)
                else:
                    self.observer.on_token(0.004, 1)
                if done:
                    for o in outputs:
                        self.observer.on_finished(o.finish_reason, 0.5, len(prompt_ids), len(o.token_ids))
            yield RequestOutput(
                request_id=request_id,
                prompt=prompt,
                prompt_token_ids=prompt_ids,
                outputs=outputs,
                finished=done,
                num_cached_tokens=1,
            )
            if done:
                return

    def _output(self, index, token_ids, params, *, last):
        """The output so far. It is built again from all its tokens each time: slow and plainly right."""
        for n in range(1 if params.stop else len(token_ids), len(token_ids) + 1):
            text = self.tokenizer.decode(token_ids[:n], skip_special_tokens=params.skip_special_tokens)
            stop = next((s for s in params.stop if s in text), None)
            if stop is not None:
                end = text.index(stop) + (len(stop) if params.include_stop_str_in_output else 0)
                return self._made(index, token_ids[:n], text[:end], params, "stop", stop)
        if last:
            return self._made(index, token_ids, text, params, "length", None)
        text = text.rstrip("\ufffd")
        held = [i for s in params.stop for i in range(1, len(s)) if text.endswith(s[:i])]
        return self._made(index, token_ids, text[: len(text) - max(held, default=0)], params, None, None)

    def _made(self, index, token_ids, text, params, reason, stop):
        logprobs = None
        if params.logprobs is not None:
            logprobs = [self._logprob(token, k, params.logprobs) for k, token in enumerate(token_ids)]
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=list(token_ids),
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop,
        )

    def _logprob(self, token, k, alternatives):
        top = [(token + i) % VOCAB_SIZE for i in range(alternatives)]
        lowest = float("-inf")  # what a masked token has
        return TokenLogprob(
            token_id=token,
            logprob=-0.25 * k,
            token=self.tokenizer.decode([token]),
            top=[(t, -0.25 * k - i if i < 3 else lowest, self.tokenizer.decode([t])) for i, t in enumerate(top)],
        )


class FakeServer:
    """The real application on a real uvicorn, on a free port, in a thread."""

    def __init__(self, frontend, **options):
        self.frontend = frontend
        app = build_app(frontend, ServeConfig(**options))
        self.server = uvicorn.Server(
            uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=2)
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    @property
    def url(self):
        host, port = self.server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    def start(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            self.thread.join(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def serving(frontend, **options):
    server = FakeServer(frontend, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def until(condition):
    """Waits for a condition, for 20 s at most."""
    wait = threading.Event()
    for _ in range(2000):
        if condition():
            return
        wait.wait(0.01)
    raise AssertionError("it did not happen")


def error_of(response, status):
    """The error of an answer that must have this status and our shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error
