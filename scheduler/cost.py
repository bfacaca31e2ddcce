"""The communication cost model: how long a MoE layer's exchanges and experts take, and what is chosen from it.

Constants are measured on this machine and fitted here; the ranks exchange them and take the worst of each, so that all
hold the same. From then on everything is integers with explicit tie-breaks: every rank makes the same choice.

P: ranks, `tokens_P` one number for each. A row is what one token sends to one rank, or gets back from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from math import comb
from operator import index
from statistics import median

import numpy as np

DISPATCHERS = ("all_gather", "all_to_all")  # in the order in which they win ties
DEGREES = (1, 2, 4, 8)
_COUNT_BYTES = 4  # the counts exchange is int32
_ONE = 1 << 40  # 1.0 in the fixed-point numbers of `_touched`


def _ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def _check_constants(cost: LinkCost | ExpertCost) -> None:
    """Plain integers, not numpy's that overflow, and none below 0."""
    for field in fields(cost):
        value = index(getattr(cost, field.name))
        if value < 0:
            raise ValueError(f"{field.name} is {value}; a cost cannot be below 0, measure it again")
        object.__setattr__(cost, field.name, value)


@dataclass(frozen=True)
class LinkCost:
    """Time of one collective: a start-up time and a time per byte (the alpha-beta model).

    Bytes are what the busiest rank sends or receives, the larger of the two, its own share left out.
    """

    alpha_ns: int
    ps_per_byte: int

    def __post_init__(self) -> None:
        _check_constants(self)

    def time_ns(self, nbytes: int) -> int:
        return self.alpha_ns + _ceil_div(index(nbytes) * self.ps_per_byte, 1000)


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
        return self.base_ns + max(streaming, _ceil_div(index(rows) * self.ps_per_row, 1000))


@dataclass(frozen=True)
class Constants:
    """All that the choices need to know of a machine; equal on all ranks once they took the `worst`."""

    small: LinkCost  # the counts exchange: an all-gather of int32
    all_gather: LinkCost
    reduce_scatter: LinkCost
    all_to_all: LinkCost
    experts: ExpertCost

    def to_list(self) -> list[int]:
        """Plain integers, to send to other ranks."""
        return [value for part in astuple(self) for value in part]

    @classmethod
    def from_list(cls, values: Sequence[int]) -> Constants:
        if len(values) != 11:
            raise ValueError(f"constants has {len(values)} values, not 11; all ranks must run the same moeyard")
        small, all_gather, reduce_scatter, all_to_all = (LinkCost(*values[i : i + 2]) for i in range(0, 8, 2))
        return cls(small, all_gather, reduce_scatter, all_to_all, ExpertCost(*values[8:]))

    @classmethod
    def worst(cls, all_ranks: Sequence[Constants]) -> Constants:
        """The largest of each constant: a collective and a layer are as slow as their slowest rank."""
        if not all_ranks:
            raise ValueError("all_ranks is empty; the constants of at least one rank are needed")
        return cls.from_list([max(values) for values in zip(*(c.to_list() for c in all_ranks), strict=True)])


@dataclass(frozen=True)
class Choice:
    """How a step's MoE layers exchange rows, its time per layer, and every (dispatcher, degree, ns) that was priced."""

    dispatcher: str
    degree: int
    modelled_ns: int
    alternatives: tuple[tuple[str, int, int], ...]


# From measurements to constants


def fit_link(samples: Iterable[tuple[int, int]]) -> LinkCost:
    """The link that explains samples of (bytes, ns) best.

    The median of each size counts, by its relative error, so that small sizes give alpha and large ones beta.

    Raises:
        ValueError: with fewer than two different sizes, or times that are not above 0.
    """
    points = _medians(samples)
    if len(points) < 2:
        raise ValueError(f"samples has {len(points)} different sizes; at least 2 are needed to tell alpha from beta")
    alpha, beta, _ = _fit_line(np.array([size for (size,), _ in points]), np.array([ns for _, ns in points]))
    return LinkCost(round(alpha), round(1000 * beta))


def fit_experts(samples: Iterable[tuple[int, int, int]]) -> ExpertCost:
    """The expert cost that explains samples of (experts touched, rows, ns) best.

    Given the rows per expert at which streaming ends, the model is a line in `max(crossover * experts, rows)`; the
    crossover is searched between the samples' smallest and largest. A regime that no sample is in gets the largest
    cost that the samples allow.

    Raises:
        ValueError: with fewer than three different (experts, rows), no rows in any, or times that are not above 0.
    """
    points = _medians(samples)
    if len(points) < 3:
        raise ValueError(f"samples has {len(points)} different (experts, rows); at least 3 are needed")
    experts, rows = np.array([x for x, _ in points], dtype=float).T
    times = np.array([ns for _, ns in points])
    busy = (experts > 0) & (rows > 0)
    if not busy.any():
        raise ValueError("samples has no rows in any; give some experts work")
    ratios = rows[busy] / experts[busy]
    low, high = float(ratios.min()), float(ratios.max())
    fits: dict[float, tuple[float, float, float]] = {}
    for _ in range(3):  # each round looks closer around the best so far
        for crossover in np.geomspace(low, high, 41).tolist():
            fits[crossover] = _fit_line(np.maximum(crossover * experts, rows), times)
        best = min(fits, key=lambda q: (fits[q][2], q))
        tried = sorted(fits)
        at = tried.index(best)
        low, high = tried[max(at - 1, 0)], tried[min(at + 1, len(tried) - 1)]
    base, per_row, _ = fits[best]
    return ExpertCost(round(base), round(best * per_row), round(1000 * per_row))


def _medians(samples: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], float]]:
    """The median time of each input; a sample is its input's numbers, then its time. In order of the inputs."""
    times: dict[tuple[int, ...], list[int]] = {}
    for sample in samples:
        *inputs, ns = map(index, sample)
        if ns <= 0 or min(inputs) < 0:
            raise ValueError(f"samples has {tuple(sample)}; sizes cannot be below 0 and times must be above 0 ns")
        times.setdefault(tuple(inputs), []).append(ns)
    return sorted((inputs, float(median(ns))) for inputs, ns in times.items())


def _fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Intercept and slope, neither below 0, with the smallest sum of relative absolute errors, and that sum.

    Such a line goes through two of the points, or through one with the slope or the intercept at 0: all are tried.
    Absolute errors, not their squares, so that a point that is far off does not pull the line.
    """
    i, j = np.triu_indices(len(x), 1)
    i, j = i[x[i] != x[j]], j[x[i] != x[j]]
    slope = (y[j] - y[i]) / (x[j] - x[i])
    level, through_zero = np.zeros(len(y)), y[x > 0] / x[x > 0]
    intercepts = np.concatenate([y, y[i] - slope * x[i], np.zeros(len(through_zero))])
    slopes = np.concatenate([level, slope, through_zero])
    possible = (intercepts >= 0) & (slopes >= 0)
    intercepts, slopes = intercepts[possible], slopes[possible]
    errors = (np.abs(intercepts[:, None] + slopes[:, None] * x - y) / y).sum(1)
    best = int(errors.argmin())
    return float(intercepts[best]), float(slopes[best]), float(errors[best])


# From constants to times


def pipeline_ns(degree: int, dispatch_ns: int, experts_ns: int, combine_ns: int) -> int:
    """Time of a layer in `degree` equal chunks, given the time of each stage of one chunk.

    The schedule that the layer runs: dispatch 0 is posted; then for each chunk c dispatch c+1 is posted, dispatch c
    waited for, the experts run, combine c is posted; at the end all combines are waited for. Dispatches and combines
    share one link and take it in the order in which they were posted; experts run beside it.
    """
    link = arrived = dispatch_ns
    computed = 0
    for chunk in range(degree):
        next_arrived = 0
        if chunk + 1 < degree:
            link = next_arrived = link + dispatch_ns
        computed = max(computed, arrived) + experts_ns
        link = max(link, computed) + combine_ns
        arrived = next_arrived
    return link


def expected_rows(
    tokens_P: Sequence[int], top_k: int, experts: int, ranks: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows that each rank sends and receives in an all-to-all when every set of `top_k` experts is equally likely.

    A token goes once to each other rank that has an expert of it, so to one with m experts with a probability of
    1 - C(experts - m, top_k) / C(experts, top_k). Exact, then rounded up.
    """
    tokens_P, top_k, experts, ranks = _counts(tokens_P, "tokens_P"), index(top_k), index(experts), index(ranks)
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


def _touched(here: int, tokens: int, top_k: int, experts: int) -> int:
    """How many of `here` experts `tokens` tokens touch under uniform routing, in expectation, rounded up.

    (1 - top_k / experts) ** tokens in fixed point: a float power may differ in its last bit from machine to machine.
    """
    power, untouched = _ONE * (experts - top_k) // experts, _ONE
    while tokens:
        if tokens & 1:
            untouched = untouched * power // _ONE
        power, tokens = power * power // _ONE, tokens >> 1
    return here - here * untouched // _ONE


# From times to choices


def choose_step(
    constants: Constants,
    tokens_P: Sequence[int],
    *,
    row_bytes: int,
    top_k: int,
    experts: int,
    row_bytes_back: int | None = None,
    allowed: Sequence[str] = DISPATCHERS,
    degrees: Sequence[int] = DEGREES,
) -> Choice:
    """The dispatcher and the number of chunks for a step, before any routing is known.

    `all_gather`: all ranks' tokens come in and the partial sums are reduce-scattered out, both padded to the rank with
    the most tokens. `all_to_all`: the counts exchange, then rows out and rows back under uniform routing.

    Args:
        tokens_P: tokens of each rank in this step.
        row_bytes: of one row on its way to the experts, with what travels along (ids, weights).
        row_bytes_back: of one row on its way home; as `row_bytes` unless given.
        allowed: one name forces it.
        degrees: numbers of chunks to consider.

    Returns:
        The smallest modelled time; on a tie fewer chunks, then all_gather.
    """
    tokens_P, top_k, experts = _counts(tokens_P, "tokens_P"), index(top_k), index(experts)
    row_bytes = index(row_bytes)
    back = row_bytes if row_bytes_back is None else index(row_bytes_back)
    if not allowed or not set(allowed) <= set(DISPATCHERS):
        raise ValueError(f"allowed is {tuple(allowed)}; choose one or more of {', '.join(DISPATCHERS)}")
    ranks, c = len(tokens_P), constants
    here = _ceil_div(experts, ranks)  # on the rank that has the most
    alternatives = []
    for degree in _check_degrees(degrees):
        chunk_P = [_ceil_div(tokens, degree) for tokens in tokens_P]
        sent_P, received_P = expected_rows(chunk_P, top_k, experts, ranks)
        pairs = _ceil_div(sum(chunk_P) * top_k * here, experts)
        compute = c.experts.time_ns(_touched(here, sum(chunk_P), top_k, experts), pairs)
        for dispatcher in (name for name in DISPATCHERS if name in allowed):
            exchange = out = home = 0
            if ranks > 1 and dispatcher == "all_gather":
                rows = (ranks - 1) * max(chunk_P)
                out, home = c.all_gather.time_ns(rows * row_bytes), c.reduce_scatter.time_ns(rows * back)
            elif ranks > 1:
                rows = max(sent_P + received_P)
                exchange = c.small.time_ns((ranks - 1) * experts * _COUNT_BYTES)
                out, home = c.all_to_all.time_ns(rows * row_bytes), c.all_to_all.time_ns(rows * back)
            alternatives.append((dispatcher, degree, exchange + pipeline_ns(degree, out, compute, home)))
    best = min(alternatives, key=lambda choice: choice[2])  # the first of equals, so their order is the tie-break
    return Choice(*best, tuple(alternatives))


def choose_degree(
    constants: Constants,
    rows_out_PP: Sequence[Sequence[int]] | np.ndarray,
    *,
    row_bytes_out: int,
    row_bytes_back: int,
    experts_P: Sequence[int],
    pairs_P: Sequence[int],
    degrees: Sequence[int] = DEGREES,
) -> int:
    """In how many chunks to run one all-to-all layer, from the exact loads that the counts exchange gave.

    FSMoE's choice of the pipeline degree, corrected for skew: a collective, and so the layer, ends when its slowest
    member does, so each stage takes as long as on the rank that has the most of it, not as on the mean one. Each chunk
    streams the weights of the same experts again, which a purely linear cost would hide.

    Args:
        rows_out_PP: rows from each rank (first index) to each; what stays at home (the diagonal) costs nothing.
        experts_P: experts with at least one row, on each rank.
        pairs_P: (token, expert) pairs that each rank computes.

    Returns:
        The degree with the smallest modelled time; on a tie the smallest.
    """
    matrix = np.asarray(rows_out_PP)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or matrix.dtype.kind not in "iu" or matrix.min() < 0:
        raise ValueError("rows_out_PP must be a square matrix of counts, a row for each sending rank")
    matrix = matrix.astype(np.int64)  # a copy
    np.fill_diagonal(matrix, 0)
    busiest = int(max(matrix.sum(0).max(), matrix.sum(1).max()))
    experts_P, pairs_P = _counts(experts_P, "experts_P"), _counts(pairs_P, "pairs_P")
    if not len(matrix) == len(experts_P) == len(pairs_P):
        raise ValueError(f"experts_P has {len(experts_P)} and pairs_P {len(pairs_P)} ranks, not {len(matrix)}")

    def time_ns(degree: int) -> int:
        rows_P = [_ceil_div(pairs, degree) for pairs in pairs_P]
        # A chunk touches the same experts as the whole, unless it has too few rows for that. The cost is the larger of
        # two terms, so the largest of all ranks is that of the two terms' largest.
        compute = constants.experts.time_ns(max(map(min, experts_P, rows_P)), max(rows_P))
        out = home = 0
        if len(matrix) > 1:
            rows = _ceil_div(busiest, degree)
            out = constants.all_to_all.time_ns(rows * index(row_bytes_out))
            home = constants.all_to_all.time_ns(rows * index(row_bytes_back))
        return pipeline_ns(degree, out, compute, home)

    return min(_check_degrees(degrees), key=time_ns)  # ascending, and min takes the first of equals


def _check_degrees(degrees: Sequence[int]) -> list[int]:
    """Each once, ascending."""
    checked = sorted({index(degree) for degree in degrees})
    if not checked or checked[0] < 1:
        raise ValueError(f"degrees is {tuple(degrees)}; give one or more numbers from 1 up")
    return checked


def _counts(values: Sequence[int], name: str) -> tuple[int, ...]:
    """Plain integers: numpy's would overflow in products of tokens and bytes."""
    counts = tuple(map(index, values))
    if not counts or min(counts) < 0:
        raise ValueError(f"{name} is {counts}; it must have a number from 0 up for each rank")
    return counts
