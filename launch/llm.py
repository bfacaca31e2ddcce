"""Offline use: `LLM(model).generate(prompts)`, with the engine in its own process."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import difflib
import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from ..engine.config import EngineConfig
from ..engine.params import SamplingParams
from .frontend import FrontEnd, RequestError
from .outputs import RequestOutput

Prompt = str | Mapping[str, Any]
"""A text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`."""

T = TypeVar("T")


class LLM:
    """A model to call from Python. `options` are `EngineConfig`'s.

    Use it in a `with` block, or `close` it; it is closed when it is forgotten and at the end of the program too. Raises
    ValueError for what the caller can put right, TypeError for an unknown option, EngineError when the engine fails.
    """

    def __init__(self, model: str = "", **options: Any) -> None:
        _check_names(options)
        self.config = EngineConfig(model=str(model), **options)
        self._frontend = FrontEnd(self.config)
        self._loop = _Loop()
        self._close = weakref.finalize(self, _close, self._loop, self._frontend)
        self._numbers = itertools.count()
        try:
            self._loop.run(self._frontend.start())
        except BaseException:
            self.close()
            raise

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's transformers tokenizer, None when it has none."""
        return self._frontend.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._frontend.max_model_len

    def default_params(self) -> SamplingParams:
        """What a call without sampling parameters gets: the checkpoint's defaults."""
        return SamplingParams(**self._frontend.default_params())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Runs all prompts together; results come in the order of the prompts.

        One `sampling_params` is for all prompts, a list has one for each. Raises ValueError naming the prompt when one
        of them cannot be served; then none is run.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        return self._run([self._read(prompt) for prompt in many], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or a list of them, through the checkpoint's chat template.

        A conversation is a list of `{"role": ..., "content": ...}`; `template_options` go to the template.
        """
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self._read_chat(conversation, template_options) for conversation in many]
        return self._run(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yields the output so far each time it has grown; the last has `finished` set.

        Each is a value of its own. Closing the iterator aborts the request.
        """
        text, ids = self._read(prompt)
        params = sampling_params or self.default_params()
        self._loop.run(_check(self._frontend, [(text, ids)], [params]))
        return _stream(self._loop, self._frontend.generate(ids, params, request_id=self._next_id(), prompt=text))

    def close(self) -> None:
        """Ends the engine's process. Again is nothing; using the model afterwards is a ValueError."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.default_params()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise ValueError(f"sampling_params has {len(params)} entries for {len(prompts)} prompts")
        requests = [(self._next_id(), text, ids, one) for (text, ids), one in zip(prompts, params, strict=True)]
        self._loop.run(_check(self._frontend, prompts, params))
        show = use_tqdm and self.config.progress
        with tqdm(total=len(prompts), desc="requests", unit="request", disable=not show) as bar:
            return self._loop.run(_generate(self._frontend, requests, bar))

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text (None when it came as ids) and token ids."""
        if isinstance(prompt, Mapping):
            if set(prompt) == {"prompt_token_ids"}:
                return None, [int(i) for i in prompt["prompt_token_ids"]]
            text = prompt["prompt"] if set(prompt) == {"prompt"} else None
        else:
            text = prompt
        if not isinstance(text, str):
            raise ValueError('a prompt is a text, {"prompt": text} or {"prompt_token_ids": [...]}')
        return text, self._frontend.tokenize(text)

    def _read_chat(self, conversation: Any, options: Mapping[str, Any]) -> tuple[str, list[int]]:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError("the checkpoint has no chat template; write the prompt yourself and use generate")
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, **{"add_generation_prompt": True} | dict(options) | {"tokenize": False}
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refused the messages: {error}") from error
        return text, self._frontend.tokenize(text, add_special_tokens=False)

    def _next_id(self) -> str:
        return f"request-{next(self._numbers)}"


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: the interpreter waits for other threads before it runs what closes this one.
        self.thread = threading.Thread(target=self._loop.run_forever, name="moeyard front end", daemon=True)
        self.thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it to its end and returns its result; an interrupted caller cancels it."""
        if self.closed:
            coroutine.close()
            raise ValueError("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def close(self) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join()
        self._loop.close()


def _close(loop: _Loop, frontend: FrontEnd) -> None:
    if threading.current_thread() is loop.thread:  # the garbage collector runs where it likes
        threading.Thread(target=_close, args=(loop, frontend)).start()
        return
    try:
        loop.run(frontend.close())
    finally:
        loop.close()


def _check_names(options: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(EngineConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(known)}"
            raise TypeError(f"LLM has no option {name!r}; {hint}")


async def _check(
    frontend: FrontEnd, prompts: Sequence[tuple[str | None, list[int]]], params: Sequence[SamplingParams]
) -> None:
    for i, ((_, ids), one) in enumerate(zip(prompts, params, strict=True)):
        try:
            frontend.check(ids, one)
        except RequestError as error:
            raise ValueError(f"prompts[{i}]: {error}" if len(prompts) > 1 else str(error)) from error


async def _generate(
    frontend: FrontEnd, requests: Sequence[tuple[str, str | None, list[int], SamplingParams]], bar: Any
) -> list[RequestOutput]:
    async def one(request_id: str, text: str | None, ids: list[int], params: SamplingParams) -> RequestOutput:
        async for output in frontend.generate(ids, params, request_id=request_id, prompt=text):
            result = output
        bar.update(1)
        return result

    tasks = [asyncio.create_task(one(*request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _stream(loop: _Loop, outputs: AsyncGenerator[RequestOutput, None]) -> Iterator[RequestOutput]:
    async def following() -> RequestOutput | None:
        output = await anext(outputs, None)
        return copy.deepcopy(output)  # here, where it does not change meanwhile

    async def end() -> None:
        await outputs.aclose()

    try:
        while (output := loop.run(following())) is not None:
            yield output
    finally:
        if not loop.closed:
            loop.run(end())
