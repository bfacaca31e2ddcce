"""The bodies of the OpenAI-compatible endpoints, and how they become `SamplingParams`.

A field that is not declared here is a 400 that names it. A field that is declared is honoured, or accepted only at the
value at which it asks for nothing (`_only`), or has no effect by its definition (`user`, `metadata`). Types are strict:
`"5"` is not a number. `null` means the default everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from ..engine.params import MAX_LOGPROBS, MAX_N, SamplingParams
from .frontend import RequestError

MAX_STOPS = 16
MAX_PROMPTS = 1024

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def bad_value(reason: str, param: str | None = None) -> PydanticCustomError:
    """A refusal in plain words; `param` where pydantic cannot know which field is meant."""
    context: dict[str, Any] = {"reason": reason}
    if param:
        context["param"] = param
    return PydanticCustomError("bad_value", "{reason}", context)


def _unicode(text: str) -> str:
    """JSON can say half of a surrogate pair, and no text can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_value("is not valid Unicode") from error
    return text


def _only(*neutral: Any, why: str) -> PlainValidator:
    """Accepts the values at which a field asks for nothing, and says why nothing else is."""

    def check(value: Any) -> Any:
        if any(type(value) is type(v) and value == v for v in neutral):
            return value
        allowed = ", ".join(json.dumps(v) for v in neutral)
        raise bad_value(f"{why}; only {allowed} is accepted")

    return PlainValidator(check)


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if value is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise bad_value("must be a non-empty string or a list of them")
    for stop in stops:
        _unicode(stop)
    if len(stops) > MAX_STOPS:
        raise bad_value(f"has {len(stops)} strings; the limit is {MAX_STOPS}")
    return stops


def _biases(value: Any) -> Any:
    """JSON keys are text; the sampler wants token ids."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise bad_value("must be an object of token id to bias")
    biases: dict[int, float] = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise bad_value(f"{token!r} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise bad_value(f"the bias of token {token} must be between -100 and 100")
        biases[int(token)] = float(bias)
    return biases


def _text(value: Any) -> Any:
    """A message's content: a string, or text parts joined by line breaks."""
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise bad_value(f"part {i} has type {kind!r}; this server reads text parts only")
        extra = set(part) - {"type", "text"}
        if extra or not isinstance(part.get("text"), str):
            raise bad_value(f'part {i} must be {{"type": "text", "text": string}}')
        texts.append(part["text"])
    return "\n".join(texts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is int and 0 <= v < 2**31 for v in value)


def _prompts(value: Any) -> Any:
    """Always a list: of strings, or of lists of token ids."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    wanted = "must be a string, a list of strings, a list of token ids or a list of lists of token ids, none empty"
    if not isinstance(prompts, list) or not prompts:
        raise bad_value(wanted)
    if not (all(isinstance(p, str) for p in prompts) or all(_is_ids(p) for p in prompts)):
        raise bad_value(wanted)
    if len(prompts) > MAX_PROMPTS:
        raise bad_value(f"has {len(prompts)} prompts; the limit is {MAX_PROMPTS}")
    return prompts


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="the served model's name, as /v1/models gives it")


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


NoTools = Annotated[Any, _only(None, [], why="tool calls are not supported")]
Absent = Annotated[Any, _only(None, why="not supported")]


class Message(BaseModel):
    """One turn. The fields beside role, content and name are those of an answer that is sent back as history."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[TextPart])]
    name: str | None = Field(None, description="handed to the chat template")
    tool_calls: NoTools = None
    function_call: Absent = None
    refusal: Absent = None
    audio: Absent = None
    annotations: NoTools = None

    def to_template(self) -> dict[str, str]:
        return self.model_dump(include={"role", "content", "name"}, exclude_none=True)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(None, description="one last chunk with usage and no choices")
    continuous_usage_stats: bool | None = Field(None, description="usage in every chunk")


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = None
    description: str | None = None
    strict: bool | None = Field(None, description="the schema is always enforced")
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise bad_value("a json_schema goes with the type json_schema", "response_format.json_schema")
        return self

    def schema_text(self) -> str | None:
        if self.json_schema is not None:
            try:
                return json.dumps(self.json_schema.schema_, allow_nan=False)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the schema is not JSON: {error}", status=400, param="response_format") from error
        return '{"type": "object"}' if self.type == "json_object" else None


class Sampling(Body):
    """What chat and text completions have in common."""

    n: Int | None = Field(None, description=f"outputs per prompt, up to {MAX_N}")
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[Any, PlainValidator(_biases, json_schema_input_type=dict[str, float] | None)] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: Annotated[Any, PlainValidator(_stops, json_schema_input_type=str | list[str] | None)] = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    max_tokens: Int | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, AfterValidator(_unicode)] | None = Field(
        None, description="only requests with the same salt share cached prefixes"
    )
    add_special_tokens: bool | None = None
    user: str | None = Field(None, description="has no effect")
    metadata: dict[str, str] | None = Field(None, description="has no effect")

    @model_validator(mode="after")
    def _usage_needs_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise bad_value("needs stream: true", "stream_options")
        return self

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The body's fields over the checkpoint's defaults. Raises RequestError (400) naming the field."""
        values = dict(defaults)
        for name in _SHARED:
            value = getattr(self, name)
            if value is not None:
                values[name] = value
        if self.response_format is not None:
            values["json_schema"] = self.response_format.schema_text()
        values |= self._own_sampling(values)
        try:
            return SamplingParams(**values)
        except ValueError as error:
            field = str(error).split()[0].split("[")[0]
            name = self._param(field)
            raise RequestError(str(error).replace(field, name, 1), status=400, param=name) from error

    def _own_sampling(self, values: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _param(self, field: str) -> str:
        """The body's name for a field of `SamplingParams`."""
        return field


_SHARED = sorted(set(Sampling.model_fields) & set(SamplingParams.__dataclass_fields__))


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="handed to the chat template")
    add_generation_prompt: bool | None = None
    tools: NoTools = None
    tool_choice: Annotated[Any, _only(None, "none", why="tool calls are not supported")] = None
    parallel_tool_calls: bool | None = Field(None, description="has no effect without tools")
    store: Annotated[Any, _only(None, False, why="completions are not stored")] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise bad_value("differs from max_tokens; give one of them", "max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_value("needs logprobs: true", "top_logprobs")
        return self

    def _own_sampling(self, values: Mapping[str, Any]) -> dict[str, Any]:
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return {
            "max_tokens": values.get("max_tokens") if limit is None else limit,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }

    def _param(self, field: str) -> str:
        if field == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return field


class CompletionRequest(Sampling):
    """Body of POST /v1/completions. Prompt i's outputs have the indices i*n to i*n + n-1."""

    prompt: Annotated[
        Any,
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="put the prompt before each output")
    best_of: Int | None = Field(None, description="accepted when equal to n")
    suffix: Annotated[Any, _only(None, "", why="text after the completion is not supported")] = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad_value("candidates are not ranked; it must equal n", "best_of")
        if self.echo and self.logprobs is not None:
            raise bad_value("log-probabilities of the prompt are not supported; drop echo or logprobs", "echo")
        return self

    def _own_sampling(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"logprobs": self.logprobs}


class TokenizeRequest(Body):
    """Body of POST /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise bad_value("give either prompt or messages", "prompt")
        if self.messages is None:
            for name in ("add_generation_prompt", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise bad_value("goes with messages, not with prompt", name)
        return self


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    tokens: list[TokenId]


BODIES: Mapping[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
KNOWN_FIELDS: Mapping[str, list[str]] = {path: list(body.model_fields) for path, body in BODIES.items()}
