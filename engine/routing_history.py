"""How sequences were routed so far, and the features of it that next use is predicted from.

T: tokens, L: layers, E: experts of a layer, K: experts per token, S: sequences, H: half-lives, F: features per expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

RATE_HALF_LIVES = (2.0, 4.0, 16.0, 64.0)
"""Of the rates of use, in tokens."""
FEATURES = 2 * len(RATE_HALF_LIVES)
"""Of each expert, for its own layer: the rates' roots, which are more even, and the rates."""
PRIOR_TOKENS = 2.0
"""A sequence's first rates are drawn to the even one as if it had had so many tokens of it."""
CHUNK = 2048


class History:
    """How one sequence was routed: all that the prediction needs of it, brought up to date token by token."""

    def __init__(self, layers: int, experts: int) -> None:
        self._decay_H11 = _decays()[:, None, None]
        self._decayed_HLE = np.zeros((len(RATE_HALF_LIVES), layers, experts), dtype=np.float32)
        self._tokens_H = np.zeros(len(RATE_HALF_LIVES), dtype=np.float32)
        self.last_LK: Array | None = None
        self.previous_LK: Array | None = None

    def observe(self, ids_LK: Array) -> None:
        """The next token's experts in all layers, in the order of the router's weights, -1 for none."""
        self.previous_LK, self.last_LK = self.last_LK, np.array(ids_LK)
        self._decayed_HLE *= self._decay_H11
        self._tokens_H *= self._decay_H11[:, 0, 0]
        self._tokens_H += 1
        layer_N, place_N = np.nonzero(self.last_LK >= 0)
        self._decayed_HLE[:, layer_N, self.last_LK[layer_N, place_N]] += 1

    def features(self, even: float) -> Array:
        """[L, F * E] of each layer's own experts."""
        rate_HLE = _rates(self._decayed_HLE, self._tokens_H[:, None, None], even)
        layers = rate_HLE.shape[1]
        return _own_features(rate_HLE[:, None]).reshape(layers, -1)

    def rate_roots(self, even: float) -> Array:
        """[H, L, E] the roots of the rates alone."""
        rate_HLE = _rates(self._decayed_HLE, self._tokens_H[:, None, None], even)
        return np.sqrt(rate_HLE, out=rate_HLE)


def _decays() -> npt.NDArray[np.float32]:
    return np.array([2.0 ** (-1.0 / half_life) for half_life in RATE_HALF_LIVES], dtype=np.float32)


def _rates(decayed: Array, tokens: Array, even: float) -> Array:
    """Uses per token, each half-life's own, drawn to the even one while there are few tokens."""
    return (decayed + np.float32(PRIOR_TOKENS * even)) / (tokens + np.float32(PRIOR_TOKENS))


def _own_features(rate_HTLE: Array) -> Array:
    """[T, L, F, E]: the rates, and their roots, which are more even."""
    return np.concatenate([np.sqrt(rate_HTLE), rate_HTLE]).transpose(1, 2, 0, 3)


def rate_roots(decayed_BHLE: Array, tokens_B: Array, even: float) -> Array:
    """[B, H, L, E] the roots of the rates of B sequences that have had so many tokens, and these decayed uses."""
    keep_H = _decays()
    tokens_BH = (1 - keep_H ** tokens_B[:, None].astype(np.float32)) / (1 - keep_H)  # the sum of the decays
    rate_BHLE = _rates(decayed_BHLE, tokens_BH[:, :, None, None], even)
    return np.sqrt(rate_BHLE, out=rate_BHLE)


def rank_weights(top_k: int) -> npt.NDArray[np.float32]:
    return np.linspace(1, -1, top_k, dtype=np.float32) if top_k > 1 else np.zeros(1, dtype=np.float32)


def rows(ids_LK: Array, experts: int) -> tuple[Array, Array]:
    """Rows of the weights for a token's experts, and their places in the router's order."""
    layer_N, place_N = np.nonzero(ids_LK >= 0)
    return layer_N * experts + ids_LK[layer_N, place_N], place_N


def features(topk_TLK: Array, start_S: Array, experts: int, even: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For some tokens after the other: of all layers [T, 3 * L * E], and each layer's own [T, L, F * E]."""
    layers = topk_TLK.shape[1]
    rank_K = rank_weights(topk_TLK.shape[2])
    starts = {int(start) for start in start_S}
    history = History(layers, experts)
    for first in range(0, len(topk_TLK), CHUNK):
        ids_TLK = topk_TLK[first : first + CHUNK]
        cross_T3LE = np.zeros((len(ids_TLK), 3, layers, experts), dtype=np.float32)
        own_TLF = np.empty((len(ids_TLK), layers, FEATURES * experts), dtype=np.float32)
        for t, ids_LK in enumerate(ids_TLK):
            if first + t in starts:
                history = History(layers, experts)
            history.observe(ids_LK)
            own_TLF[t] = history.features(even)
            if history.previous_LK is not None:
                layer_N, place_N = np.nonzero(history.previous_LK >= 0)
                cross_T3LE[t, 2, layer_N, history.previous_LK[layer_N, place_N]] = 1
        t_N, layer_N, place_N = np.nonzero(ids_TLK >= 0)
        ids_N = ids_TLK[t_N, layer_N, place_N]
        cross_T3LE[t_N, 0, layer_N, ids_N] = 1
        cross_T3LE[t_N, 1, layer_N, ids_N] = rank_K[place_N]
        yield torch.from_numpy(cross_T3LE.reshape(len(ids_TLK), -1)), torch.from_numpy(own_TLF)
