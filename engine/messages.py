"""The messages between the front end and the ranks: msgpack arrays `[version, tag, field, ...]`, nothing else.

Every message is a frozen dataclass registered in `MESSAGES` under a tag. `decode` refuses other versions, unknown tags,
a wrong number of fields, wrong types and anything longer than `MAX_BYTES`, each with a `MessageError` that says which.
Nothing is ever unpickled.

A conversation: the rank connects and says `Hello`; it gets `Configure`. A rank that is one of several then gets `Form`:
the first member makes the group's store and answers `Store`, and when all have its address in a second `Form`, each
joins and answers `Joined`. It loads, and answers `Ready` or `Fatal`. From then on `Submit`, `Abort`, `Wake`, `Place`
and `Ping` come in; one `Tokens` per step, now and then `Stats`, and a `Pong` per `Ping` go out. A rank whose group
breaks says `Broken` and waits for the `Form` of the next epoch, which it answers with `Joined` when it serves again. It
ends with `Shutdown` from the one side or `Fatal` from the other.

Beside that each of several ranks has a second connection for `Beat`, from a thread that goes on while the rank
computes; each is answered by `Heard`, which also says when the group is broken. A node that only starts ranks says
`NodeHello` and `Ended`, and takes `Kill`.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack

VERSION = 3
MAX_BYTES = 64 * 2**20


class MessageError(ValueError):
    """A message that this version does not accept."""


class VersionError(MessageError):
    """A message of another version: the other side runs another build."""


# Front end -> rank


@dataclass(frozen=True, kw_only=True)
class Configure:
    """First message to a rank: its options (`EngineConfig.to_dict()`).

    `tables` is where the experts of each MoE layer are, `[layer][rank][slot]` expert ids or -1, rank being the position
    among the group's members; None: the rank works it out from the options. `loads` is tokens per [layer][expert] from
    an earlier run, for planning.
    """

    config: dict[str, Any]
    tables: list[Any] | None = None
    loads: list[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Form:
    """Form the group of `epoch` (1, 2, ...) from the ranks `members`, in this order.

    `address` is `host:port` of the group's store; "" tells the first member to make the store and answer `Store`. A
    rank that is not in the group yet joins; one that is leaves the broken group of the epoch before.
    """

    epoch: int
    members: list[int]
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A request: one output sequence (the front end splits `n`). `params` is `SamplingParams.to_dict()`.

    `output_ids` are tokens that another rank generated before it was lost; the answer goes on after them.
    """

    request_id: str
    prompt_ids: list[int]
    params: dict[str, Any]
    cache_salt: str = ""
    output_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Forget these requests; unknown ids are ignored. No answer follows for them."""

    request_ids: list[str]


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Answered by `Pong` with the same number, between two steps: shows that the loop is alive."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Wake:
    """Take part in steps until every rank has seen this number and none has work.

    Sent to all ranks whenever one of them is given something to do; numbers grow.
    """

    number: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Move the experts to `tables` (as in `Configure`), a bounded number of bytes per step.

    The ranks begin at the step at which all have `version`; the newest version replaces what is not done of an older.
    """

    version: int
    tables: list[Any]


@dataclass(frozen=True, kw_only=True)
class Heard:
    """Answer to `Beat`: its `clock`, and this side's when it came (nanoseconds, monotonic).

    `broken` is the newest epoch that is known to be broken, 0 when there is none: a rank that is still in it, or in an
    older one, is to leave it in the middle of whatever exchange it waits in.
    """

    clock: int
    heard: int
    broken: int = 0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """To a node: end this rank's process at once."""

    rank: int


@dataclass(frozen=True, kw_only=True)
class Shutdown:
    """Stop now; running requests are dropped."""


# Rank -> front end


@dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a rank. `host` is the address at which the other ranks reach it."""

    pid: int
    version: str
    rank: int = 0
    host: str = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Store:
    """The group's store of `epoch` is at `address` (`host:port`)."""

    epoch: int
    address: str


@dataclass(frozen=True, kw_only=True)
class Joined:
    """This rank is in the group of `epoch`; after the first epoch: it has its experts and serves again.

    `tables` is where the experts are now (as in `Configure`); None in the first epoch, before anything is loaded.
    """

    epoch: int
    tables: list[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The group of `epoch` broke in this rank's hands: where it was, and what the collective said.

    `told`: it left because `Heard` said so, and knows nothing of the reason.
    """

    epoch: int
    step: int
    layer: int
    phase: str
    error: str
    told: bool = False


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The experts are as `Place` asked (first member only). `moved` is the bytes that were copied or read for it."""

    version: int
    moved: int
    tables: list[Any]


@dataclass(frozen=True, kw_only=True)
class Beat:
    """This rank is alive: where its main loop is (`phase` "" before the first step), at `clock` (nanoseconds)."""

    rank: int
    step: int
    layer: int
    phase: str
    clock: int


@dataclass(frozen=True, kw_only=True)
class Spans:
    """What a rank did when: arrays of `[name, step, layer, start, length]`, nanoseconds of its own monotonic clock."""

    spans: list[Any]


@dataclass(frozen=True, kw_only=True)
class NodeHello:
    """First message of a process that started `ranks` on another machine."""

    node: int
    version: str
    ranks: list[int]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A rank's process on that machine ended, and how."""

    rank: int
    how: str


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

    `expert_counts` is tokens per [MoE layer][expert] since the start, this rank's tokens alone, sent when it changed,
    else None. `sent_rows` are hidden vectors that went to other ranks' experts and `least_rows` the fewest that could
    (each token once per distinct other rank); `sent_bytes` all bytes that dispatch and combine sent; `moved_bytes`
    those of expert weights that the placement moved. What begins with `balance_` is about layers that were planned
    (`balance.BalanceFigures`). What begins with `expert_` but the counts is the expert store's (`store.StoreFigures`);
    `expert_resident_bytes` is a gauge. What begins with `decode_` is about steps that had no room for all that could
    decode (`decode_batching`). The times are what one of several ranks spent in each part of its steps
    (`progress.PHASES`), and in steps altogether. `predictors` has for each predictor of routing the fields of
    `predict.meter.Measured`, which is of late rather than since the start.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    state_slots_used: int = 0
    state_slots_total: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    expert_counts: list[list[int]] | None = None
    sent_rows: int = 0
    least_rows: int = 0
    sent_bytes: int = 0
    moved_bytes: int = 0
    steps_all_gather: int = 0
    steps_all_to_all: int = 0
    balance_layers: int = 0
    balance_acted: int = 0
    balance_plan_ns: int = 0
    balance_native_ns: int = 0
    balance_modelled_ns: int = 0
    balance_ideal_ns: int = 0
    balance_moved_bytes: int = 0
    balance_transfers: int = 0
    balance_parts: int = 0
    balance_split_experts: int = 0
    balance_refused: int = 0
    balance_guest_hits: int = 0
    balance_guests_kept: int = 0
    balance_guests_evicted: int = 0
    balance_tables: int = 0
    balance_early: int = 0
    balance_shared_rows: int = 0
    balance_late: int = 0
    expert_hits: int = 0
    expert_misses: int = 0
    expert_read_bytes: int = 0
    expert_admitted_bytes: int = 0
    expert_resident_bytes: int = 0
    expert_ahead: int = 0
    expert_ahead_ready: int = 0
    expert_ahead_bytes: int = 0
    expert_ahead_used_bytes: int = 0
    expert_preloaded: int = 0
    expert_wait_ns: int = 0
    expert_on_cpu: int = 0
    expert_copied: int = 0
    expert_streamed: int = 0
    decode_chosen: int = 0
    decode_passed_over: int = 0
    decode_regrouped: int = 0
    decode_saved_ns: int = 0
    attention_ns: int = 0
    plan_ns: int = 0
    dispatch_ns: int = 0
    experts_ns: int = 0
    combine_ns: int = 0
    wait_ns: int = 0
    shared_ns: int = 0
    move_ns: int = 0
    step_ns: int = 0
    predictors: dict[str, Any] = field(default_factory=dict)


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
    6: Form,
    7: Wake,
    8: Place,
    9: Heard,
    10: Kill,
    64: Hello,
    65: Ready,
    66: Tokens,
    67: Stats,
    68: Pong,
    69: Fatal,
    70: Store,
    71: Joined,
    72: Broken,
    73: Placed,
    74: Beat,
    75: Spans,
    76: NodeHello,
    77: Ended,
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
