"""Records which experts the router chooses, token by token, as the engine runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class RoutingRecorder:
    """Takes every MoE layer's routing, in the order in which rows are computed; `MoEFunction.recorder` calls it.

    T: tokens, L: MoE layers, K: the most experts of a token in any layer.
    """

    def __init__(self, top_k: list[int]) -> None:
        """`top_k` of each MoE layer."""
        self._most = max(top_k)
        self._rows: list[list[npt.NDArray[Any]]] = [[] for _ in top_k]

    def __call__(self, layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """The layer's choice for some tokens, -1 for none. Kept in the order of the weights, the largest first."""
        worth_TK = weights_TK.float().masked_fill(ids_TK < 0, -torch.inf)
        order_TK = worth_TK.argsort(dim=-1, descending=True, stable=True)
        self._rows[layer].append(ids_TK.gather(-1, order_TK).to("cpu", torch.int16).numpy())

    def take(self) -> npt.NDArray[np.int16]:
        """[T, L, K] of all tokens since the last time, -1 for none."""
        rows_L = [np.concatenate(rows) if rows else np.empty((0, self._most), np.int16) for rows in self._rows]
        tokens = len(rows_L[0])
        assert all(len(rows) == tokens for rows in rows_L), [len(rows) for rows in rows_L]
        topk_TLK = np.full((tokens, len(rows_L), self._most), -1, dtype=np.int16)
        for layer, ids_TK in enumerate(rows_L):
            topk_TLK[:, layer, : ids_TK.shape[1]] = ids_TK
            self._rows[layer].clear()
        return topk_TLK
