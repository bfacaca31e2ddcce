"""How local a model's routing is: what a fixed group of experts can serve for some tokens, what a small cache can hit,
and how evenly experts are used.

The measures SRP, SCH and CHR are those of a study of local routing consistency (arXiv 2505.16056), so that values can
be compared with its tables. T: tokens, L: layers, K: experts per token, E: experts of a layer, S: sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

LRU, LFU, BELADY, SEGMENT = range(4)
"""What a cache knows: when an expert was used last, how often it was, when it is used next, or the next few tokens."""
RULES = {"lru": LRU, "lfu": LFU, "belady": BELADY}


@dataclass(frozen=True, kw_only=True)
class SegmentGroups:
    """How well the best fixed groups of experts predict the routing of segments of some length (SRP)."""

    f1: float
    """Of the predicted experts against those that the tokens used: 1 if every token of a segment uses the same."""
    size: float
    """Of the groups, in active experts: 1 for a group as large as what one token uses."""


@dataclass(frozen=True, kw_only=True)
class Skew:
    """How unevenly a layer's experts are used."""

    peak: float
    """Uses of the most used expert by the mean."""
    gini: float
    """0 if all are used equally often, near 1 if one has all."""


def segment_groups(topk_TLK: Array, start_S: Array, experts: int, length: int) -> SegmentGroups | None:
    """SRP, the segment routing best performance, of all segments of `length` tokens; None if no sequence is so long.

    A segment's group has the (layer, expert) pairs that at least tau of its tokens use; tau is one number for all
    layers and segments, the one with the best F1. Matches, predictions and uses are added up over all segments. A
    segment is any `length` tokens in a row of one sequence.
    """
    times_C = segment_counts(topk_TLK, start_S, experts, length)
    uses_C = np.arange(length + 1) * times_C
    if not uses_C.sum():
        return None
    matched_C = uses_C[::-1].cumsum()[::-1]  # of each tau
    predicted_C = length * times_C[::-1].cumsum()[::-1]
    f1_C = 2 * matched_C[1:] / (predicted_C[1:] + matched_C[0])
    tau = 1 + int(f1_C.argmax())
    return SegmentGroups(f1=float(f1_C[tau - 1]), size=float(predicted_C[tau] / matched_C[0]))


def segment_counts(topk_TLK: Array, start_S: Array, experts: int, length: int) -> Array:
    """[C = length + 1] how many (segment, layer, expert) there are in which c of the tokens use the expert. c = 0 is
    not counted.
    """
    times_C = np.zeros(length + 1, dtype=np.int64)
    for first, end in zip(start_S, [*start_S[1:], len(topk_TLK)], strict=True):
        if end - first < length:
            continue
        for layer in range(topk_TLK.shape[1]):
            ids_TK = topk_TLK[first:end, layer]
            t_N, place_N = np.nonzero(ids_TK >= 0)
            used_TE = np.zeros((end - first + 1, experts), dtype=np.int32)
            used_TE[t_N + 1, ids_TK[t_N, place_N]] = 1
            np.cumsum(used_TE, axis=0, out=used_TE)
            times_C += np.bincount((used_TE[length:] - used_TE[:-length]).reshape(-1), minlength=length + 1)
    times_C[0] = 0
    return times_C


def segment_hit_rate(topk_TLK: Array, start_S: Array, experts: int, slots: int, length: int) -> float:
    """SCH, the segment cache best hit rate: a cache of `slots` for all layers that knows a segment of `length` tokens,
    the present one and those after it.

    It keeps what the rest of the segment uses most often, of equals the most recently used. See `hit_rate` for the
    rules.
    """
    return _rate(topk_TLK, start_S, experts, slots, SEGMENT, length)


def hit_rate(topk_TLK: Array, start_S: Array, experts: int, slots: int, rule: str) -> float:
    """CHR, the hit rate of a cache of `slots` for all layers by one of `RULES`.

    As in the study every sequence begins with an empty cache, all experts of a token (of all layers) are looked up
    before anything changes, and the first use of an expert counts as a hit as long as the cache is not full.
    """
    return _rate(topk_TLK, start_S, experts, slots, RULES[rule], 1)


def _rate(topk_TLK: Array, start_S: Array, experts: int, slots: int, rule: int, length: int) -> float:
    if slots < 1 or length < 1:
        raise ValueError(f"slots is {slots} and length {length}; both must be at least 1")
    tokens, layers, _ = topk_TLK.shape
    offset_L1 = experts * np.arange(layers)[:, None]
    ids_TN = np.where(topk_TLK >= 0, topk_TLK + offset_L1, -1).reshape(tokens, -1).astype(np.int64)
    ends_S = np.append(start_S, tokens).astype(np.int64)
    hits = _hits(ids_TN, ends_S, layers * experts, slots, rule, length)
    return float(hits / np.count_nonzero(ids_TN >= 0))


@njit(cache=True)
def _hits(ids_TN: Array, ends_S: Array, experts: int, slots: int, rule: int, length: int) -> int:
    """Hits of all tokens; each is one event: what is cached or used competes for the slots by its key."""
    never = np.int64(1) << 60
    width = ids_TN.shape[1]
    hits = 0
    for s in range(len(ends_S) - 1):
        first, end = ends_S[s], ends_S[s + 1]
        next_TN = np.empty((end - first, width), dtype=np.int64)
        if rule == BELADY:
            soonest_E = np.full(experts, never)
            for t in range(end - 1, first - 1, -1):
                for n in range(width):
                    if ids_TN[t, n] >= 0:
                        next_TN[t - first, n] = soonest_E[ids_TN[t, n]]
                for n in range(width):
                    if ids_TN[t, n] >= 0:
                        soonest_E[ids_TN[t, n]] = t * width + n
        uses_E = np.zeros(experts, dtype=np.int64)  # so far, or in the rest of the segment
        if rule == SEGMENT:
            for t in range(first, min(first + length, end)):
                for n in range(width):
                    if ids_TN[t, n] >= 0:
                        uses_E[ids_TN[t, n]] += 1
        last_E = np.zeros(experts, dtype=np.int64)  # 0: not yet
        next_E = np.full(experts, never)
        cached_E = np.zeros(experts, dtype=np.bool_)
        rivals_M = np.empty(slots + width, dtype=np.int64)
        keys_M = np.empty(slots + width, dtype=np.int64)
        known = 0
        count = 0  # of the cached ones, the first of rivals_M
        clock = 0
        for t in range(first, end):
            for n in range(width):
                e = ids_TN[t, n]
                if e >= 0:
                    if cached_E[e]:
                        hits += 1
                    elif last_E[e] == 0:
                        hits += known < slots
                        known += 1
            rivals = count
            for n in range(width):
                e = ids_TN[t, n]
                if e >= 0:
                    clock += 1
                    last_E[e] = clock
                    uses_E[e] += -1 if rule == SEGMENT else 1
                    next_E[e] = next_TN[t - first, n]
                    if not cached_E[e]:
                        cached_E[e] = True
                        rivals_M[rivals] = e
                        rivals += 1
            if rivals > slots:
                for r in range(rivals):
                    e = rivals_M[r]
                    if rule == LRU:
                        keys_M[r] = last_E[e]
                    elif rule == BELADY:
                        keys_M[r] = -next_E[e] if next_E[e] < never else last_E[e] - never
                    else:
                        keys_M[r] = (uses_E[e] << 40) + last_E[e]
                least = np.partition(keys_M[:rivals], rivals - slots)[rivals - slots]
                count = 0
                for r in range(rivals):
                    if keys_M[r] >= least:
                        rivals_M[count] = rivals_M[r]
                        count += 1
                    else:
                        cached_E[rivals_M[r]] = False
            else:
                count = rivals
            if rule == SEGMENT and t + length < end:
                for n in range(width):
                    if ids_TN[t + length, n] >= 0:
                        uses_E[ids_TN[t + length, n]] += 1
    return hits


def skew(topk_TLK: Array, experts: int) -> list[Skew]:
    """Of each layer."""
    found = []
    for layer in range(topk_TLK.shape[1]):
        ids_TK = topk_TLK[:, layer]
        uses_E = np.sort(np.bincount(ids_TK[ids_TK >= 0].astype(np.int64), minlength=experts))
        total = int(uses_E.sum())
        if not total:
            found.append(Skew(peak=1.0, gini=0.0))
            continue
        below = float((np.arange(1, experts + 1) * uses_E).sum())
        gini = 2 * below / (experts * total) - (experts + 1) / experts
        found.append(Skew(peak=float(uses_E[-1] * experts / total), gini=float(gini)))
    return found


def distinct(topk_TLK: Array) -> float:
    """Experts of a token and layer, in the mean: k, or less where a router leaves some out."""
    return float(np.count_nonzero(topk_TLK >= 0) / (topk_TLK.shape[0] * topk_TLK.shape[1]))


def longest(start_S: Sequence[int] | Array, tokens: int) -> int:
    """Tokens of the longest sequence."""
    return int(np.diff(np.append(start_S, tokens)).max())
