"""The cost model, the one place that turns bytes and tokens into time: how long a MoE layer's exchanges, experts and
weight transfers take. `choices` chooses by it.

Constants are measured on this machine and fitted (`fit`); the ranks exchange them and take the worst of each, so that
all hold the same. From then on everything is integers with explicit tie-breaks: every rank makes the same choice.

P: ranks, `tokens_P` one number for each. A row is what one token sends to one rank, or gets back from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import comb
from operator import index
from statistics import median
from typing import Any

from .balance.problem import FS, PS, Rates

COUNT_BYTES = 4  # the counts exchange is int32
_ONE = 1 << 40  # 1.0 in the fixed-point numbers of `touched`


def _ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def _check_constants(cost: Any) -> None:
    """Plain integers, not numpy's that overflow, and none below 0."""
    for field in fields(cost):
        value = getattr(cost, field.name)
        if isinstance(value, LinkCost | ExpertCost):
            continue
        value = index(value)
        if value < 0:
            raise ValueError(f"{field.name} is {value}; a cost cannot be below 0, measure it again")
        object.__setattr__(cost, field.name, value)


@dataclass(frozen=True)
class LinkCost:
    """Time of one collective or transfer: a start-up time and a time per byte (the alpha-beta model).

    Bytes of a collective are what the busiest rank sends or receives, the larger of the two, its own share left out.
    Femtoseconds: a byte takes two picoseconds at 500 GB/s, too few to count in whole ones.
    """

    alpha_ns: int
    fs_per_byte: int

    def __post_init__(self) -> None:
        _check_constants(self)

    def time_ns(self, nbytes: int) -> int:
        return self.alpha_ns + _ceil_div(index(nbytes) * self.fs_per_byte, FS)


@dataclass(frozen=True)
class ExpertCost:
    """Time of one call of a layer's experts on one rank: flat while weight streaming is the limit, then linear in rows.

    `base + max(per_expert * experts touched, per_row * rows)`; a row is one (token, expert) pair. TEMPO's max-affine
    model with one base for both.
    """

    base_ns: int
    per_expert_ns: int
    ps_per_row: int

    def __post_init__(self) -> None:
        _check_constants(self)

    def time_ns(self, experts: int, rows: int) -> int:
        streaming = index(experts) * self.per_expert_ns
        return self.base_ns + max(streaming, _ceil_div(index(rows) * self.ps_per_row, PS))


FREE = LinkCost(0, 0)
NO_EXPERTS = ExpertCost(0, 0, 0)
NO_LIMIT = 2**31
"""Of `RankConstants.panel_rows`: more rows than there are."""


@dataclass(frozen=True)
class RankConstants:
    """What a rank measures by itself."""

    experts: ExpertCost
    few_rows: int
    """Mean rows per expert up to which the compiled kernels are the faster way; 0 at none, as on a GPU."""
    host: LinkCost = FREE
    """A copy between host and device, the slower direction; free where they are the same."""
    panel_rows: int = 0
    """The same of the compiled kernels that pack weights, for more rows than `few_rows`; `NO_LIMIT` for any number."""

    def __post_init__(self) -> None:
        _check_constants(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankConstants:
        """The inverse of `dataclasses.asdict`. Raises ValueError or TypeError for anything else."""
        return cls(**_parts(cls, values))


@dataclass(frozen=True)
class Constants:
    """All that the choices need to know of a group of ranks; equal on all ranks once they took the `worst`."""

    small: LinkCost  # the counts exchange: an all-gather of int32
    all_gather: LinkCost
    reduce_scatter: LinkCost
    all_to_all: LinkCost
    experts: ExpertCost  # with all ranks computing at once
    near: LinkCost = FREE
    """An expert's weights from one rank to another of the same machine, all ranks sending or receiving one."""
    far: LinkCost = FREE
    """The same between two machines: bytes of all their ranks together over the time of all."""
    planner_ns: int = 0
    """One balancing plan on the host."""
    shared: ExpertCost = NO_EXPERTS
    """The layer's shared experts, which are one expert here; nothing where there are none that plans may move."""

    def __post_init__(self) -> None:
        _check_constants(self)

    def to_list(self) -> list[int]:
        """Plain integers, to send to other ranks."""
        parts = (getattr(self, field.name) for field in fields(self))
        return [value for part in parts for value in ([part] if isinstance(part, int) else _values(part))]

    @classmethod
    def from_list(cls, values: Sequence[int]) -> Constants:
        if len(values) != 19:
            raise ValueError(f"constants has {len(values)} values, not 19; all ranks must run the same moeyard")
        small, all_gather, reduce_scatter, all_to_all = (LinkCost(*values[i : i + 2]) for i in range(0, 8, 2))
        near, far = LinkCost(*values[11:13]), LinkCost(*values[13:15])
        experts, shared = ExpertCost(*values[8:11]), ExpertCost(*values[16:19])
        return cls(small, all_gather, reduce_scatter, all_to_all, experts, near, far, values[15], shared)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Constants:
        """The inverse of `dataclasses.asdict`. Raises ValueError or TypeError for anything else."""
        return cls(**_parts(cls, values))

    @classmethod
    def worst(cls, all_ranks: Sequence[Constants]) -> Constants:
        """The largest of each constant: a collective and a layer are as slow as their slowest rank."""
        if not all_ranks:
            raise ValueError("all_ranks is empty; the constants of at least one rank are needed")
        return cls.from_list([max(values) for values in zip(*(c.to_list() for c in all_ranks), strict=True)])


def _values(cost: LinkCost | ExpertCost) -> list[int]:
    return [getattr(cost, field.name) for field in fields(cost)]


def _parts(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `cls`, all of them, from plain values."""
    names = {field.name for field in fields(cls)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ValueError(f"constants: expected {', '.join(sorted(names))}")
    makers: dict[str, Any] = {"LinkCost": LinkCost, "ExpertCost": ExpertCost}
    types = {field.name: str(field.type) for field in fields(cls)}
    return {
        name: index(value) if types[name] == "int" else makers[types[name]](**value) for name, value in values.items()
    }


# From constants to times


def expected_rows(
    tokens_P: Sequence[int], top_k: int, experts: int, ranks: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows that each rank sends and receives in an all-to-all when every set of `top_k` experts is equally likely.

    A token goes once to each other rank that has an expert of it, so to one with m experts with a probability of
    1 - C(experts - m, top_k) / C(experts, top_k). Exact, then rounded up.
    """
    tokens_P, top_k, experts, ranks = rank_counts(tokens_P, "tokens_P"), index(top_k), index(experts), index(ranks)
    if len(tokens_P) != ranks:
        raise ValueError(f"tokens_P has {len(tokens_P)} ranks, not {ranks}")
    hits_P, ways = _hits(top_k, experts, ranks)
    total_hits, total_tokens = sum(hits_P), sum(tokens_P)
    pairs = list(zip(tokens_P, hits_P, strict=True))
    sent_P = tuple(_ceil_div(tokens * (total_hits - own), ways) for tokens, own in pairs)
    received_P = tuple(_ceil_div((total_tokens - own) * hits, ways) for own, hits in pairs)
    return sent_P, received_P


@lru_cache(maxsize=64)
def _hits(top_k: int, experts: int, ranks: int) -> tuple[tuple[int, ...], int]:
    """For each rank in how many choices of `top_k` experts it has at least one, and the number of choices.

    Experts are spread as evenly as they go, lower ranks first.
    """
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; it must be from 1 to the number of experts, {experts}")
    ways = comb(experts, top_k)
    sizes_P = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    return tuple(ways - comb(experts - size, top_k) for size in sizes_P), ways


def touched(here: int, tokens: int, top_k: int, experts: int) -> int:
    """How many of `here` experts `tokens` tokens touch under uniform routing, in expectation, rounded up.

    (1 - top_k / experts) ** tokens in fixed point: a float power may differ in its last bit from machine to machine.
    """
    power, untouched = _ONE * (experts - top_k) // experts, _ONE
    while tokens:
        if tokens & 1:
            untouched = untouched * power // _ONE
        power, tokens = power * power // _ONE, tokens >> 1
    return here - here * untouched // _ONE


def rates(
    constants: Constants,
    *,
    row_bytes: int,
    row_bytes_back: int,
    top_k: int,
    experts: int,
    ranks: int,
    beside: bool,
    hidden_ns: int = 0,
) -> Rates:
    """What the balancing planners calculate with, for a layer of `experts` experts over `ranks` ranks by all-to-all.

    A token travels once to a rank that has several of its experts, and not at all to its own: each (token, expert) pair
    pays for its share of that, under uniform routing. Where experts are spread unevenly the rank with the most counts.

    Args:
        row_bytes: of one row on its way to the experts, with what travels along.
        row_bytes_back: of one row on its way home.
        beside: whether rows travel while experts compute, as on GPUs. Gloo computes with the cores that the experts
            need: there a row takes the sum of both.
        hidden_ns: how long weights are under way before the experts could begin anyway.
    """
    c, top_k, experts, ranks = constants, index(top_k), index(experts), index(ranks)
    hits_P, ways = _hits(top_k, experts, ranks)
    here = _ceil_div(experts, ranks)
    bytes_fs = (index(row_bytes) + index(row_bytes_back)) * c.all_to_all.fs_per_byte
    wire_ps = _ceil_div(bytes_fs * hits_P[0] * experts * (ranks - 1), ways * top_k * here * ranks * FS // PS)
    counts_ns = c.small.time_ns((ranks - 1) * experts * COUNT_BYTES) if ranks > 1 else 0
    return Rates(
        base_ns=c.experts.base_ns + counts_ns + (2 * c.all_to_all.alpha_ns if ranks > 1 else 0),
        expert_ps=c.experts.per_expert_ns * PS,
        row_ps=c.experts.ps_per_row + (0 if beside else wire_ps),
        wire_ps=wire_ps if beside else 0,
        near_alpha_ns=c.near.alpha_ns,
        near_fs_per_byte=c.near.fs_per_byte,
        far_alpha_ns=c.far.alpha_ns,
        far_fs_per_byte=c.far.fs_per_byte,
        hidden_ns=hidden_ns,
        guest_ns=c.experts.base_ns,  # a call of its own
        plan_ns=counts_ns + c.planner_ns,
        **_shared_rates(c, index(row_bytes_back)),
    )


def _shared_rates(c: Constants, hidden_bytes: int) -> dict[str, int]:
    """The part of `Rates` about shared experts, whose tokens travel both ways as hidden vectors."""
    if not c.shared.ps_per_row:
        return {}
    return {
        "shared_ps": c.shared.ps_per_row,
        "shared_wire_ps": _ceil_div(2 * hidden_bytes * c.all_to_all.fs_per_byte, FS // PS),
        "shared_ns": c.shared.base_ns + c.shared.per_expert_ns + 2 * c.all_to_all.alpha_ns,
    }


def balancing_can_pay(rates: Rates, rows: int, ranks: int) -> bool:
    """Whether any routing of so many rows could be worth a plan: all rows on one rank against all spread evenly."""
    row_ps = max(rates.row_ps, rates.wire_ps)
    return index(rows) * row_ps * (ranks - 1) // ranks > rates.plan_ns * PS


def median_error(pairs: Iterable[tuple[int, int]]) -> float:
    """How far modelled times are from measured ones, of pairs (modelled ns, measured ns): the median of
    |modelled - measured| / measured. Raises ValueError for no pairs, or a measured time that is not above 0.
    """
    errors = []
    for modelled, measured in pairs:
        if measured <= 0:
            raise ValueError(f"pairs has a measured time of {measured} ns; it must be above 0")
        errors.append(abs(modelled - measured) / measured)
    if not errors:
        raise ValueError("pairs is empty; at least one modelled and measured time are needed")
    return median(errors)


def rank_counts(values: Sequence[int], name: str) -> tuple[int, ...]:
    """Plain integers: numpy's would overflow in products of tokens and bytes."""
    counts = tuple(map(index, values))
    if not counts or min(counts) < 0:
        raise ValueError(f"{name} is {counts}; it must have a number from 0 up for each rank")
    return counts
