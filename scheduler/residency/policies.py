"""Residency policies that know the past: recency, frequency, both, decayed frequency, and predicted next use.

L: layers, E: experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .filling import add_uses
from .slots import Budget, Context, Decision, Floats, Integers, Moves, Place, Policy


class LRU(Policy):
    """Admits every miss; the least recently used goes."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self._events = 0
        self._last_LE: Integers = np.full((budget.layers, budget.experts), -1, dtype=np.int64)

    def _touch(self, layer: int, need: Integers) -> None:
        self._events += 1
        self._last_LE[layer, need] = self._events

    def _values(self, rows: slice) -> npt.NDArray[Any]:
        return self._last_LE[rows]


class LFU(LRU):
    """Admits every miss; the least often used so far goes, of equals the least recently used."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self._uses_LE: Integers = np.zeros((budget.layers, budget.experts), dtype=np.int64)

    def _touch(self, layer: int, need: Integers) -> None:
        super()._touch(layer, need)
        self._uses_LE[layer, need] += 1

    def _values(self, rows: slice) -> npt.NDArray[Any]:
        return (self._uses_LE[rows] << 40) + self._last_LE[rows]


class LFRU(LFU):
    """Admits every miss; the least uses per event of its age goes: uses / (steps since the last + 1), as in vLLM's
    proposed expert cache (pull request 37190).
    """

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self._now = 0
        self._last_step_LE: Integers = np.zeros((budget.layers, budget.experts), dtype=np.int64)

    def _begin(self, step: int) -> None:
        self._now = step

    def _touch(self, layer: int, need: Integers) -> None:
        super()._touch(layer, need)
        self._last_step_LE[layer, need] = self._now

    def _values(self, rows: slice) -> npt.NDArray[Any]:
        return self._uses_LE[rows] / (self._now - self._last_step_LE[rows] + 1)


class DecayedFrequency(Policy):
    """Admits a miss only if its score beats the victim's by more than `margin`; other misses are bypassed.

    An expert's score is a weighted sum of its uses, each of which counts half after a half-life. One half-life is
    decayed-frequency admission; several tell short bursts from lasting use. Scores are of all steps, also those in
    which the expert had no slot.

    Args:
        half_lives: in steps: in a decode step a sequence has one token.
        weights: of the half-lives; a use adds their sum to the score.
        margin: in the unit of the score: with one half-life and weight 1, uses.
    """

    def __init__(
        self,
        budget: Budget,
        half_lives: Sequence[float] = (16,),
        weights: Sequence[float] = (1,),
        margin: float = 0.0,
    ) -> None:
        super().__init__(budget)
        if not half_lives or len(half_lives) != len(weights):
            raise ValueError(f"half_lives are {half_lives} and weights {weights}; give as many of both, at least 1")
        for name, values, least in (("half_lives", half_lives, 0.0), ("weights", weights, 0.0)):
            if not all(value > least and math.isfinite(value) for value in values):
                raise ValueError(f"{name} are {values}; they must be above 0")
        self._margin = checked_margin(margin)
        # float32 forgets the last bits of pow, in which machines differ
        self._decay_H = [float(np.float32(2.0 ** (-1.0 / half_life))) for half_life in half_lives]
        self._weights_H: Floats = np.array(weights, dtype=np.float64)
        self._decayed_HLE: Floats = np.zeros((len(half_lives), budget.layers, budget.experts))

    def _begin(self, step: int) -> None:
        steps = step - max(self._step, 0)
        if not steps:
            return
        for decayed_LE, decay in zip(self._decayed_HLE, self._decay_H, strict=True):
            decayed_LE *= decay if steps == 1 else decay**steps

    def _touch(self, layer: int, need: Integers) -> None:
        add_uses(self._decayed_HLE, layer, need, self._weights_H)

    def _values(self, rows: slice) -> npt.NDArray[Any]:
        values_LE = self._decayed_HLE[0, rows]
        for decayed_LE in self._decayed_HLE[1:]:
            values_LE = values_LE + decayed_LE[rows]
        return values_LE


class PredictedUse(Policy):
    """Keeps what a predictor says will be used: decides when the step is over, from `context.scores_LE`.

    By then all of the step's routing is known, and one prediction serves all layers. A miss of the step is admitted if
    its score beats the victim's by more than `margin`. What the step used in a layer is not evicted from it. A step
    that is not settled admits nothing.
    """

    def __init__(self, budget: Budget, margin: float = 0.0) -> None:
        super().__init__(budget)
        self._margin = checked_margin(margin)
        self._scores_LE: Floats = np.zeros((budget.layers, budget.experts))
        self._misses_L: list[list[int]] = [[] for _ in range(budget.layers)]

    def _begin(self, step: int) -> None:
        for misses in self._misses_L:
            misses.clear()
        self._keep_LE[:] = False

    def _touch(self, layer: int, need: Integers) -> None:
        self._keep_LE[layer, need] = True

    def _values(self, rows: slice) -> npt.NDArray[Any]:
        return self._scores_LE[rows]

    def _decide(self, layer: int, misses: tuple[int, ...], need: Integers) -> Moves:
        self._misses_L[layer] += [expert for expert in misses if expert not in self._misses_L[layer]]
        return (), ()

    def settle(self, context: Context) -> Decision:
        """Raises ValueError without scores for all experts that are finite numbers."""
        scores_LE = checked_scores(context, self._scores_LE.shape)
        if context.step != self._step:
            raise ValueError(f"step {context.step} cannot be settled; the last event was of step {self._step}")
        self._scores_LE[:] = scores_LE
        admitted: list[Place] = []
        evicted: list[Place] = []
        missed_L = [[(layer, expert) for expert in missed] for layer, missed in enumerate(self._misses_L)]
        if self.budget.shared:  # the best of all layers first
            missed_L = [[place for missed in missed_L for place in missed]]
        filled: list[Place] = []
        for layer, missed in enumerate(missed_L):
            if missed and self.budget.slots:
                came, went = self._fill([at for at, _ in missed], [expert for _, expert in missed], layer)
                free = len(came) - len(went)
                filled += came[:free]
                admitted += came[free:]
                evicted += went
        for misses in self._misses_L:
            misses.clear()
        return Decision(admitted=(*filled, *admitted), evicted=tuple(evicted))


class PredictedNow(Policy):
    """Keeps what a predictor says will be used: decides within the event, from `context.scores_LE`.

    As a live engine must, in which what a layer has missed is in memory while the layer runs only. The scores may know
    the step's routing up to this layer. A miss is admitted if its score beats the victim's by more than `margin`.
    """

    def __init__(self, budget: Budget, margin: float = 0.0) -> None:
        super().__init__(budget)
        self._margin = checked_margin(margin)
        self._scores_LE: npt.NDArray[Any] = np.zeros((budget.layers, budget.experts))

    def step(self, layer: int, experts: Iterable[int], context: Context) -> Decision:
        """As `Policy.step`. Raises ValueError without finite scores for all experts."""
        self._scores_LE = checked_scores(context, self._scores_LE.shape)
        return super().step(layer, experts, context)

    def _touch(self, layer: int, need: Integers) -> None:
        pass

    def _values(self, rows: slice) -> npt.NDArray[Any]:
        return self._scores_LE[rows]


def checked_scores(context: Context, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Raises ValueError without scores for all experts that are finite numbers."""
    scores_LE = context.scores_LE
    if scores_LE is None or scores_LE.shape != shape or not np.isfinite(scores_LE).all():
        found = "missing" if scores_LE is None else f"of shape {scores_LE.shape}, or not all finite"
        raise ValueError(f"scores_LE are {found}; predicted use needs finite numbers of shape {shape}")
    return scores_LE


def checked_margin(margin: float) -> float:
    """Raises ValueError for one that is not a number from 0."""
    if not (margin >= 0 and math.isfinite(margin)):
        raise ValueError(f"margin is {margin}; it must be a number from 0")
    return float(margin)


def default_policy(budget: Budget) -> DecayedFrequency:
    """Decayed-frequency admission with a fast and a slow half-life.

    The slow one alone is the published rule (half-life 16). On recorded decoding of gpt-oss-20b two avoid more of
    LRU's misses with as few copies, and the numbers matter little: half-lives of 2 to 8 and 16 to 32 are about alike.
    """
    return DecayedFrequency(budget, half_lives=(4, 32), weights=(1, 0.3), margin=0.4)
