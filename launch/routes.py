"""The routes of the HTTP server, over a front end."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from starlette.responses import Response

from .. import __version__
from ..engine.params import SamplingParams
from . import answers
from .admin import Admin
from .chat import decode, encode, render
from .errors import JSON
from .frontend import FrontEnd, RequestError
from .metrics import Metrics, expert_load
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from .sse import EventStream, while_connected

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
RETRY_S = 5
STREAMED: dict[int | str, Any] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


class Routes:
    """The handlers of one application, and the ids of the requests in them."""

    def __init__(self, frontend: FrontEnd, metrics: Metrics) -> None:
        self.frontend = frontend
        self.metrics = metrics
        self.created = int(time.time())
        self.active: set[str] = set()

    def add_to(self, app: FastAPI) -> None:
        post: dict[str, Any] = {"methods": ["POST"], "response_model": None}
        get: dict[str, Any] = {"methods": ["GET"], "response_model": None}
        app.add_api_route("/v1/chat/completions", self.chat, responses=STREAMED, **post)
        app.add_api_route("/v1/completions", self.completions, responses=STREAMED, **post)
        app.add_api_route("/tokenize", self.tokenize, **post)
        app.add_api_route("/detokenize", self.detokenize, **post)
        app.add_api_route("/v1/models", self.models, **get)
        app.add_api_route("/v1/models/{name:path}", self.model, **get)
        app.add_api_route("/health", self.health, **get)
        app.add_api_route("/ready", self.ready, **get)
        app.add_api_route("/version", self.version, **get)
        app.add_api_route("/metrics", self.prometheus, **get)
        app.add_api_route("/moe/experts", self.experts, **get)
        Admin(self.frontend, self._check_ready).add_to(app)

    # State of the engine

    def _check_alive(self) -> None:
        frontend = self.frontend
        if frontend.draining:
            message = "the server is shutting down"
            raise RequestError(message, status=503, code="shutting_down", retry_after=RETRY_S)
        # An engine that fails to load ends the server, so before that it is only not there yet.
        if frontend.ready is not None and not frontend.alive:
            message = f"the engine is dead: {frontend.dead_reason}"
            raise RequestError(message, status=503, code="engine_dead")

    def _check_ready(self) -> None:
        self._check_alive()
        if self.frontend.ready is None:
            message = "the model is still loading"
            raise RequestError(message, status=503, code="loading", retry_after=RETRY_S)

    async def health(self) -> Response:
        """200 while the engine is alive, also while it loads or goes on without a rank that was lost."""
        self._check_alive()
        frontend = self.frontend
        status = "loading" if frontend.ready is None else "recovering" if frontend.recovering else "ok"
        ranks = {str(rank): state for rank, state in frontend.rank_states().items()}
        return JSON({"status": status, "ranks": ranks, "trouble": frontend.trouble})

    async def ready(self) -> Response:
        """200 once requests are taken, and served at once."""
        self._check_ready()
        if self.frontend.recovering:
            message = f"{self.frontend.trouble}; requests wait until it is over"
            raise RequestError(message, status=503, code="recovering", retry_after=RETRY_S)
        return JSON({"status": "ok"})

    async def version(self) -> Response:
        return JSON({"version": __version__})

    async def prometheus(self) -> Response:
        return Response(self.metrics.render(), media_type=PROMETHEUS)

    async def experts(self) -> Response:
        """Tokens per expert of each MoE layer since the start, and how even they are."""
        counts = self.metrics.expert_counts
        loads = [dataclasses.asdict(load) for load in expert_load(counts)]
        return JSON({"layers": [load | {"counts": counts[load["layer"]]} for load in loads]})

    # Models and tokens

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.frontend.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "moeyard",
            "root": str(self.frontend.model_path),
            "parent": None,
            "max_model_len": self.frontend.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        served = self.frontend.model_name
        if name is not None and name != served:
            message = f"the model {name!r} does not exist; this server has {served!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    async def models(self) -> Response:
        self._check_ready()
        return JSON({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._check_ready()
        self._check_model(name)
        return JSON(self._card())

    async def tokenize(self, body: Annotated[TokenizeRequest, Body()]) -> Response:
        self._check_ready()
        self._check_model(body.model)
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            tokens = await encode(self.frontend.tokenizer, body.prompt, add_special_tokens=special)
        else:
            text = self._render(body)
            special = body.add_special_tokens is True
            tokens = await encode(self.frontend.tokenizer, text, add_special_tokens=special)
        return JSON({"tokens": tokens, "count": len(tokens), "max_model_len": self.frontend.max_model_len})

    async def detokenize(self, body: Annotated[DetokenizeRequest, Body()]) -> Response:
        self._check_ready()
        self._check_model(body.model)
        self._check_vocabulary(body.tokens, "tokens")
        return JSON({"prompt": decode(self.frontend.tokenizer, body.tokens, skip_special_tokens=False)})

    def _check_vocabulary(self, ids: Iterable[int], param: str) -> None:
        ready = self.frontend.ready
        assert ready is not None
        wrong = next((i for i in ids if i >= ready.vocab_size), None)
        if wrong is not None:
            message = f"{param}: {wrong} is not a token; the vocabulary has {ready.vocab_size}"
            raise RequestError(message, status=400, param=param)

    def _render(self, body: ChatRequest | TokenizeRequest) -> str:
        return render(
            self.frontend.tokenizer,
            body.messages or [],
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=body.chat_template_kwargs,
        )

    # Generation

    async def chat(self, request: Request, body: Annotated[ChatRequest, Body()]) -> Response:
        """OpenAI's chat completions, whole or as server-sent events."""
        params = self._params(body)
        text = self._render(body)
        # The template writes the special tokens itself.
        special = body.add_special_tokens is True
        ids = await encode(self.frontend.tokenizer, text, add_special_tokens=special)
        return await self._answer(request, body, self._call(request, body, params, [ids], [text]))

    async def completions(self, request: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
        """OpenAI's text completions, whole or as server-sent events."""
        params = self._params(body)
        tokenizer = self.frontend.tokenizer
        prompts: list[list[int]] = []
        texts: list[str | None] = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                special = body.add_special_tokens is not False
                prompts.append(await encode(tokenizer, prompt, add_special_tokens=special))
                texts.append(prompt)
            else:
                self._check_vocabulary(prompt, "prompt")
                prompts.append(prompt)
                skip = params.skip_special_tokens
                texts.append(decode(tokenizer, prompt, skip_special_tokens=skip) if body.echo else None)
        return await self._answer(request, body, self._call(request, body, params, prompts, texts))

    def _params(self, body: Sampling) -> SamplingParams:
        """Everything that can be refused before the prompt is read."""
        self._check_ready()
        self._check_model(body.model)
        params = body.sampling_params(self.frontend.default_params())
        self._check_vocabulary(params.logit_bias, "logit_bias")
        self._check_vocabulary(params.stop_token_ids, "stop_token_ids")
        return params

    def _call(
        self,
        request: Request,
        body: Sampling,
        params: SamplingParams,
        prompts: list[list[int]],
        texts: list[str | None],
    ) -> answers.Call:
        chat = isinstance(body, ChatRequest)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{request.state.request_id}"
        options = body.stream_options
        return answers.Call(
            id=f"{name}-{uuid.uuid4().hex[:8]}" if name in self.active else name,
            chat=chat,
            model=self.frontend.model_name,
            prompts=prompts,
            texts=texts,
            params=params,
            cache_salt=body.cache_salt or "",
            echo=isinstance(body, CompletionRequest) and bool(body.echo),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
        )

    async def _answer(self, request: Request, body: Sampling, call: answers.Call) -> Response:
        self.active.add(call.id)
        outputs = self._tracked(call)
        if not body.stream:
            return JSON(await while_connected(request.receive, answers.collect(call, outputs)))
        # The first output is waited for before the status is sent, so that a refusal can be one.
        first = await while_connected(request.receive, answers.first(outputs))
        return EventStream(answers.stream(call, first, outputs))

    async def _tracked(self, call: answers.Call) -> answers.Outputs:
        try:
            async with aclosing(answers.outputs(self.frontend, call)) as outputs:
                async for item in outputs:
                    yield item
        finally:
            self.active.discard(call.id)
