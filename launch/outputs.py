"""What a finished or streaming request gives back, under the names that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class TokenLogprob:
    """One generated token: its id, log-probability, text and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    token: str = ""
    top: list[tuple[int, float, str]] = field(default_factory=list)


@dataclass(kw_only=True)
class CompletionOutput:
    """One of a request's `n` outputs. In a stream, `text`, `token_ids` and `logprobs` hold all there is so far.

    `finish_reason` is None while running, else `stop`, `length`, `abort` or `error`; `stop_reason` is the stop string
    or stop token id that ended it, None for the model's own end token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A request and its outputs so far. `num_cached_tokens` counts prompt tokens found in the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
