"""The messages between the front end and a rank: msgpack arrays `[version, tag, field, ...]`, nothing else.

Every message is a frozen dataclass registered in `MESSAGES` under a tag. `decode` refuses other versions, unknown tags,
a wrong number of fields, wrong types and anything longer than `MAX_BYTES`, each with a `MessageError` that says which.
Nothing is ever unpickled.

A conversation: the rank connects and says `Hello`; it gets `Configure`, loads, and answers `Ready` or `Fatal`. From
then on `Submit`, `Abort` and `Ping` come in; one `Tokens` per step, now and then `Stats`, and a `Pong` per `Ping` go
out. It ends with `Shutdown` from the one side or `Fatal` from the other.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack

VERSION = 1
MAX_BYTES = 64 * 2**20


class MessageError(ValueError):
    """A message that this version does not accept."""


class VersionError(MessageError):
    """A message of another version: the other side runs another build."""


# Front end -> rank


@dataclass(frozen=True, kw_only=True)
class Configure:
    """First message to a rank: its options (`EngineConfig.to_dict()`)."""

    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A request: one output sequence (the front end splits `n`). `params` is `SamplingParams.to_dict()`."""

    request_id: str
    prompt_ids: list[int]
    params: dict[str, Any]
    cache_salt: str = ""


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Forget these requests; unknown ids are ignored. No answer follows for them."""

    request_ids: list[str]


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Answered by `Pong` with the same number, between two steps: shows that the loop is alive."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Shutdown:
    """Stop now; running requests are dropped."""


# Rank -> front end


@dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a rank."""

    pid: int
    version: str


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The model is loaded: its limits, and `EngineInfo` for people."""

    max_model_len: int
    vocab_size: int
    kv_tokens: int
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TokenDelta:
    """What one step added to one request.

    `logprobs` has, for each new token, `[logprob, [[token, logprob], ...]]`, or is None. `finish_reason` is "" while
    running, else `stop`, `length`, `refused` (it can never be served) or `error`. `stop_token` is the stop token id
    that ended it (None: the model's own end token or no stop). With the first token come `queue_s` (seconds from
    arrival at the rank to its first step), `prefill_s` (from there to the first token) and `cached_tokens`. `error`
    says why when `finish_reason` is `error`.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[Any] | None = None
    finish_reason: str = ""
    stop_token: int | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """All deltas of one step, each an array of `TokenDelta`'s fields (`pack_delta`)."""

    deltas: list[Any]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """State of a rank: gauges are current, counters run from its start.

    `expert_counts` is tokens per [MoE layer][expert] since the start, sent when it changed, else None.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    expert_counts: list[list[int]] | None = None


@dataclass(frozen=True, kw_only=True)
class Pong:
    number: int


@dataclass(frozen=True, kw_only=True)
class Fatal:
    """The rank is about to end, and why; `user` when the reason is the user's input (configuration, checkpoint)."""

    error: str
    user: bool = False


MESSAGES: dict[int, type] = {
    1: Configure,
    2: Submit,
    3: Abort,
    4: Ping,
    5: Shutdown,
    64: Hello,
    65: Ready,
    66: Tokens,
    67: Stats,
    68: Pong,
    69: Fatal,
}
_TAGS = {cls: tag for tag, cls in MESSAGES.items()}
_DELTA_NAMES = [f.name for f in dataclasses.fields(TokenDelta)]


def _fields(cls: type) -> list[tuple[str, tuple[type, ...], type | None]]:
    """Field names, the plain types that are accepted for each, and the type of a list's items (None: any)."""
    out = []
    for name, hint in get_type_hints(cls).items():
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        plain = tuple(get_origin(o) or o for o in options)
        items = [get_args(o)[0] for o in options if get_origin(o) is list]
        item = (get_origin(items[0]) or items[0]) if items and items[0] is not Any else None
        out.append((name, (*plain, int) if float in plain else plain, item))
    return out


_SHAPES = {cls: _fields(cls) for cls in [*MESSAGES.values(), TokenDelta]}


def _check_types(cls: type, values: list[Any]) -> None:
    shape = _SHAPES[cls]
    if len(values) != len(shape):
        raise MessageError(f"{cls.__name__} has {len(values)} fields; version {VERSION} has {len(shape)}")
    for (name, accepted, item), value in zip(shape, values, strict=True):
        if type(value) not in accepted:
            wanted = " or ".join(t.__name__ for t in accepted)
            raise MessageError(f"{cls.__name__}.{name} is {type(value).__name__}; it must be {wanted}")
        if item is not None and value and set(map(type, value)) != {item}:
            raise MessageError(f"{cls.__name__}.{name} must hold only {item.__name__}")


def pack_delta(delta: TokenDelta) -> list[Any]:
    """A `TokenDelta` as the array that travels inside `Tokens`."""
    return [getattr(delta, name) for name in _DELTA_NAMES]


def unpack_delta(values: list[Any]) -> TokenDelta:
    if not isinstance(values, list):
        raise MessageError("Tokens.deltas must hold arrays")
    _check_types(TokenDelta, values)
    return TokenDelta(**dict(zip(_DELTA_NAMES, values, strict=True)))


def encode(message: Any) -> bytes:
    """The bytes of a message. Raises MessageError when they would be longer than `MAX_BYTES`, and for values that
    msgpack cannot hold (an integer above 64 bits, half a surrogate pair in a text)."""
    values = [getattr(message, name) for name, _, _ in _SHAPES[type(message)]]
    try:
        data = msgpack.packb([VERSION, _TAGS[type(message)], *values], use_bin_type=True)
    except (ValueError, OverflowError, TypeError) as error:
        raise MessageError(f"{type(message).__name__} cannot be sent: {error}") from error
    if len(data) > MAX_BYTES:
        raise MessageError(f"{type(message).__name__} takes {len(data)} bytes; the limit is {MAX_BYTES}")
    return data


def decode(data: bytes) -> Any:
    """The message in `data`. Raises MessageError for anything that `encode` of this version does not make."""
    if len(data) > MAX_BYTES:
        raise MessageError(f"a message of {len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        values = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except Exception as error:
        raise MessageError(f"not msgpack: {error}") from error
    if not isinstance(values, list) or len(values) < 2:
        raise MessageError("a message is an array of version, tag and fields")
    version, tag, *rest = values
    if type(version) is not int or version != VERSION:
        raise VersionError(f"message version {version!r}; this build speaks version {VERSION}")
    cls = MESSAGES.get(tag) if type(tag) is int else None
    if cls is None:
        raise MessageError(f"unknown message tag {tag!r}")
    _check_types(cls, rest)
    return cls(**dict(zip([name for name, _, _ in _SHAPES[cls]], rest, strict=True)))
