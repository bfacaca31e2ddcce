"""What a request may ask of the sampler, under the names that OpenAI's and vLLM's users know."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import option

MAX_LOGPROBS = 20
MAX_N = 64


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request. Raises ValueError naming the field.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. `max_tokens` None means up to the
    model's length. `logprobs` is the number of alternatives to report per token (0: the chosen token alone).
    `json_schema` (JSON text) makes the output match that schema.
    """

    n: int = option(1, "outputs per prompt")
    temperature: float = option(1.0, "0 is greedy")
    top_p: float = option(1.0, "keep the likeliest tokens up to this probability; 1 is off")
    top_k: int = option(0, "keep this many of the likeliest tokens; 0 is off")
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest; 0 is off")
    repetition_penalty: float = option(1.0, "above 1 discourages tokens of the prompt and the output")
    presence_penalty: float = option(0.0, "above 0 discourages tokens of the output")
    frequency_penalty: float = option(0.0, "above 0 discourages tokens by how often the output has them")
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = option(None, "makes the output reproducible")
    stop: tuple[str, ...] = option((), "text that ends the output; may be repeated")
    stop_token_ids: tuple[int, ...] = option((), "token that ends the output; may be repeated")
    include_stop_str_in_output: bool = option(False, "keep the stop text in the output")
    ignore_eos: bool = option(False, "go on after the model's own end token")
    min_tokens: int = option(0, "fewest tokens before an end token or stop token counts")
    max_tokens: int | None = option(16, "most tokens to write")
    logprobs: int | None = option(None, "alternatives to report per token")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    json_schema: str | None = option(None, "JSON schema that the output must match")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in (self.logit_bias or {}).items()})
        for f in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, f)):
                raise ValueError(f"{f} is {getattr(self, f)}; it must be a finite number")
        _check(1 <= self.n <= MAX_N, "n", self.n, f"between 1 and {MAX_N}")
        _check(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(self.top_k >= -1, "top_k", self.top_k, "-1, 0 (both off) or the number of tokens to keep")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "between -2 and 2")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "between -2 and 2")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        if self.logprobs is not None:
            _check(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, f"between 0 and {MAX_LOGPROBS}")
        if self.seed is not None:
            _check(-(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer")
        _check(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "non-empty strings")
        for token, bias in self.logit_bias.items():
            _check(token >= 0 and -100 <= bias <= 100, f"logit_bias[{token}]", bias, "between -100 and 100")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a message; `from_dict` restores them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        return cls(**values)


def _check(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; it must be {wanted}")
