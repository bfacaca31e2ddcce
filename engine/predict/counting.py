"""The compiled loops of counting: decayed uses, rates, and which experts go together.

S: sequences that are followed, R: those of the step, T: tokens, L: layers, E: experts of a layer, K: experts per token,
H: half-lives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

REACH = 1024
"""Tokens of a chunk that are counted, the last ones: at half-lives up to 64 those before weigh less than 2 ** -15."""


@njit(cache=True)
def count_uses(ids_TK: Array, first: int, end: int, decayed_HE: Array, decay_H: Array) -> None:
    """Adds the uses of these rows to decayed counts, as token by token."""
    experts = decayed_HE.shape[1]
    for h in range(len(decay_H)):
        faded = decay_H[h] ** (end - first)
        for e in range(experts):
            # A number so small that the processor takes long for it would never get smaller by rounding
            decayed_HE[h, e] = decayed_HE[h, e] * faded if decayed_HE[h, e] > 1e-20 else 0.0
        weight = 1.0
        for t in range(end - 1, max(first, end - REACH) - 1, -1):
            for k in range(ids_TK.shape[1]):
                if 0 <= ids_TK[t, k] < experts:
                    decayed_HE[h, ids_TK[t, k]] += weight
            weight *= decay_H[h]


@njit(cache=True)
def count_layer(
    layer: int,
    ids_TK: Array,
    row_R3: Array,
    decay_H: Array,
    decayed_SLHE: Array,
    tokens_SLH: Array,
    used_LE: Array,
    tokens_L: Array,
) -> None:
    """What the step's tokens chose in a layer, into the counts of their sequences (and how many tokens those are of),
    and of all text.
    """
    experts = used_LE.shape[1]
    for r in range(len(row_R3)):
        s, first, end = row_R3[r]
        count_uses(ids_TK, first, end, decayed_SLHE[s, layer], decay_H)
        for h in range(len(decay_H)):
            faded = decay_H[h] ** (end - first)
            tokens_SLH[s, layer, h] = tokens_SLH[s, layer, h] * faded + (1 - faded) / (1 - decay_H[h])
        for t in range(max(first, end - REACH), end):
            tokens_L[layer] += 1
            for k in range(ids_TK.shape[1]):
                if 0 <= ids_TK[t, k] < experts:
                    used_LE[layer, ids_TK[t, k]] += 1


@njit(cache=True)
def rates(
    layer: int,
    row_R3: Array,
    weight_H: Array,
    prior_tokens: float,
    decayed_SLHE: Array,
    tokens_SLH: Array,
    used_LE: Array,
    tokens_L: Array,
) -> Array:
    """[R, E] uses per token, weighted for each half-life, drawn to those of all text as by `prior_tokens` of it."""
    experts = used_LE.shape[1]
    rate_RE = np.zeros((len(row_R3), experts), dtype=np.float32)
    for r in range(len(row_R3)):
        s = row_R3[r, 0]
        tokens = prior_tokens
        for h in range(len(weight_H)):
            tokens += weight_H[h] * tokens_SLH[s, layer, h]
        for e in range(experts):
            uses = prior_tokens * used_LE[layer, e] / max(tokens_L[layer], 1.0)
            for h in range(len(weight_H)):
                uses += weight_H[h] * decayed_SLHE[s, layer, h, e]
            rate_RE[r, e] = min(uses / tokens, 1.0)
    return rate_RE


@njit(cache=True)
def count_pairs(row_R3: Array, before_TK: Array, after_TK: Array, together_EE: Array) -> None:
    """Adds 1 for each pair of experts that a token of the step's sequences chose in two layers."""
    experts = together_EE.shape[0]
    for r in range(len(row_R3)):
        for t in range(max(row_R3[r, 1], row_R3[r, 2] - REACH), row_R3[r, 2]):
            for before in before_TK[t]:
                if 0 <= before < experts:
                    for after in after_TK[t]:
                        if 0 <= after < experts:
                            together_EE[before, after] += 1


@njit(cache=True)
def joined(
    rate_RE: Array, row_R3: Array, before_TK: Array, used_E: Array, together_EE: Array, of_all_E: Array, prior: float
) -> Array:
    """[R, E] the rates with their odds multiplied by what each expert of another layer, which the sequence's last row
    has chosen, made of the odds in all text; each factor to the power of 1 / sqrt(K).

    Args:
        used_E: tokens that used each expert of the other layer.
        together_EE: those of them that used each expert of this layer, too.
        of_all_E: rates of this layer in all text.
        prior: uses of an expert of the other layer as if this layer had been as in all text.
    """
    rows, experts = rate_RE.shape
    found_RE = np.empty_like(rate_RE)
    power = 1.0 / np.sqrt(max(1, before_TK.shape[1]))
    for r in range(rows):
        for e in range(experts):
            odds = _log_odds(rate_RE[r, e])
            usual = _log_odds(of_all_E[e])
            for before in before_TK[row_R3[r, 2] - 1]:
                if 0 <= before < experts:
                    chance = (together_EE[before, e] + prior * of_all_E[e]) / (used_E[before] + prior)
                    odds += power * (_log_odds(chance) - usual)
            found_RE[r, e] = 1.0 / (1.0 + np.exp(-odds))
    return found_RE


@njit(cache=True)
def any_of(chance_RE: Array, row_R3: Array) -> Array:
    """[E] that any token of the step uses it, when each token of a chunk is as probable to as the sequence's last."""
    unused_E = np.ones(chance_RE.shape[1], dtype=np.float32)
    for r in range(len(row_R3)):
        for e in range(len(unused_E)):
            unused_E[e] *= (1 - chance_RE[r, e]) ** (row_R3[r, 2] - row_R3[r, 1])
    return 1 - unused_E


@njit(cache=True)
def _log_odds(chance: float) -> float:
    chance = min(max(chance, 1e-4), 1 - 1e-4)
    return np.log(chance / (1 - chance))
