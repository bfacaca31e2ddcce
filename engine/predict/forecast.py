"""What the predictors say together: scores for the residency policy, and which experts to read ahead.

L: MoE layers, E: experts of a layer, T: tokens of a step, K: experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..readers import Priority
from ..store import Want
from .base import Floats, Predictor, Rows


class Forecast:
    """Owns the predictors and tells them how each step goes.

    Args:
        predictors: the first that knows of a layer is asked about it, and the first that knows of the future.
        least_chance: an expert that is needed with a smaller probability is not worth reading ahead.
        depth: how many layers ahead.
    """

    def __init__(
        self, predictors: Sequence[Predictor], layers: int, experts: int, *, least_chance: float, depth: int = 4
    ) -> None:
        self.predictors = list(predictors)
        self.beside: list[Predictor] = []
        """Are told the same, and asked by `next_of` alone, after the others."""
        self._layers = layers
        self._least = least_chance
        self._depth = depth
        self._none_LE: Floats = np.zeros((layers, experts), dtype=np.float32)

    @property
    def _all(self) -> list[Predictor]:
        return [*self.predictors, *self.beside]

    def begin_step(self, rows: Sequence[Rows]) -> None:
        for predictor in self._all:
            predictor.begin_step(rows)

    def routed(self, layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """A router has chosen: ids in any order with their weights, -1 for none."""
        if not self._all:
            return
        worth_TK = weights_TK.float().masked_fill(ids_TK < 0, -torch.inf)
        sorted_TK = ids_TK.gather(-1, worth_TK.argsort(dim=-1, descending=True, stable=True)).cpu().numpy()
        for predictor in self._all:
            predictor.routed(layer, sorted_TK)

    def end_step(self) -> None:
        for predictor in self._all:
            predictor.end_step()

    def forget(self, request_id: str) -> None:
        for predictor in self._all:
            predictor.forget(request_id)

    def future(self) -> Floats:
        """[L, E] discounted uses; zeros while nobody knows."""
        for predictor in self.predictors:
            if (future_LE := predictor.future()) is not None:
                return future_LE
        return self._none_LE

    def next_of(self, request_id: str) -> Floats | None:
        """[L, E] of a sequence's next token, by the first who knows; None while nobody does."""
        found = (predictor.next_of(request_id) for predictor in self._all)
        return next((chance_LE for chance_LE in found if chance_LE is not None), None)

    def wants(self, layer: int) -> Iterator[Want]:
        """What the layers after one will probably need: the next layer first, in each the most probable first."""
        for ahead in range(layer + 1, min(layer + 1 + self._depth, self._layers)):
            found = ((p.name, p.upcoming(ahead)) for p in self.predictors)
            name, chance_E = next(((n, c) for n, c in found if c is not None), ("", None))
            if chance_E is None:
                continue
            priority = Priority.NEXT_LAYER if ahead == layer + 1 else Priority.LATER
            for expert in np.argsort(-chance_E, kind="stable").tolist():
                if chance_E[expert] < self._least:
                    break
                yield Want(layer=ahead, expert=expert, chance=float(chance_E[expert]), priority=priority, by=name)
