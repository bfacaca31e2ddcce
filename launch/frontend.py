"""The front end: takes token ids and sampling options, gives back text as it grows.

Tokenizing, detokenizing, stop strings, the bound of the queue and the life of requests are here; the model runs in
another process (`link`). One event loop owns a front end: no method is for other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from ..engine.config import EngineConfig, ServeConfig
from ..engine.messages import Abort, MessageError, Ready, Stats, Tokens, unpack_delta
from ..engine.params import SamplingParams
from ..engine.resolve import resolve_model
from .admission import PrefillQueue
from .detokenize import Vocabulary
from .link import SILENCE_TIMEOUT_S, EngineError, EngineLink
from .local import Launcher, LocalLauncher
from .outputs import RequestOutput
from .sequences import Observer, Output, Request, RequestError, SilentObserver, split
from .tokenizer import end_token_ids, load_tokenizer, sampling_defaults

__all__ = ["EngineError", "FrontEnd", "Observer", "RequestError"]

START_TIMEOUT_S = 1800.0
"""How long the engine may load when the configuration has no `start_timeout`."""

log = logging.getLogger("moeyard.frontend")


class FrontEnd:
    """Starts an engine and serves requests with it.

    `tokenizer` replaces the checkpoint's, `launcher` the process on this machine. `ready` has the engine's limits, None
    until it is loaded; `stats` is its last report; `model_path` is the checkpoint's directory; `tokenizer` is None when
    the checkpoint has none (then only token ids go in and no text comes out).
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        tokenizer: Any = None,
        launcher: Launcher | None = None,
        observer: Observer | None = None,
        silence_timeout: float = SILENCE_TIMEOUT_S,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.observer: Observer = observer or SilentObserver()
        self.draining = False
        self.ready: Ready | None = None
        self.stats = Stats()
        served = config.served_model_name if isinstance(config, ServeConfig) else None
        self.model_name = served or config.model or "reference_model"
        self.model_path = ""
        self._link = EngineLink(launcher or LocalLauncher(), self._take, self._fail_all, silence_timeout)
        self._vocabulary = Vocabulary(None)
        self._end_ids: frozenset[int] = frozenset()
        self._defaults: dict[str, Any] = {}
        self._queue = PrefillQueue(config.max_queued_tokens if isinstance(config, ServeConfig) else None)
        self._requests: set[Request] = set()
        self._outputs: dict[str, tuple[Request, Output]] = {}
        self._serial = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()

    # Life

    async def start(self) -> None:
        """Finds the model, starts the engine and loads the tokenizer.

        Raises ValueError for what the user can put right (model, options), EngineError otherwise.
        """
        config = self.config
        path = await _in_daemon_thread(
            functools.partial(resolve_model, config.model, config.revision, remote_code=config.trust_remote_code)
        )
        self.model_path = str(path)
        if config.generation_config == "model":
            self._defaults = sampling_defaults(path)
        engine_config = config.engine_config() if isinstance(config, ServeConfig) else config
        engine_config = dataclasses.replace(engine_config, model=str(path), revision=None)
        timeout = config.start_timeout if isinstance(config, ServeConfig) else START_TIMEOUT_S
        try:
            ready, self.tokenizer = await asyncio.gather(
                self._link.start(engine_config, timeout), asyncio.to_thread(self._load_tokenizer, path)
            )
            self._end_ids = end_token_ids(path, self.tokenizer)
        except BaseException:
            await self.close()
            raise
        self._vocabulary = Vocabulary(self.tokenizer)
        if self.tokenizer is None:
            log.warning("%s has no tokenizer: only token ids go in, and no text comes out", path)
        self.ready = ready

    async def close(self, drain: float = 0.0) -> None:
        """Refuses new requests, gives those in flight `drain` seconds to finish, fails the rest, ends the engine."""
        self.draining = True
        if self.alive and drain > 0:
            try:
                await asyncio.wait_for(self._idle.wait(), drain)
            except TimeoutError:
                log.warning("%d requests did not finish within %g s", len(self._requests), drain)
        for request in list(self._requests):
            request.fail(_shutting_down())
        await self._link.close()

    @property
    def alive(self) -> bool:
        """Whether the engine is loaded and can be used."""
        return self.ready is not None and not self._link.dead_reason

    @property
    def dead_reason(self) -> str:
        """Why the engine can no longer be used; "" while it can, and while it loads."""
        return self._link.dead_reason

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._limits().max_model_len

    def default_params(self) -> dict[str, Any]:
        """Sampling defaults of the checkpoint, `{}` when the configuration wants none."""
        return dict(self._defaults)

    # Requests

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. A chat template writes its own special tokens: False for its result."""
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer; send token ids", param="prompt")
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        except (TypeError, UnicodeError) as error:
            raise RequestError("the text is not valid Unicode", param="prompt") from error

    def admit(self, tokens: int) -> None:
        """Raises RequestError 503 when `tokens` more prompt tokens have no room in the queue."""
        retry_after = self._queue.retry_after(tokens)
        if retry_after is not None:
            raise RequestError(
                f"{self._queue.waiting} prompt tokens wait already; with these {tokens} they would be more than"
                f" max_queued_tokens ({self._queue.limit})",
                status=503,
                code="queue_full",
                retry_after=retry_after,
            )

    def check(self, prompt_ids: list[int], params: SamplingParams) -> SamplingParams:
        """Raises RequestError for a request that cannot be served; returns `params` with `max_tokens` filled in.

        Whether the queue has room is `admit`'s to say, afterwards: what can never be served must not be told to retry.
        """
        if self.draining:
            raise _shutting_down()
        if self.dead_reason:
            raise RequestError(f"the engine is dead: {self.dead_reason}", status=503, code="engine_dead")
        vocab_size = self._limits().vocab_size
        if not prompt_ids:
            raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
        if set(map(type, prompt_ids)) != {int} or min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            raise RequestError(f"prompt: token ids are integers from 0 to {vocab_size - 1}", param="prompt")
        if params.json_schema is not None and self.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer: a JSON schema cannot be followed", param="response_format"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer: stop strings cannot be found", param="stop")
        params = self._fit(len(prompt_ids), params)
        return params

    async def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        cache_salt: str = "",
        prompt: str | None = None,
        admitted: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs a request; yields its outputs so far after each change, the last time with `finished` set.

        It is one object that changes in place, lists included: copy what must stay. A slow reader misses steps in
        between, never text. Closing the generator, or cancelling its task, aborts the request. Raises RequestError
        (before the first output: refused; later: failed).
        """
        params = self.check(prompt_ids, params)
        if not admitted:  # else `admit` has let it in already, as one of several prompts
            self.admit(len(prompt_ids) * params.n)
        outputs = [
            Output(submit, i, params, self._vocabulary, self._end_ids)
            for i, submit in enumerate(split(next(self._serial), request_id, prompt_ids, params, cache_salt))
        ]
        request = Request(request_id, prompt, prompt_ids, outputs)
        self._add(request)
        try:
            self._submit(request)
            while True:
                await request.changed.wait()  # the link's watch ends this when the engine does not answer
                request.changed.clear()
                if request.error is not None:
                    raise request.error
                yield request.result
                if request.result.finished:
                    return
        finally:
            self._remove(request)

    def _fit(self, prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        """Checks the lengths against the model's limit and the KV cache."""
        limits, code = self._limits(), "context_length_exceeded"
        room, name = limits.max_model_len, "max_model_len"
        if limits.kv_tokens < room:
            room, name = limits.kv_tokens, "what the KV cache holds"
        if prompt_tokens > room - 1:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens; at most {room - 1} leave room for one output token"
                f" within {room} ({name})",
                param="prompt",
                code=code,
            )
        max_tokens = room - prompt_tokens if params.max_tokens is None else params.max_tokens
        if prompt_tokens + max_tokens > room:
            raise RequestError(
                f"the prompt's {prompt_tokens} tokens and max_tokens {max_tokens} are {prompt_tokens + max_tokens};"
                f" the limit is {room} ({name})",
                param="max_tokens",
                code=code,
            )
        try:
            return dataclasses.replace(params, max_tokens=max_tokens)
        except ValueError as error:
            raise RequestError(str(error), param="min_tokens") from error

    def _limits(self) -> Ready:
        if self.ready is None:
            raise RequestError("the model is still loading", status=503, code="loading", retry_after=1)
        return self.ready

    def _add(self, request: Request) -> None:
        self._requests.add(request)
        self._idle.clear()
        for output in request.outputs:
            self._outputs[output.submit.request_id] = request, output
            self._queue.enter(len(output.submit.prompt_ids), request.started)

    def _submit(self, request: Request) -> None:
        self.observer.on_submitted(len(request.result.prompt_token_ids))
        try:
            for output in request.outputs:
                self._link.send(output.submit)
        except MessageError as error:  # longer than a message may be, or text that is not Unicode
            request.fail(RequestError(str(error)))

    def _remove(self, request: Request) -> None:
        """The end of a request, however it came; what the rank still works on is aborted."""
        running = [output for output in request.outputs if output.submit.request_id in self._outputs]
        for output in running:
            self._forget(output)
        if running:
            self._link.send(Abort(request_ids=[output.submit.request_id for output in running]))
        self._requests.discard(request)
        if not self._requests:
            self._idle.set()
        result = request.result
        self.observer.on_finished(
            request.reason,
            time.monotonic() - request.started,
            len(result.prompt_token_ids),
            sum(len(output.token_ids) for output in result.outputs),
        )

    def _forget(self, output: Output) -> None:
        del self._outputs[output.submit.request_id]
        if output.waiting:
            output.waiting = False
            self._queue.leave(len(output.submit.prompt_ids), time.monotonic(), prefilled=False)

    # What the engine says

    def _take(self, message: Any) -> None:
        if isinstance(message, Tokens):
            for values in message.deltas:
                self._take_delta(unpack_delta(values))
        elif isinstance(message, Stats):
            counts = self.stats.expert_counts if message.expert_counts is None else message.expert_counts
            self.stats = dataclasses.replace(message, expert_counts=counts)
            self.observer.on_stats(self.stats)
        else:
            log.error("dropped a %s, which a front end does not take", type(message).__name__)

    def _take_delta(self, delta: Any) -> None:
        found = self._outputs.get(delta.request_id)
        if found is None:
            return  # aborted while this was on the way
        request, output = found
        now = time.monotonic()
        if delta.finish_reason in ("refused", "error"):
            self._forget(output)
            status = 400 if delta.finish_reason == "refused" else 500
            request.fail(RequestError(delta.error or "the engine failed on this request", status=status))
            return
        if delta.token_ids:
            self._observe(request, output, delta, now)
        try:
            output.apply(delta)
        except Exception as error:  # a tokenizer that fails on an id; the other requests are well
            log.exception("the text of %s could not be made", delta.request_id)
            request.fail(RequestError(f"detokenizing failed: {type(error).__name__}: {error}", status=500))
            return
        if output.finished:
            self._forget(output)
            if not delta.finish_reason:  # a stop string: the rank does not know it
                self._link.send(Abort(request_ids=[delta.request_id]))
        request.update()

    def _observe(self, request: Request, output: Output, delta: Any, now: float) -> None:
        if output.waiting:
            output.waiting = False
            self._queue.leave(len(output.submit.prompt_ids), now, prefilled=True)
            if not request.first_token_seen:
                request.first_token_seen = True
                request.result.num_cached_tokens = delta.cached_tokens
                ttft = now - request.started
                self.observer.on_first_token(delta.queue_s, delta.prefill_s, ttft, delta.cached_tokens)
        else:
            self.observer.on_token(now - output.updated, len(delta.token_ids))
        output.updated = now

    def _fail_all(self, reason: str) -> None:
        for request in list(self._requests):
            request.fail(RequestError(reason, status=500, code="engine_dead"))

    def _load_tokenizer(self, path: Path) -> Any:
        if self.tokenizer is not None:
            return self.tokenizer
        return load_tokenizer(path, remote_code=self.config.trust_remote_code)


async def _in_daemon_thread(function: Callable[[], Path]) -> Path:
    """Its result, from a thread that neither a cancelled start nor the interpreter's exit waits for (downloads)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Path] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def work() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_result, function())
        except Exception as error:
            outcome = (future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="resolve model", daemon=True).start()
    return await future


def _shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, code="shutting_down")
