"""Continuous batching: which requests get how many tokens of the next step.

Prefill, chunked prefill and decode are one thing: a request gets some of its tokens that are known and not
computed yet, within the step's token budget. A step runs the requests that are running, then admits waiting
ones, first come first served. When KV blocks run out, the most recently admitted request gives up its blocks
and computes them again later (preemption by recomputation). After vLLM's V1 scheduler and nano-vllm.

The caller's loop, with `append` or `finish` for every id in `step.samples`:

    step = scheduler.schedule()
    ...run the model on step.tokens...
    scheduler.commit(step)
    for request_id in step.samples:
        scheduler.append(request_id, token)     # or scheduler.finish(request_id)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from .blocks import BlockPool
from .requests import Request, Status
from .states import NO_SLOT, StateSlots


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step computes.

    `tokens`: request id -> number of tokens, from the request's `computed` on. The order is the batch's:
    requests with one token first. `samples`: the ids whose last known token is computed, so that a new one is
    to be sampled, in batch order. `admitted`: the ids that are in a step for the first time (not those that
    come back after preemption). `preempted`: the ids that lost their blocks while this step was made.
    """

    tokens: dict[str, int]
    samples: tuple[str, ...]
    admitted: tuple[str, ...]
    preempted: tuple[str, ...]


class Picker(Protocol):
    """Chooses which requests decode in a step, where not all should: `affinity.picker` for one."""

    def pick(self, ready: Sequence[Request]) -> Collection[str]:
        """The ids, at least one, of those that decode now, from requests in order of admission. Whoever is passed
        over keeps its blocks; that this ends (see `Request.passed_over`) is the picker's to see to."""
        ...


class Scheduler:
    """`running` is in order of admission, `waiting` in order of service; read them, do not change them.

    Whenever `has_work`, `schedule` gives at least one token, and the oldest running request is never
    preempted: every request ends. With a `picker` only those that it picks decode, and prompts have the room that
    the others leave. `states` are the slots of a model whose layers keep states: whoever runs has one. Raises
    ValueError for limits that cannot work.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_batched_tokens: int,
        picker: Picker | None = None,
        states: StateSlots | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {max_num_seqs}; it must be at least 1")
        if max_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_batched_tokens ({max_batched_tokens}) is below max_num_seqs ({max_num_seqs}): a step"
                " must have room for one token of each request; raise the first or lower the second"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preemptions = 0
        self.states = states
        self._picker = picker
        self._requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def get(self, request_id: str) -> Request:
        """The waiting or running request. Raises KeyError for any other id."""
        return self._requests[request_id]

    def add(self, request: Request) -> None:
        """Put a new request at the end of the queue.

        Raises ValueError when its id is in use, or when it could outgrow the whole KV cache.
        """
        assert request.status is Status.WAITING and not request.started
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use; give each request its own")
        needed = self.pool.blocks_for(request.max_total)
        if needed > self.pool.num_blocks:
            size = self.pool.block_size
            raise ValueError(
                f"the request may reach {request.max_total} tokens ({needed} KV blocks of {size}), but the KV"
                f" cache holds {self.pool.num_blocks * size} ({self.pool.num_blocks} blocks); shorten the"
                " prompt, lower max_tokens, or give the KV cache more memory"
            )
        self._requests[request.id] = request
        self.waiting.append(request)

    def schedule(self) -> Step:
        """The next step. Running requests that need a block and find none free make newer ones give up
        theirs."""
        singles: dict[str, int] = {}  # one token each: decode, and the odd end of a prompt
        chunks: dict[str, int] = {}
        preempted = self._schedule_decodes(singles) if self._picker is None else self._pick_decodes(singles)
        budget = self.max_batched_tokens - len(singles)
        if len(singles) < len(self.running):
            for request in self.running:
                left = len(request.tokens) - request.computed
                if left > 1 and budget:
                    n = min(left, budget)
                    (singles if n == 1 else chunks)[request.id] = n
                    budget -= n
        admitted = [] if preempted or not self.waiting else self._admit(budget, singles, chunks)
        tokens = singles | chunks if chunks else singles
        assert tokens or not self._requests, "requests wait, and none can be served"
        requests = self._requests
        return Step(
            tokens=tokens,
            samples=tuple([i for i, n in tokens.items() if (r := requests[i]).computed + n == len(r.tokens)]),
            admitted=tuple(admitted),
            preempted=tuple(preempted),
        )

    def commit(self, step: Step) -> None:
        """The model ran `step`: its tokens are in the KV cache. Ids that are gone since `schedule` are
        ignored."""
        for request_id, n in step.tokens.items():
            request = self._requests.get(request_id)
            if request is None or request.status is not Status.RUNNING:
                continue
            request.computed += n
            assert request.computed <= len(request.tokens), f"{request!r}: a step was committed twice"
            self.pool.publish(request)

    def append(self, request_id: str, token_id: int) -> bool:
        """Add the token that was sampled for a request of `step.samples`. False: the request is gone."""
        request = self._requests.get(request_id)
        if request is None or request.status is not Status.RUNNING:
            return False
        assert request.computed == len(request.tokens) < request.max_total, f"{request!r} expects no token"
        request.tokens.append(token_id)
        return True

    def finish(self, request_id: str) -> bool:
        """Forget a request and free its blocks, whatever its state. False: there is none with this id."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request.status is Status.RUNNING:
            self._leave(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        return True

    def abort(self, request_id: str) -> bool:
        """`finish`, at any moment: also between `schedule` and `commit`."""
        return self.finish(request_id)

    def restart(self, request_ids: Collection[str]) -> None:
        """Computes those of these requests that run again from the start, or from what the prefix cache has: a step
        that was given up has changed their states."""
        for request in reversed([r for r in self.running if r.id in request_ids]):
            self._leave(request)
            request.status = Status.WAITING
            self.waiting.appendleft(request)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the queues and the block pool agree. Slow: for tests and idle times."""
        assert {r.id for r in self.running} | {r.id for r in self.waiting} == set(self._requests)
        assert len(self.running) + len(self.waiting) == len(self._requests)
        assert all(r.status is Status.RUNNING for r in self.running)
        assert all(r.status is Status.WAITING and not r.block_table and not r.computed for r in self.waiting)
        self.pool.check_integrity(self.running)
        assert all(r.state_slot == NO_SLOT for r in self.waiting)
        if self.states is not None:
            self.states.check_integrity(self.running)

    def _pick_decodes(self, singles: dict[str, int]) -> list[str]:
        """`_schedule_decodes` of those that the picker takes. The last token of a prompt is not its to choose."""
        assert self._picker is not None
        ready = [r for r in self.running if r.num_tokens > r.prompt_len and r.num_tokens - r.computed == 1]
        if not ready:
            return self._schedule_decodes(singles)
        ids = {request.id for request in ready}
        picked = set(self._picker.pick(ready))
        assert picked and picked <= ids, f"picked {sorted(picked)} of {sorted(ids)}"
        preempted = self._schedule_decodes(singles, ids - picked)
        if not singles and all(r.num_tokens - r.computed == 1 for r in self.running):
            # Those picked were preempted: without this the step would be empty.
            preempted += self._schedule_decodes(singles)
        for request in ready:
            request.passed_over = 0 if request.id in singles or request.id in preempted else request.passed_over + 1
        return preempted

    def _schedule_decodes(self, singles: dict[str, int], passed_over: Collection[str] = ()) -> list[str]:
        """One token for each running request that has one left; the ids that were preempted to make room.

        Only these can need a block, since admission gave each request blocks for all the tokens it knew.
        Going from the oldest to the newest, and preempting from the newest, no request loses blocks after it
        was scheduled.
        """
        running, preempted, at = self.running, [], 0
        while at < len(running):
            request = running[at]
            left = len(request.tokens) - request.computed
            assert left > 0, f"{request!r} was sampled, then neither appended to nor finished"
            if left == 1 and request.id not in passed_over:
                while not self.pool.may_append(request):
                    victim = running[-1]
                    self._preempt(victim)
                    preempted.append(victim.id)
                    if victim is request:
                        break
                else:
                    singles[request.id] = 1
            at += 1
        return preempted

    def _preempt(self, request: Request) -> None:
        assert len(self.running) > 1, f"{request!r} does not fit the KV cache alone"
        self._leave(request)
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _leave(self, request: Request) -> None:
        """The request no longer runs: gives up its blocks and its state."""
        self.running.remove(request)
        self.pool.free(request)
        if self.states is not None:
            self.states.free(request)

    def _admit(self, budget: int, singles: dict[str, int], chunks: dict[str, int]) -> list[str]:
        """Move waiting requests to `running` while there is budget and memory; the ids admitted for the first
        time."""
        admitted: list[str] = []
        deferred: list[Request] = []
        pool, running, waiting = self.pool, self.running, self.waiting
        most = self.max_num_seqs if self.states is None else min(self.max_num_seqs, self.states.num_slots)
        while waiting and budget and len(running) < most:
            request = waiting[0]
            if pool.is_pending(request.waits_for):
                deferred.append(waiting.popleft())
                continue
            matched = pool.match_prefix(request)
            # What another request is computing right now is not computed twice: n samples of one prompt
            # prefill it once. Whoever waits here goes on when that request has computed it, or is gone or
            # preempted.
            request.waits_for = pool.pending_after(request, len(matched))
            if request.waits_for is not None:
                deferred.append(waiting.popleft())
                continue
            # One block of reserve per running request, or the newcomer would be preempted before it gets
            # anywhere.
            if not pool.can_allocate(pool.blocks_needed(request, matched) + len(running)):
                break
            waiting.popleft()
            pool.allocate(request, matched)
            if self.states is not None:
                self.states.allocate(request)
            request.status = Status.RUNNING
            if not request.started:
                request.started = True
                request.cached_tokens = request.computed
                admitted.append(request.id)
            running.append(request)
            n = min(budget, len(request.tokens) - request.computed)
            (singles if n == 1 else chunks)[request.id] = n
            budget -= n
        waiting.extendleft(reversed(deferred))
        return admitted
