"""Residency with knowledge of the future: what no policy can beat, and what knowing the next steps would be worth.

T: steps, L: layers, K: experts per token, E: experts of a layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .policies import DecayedFrequency
from .slots import Budget, Integers, Policy

NEVER = np.iinfo(np.int64).max // 4


class Future:
    """When each expert is used next, told event by event along a trace: steps 0, 1, ... of it."""

    def __init__(self, topk_TLK: npt.NDArray[Any], experts: int) -> None:
        self._topk_TLK = topk_TLK
        self._next_TLK = next_uses(topk_TLK, experts)
        self.next_LE: Integers = np.full((topk_TLK.shape[1], experts), NEVER, dtype=np.int64)
        """Of the experts used so far: step * L + layer of the next use."""
        self.now = 0

    def begin(self, step: int) -> None:
        """Raises ValueError for a step that the trace does not have."""
        if step >= len(self._topk_TLK):
            raise ValueError(f"step is {step}; the oracle's trace has {len(self._topk_TLK)}")
        self.now = step

    def touch(self, layer: int, need: Integers) -> None:
        """Raises ValueError for other experts than the trace's."""
        experts_K = self._topk_TLK[self.now, layer]
        known_K = experts_K >= 0
        if set(experts_K[known_K].tolist()) != set(need.tolist()):
            raise ValueError(f"experts of step {self.now}, layer {layer} are not the trace's; give it those")
        self.next_LE[layer, experts_K[known_K]] = self._next_TLK[self.now, layer, known_K]


class Belady(Policy):
    """MIN: of those that may go, what is used again latest. With `bypass` a miss that is itself later is not admitted.

    Without bypass every miss is copied (Belady, 1966). With it no policy has fewer misses, but for a rare event that
    would have to evict an expert that it uses.
    """

    def __init__(self, budget: Budget, topk_TLK: npt.NDArray[Any], bypass: bool) -> None:
        super().__init__(budget)
        self._future = Future(topk_TLK, budget.experts)
        if bypass:
            self._margin = 0.0

    def _begin(self, step: int) -> None:
        self._future.begin(step)

    def _touch(self, layer: int, need: Integers) -> None:
        self._future.touch(layer, need)

    def _values(self, rows: slice) -> npt.NDArray[Any]:
        return -self._future.next_LE[rows]


class Foresight(DecayedFrequency):
    """Knows the next `window` steps exactly, and of what is not used in them only the decayed frequency.

    What is used sooner is kept before what is used later, and both before all others.
    """

    def __init__(self, budget: Budget, topk_TLK: npt.NDArray[Any], window: int) -> None:
        super().__init__(budget)
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1 step")
        self._future = Future(topk_TLK, budget.experts)
        self._window = window

    def _begin(self, step: int) -> None:
        super()._begin(step)
        self._future.begin(step)

    def _touch(self, layer: int, need: Integers) -> None:
        super()._touch(layer, need)
        self._future.touch(layer, need)

    def _values(self, rows: slice) -> npt.NDArray[Any]:
        layers = self.budget.layers
        ahead_LE = self._future.next_LE[rows] - self._future.now * layers
        near_LE = ahead_LE < (self._window + 1) * layers
        return np.where(near_LE, 2.0**40 - ahead_LE, super()._values(rows))


def next_uses(topk_TLK: npt.NDArray[Any], experts: int) -> Integers:
    """[T, L, K] when each expert is used next: step * L + layer, NEVER for not again. Experts of -1 are none.

    >>> found = next_uses(np.array([[[0, 1]], [[1, 2]], [[0, -1]]]), 3)[:, 0].tolist()
    >>> found == [[2, 1], [NEVER, NEVER], [NEVER, NEVER]]
    True
    """
    steps, layers, top_k = topk_TLK.shape
    next_TLK = np.full(topk_TLK.shape, NEVER, dtype=np.int64)
    step_N = np.repeat(np.arange(steps), top_k)
    for layer in range(layers):
        ids_N = topk_TLK[:, layer].reshape(-1)
        order = np.argsort(ids_N, kind="stable")
        again = (ids_N[order][:-1] == ids_N[order][1:]) & (ids_N[order][:-1] >= 0)
        next_N = np.full(len(ids_N), NEVER, dtype=np.int64)
        next_N[order[:-1][again]] = step_N[order[1:][again]] * layers + layer
        next_TLK[:, layer] = next_N.reshape(steps, top_k)
    return next_TLK
