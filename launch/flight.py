"""The requests in flight: which rank has each output, what goes there and comes back, and what a lost rank leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from ..engine.config import EngineConfig
from ..engine.messages import Abort, MessageError, TokenDelta, Tokens, unpack_delta
from ..scheduler.replicas import DualMap, Item, LeastLoaded, RoundRobin, Router, prefix_keys
from .admission import PrefillQueue
from .sequences import Observer, Output, Request, RequestError

ROUTERS: dict[str, type[Router]] = {"dualmap": DualMap, "round_robin": RoundRobin, "least_loaded": LeastLoaded}
ROUTE_S = 0.1
"""How often the queue is looked at while requests wait in it: what was idle may help what has stalled."""
MAX_LOSSES = 3
"""Ranks that an output may lose, one after the other and without a token in between, before it is failed: it may be
what ends them."""
KEY_BLOCKS = 4096
"""Leading KV blocks of a prompt that the router looks at."""

log = logging.getLogger("moeyard.frontend")


class Ranks(Protocol):
    """What is needed of an `EngineGroup`."""

    @property
    def state(self) -> str: ...
    def send(self, rank: int, message: object) -> None: ...
    def wake(self) -> None: ...


class Flights:
    """Sends outputs to ranks and applies what comes back. One event loop owns it.

    With several ranks outputs wait here, in the router's queue, until their rank can begin with them. An output whose
    rank is lost goes back there with the tokens that it has, and goes on elsewhere: the sampler's choice follows from
    seed and position alone.
    """

    def __init__(self, group: Ranks, queue: PrefillQueue, observer: Observer) -> None:
        self.observer = observer
        self.requests: set[Request] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        self._group = group
        self._queue = queue
        self._outputs: dict[str, tuple[Request, Output]] = {}
        self._router: Router | None = None  # None: there is one rank, and everything goes there at once
        self._only_rank = 0
        self._homeless: list[Item] = []  # while there is no rank at all
        self._timer: asyncio.TimerHandle | None = None

    def open(self, config: EngineConfig, ranks: Sequence[int], kv_tokens: int) -> None:
        """The ranks are loaded; each has room for `kv_tokens`."""
        self._only_rank = ranks[0]
        # One rank that may come back, or one that is left of several, needs it too: somebody has to keep the requests.
        if len(ranks) > 1 or (config.ep or 1) > 1 or config.on_rank_loss == "restart":
            self._router = ROUTERS[config.router](
                ranks,
                block_size=config.block_size,
                ttft_target_s=config.ttft_target,
                budget_tokens=config.max_batched_tokens,
                cache_blocks=max(1, kv_tokens // config.block_size),
            )

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def waiting(self) -> int:
        """Outputs that wait here for a rank."""
        return len(self._homeless) + (self._router.waiting if self._router else 0)

    # Requests

    def add(self, request: Request) -> None:
        self.requests.add(request)
        self.idle.clear()
        self.observer.on_submitted(len(request.result.prompt_token_ids))
        for output in request.outputs:
            self._outputs[output.submit.request_id] = request, output
            self._queue.enter(len(output.submit.prompt_ids), request.started)
        for output in request.outputs:
            if self._router is None:
                self._send(request, output, self._only_rank)
            else:
                self._enqueue(output)
        self.route()

    def remove(self, request: Request) -> None:
        """The end of a request, however it came; what ranks still work on is aborted."""
        running: dict[int, list[str]] = {}
        for output in request.outputs:
            if output.submit.request_id in self._outputs:
                if output.rank is not None:
                    running.setdefault(output.rank, []).append(output.submit.request_id)
                self._forget(output)
        for rank, request_ids in running.items():
            self._group.send(rank, Abort(request_ids=request_ids))
        self.requests.discard(request)
        if not self.requests:
            self.idle.set()
        result = request.result
        self.observer.on_finished(
            request.reason,
            time.monotonic() - request.started,
            len(result.prompt_token_ids),
            sum(len(output.token_ids) for output in result.outputs),
        )
        self.route()  # an aborted prompt makes room

    def fail_all(self, error: RequestError) -> None:
        for request in list(self.requests):
            request.fail(error)

    # Ranks

    def route(self) -> None:
        """Sends what the router releases, and looks again in a moment while something waits."""
        if self._router is None or self._group.state == "dead":
            return
        if self._group.state == "serving" and self._router.ranks:
            for request_id, rank in self._router.release(time.monotonic()):
                self._send(*self._outputs[request_id], rank)
        if self.waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(ROUTE_S, self._look_again)

    def lose(self, rank: int) -> None:
        """The rank is gone: all that it had, or would have got, goes to others."""
        if self._router is None or rank not in self._router.ranks:
            return
        waiting = {item.request_id for item in self._router.remove_rank(rank)}
        for request, output in list(self._outputs.values()):  # in the order in which they came
            if output.rank == rank:
                output.lost()
                if output.losses >= MAX_LOSSES:
                    message = f"its rank was lost {output.losses} times before it gave a token; it is not tried again"
                    log.error("request %s is failed: %s", request.result.request_id, message)
                    self._forget(output)
                    request.fail(RequestError(message, status=500, code="rank_lost"))
                    continue
                self._router.finished(output.submit.request_id)
            elif output.submit.request_id not in waiting:
                continue
            self._enqueue(output)
        self.route()

    def join(self, rank: int) -> None:
        """The rank serves, for the first time or again, with an empty KV cache."""
        if self._router is None:
            return
        if rank not in self._router.ranks:
            self._router.add_rank(rank)
        items, self._homeless = self._homeless, []
        for item in items:
            self._router.enqueue(item, time.monotonic())
        self.route()

    def _look_again(self) -> None:
        self._timer = None
        self.route()

    def _enqueue(self, output: Output) -> None:
        assert self._router is not None
        item = _item(output, self._router)
        if self._router.ranks:
            self._router.enqueue(item, time.monotonic())
        else:
            self._homeless.append(item)

    def _send(self, request: Request, output: Output, rank: int) -> None:
        try:
            self._group.send(rank, output.to_send())
        except MessageError as error:  # longer than a message may be, or text that is not Unicode
            request.fail(RequestError(str(error)))
            return
        output.rank, output.computing = rank, False
        self._group.wake()

    def _forget(self, output: Output) -> None:
        request_id = output.submit.request_id
        del self._outputs[request_id]
        if output.waiting:
            output.waiting = False
            self._queue.leave(len(output.submit.prompt_ids), time.monotonic(), prefilled=False)
        if self._router is not None:
            homeless = [item for item in self._homeless if item.request_id == request_id]
            if homeless:
                self._homeless.remove(homeless[0])
            else:
                self._router.finished(request_id)

    # What ranks say

    def take(self, rank: int, message: Tokens) -> None:
        for values in message.deltas:
            delta = unpack_delta(values)
            request, output = self._outputs.get(delta.request_id, (None, None))
            # Else it was aborted, or given to another rank, while this was on the way.
            if request is not None and output is not None and output.rank == rank:
                self._take_delta(request, output, delta)
        self.route()

    def _take_delta(self, request: Request, output: Output, delta: TokenDelta) -> None:
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
            assert output.rank is not None
            self._forget(output)
            if not delta.finish_reason:  # a stop string: the rank does not know it
                self._group.send(output.rank, Abort(request_ids=[delta.request_id]))
        request.update()

    def _observe(self, request: Request, output: Output, delta: TokenDelta, now: float) -> None:
        if not output.computing:
            output.computing, output.losses = True, 0
            if self._router is not None:
                self._router.started(delta.request_id, now, delta.cached_tokens)
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


def _item(output: Output, router: Router) -> Item:
    """The output as the router sees it, with the tokens that it has got already: they are prefilled again."""
    ids = output.submit.prompt_ids + output.result.token_ids
    max_tokens = output.submit.params.get("max_tokens") or 0
    return Item(
        request_id=output.submit.request_id,
        prompt_len=len(ids),
        prefix_keys=prefix_keys(ids, router.block_size, output.submit.cache_salt, KEY_BLOCKS)
        if isinstance(router, DualMap)
        else (),
        output_len=max(0, max_tokens - len(output.result.token_ids)),
    )
