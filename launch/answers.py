"""From engine outputs to OpenAI's answers: whole ones and chunks, with log-probabilities and usage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..engine.params import SamplingParams
from .frontend import FrontEnd, RequestError
from .outputs import CompletionOutput, RequestOutput, TokenLogprob

# JSON has no infinity; vLLM's clients know this number as "practically impossible".
MIN_LOGPROB = -9999.0


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request for tokens, checked and tokenized.

    `id` is the answer's id and the engine's request id; `texts` are the prompts' texts where they are known.
    """

    id: str
    chat: bool
    model: str
    prompts: Sequence[list[int]]
    texts: Sequence[str | None]
    params: SamplingParams
    cache_salt: str = ""
    echo: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))


Outputs: TypeAlias = AsyncGenerator[tuple[int, RequestOutput], None]
"""(prompt index, output so far), in the order in which they come."""


async def outputs(frontend: FrontEnd, call: Call) -> Outputs:
    """Runs all prompts of a call together. Closing it aborts them.

    Outputs are cumulative, so only the newest of each prompt is kept: a client that reads slowly gets larger chunks and
    costs no memory. An error of any prompt ends the call.
    """
    newest: dict[int, RequestOutput] = {}
    news = asyncio.Event()

    for ids in call.prompts:
        frontend.check(ids, call.params)
    # One decision for the whole call: its own prompts must not fill the queue for each other.
    frontend.admit(sum(map(len, call.prompts)) * call.params.n)

    async def follow(i: int, ids: list[int]) -> None:
        name = call.id if len(call.prompts) == 1 else f"{call.id}-{i}"
        stream = frontend.generate(
            ids,
            call.params,
            request_id=name,
            cache_salt=call.cache_salt,
            prompt=call.texts[i],
            admitted=True,
        )
        async with aclosing(stream):
            async for output in stream:
                newest[i] = output
                news.set()

    tasks = [asyncio.create_task(follow(i, ids)) for i, ids in enumerate(call.prompts)]
    for task in tasks:
        task.add_done_callback(lambda _: news.set())
    started = False
    try:
        while not started or newest or not all(task.done() for task in tasks):
            await news.wait()
            news.clear()
            # A refusal must reach the client as a status, so it goes before the first tokens of other prompts.
            if not started:
                _raise_failure(tasks)
            batch = sorted(newest.items())
            newest.clear()
            for i, output in batch:
                started = True
                yield i, output
            _raise_failure(tasks)
            if not started and all(task.done() for task in tasks):
                raise RequestError("the engine ended the request without an answer", status=500)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_failure(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and (error := task.exception()) is not None:
            raise error


class Answer:
    """Turns one call's outputs into chunks, or into the whole answer at the end."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.latest: dict[int, RequestOutput] = {}
        self._sent: dict[int, _Sent] = {}

    def add(self, i: int, output: RequestOutput) -> None:
        self.latest[i] = output
        for choice in output.outputs:
            if choice.finish_reason == "error":
                raise RequestError("the engine failed on this request", status=500, code="engine_error")

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = []
        for i, output in sorted(self.latest.items()):
            for choice in output.outputs:
                index = i * self.call.params.n + choice.index
                entry: dict[str, Any] = {"index": index}
                if self.call.chat:
                    entry["message"] = {"role": "assistant", "content": choice.text}
                else:
                    entry["text"] = self._echo(i) + choice.text
                entry["logprobs"] = self._logprobs(choice.logprobs, 0)
                choices.append(entry | {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason})
        return self._frame("", choices) | {"usage": self.usage()}

    def chunks(self, i: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """One chunk for each choice that has something new to say.

        The first token of a choice is always sent, so that the time to it can be measured; later tokens wait until
        there is text (a character may need several tokens), or the end.
        """
        self.add(i, output)
        for choice in output.outputs:
            index = i * self.call.params.n + choice.index
            sent = self._sent.setdefault(index, _Sent())
            ended = choice.finish_reason is not None
            first = not sent.started and (bool(choice.token_ids) or ended)
            if sent.ended or not (first or ended or len(choice.text) > sent.chars):
                continue
            text = choice.text[sent.chars :]
            entry: dict[str, Any] = {"index": index}
            if self.call.chat:
                entry["delta"] = ({"role": "assistant"} if first else {}) | {"content": text}
            else:
                entry["text"] = (self._echo(i) if first else "") + text
            fresh = None if choice.logprobs is None else choice.logprobs[sent.tokens :]
            entry["logprobs"] = self._logprobs(fresh, sent.offset)
            entry |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            sent.advance(choice, fresh or [])
            usage = self.usage() if self.call.continuous_usage else None
            yield self._frame(".chunk" if self.call.chat else "", [entry]) | {"usage": usage}

    def usage_chunk(self) -> dict[str, Any]:
        return self._frame(".chunk" if self.call.chat else "", []) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Prompt tokens count once per prompt, whatever `n`."""
        latest = self.latest.values()
        prompt = sum(len(output.prompt_token_ids) for output in latest)
        completion = sum(len(choice.token_ids) for output in latest for choice in output.outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in latest)},
        }

    def _echo(self, i: int) -> str:
        return (self.call.texts[i] or "") if self.call.echo else ""

    def _frame(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion" if self.call.chat else "text_completion"
        return {
            "id": self.call.id,
            "object": kind + suffix,
            "created": self.call.created,
            "model": self.call.model,
            "choices": choices,
        }

    def _logprobs(self, logprobs: list[TokenLogprob] | None, offset: int) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        if self.call.chat:
            return {"content": [_chat_logprob(entry) for entry in logprobs]}
        return _completion_logprobs(logprobs, offset)


@dataclass
class _Sent:
    """How much of one choice the client has: characters, tokens, and the text offset of the next log-probability."""

    chars: int = 0
    tokens: int = 0
    offset: int = 0
    started: bool = False
    ended: bool = False

    def advance(self, choice: CompletionOutput, fresh: Sequence[TokenLogprob]) -> None:
        self.chars = len(choice.text)
        self.tokens = len(choice.token_ids)
        self.offset += sum(len(entry.token) for entry in fresh)
        self.started = True
        self.ended = choice.finish_reason is not None


def _chat_logprob(entry: TokenLogprob) -> dict[str, Any]:
    alternatives = [_token(text, logprob) for _, logprob, text in entry.top]
    return _token(entry.token, entry.logprob) | {"top_logprobs": alternatives}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A token that is only part of a character shows as U+FFFD; its bytes cannot be told from its text.
    data = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": data}


def _completion_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets, tops = [], []
    for entry in logprobs:
        offsets.append(offset)
        offset += len(entry.token)
        # Different tokens may read the same; the likeliest keeps the name. The chosen token is always listed.
        top: dict[str, float] = {}
        for _, logprob, text in entry.top:
            top.setdefault(text, max(logprob, MIN_LOGPROB))
        top.setdefault(entry.token, max(entry.logprob, MIN_LOGPROB))
        tops.append(top)
    return {
        "text_offset": offsets,
        "token_logprobs": [max(entry.logprob, MIN_LOGPROB) for entry in logprobs],
        "tokens": [entry.token for entry in logprobs],
        "top_logprobs": tops,
    }


async def first(outputs: Outputs) -> tuple[int, RequestOutput]:
    """Waits for the first output, or for the refusal that comes in its place."""
    return await anext(outputs)


async def collect(call: Call, outputs: Outputs) -> dict[str, Any]:
    """The whole answer."""
    answer = Answer(call)
    async with aclosing(outputs):
        async for i, output in outputs:
            answer.add(i, output)
    return answer.whole()


async def stream(call: Call, first: tuple[int, RequestOutput], rest: Outputs) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of an answer whose first output has already been waited for."""
    answer = Answer(call)
    async with aclosing(rest):
        for chunk in answer.chunks(*first):
            yield chunk
        async for i, output in rest:
            for chunk in answer.chunks(i, output):
                yield chunk
    if call.include_usage:
        yield answer.usage_chunk()
