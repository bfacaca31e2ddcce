"""The next token's experts: how probable each is, from predicted next use and what the token has chosen so far.

For each layer, and for each number of layers ahead, a small ridge regression of an expert's use by the next token
(0 or 1). It sees the scores of `NextUse` for the layer after the token before, and the experts of two layers: the
last two that the token has been through, or before the step the layer itself, for the token before. What it says is
made a probability by how often experts with such a prediction were used.

T: tokens, D: layers ahead, L: layers, E: experts of a layer, K: experts per token, F: 5 * E features, B: points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .routing_history import rank_weights

Array = npt.NDArray[Any]

DEPTH = 4
"""Layers ahead at most; what is farther is predicted as before the step."""
RIDGE = 300.0
"""Penalty on the weights of standardised features."""
POINTS = np.linspace(-0.2, 1.2, 29, dtype=np.float32)
"""Where probabilities are known; what is between them is interpolated."""
FEW = 20.0
"""Tokens that a prediction is worth as it is, when the probability that belongs to it is counted."""
BLOCK = 16384


@dataclass(frozen=True, eq=False, kw_only=True)
class NextToken:
    """Fitted weights; the first of D is for before the step, then for 1, 2... layers ahead.

    Args:
        weight_DLFE: of the scores, then of the experts of the nearer layer and their place in the router's order
            (times 1 for the first to -1 for the last), then the same of the farther layer.
        bias_DLE: what is predicted without any of them.
        mean_LE: mean scores, for a sequence that has none yet.
        chance_DB: probabilities at `POINTS`.
    """

    weight_DLFE: Array
    bias_DLE: Array
    mean_LE: Array
    chance_DB: Array

    @property
    def depth(self) -> int:
        return len(self.bias_DLE) - 1

    @classmethod
    def fit(
        cls,
        topk_TLK: Array,
        start_S: Array,
        scores_TLE: Array,
        *,
        depth: int = DEPTH,
        progress: Callable[[int], object] = lambda layers: None,
    ) -> NextToken:
        """From a recording and what `NextUse.scores` says of it, in closed form.

        `progress` is told numbers of layers, in all the model's times (depth + 1). Raises ValueError for a depth below
        0, and a recording without a sequence of two tokens.
        """
        layers, experts = scores_TLE.shape[1:]
        if depth < 0:
            raise ValueError(f"depth is {depth}; it must be at least 0")
        now_T = np.setdiff1d(np.arange(len(topk_TLK)), start_S)
        if not len(now_T):
            raise ValueError("no sequence has two tokens; record longer ones")
        weight_DLFE = np.zeros((depth + 1, layers, 5 * experts, experts), dtype=np.float32)
        bias_DLE = np.zeros((depth + 1, layers, experts), dtype=np.float32)
        chance_DB = np.zeros((depth + 1, len(POINTS)), dtype=np.float32)
        for ahead in range(depth + 1):
            count_B, used_B = np.zeros(len(POINTS)), np.zeros(len(POINTS))
            for layer in range(layers):
                x_TF, y_TE = _samples(topk_TLK, scores_TLE, now_T, layer, ahead)
                weight_FE, bias_E = _ridge(x_TF, y_TE)
                point = torch.from_numpy(POINTS)
                # To the nearest point
                at = torch.bucketize(x_TF @ weight_FE + bias_E, (point[1:] + point[:-1]) / 2).flatten()
                count_B += torch.bincount(at, minlength=len(POINTS)).numpy()
                used_B += torch.bincount(at, y_TE.flatten(), minlength=len(POINTS)).numpy()
                weight_DLFE[ahead, layer], bias_DLE[ahead, layer] = weight_FE.numpy(), bias_E.numpy()
                progress(1)
            chance_DB[ahead] = np.maximum.accumulate((used_B + FEW * POINTS.clip(0, 1)) / (count_B + FEW))
        return cls(
            weight_DLFE=weight_DLFE, bias_DLE=bias_DLE, mean_LE=scores_TLE[now_T - 1].mean(0), chance_DB=chance_DB
        )

    def chances(self, layer: int, ahead: int, topk_TLK: Array, scores_TLE: Array, now_T: Array) -> Array:
        """[now, E] how probable it is that tokens of a recording use each expert; `ahead` 0 is before the step.

        None of `now_T` may be the first of its sequence.
        """
        x_TF, _ = _samples(topk_TLK, scores_TLE, now_T, layer, ahead)
        found_TE = x_TF.numpy() @ self.weight_DLFE[ahead, layer] + self.bias_DLE[ahead, layer]
        return np.interp(found_TE, POINTS, self.chance_DB[ahead]).astype(np.float32)


def _samples(
    topk_TLK: Array, scores_TLE: Array, now_T: Array, layer: int, ahead: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [T, F] and uses [T, E] of these tokens in a layer. Before the step no second layer is looked at."""
    experts = scores_TLE.shape[2]
    none_TK = np.full((len(now_T), topk_TLK.shape[2]), -1)
    if ahead == 0:
        near_TK, far_TK = topk_TLK[now_T - 1, layer], none_TK
    else:
        near_TK = topk_TLK[now_T, layer - ahead] if layer >= ahead else none_TK
        far_TK = topk_TLK[now_T, layer - ahead - 1] if layer > ahead else none_TK
    parts = [scores_TLE[now_T - 1, layer], *_marks(near_TK, experts), *_marks(far_TK, experts)]
    used_TE, _ = _marks(topk_TLK[now_T, layer], experts)
    return torch.from_numpy(np.concatenate(parts, axis=1)), torch.from_numpy(used_TE)


def _marks(ids_TK: Array, experts: int) -> tuple[Array, Array]:
    """[T, E] twice: 1 for each token's experts, and their place in the router's order."""
    used_TE, rank_TE = (np.zeros((len(ids_TK), experts), dtype=np.float32) for _ in range(2))
    t_N, place_N = np.nonzero(ids_TK >= 0)
    ids_N = ids_TK[t_N, place_N]
    used_TE[t_N, ids_N] = 1
    rank_TE[t_N, ids_N] = rank_weights(ids_TK.shape[1])[place_N]
    return used_TE, rank_TE


def _ridge(x_TF: torch.Tensor, y_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the features as they are, and the bias."""
    mean_F, scale_F, mean_E = x_TF.mean(0), x_TF.std(0, correction=0) + 1e-3, y_TE.mean(0)
    gram_FF, with_FE = torch.zeros(len(mean_F), len(mean_F)), torch.zeros(len(mean_F), len(mean_E))
    for x_tF, y_tE in zip(x_TF.split(BLOCK), y_TE.split(BLOCK), strict=True):
        x_tF = (x_tF - mean_F) / scale_F
        gram_FF.addmm_(x_tF.T, x_tF)
        with_FE.addmm_(x_tF.T, y_tE - mean_E)
    gram_FF.diagonal().add_(RIDGE)
    weight_FE = torch.linalg.solve(gram_FF, with_FE) / scale_F[:, None]
    return weight_FE, mean_E - mean_F @ weight_FE
