"""The state of a request in the front end: its outputs, their text, and the news that its caller waits for."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..engine.messages import Stats, Submit, TokenDelta
from ..engine.params import SamplingParams
from ..scheduler.table import ExpertTable
from .detokenize import Detokenizer, Vocabulary
from .outputs import CompletionOutput, RequestOutput, TokenLogprob


class RequestError(ValueError):
    """A request that is refused or failed: an HTTP status, the field (`param`) and a machine-readable `code`.

    `retry_after` is in seconds, None when trying again later would not help.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


class Observer(Protocol):
    """Gets the events of requests, for metrics. Times are seconds between two readings of one monotonic clock.

    The methods are called in the event loop and must be quick.
    """

    def on_submitted(self, prompt_tokens: int) -> None:
        """A request was accepted."""

    def on_first_token(self, queue_s: float, prefill_s: float, ttft_s: float, cached: int) -> None:
        """A request's first token: waiting and prefill as the rank measured them, time to first token as seen here,
        prompt tokens found in the prefix cache. Once per request, whatever `n`."""

    def on_token(self, itl_s: float, n: int) -> None:
        """`n` further tokens of one output, `itl_s` after the ones before."""

    def on_finished(self, reason: str, e2e_s: float, prompt_tokens: int, output_tokens: int) -> None:
        """A request ended: `stop`, `length`, `abort` (its caller went away) or `error`."""

    def on_stats(self, stats: Stats) -> None:
        """The state of all ranks together, with the newest expert counts."""

    def on_ranks(self, ranks: Mapping[int, Stats]) -> None:
        """The ranks that serve now, each with its own last report."""

    def on_rank_lost(self, rank: int) -> None:
        """A rank was lost, for good or until it is started again."""

    def on_tables(self, tables: Sequence[ExpertTable]) -> None:
        """Where the experts of each MoE layer are from now on."""


class SilentObserver:
    """Takes no notice."""

    def on_submitted(self, *_: Any) -> None: ...
    def on_first_token(self, *_: Any) -> None: ...
    def on_token(self, *_: Any) -> None: ...
    def on_finished(self, *_: Any) -> None: ...
    def on_stats(self, *_: Any) -> None: ...
    def on_ranks(self, *_: Any) -> None: ...
    def on_rank_lost(self, *_: Any) -> None: ...
    def on_tables(self, *_: Any) -> None: ...


class Output:
    """One of a request's `n` outputs: one `Submit`, and the text of what comes back."""

    def __init__(
        self,
        submit: Submit,
        index: int,
        params: SamplingParams,
        vocabulary: Vocabulary,
        end_ids: frozenset[int],
    ) -> None:
        self.submit = submit
        self.result = CompletionOutput(index=index, logprobs=None if params.logprobs is None else [])
        self.waiting = True  # no token yet
        self.rank: int | None = None  # that has it now
        self.computing = False  # that rank has given a token
        self.losses = 0  # of ranks, since the last token
        self.updated = 0.0  # when the last tokens came
        self._params = params
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._detokenizer = Detokenizer(
            vocabulary,
            submit.prompt_ids,
            skip_special_tokens=params.skip_special_tokens,
            stops=params.stop,
            include_stop=params.include_stop_str_in_output,
        )

    @property
    def finished(self) -> bool:
        return self.result.finish_reason is not None

    def to_send(self) -> Submit:
        """What a rank gets now: after the loss of another one, with the tokens that this one had given."""
        if not self.result.token_ids:
            return self.submit
        return dataclasses.replace(self.submit, output_ids=list(self.result.token_ids))

    def lost(self) -> None:
        """The rank that had it is gone."""
        self.rank, self.computing = None, False
        self.losses += 1

    def apply(self, delta: TokenDelta) -> None:
        """Adds what a step gave. After a stop string `finished` is set although the rank goes on."""
        result = self.result
        for i, token_id in enumerate(delta.token_ids):
            result.token_ids.append(token_id)
            if result.logprobs is not None and delta.logprobs is not None:
                result.logprobs.append(self._logprob(token_id, delta.logprobs[i]))
            is_last = delta.finish_reason == "stop" and i == len(delta.token_ids) - 1
            if is_last and not self._params.include_stop_str_in_output and self._ends(token_id, delta):
                continue
            self._detokenizer.push(token_id, search=len(result.token_ids) > self._params.min_tokens)
            if self._detokenizer.stop is not None:
                break
        if delta.finish_reason and self._detokenizer.stop is None:
            self._detokenizer.finish()
        result.text = self._detokenizer.text
        if self._detokenizer.stop is not None:
            result.finish_reason, result.stop_reason = "stop", self._detokenizer.stop
        elif delta.finish_reason:
            result.finish_reason, result.stop_reason = delta.finish_reason, delta.stop_token

    def _ends(self, token_id: int, delta: TokenDelta) -> bool:
        """Whether the token is the one that ended the output: it is among the ids, but not in the text."""
        return token_id == delta.stop_token or token_id in self._end_ids

    def _logprob(self, token_id: int, values: Any) -> TokenLogprob:
        logprob, top = values
        text_of = self._vocabulary.text_of
        return TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            token=text_of(token_id),
            top=[(other, value, text_of(other)) for other, value in top],
        )


class Request:
    """A request in flight. `changed` is set when `result` changed or `error` was set."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_ids: list[int],
        outputs: Sequence[Output],
    ) -> None:
        self.outputs = outputs
        self.result = RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_ids,
            outputs=[output.result for output in outputs],
        )
        self.changed = asyncio.Event()
        self.error: RequestError | None = None
        self.started = time.monotonic()
        self.first_token_seen = False

    def fail(self, error: RequestError) -> None:
        if self.error is None and not self.result.finished:
            self.error = error
            self.changed.set()

    def update(self) -> None:
        self.result.finished = all(output.finished for output in self.outputs)
        self.changed.set()

    @property
    def reason(self) -> str:
        """How it ended, for metrics: the first output's reason stands for all."""
        if self.error is not None:
            return "error"
        return (self.outputs[0].result.finish_reason or "abort") if self.result.finished else "abort"


def split(serial: int, request_id: str, ids: list[int], params: SamplingParams, salt: str) -> Iterator[Submit]:
    """One `Submit` per output: seeds differ, and follow from the request's seed if it has one.

    The rank's ids are the request's with a suffix that is unique here, because callers choose theirs freely. Stop
    strings stay here, where the text is.
    """
    for i in range(params.n):
        if params.seed is None:
            seed = secrets.randbits(64)
        else:
            seed = params.seed + i if params.seed + i < 2**64 else params.seed + i - 2**64
        own = dataclasses.replace(params, n=1, seed=seed, stop=())
        yield Submit(request_id=f"{request_id}#{serial}.{i}", prompt_ids=ids, params=own.to_dict(), cache_salt=salt)
