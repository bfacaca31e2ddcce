"""The front end: takes token ids and sampling options, gives back text as it grows.

What a request may ask for, the bound of the queue, and what is known of all ranks together are here; requests in flight
are `flight`'s, and the model runs in other processes (`group`). One event loop owns a front end: no method is for other
threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.config import EngineConfig, ServeConfig
from ..engine.messages import Placed, Ready, Spans, Stats, Tokens
from ..engine.params import SamplingParams
from ..engine.resolve import resolve_model
from .admission import PrefillQueue
from .detokenize import Vocabulary
from .flight import Flights
from .group import SILENCE_TIMEOUT_S, EngineError, EngineGroup
from .limits import checked
from .local import Launcher
from .outputs import RequestOutput
from .placing import Placements
from .recorded import SAVE_S, RecordedLoads
from .sequences import Observer, Output, Request, RequestError, SilentObserver, split
from .start import choose_launcher, find_place
from .tokenizer import end_token_ids, load_tokenizer, sampling_defaults
from .totals import Totals
from .trace import TraceWriter

__all__ = ["EngineError", "FrontEnd", "Observer", "RequestError"]

START_TIMEOUT_S = 1800.0
"""How long the engine may load when the configuration has no `start_timeout`."""

log = logging.getLogger("moeyard.frontend")


class FrontEnd:
    """Starts an engine, of one rank or several, and serves requests with it.

    `tokenizer` replaces the checkpoint's, `launcher` what the options and the environment say. `ready` has the engine's
    limits (the smallest of its ranks), None until it is loaded; `stats` adds the ranks' last reports up; `model_path`
    is the checkpoint's directory; `tokenizer` is None when the checkpoint has none (then only token ids go in and no
    text comes out).
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
        self._several_nodes = False
        if launcher is None:
            place = find_place(config, os.environ)
            launcher, ep = choose_launcher(config, os.environ), place.ep
            self._several_nodes = place.nodes > 1 or config.launcher == "ray"
        else:
            ep = config.ep or len(launcher.ranks)
        self.config = dataclasses.replace(config, ep=ep)
        self.tokenizer = tokenizer
        self.draining = False
        self.ready: Ready | None = None
        self.stats = Stats()
        served = config.served_model_name if isinstance(config, ServeConfig) else None
        self.model_name = served or config.model or "reference_model"
        self.model_path = ""
        self._group = EngineGroup(launcher, self._take, self._lose, self._join, self._fail_all, silence_timeout)
        self._queue = PrefillQueue(config.max_queued_tokens if isinstance(config, ServeConfig) else None)
        self._flights = Flights(self._group, self._queue, observer or SilentObserver())
        self.placements = Placements(self._group)
        self._totals = Totals()
        self._recorded: RecordedLoads | None = None
        self._recording: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._trace: TraceWriter | None = None
        self._vocabulary = Vocabulary(None)
        self._end_ids: frozenset[int] = frozenset()
        self._defaults: dict[str, Any] = {}
        self._serial = itertools.count()

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
        if not self._several_nodes or Path(config.model or path).exists():
            engine_config = dataclasses.replace(engine_config, model=str(path.absolute()), revision=None)
        # else a Hub id, which each node turns into a directory of its own
        timeout = config.start_timeout if isinstance(config, ServeConfig) else START_TIMEOUT_S
        try:
            if config.placement is not None:
                self._recorded = RecordedLoads(config.placement, self.model_name)
            if config.trace is not None:
                self._trace = TraceWriter(config.trace)
            loads = self._recorded.earlier if self._recorded is not None else None
            ranks, self.tokenizer = await asyncio.gather(
                self._group.start(engine_config, timeout, loads), asyncio.to_thread(self._load_tokenizer, path)
            )
            ready = _together(ranks)
            if self._recorded is not None and (experts := self.placements.experts):
                self._recorded.check_shape(experts)
            self._end_ids = end_token_ids(path, self.tokenizer)
        except BaseException:
            await self.close()
            raise
        self._vocabulary = Vocabulary(self.tokenizer)
        if self.tokenizer is None:
            log.warning("%s has no tokenizer: only token ids go in, and no text comes out", path)
        self._flights.open(config, self._group.members, ready.kv_tokens)
        self._report()
        if self._recorded is not None:
            self._recording = asyncio.create_task(self._record(), name="recorded loads")
        self.ready = ready

    async def close(self, drain: float = 0.0) -> None:
        """Refuses new requests, gives those in flight `drain` seconds to finish, fails the rest, ends the engine."""
        self.draining = True
        if self.alive and drain > 0:
            try:
                await asyncio.wait_for(self._flights.idle.wait(), drain)
            except TimeoutError:
                log.warning("%d requests did not finish within %g s", len(self._flights.requests), drain)
        self._flights.fail_all(_shutting_down())
        self._flights.close()
        if self._recording is not None:
            self._recording.cancel()
            await asyncio.gather(self._recording, return_exceptions=True)
            self._recording = None
        await self._group.close()
        if self._recorded is not None:
            await asyncio.to_thread(self._save_loads)
        if self._trace is not None:
            self._trace.close()

    @property
    def observer(self) -> Observer:
        return self._flights.observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self._flights.observer = observer

    @property
    def alive(self) -> bool:
        """Whether the engine is loaded and can be used."""
        return self.ready is not None and not self._group.dead_reason

    @property
    def dead_reason(self) -> str:
        """Why the engine can no longer be used; "" while it can, and while it loads."""
        return self._group.dead_reason

    @property
    def recovering(self) -> bool:
        """Whether a rank was lost and the others, or its successor, do not serve yet; requests wait meanwhile."""
        return self.alive and self._group.state == "recovering"

    @property
    def trouble(self) -> str:
        """What happened to ranks lately, for people; "" when nothing did."""
        return self._group.trouble

    def rank_states(self) -> dict[int, str]:
        """Each rank's state, for people: `ok`, `loading`, `recovering` or `lost: ...`."""
        lost, members = self._group.lost, self._group.members
        waiting = "loading" if self.ready is None else "recovering"
        return {
            rank: f"lost: {lost[rank]}" if rank in lost else "ok" if self.ready and rank in members else waiting
            for rank in range(self.config.ep or 1)
        }

    @property
    def rank_stats(self) -> dict[int, Stats]:
        """The last report of each rank that is not lost."""
        return dict(self._totals.ranks)

    @property
    def rank_info(self) -> dict[int, dict[str, Any]]:
        """What each rank said of itself when it was loaded: sizes, device, where its experts were."""
        return {rank: ready.info for rank, ready in self._group.ready.items()}

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
        return checked(prompt_ids, params, self._limits(), has_tokenizer=self.tokenizer is not None)

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
        self._flights.add(request)
        try:
            while True:
                await request.changed.wait()  # the group's watch ends this when the engine does not answer
                request.changed.clear()
                if request.error is not None:
                    raise request.error
                yield request.result
                if request.result.finished:
                    return
        finally:
            self._flights.remove(request)

    # Placement of experts

    @property
    def loads(self) -> list[list[int]] | None:
        """Tokens of each [layer][expert] so far, with the recorded share of earlier runs; None before the first."""
        counts = self.stats.expert_counts
        return counts if self._recorded is None else self._recorded.loads(counts)

    def place(
        self,
        *,
        planner: str | None = None,
        max_moves: int | None = None,
        layers: Sequence[int] | None = None,
        rows: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> tuple[int, int]:
        """Begins to move the experts, as `Placements.new_tables` understands these; the placement's version, and how
        many slots get another expert. Raises RequestError."""
        self._limits()
        new = self.placements.new_tables(self.loads, planner=planner, max_moves=max_moves, layers=layers, rows=rows)
        return self.placements.begin(new)

    async def _record(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            await asyncio.to_thread(self._save_loads)

    def _save_loads(self) -> None:
        assert self._recorded is not None
        stats = self.stats
        self._recorded.save(stats.expert_counts, stats.prompt_tokens + stats.generated_tokens)

    def _limits(self) -> Ready:
        if self.ready is None:
            raise RequestError("the model is still loading", status=503, code="loading", retry_after=1)
        return self.ready

    # What the ranks say

    def _take(self, rank: int, message: Any) -> None:
        if isinstance(message, Tokens):
            self._flights.take(rank, message)
        elif isinstance(message, Stats):
            self._totals.take(rank, message)
            self._report()
        elif isinstance(message, Placed):
            self.placements.take(message)
            if self._recorded is not None:
                self._saving = asyncio.create_task(asyncio.to_thread(self._save_loads), name="recorded loads, once")
        elif isinstance(message, Spans):
            if self._trace is not None:
                self._trace.add(rank, message.spans, self._group.clock_offset_ns.get(rank, 0))
        else:
            log.error("dropped a %s, which a front end does not take", type(message).__name__)

    def _report(self) -> None:
        total = self._totals.total
        self.stats = dataclasses.replace(total, waiting=total.waiting + self._flights.waiting)
        self.observer.on_stats(self.stats)
        self.observer.on_ranks({rank: self._totals.ranks.get(rank, Stats()) for rank in self._group.members})
        self.observer.on_tables(self.placements.tables)

    def _lose(self, rank: int) -> None:
        self.observer.on_rank_lost(rank)
        self._totals.lose(rank)
        self.placements.forget()
        self._flights.lose(rank)
        self._report()

    def _join(self, rank: int) -> None:
        self._flights.join(rank)
        self._report()

    def _fail_all(self, reason: str) -> None:
        self._flights.fail_all(RequestError(reason, status=500, code="engine_dead"))

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


def _together(ranks: Mapping[int, Ready]) -> Ready:
    """What all ranks can serve, and the first one's information."""
    all_of = list(ranks.values())
    return dataclasses.replace(
        all_of[0],
        max_model_len=min(ready.max_model_len for ready in all_of),
        vocab_size=min(ready.vocab_size for ready in all_of),
        kv_tokens=min(ready.kv_tokens for ready in all_of),
    )
