"""What an engine can serve at all: a request's tokens and options against the limits of its ranks."""

from __future__ import annotations

import dataclasses

from ..engine.messages import Ready
from ..engine.params import SamplingParams
from .sequences import RequestError


def checked(prompt_ids: list[int], params: SamplingParams, limits: Ready, *, has_tokenizer: bool) -> SamplingParams:
    """`params` with `max_tokens` filled in. Raises RequestError 400 for a request that can never be served."""
    vocab_size = limits.vocab_size
    if not prompt_ids:
        raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
    if set(map(type, prompt_ids)) != {int} or min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise RequestError(f"prompt: token ids are integers from 0 to {vocab_size - 1}", param="prompt")
    if params.json_schema is not None and not has_tokenizer:
        raise RequestError(
            "this checkpoint has no tokenizer: a JSON schema cannot be followed", param="response_format"
        )
    if params.stop and not has_tokenizer:
        raise RequestError("this checkpoint has no tokenizer: stop strings cannot be found", param="stop")
    return _fit(len(prompt_ids), params, limits)


def _fit(prompt_tokens: int, params: SamplingParams, limits: Ready) -> SamplingParams:
    """Checks the lengths against the model's limit and the KV cache."""
    code = "context_length_exceeded"
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
