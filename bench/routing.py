"""Routing of simulated steps: how many rows each rank has for each expert, even, skewed by design, drawn or recorded.

A router gives each token `top_k` different experts, so an expert has at most one row of a token. Every function here
returns `rows_PE` with exactly `tokens * top_k` rows on each rank and at most `tokens` of one expert, and any such
counts can come from a router: `token_experts` finds the tokens. P: ranks, T: tokens, E: experts, K: experts per token.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

EXACT_DRAWS = 1 << 22
"""Tokens times experts up to which every token is drawn; above that only the counts are."""


# Even and skewed by design


def dealt(ranks: int, tokens: int, experts: int, top_k: int, hot: int = 0, percent: int = 0) -> Integers:
    """[P, E] copies dealt like cards, `percent` % of them to the first `hot` experts, the others to the rest.

    Each rank goes on where the one before stopped, so that no expert has two rows more than another of its kind, on
    any rank and in total, and those that have one more are not neighbours: with `percent=0` routing is balanced
    whatever the numbers. (The same pattern on every rank is not, nor are experts in their order when there are fewer
    rows than experts: with 256 experts, top-8 and 16 ranks half of the ranks can be idle.)

    Raises ValueError for a share that different experts per token make impossible.
    """
    if not can_deal(experts, top_k, hot, percent):
        raise ValueError(
            f"{percent} % of the copies do not fit into {hot} of {experts} experts with top-{top_k}: "
            f"a token has at most one copy for each; give more hot experts or a smaller share"
        )
    ends_P = np.arange(ranks + 1, dtype=np.int64) * tokens * top_k
    hot_P = ends_P * percent // 100
    rows_PE = np.zeros((ranks, experts), dtype=np.int64)
    if hot:
        rows_PE[:, :hot] = _deal(hot_P, hot)
    if hot < experts:
        rows_PE[:, hot:] = _deal(ends_P - hot_P, experts - hot)
    return rows_PE


def can_deal(experts: int, top_k: int, hot: int, percent: int) -> bool:
    """Whether tokens with `top_k` different experts can have such a share in the hot ones."""
    return 0 <= percent * top_k <= 100 * hot and 0 <= (100 - percent) * top_k <= 100 * (experts - hot)


def _deal(ends_P: Integers, places: int) -> Integers:
    """[P, places] cards numbered ends_P[p] .. ends_P[p + 1] - 1, card c to place c * stride % places.

    The stride is near the golden section, so that any few cards in a row are spread over all places.
    """
    stride = round(places * (math.sqrt(5) - 1) / 2)
    while math.gcd(stride, places) > 1:
        stride += 1
    start_P1, count_P1 = ends_P[:-1, None], np.diff(ends_P)[:, None]
    turn_PE = (np.arange(places) * pow(stride, -1, places) - start_P1) % places  # when a place's first card comes
    return count_P1 // places + (turn_PE < count_P1 % places)


# Drawn


def zipf_weights(experts: int, exponent: float, order_E: Integers) -> Floats:
    """[E] popularity 1 / rank ** exponent, where `order_E[e]` is expert e's rank from 0."""
    return np.asarray((1.0 + order_E) ** -exponent, dtype=np.float64)


def drawn(weights_E: Floats, ranks: int, tokens: int, top_k: int, rng: np.random.Generator) -> Integers:
    """[P, E] rows of tokens that draw `top_k` different experts, one after the other, in proportion to their weights.

    Drawn by Gumbel top-k. Above EXACT_DRAWS only the counts are drawn: the share of tokens that choose an expert
    comes from as many tokens as are allowed, and `counted` draws each expert's rows from it. That keeps the mean and
    the spread of each expert's rows; how two experts depend on each other it keeps only in that the sum is right.
    """
    experts = len(weights_E)
    if ranks * tokens * experts <= EXACT_DRAWS:
        ids_PTK = _gumbel_top_k(weights_E, ranks * tokens, top_k, rng).reshape(ranks, tokens * top_k)
        return np.stack([np.bincount(ids, minlength=experts) for ids in ids_PTK]).astype(np.int64)
    sample = EXACT_DRAWS // experts
    ids = _gumbel_top_k(weights_E, sample, top_k, rng)
    return counted(np.bincount(ids.ravel(), minlength=experts) / sample, ranks, tokens, top_k, rng)


def _gumbel_top_k(weights_E: Floats, tokens: int, top_k: int, rng: np.random.Generator) -> Integers:
    """[T, K] experts. The first K of exponential clocks with rates `weights_E` are what Gumbel top-k chooses."""
    clocks_TE = rng.standard_exponential((tokens, len(weights_E)), dtype=np.float32) / weights_E.astype(np.float32)
    return np.argpartition(clocks_TE, top_k - 1, axis=1)[:, :top_k]


def counted(shares_E: Floats, ranks: int, tokens: int, top_k: int, rng: np.random.Generator) -> Integers:
    """[P, E] binomial counts, of which each expert has the mean share of tokens `shares_E` (summing up to `top_k`).

    A rank's counts are then corrected, most where they vary most, so that its tokens have `top_k` rows each.
    """
    shares_E = capped(shares_E, top_k)
    rows_PE = rng.binomial(tokens, shares_E, size=(ranks, len(shares_E))).astype(np.int64)
    spread_E = shares_E * (1 - shares_E) + 1e-9
    order = np.argsort(-spread_E, kind="stable")
    for rows_E in rows_PE:
        while missing := tokens * top_k - int(rows_E.sum()):
            step_E = np.floor(abs(missing) * spread_E / spread_E.sum()).astype(np.int64)
            step_E[order[: abs(missing) - int(step_E.sum())]] += 1
            corrected = np.clip(rows_E + (step_E if missing > 0 else -step_E), 0, tokens)
            if (corrected == rows_E).all():  # those that vary have no room: any that has
                room_E = tokens - rows_E if missing > 0 else rows_E
                corrected[np.argmax(room_E)] += 1 if missing > 0 else -1
            rows_E[:] = corrected
    return rows_PE


def capped(shares_E: Floats, top_k: int) -> Floats:
    """[E] shares scaled so that they sum up to `top_k` with none above 1: what is cut goes to the others.

    Raises ValueError when fewer than `top_k` experts have a share.
    """
    positive_E = shares_E > 0
    if positive_E.sum() < top_k:
        raise ValueError(f"{positive_E.sum()} experts have rows; top-{top_k} needs as many different ones")
    full_E = np.zeros(len(shares_E), dtype=bool)
    while True:
        rest_E = positive_E & ~full_E
        scaled_E = np.where(full_E, 1.0, 0.0)
        if rest_E.any():
            scaled_E[rest_E] = shares_E[rest_E] * ((top_k - full_E.sum()) / shares_E[rest_E].sum())
        above_E = scaled_E > 1
        if not above_E.any():
            return scaled_E
        full_E |= above_E


def token_experts(rows_E: Integers, tokens: int) -> Integers:
    """[T, K] experts of a rank's tokens that make up these counts, different ones for each token.

    Copies sorted by expert are dealt to the tokens in turn. Raises ValueError for counts that no router gives.
    """
    top_k, rest = divmod(int(rows_E.sum()), tokens)
    if rest or rows_E.max(initial=0) > tokens:
        raise ValueError(f"{rows_E.sum()} rows, at most {rows_E.max(initial=0)} of one expert, are not {tokens} tokens")
    return np.repeat(np.arange(len(rows_E)), rows_E).reshape(top_k, tokens).T


# Recorded


@dataclass(frozen=True, eq=False)
class Trace:
    """A recorded routing: `topk` [tokens, layers, K] expert ids, or `counts` [steps, layers, E] rows, -1 for none."""

    name: str
    topk: Integers | None
    counts: Integers | None
    experts: int
    top_k: int | None
    """Of `topk` traces; rows alone do not tell it."""

    @property
    def layers(self) -> int:
        array = self.topk if self.topk is not None else self.counts
        assert array is not None
        return array.shape[1]

    def rows(
        self, layer: int, ranks: int, tokens: int, top_k: int, rng: np.random.Generator, start: float = 0.0
    ) -> Integers:
        """[P, E] rows of one layer, beginning at `start` (0 to 1) of the trace.

        Of recorded tokens, rank p takes `tokens` in their order, beginning p / ranks of the trace further on, and
        from the beginning again at its end. Of recorded loads, each rank draws from the sum of as many steps in
        order as have its rows.
        """
        if self.topk is not None:
            ids_NK = self.topk[:, layer]
            total = len(ids_NK)
            rows = [self._of_tokens(ids_NK, int((start + p / ranks) * total) % total, tokens) for p in range(ranks)]
            return np.stack(rows)
        assert self.counts is not None
        counts_SE = np.maximum(self.counts[:, layer], 0)
        steps = len(counts_SE)
        wanted = min(steps, max(1, -(-tokens * top_k * steps // max(1, int(counts_SE.sum())))))
        rows = []
        for p in range(ranks):
            first = int((start + p / ranks) * steps) % steps
            shares_E = counts_SE[np.arange(first, first + wanted) % steps].sum(0).astype(np.float64)
            if np.count_nonzero(shares_E) < top_k:
                shares_E = counts_SE.sum(0).astype(np.float64)
            rows.append(counted(shares_E, 1, tokens, top_k, rng)[0])
        return np.stack(rows)

    def _of_tokens(self, ids_NK: Integers, first: int, tokens: int) -> Integers:
        rounds, rest = divmod(tokens, len(ids_NK))
        parts = [(ids_NK, rounds), (ids_NK[first : first + rest], 1), (ids_NK[: max(0, first + rest - len(ids_NK))], 1)]
        rows_E = np.zeros(self.experts, dtype=np.int64)
        for ids, times in parts:
            if times:
                rows_E += times * np.bincount(ids[ids >= 0].astype(np.int64), minlength=self.experts)
        return rows_E


def read_trace(path: str) -> Trace:
    """The trace in an .npz file with an array `topk` or `counts`. Raises ValueError for a file that is not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            name = next((name for name in ("topk", "counts") if name in file.files), None)
            if name is None:
                raise ValueError("no array topk or counts")
            array = file[name]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"--trace {path}: {' '.join(str(error).split())}; give an .npz file of routing") from error
    if array.ndim != 3 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            f"--trace {path}: {name} has shape {array.shape} of {array.dtype}; it must be integers [N, L, M]"
        )
    if array.max() < 0 or (name == "counts" and (array.clip(0).sum(axis=(0, 2)) == 0).any()):
        raise ValueError(f"--trace {path}: a layer without any row")
    if name == "counts":
        return Trace(Path(path).stem, None, array.astype(np.int64), array.shape[2], None)
    return Trace(Path(path).stem, array, None, int(array.max()) + 1, array.shape[2])
