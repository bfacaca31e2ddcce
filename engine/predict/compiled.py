"""The compiled loops of live predictions: a layer's routing into the sums that next use is predicted from.

S: sequences that are followed, R: those of the step, T: tokens, L: layers, E: experts of a layer, K: experts per token,
N: L * E, H: half-lives, F: features, B: points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from .counting import count_uses

Array = npt.NDArray[Any]


@njit(cache=True)
def route(
    layer: int,
    ids_TK: Array,
    rank_K: Array,
    row_R3: Array,
    now_NN: Array,
    rank_NN: Array,
    before_NN: Array,
    part_SLN: Array,
    before_SN: Array,
    coming_SN: Array,
    last_SLE: Array,
    decayed_SLHE: Array,
    decay_H: Array,
) -> None:
    """What the step's tokens chose in a layer, into what is kept of their sequences.

    Args:
        rank_K: the weight of each place in the router's order.
        row_R3: of each sequence its number, and the first and the end of its rows of `ids_TK`.
        part_SLN: what the last token's experts of each layer say of all experts; replaced for this layer.
        before_SN: what the token before the last says of all experts.
        coming_SN: what the last token will say as the one before the last; grows layer by layer.
        last_SLE: the last token's experts in the router's order, then -1; replaced for this layer.
        decayed_SLHE: uses, each of which counts half after a half-life; brought up to date for this layer.
    """
    experts, size = last_SLE.shape[2], now_NN.shape[0]
    for r in range(len(row_R3)):
        s, first, end = row_R3[r]
        part_N, before_N, coming_N = part_SLN[s, layer], before_SN[s], coming_SN[s]
        if end - first > 1:  # the token before the last is one of the step's, too
            for k in range(experts):
                if last_SLE[s, layer, k] >= 0:
                    at = layer * experts + last_SLE[s, layer, k]
                    for n in range(size):
                        before_N[n] -= before_NN[at, n]
            for k in range(ids_TK.shape[1]):
                expert = ids_TK[end - 2, k]
                if 0 <= expert < experts:
                    at = layer * experts + expert
                    for n in range(size):
                        before_N[n] += before_NN[at, n]
        part_N[:] = 0
        last_SLE[s, layer] = -1
        for k in range(min(experts, ids_TK.shape[1])):
            expert = ids_TK[end - 1, k]
            if 0 <= expert < experts:
                last_SLE[s, layer, k] = expert
                at, weight = layer * experts + expert, rank_K[k]
                for n in range(size):
                    part_N[n] += now_NN[at, n] + weight * rank_NN[at, n]
                    coming_N[n] += before_NN[at, n]
        count_uses(ids_TK, first, end, decayed_SLHE[s, layer], decay_H)


@njit(cache=True, fastmath=True)
def score_layer(
    layer: int,
    row_R3: Array,
    prior: float,
    prior_tokens: float,
    tokens_SH: Array,
    decayed_SLHE: Array,
    own_LFE: Array,
    bias_LE: Array,
    part_SLN: Array,
    before_SN: Array,
    own_SLE: Array,
    scores_SLE: Array,
    total_LE: Array,
) -> None:
    """A layer's scores of all sequences of the step, and their sum: its own rates are exact, other layers' parts are
    those of the last token that is known there.
    """
    halves, experts = decayed_SLHE.shape[2:]
    layers = part_SLN.shape[1]
    low, high = layer * experts, (layer + 1) * experts
    total_LE[layer] = 0
    for r in range(len(row_R3)):
        s = row_R3[r, 0]
        own_E, score_E = own_SLE[s, layer], scores_SLE[s, layer]
        own_E[:] = bias_LE[layer]
        for h in range(halves):
            over = np.float32(1.0 / (tokens_SH[s, h] + prior_tokens))
            for e in range(experts):
                rate = (decayed_SLHE[s, layer, h, e] + np.float32(prior)) * over
                root = np.sqrt(rate)
                root_E, rate_E = own_LFE[layer, h * experts + e], own_LFE[layer, (halves + h) * experts + e]
                for to in range(experts):
                    own_E[to] += root * root_E[to] + rate * rate_E[to]
        score_E[:] = own_E + before_SN[s, low:high]
        for other in range(layers):
            score_E += part_SLN[s, other, low:high]
        total_LE[layer] += score_E


@njit(cache=True)
def score_all(
    row_R3: Array, part_SLN: Array, before_SN: Array, own_SLE: Array, scores_SLE: Array, total_LE: Array
) -> None:
    """All layers' scores when all of the step is known, and their sum over its sequences."""
    layers, experts = total_LE.shape
    total_LE[:] = 0
    for r in range(len(row_R3)):
        s = row_R3[r, 0]
        scores_N = scores_SLE[s].reshape(layers * experts)
        scores_N[:] = before_SN[s]
        for layer in range(layers):
            scores_N += part_SLN[s, layer]
        scores_SLE[s] += own_SLE[s]
        total_LE += scores_SLE[s]


@njit(cache=True)
def chances(
    layer: int,
    near: int,
    far: int,
    row_R3: Array,
    new_R: Array,
    rank_K: Array,
    mean_E: Array,
    scores_SLE: Array,
    last_SLE: Array,
    weight_FE: Array,
    bias_E: Array,
    point_B: Array,
    chance_B: Array,
) -> Array:
    """[E] how probable it is that any token of the step uses each expert of a layer; see `NextToken`.

    `near` and `far` are the layers whose experts it looks at, -1 for none. New sequences have no scores: means stand
    for them. Each token of a chunk is taken to be as probable to use an expert as the last one.
    """
    experts = len(bias_E)
    unused_E = np.ones(experts, dtype=np.float32)
    found_E = np.empty(experts, dtype=np.float32)
    step = (point_B[-1] - point_B[0]) / (len(point_B) - 1)
    for r in range(len(row_R3)):
        s, first, end = row_R3[r]
        found_E[:] = bias_E
        for e in range(experts):
            score = mean_E[e] if new_R[r] else scores_SLE[s, layer, e]
            for to in range(experts):
                found_E[to] += score * weight_FE[e, to]
        for part, other in ((1, near), (3, far)):
            if other < 0:
                continue
            for k in range(min(experts, len(rank_K))):
                expert = last_SLE[s, other, k]
                if expert >= 0:
                    used_E, rank_E = weight_FE[part * experts + expert], weight_FE[(part + 1) * experts + expert]
                    for to in range(experts):
                        found_E[to] += used_E[to] + rank_K[k] * rank_E[to]
        for e in range(experts):
            place = min(max((found_E[e] - point_B[0]) / step, 0.0), len(point_B) - 1.0)
            below = min(int(place), len(point_B) - 2)
            chance = chance_B[below] + (place - below) * (chance_B[below + 1] - chance_B[below])
            unused_E[e] *= (1 - chance) ** (end - first)
    return 1 - unused_E


@njit(cache=True)
def next_chances(
    place: int,
    rank_K: Array,
    mean_LE: Array,
    scores_SLE: Array,
    last_SLE: Array,
    weight_LFE: Array,
    bias_LE: Array,
    point_B: Array,
    chance_B: Array,
) -> Array:
    """[L, E] how probable it is that the next token of the sequence at `place` uses each expert: `chances` of all
    layers before the step.
    """
    layers, experts = bias_LE.shape
    found_LE = np.empty((layers, experts), dtype=np.float32)
    row_R3 = np.array([[place, 0, 1]])
    new_R = np.zeros(1, dtype=np.bool_)
    for layer in range(layers):
        found_LE[layer] = chances(
            layer,
            layer,
            -1,
            row_R3,
            new_R,
            rank_K,
            mean_LE[layer],
            scores_SLE,
            last_SLE,
            weight_LFE[layer],
            bias_LE[layer],
            point_B,
            chance_B,
        )
    return found_LE
