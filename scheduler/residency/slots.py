"""The slots that experts stay in, and the rules that every residency policy keeps: atomic events, protection, floors.

An event is one layer of one step. All experts that the step's tokens touch there are looked up first, then the state
changes; replays that change it expert by expert count 27 to 29 % more misses for LRU and LFU (arXiv 2608.07911). An
expert that an event touches is never a victim of the event. A miss that is not admitted is bypassed: the expert is read
and run where it is, and no slot changes.

L: layers, E: experts of a layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .filling import fill

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
Place = tuple[int, int]
"""A layer and an expert of it."""
Moves = tuple[tuple[Place, ...], tuple[Place, ...]]
"""Who is admitted, and who is evicted for it."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many experts may stay. `slots` are for all layers together; `floor` of them belong to each layer alone.

    A layer fills its floor from free slots that are kept for it, and another layer never takes it below. With
    `floor * layers == slots` nothing is shared: a cache per layer, as in most publications. Raises ValueError for
    numbers that cannot be.
    """

    layers: int
    experts: int
    slots: int
    floor: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.slots <= self.layers * self.experts:
            raise ValueError(f"slots is {self.slots}; it must be 0 to {self.layers * self.experts}, all experts")
        if not 0 <= self.floor <= self.slots // self.layers:
            raise ValueError(
                f"floor is {self.floor}; {self.slots} slots for {self.layers} layers allow 0 to"
                f" {self.slots // self.layers}"
            )

    @classmethod
    def per_layer(cls, layers: int, experts: int, slots: int) -> Budget:
        """A cache of `slots` for each layer."""
        return cls(layers=layers, experts=experts, slots=layers * slots, floor=slots)

    @property
    def shared(self) -> bool:
        return self.slots > self.layers * self.floor


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a policy may know beside the routing: the number of the step, and what a predictor says.

    Steps count up from 0; some may be left out. `scores_LE` are predicted future uses, larger for an expert that is
    wanted more or sooner; `PredictedNow` needs them in each event, `PredictedUse` when it settles.
    """

    step: int
    scores_LE: npt.NDArray[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Hits and misses of an event, in ascending order, and what changes places because of it.

    The first of `admitted` go into free slots; the last `len(evicted)` take the places of `evicted`, one by one.
    """

    hits: tuple[int, ...] = ()
    misses: tuple[int, ...] = ()
    admitted: tuple[Place, ...] = ()
    evicted: tuple[Place, ...] = ()


class Policy(ABC):
    """Decides which experts stay, event by event. Starts empty.

    Everything is a function of the events (and of the predicted scores, for the policies that use them): ranks that see
    the same ones decide the same. Equal values are told apart by layer and expert; the order of an event's experts
    does not matter.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._resident_LE: Booleans = np.zeros((budget.layers, budget.experts), dtype=bool)
        self._seen_LE = self._resident_LE.view()
        self._seen_LE.flags.writeable = False
        self._count_L: Integers = np.zeros(budget.layers, dtype=np.int64)
        self._keep_LE: Booleans = np.zeros_like(self._resident_LE)
        """Who is in use and must stay."""
        self._margin = -math.inf
        """By how much a newcomer must be worth more than its victim."""
        self._step = -1
        self._at = (-1, -1)
        self._used: frozenset[int] = frozenset()
        """By the last events, which were of that step and layer."""

    @property
    def resident_LE(self) -> Booleans:
        """[L, E] who is there now; a copy."""
        return self._resident_LE.copy()

    def residents_of(self, layer: int) -> Booleans:
        """[E] who of a layer is there, at any time: a view, which cannot be written to."""
        return self._seen_LE[layer]

    def step(self, layer: int, experts: Iterable[int], context: Context) -> Decision:
        """One event: looks up `experts` of `layer`, then decides what to admit and what to evict for it.

        Repeated experts count once, and as used once where a layer of a step has several events, one after the other:
        it is computed in chunks. Raises ValueError for a layer or an expert that is not there, or a step that is before
        the last one.
        """
        need = sorted({int(expert) for expert in experts})
        if not 0 <= layer < self.budget.layers:
            raise ValueError(f"layer is {layer}; the budget has 0 to {self.budget.layers - 1}")
        if need and not (need[0] >= 0 and need[-1] < self.budget.experts):
            raise ValueError(f"experts are {need}; the budget has 0 to {self.budget.experts - 1}")
        if context.step != self._step:
            if context.step < self._step:
                raise ValueError(f"step is {context.step} after {self._step}; steps only count up")
            self._begin(context.step)
            self._step = context.step
        if not need:
            return Decision()
        need_K = np.array(need)
        here_K = self._resident_LE[layer, need_K].tolist()
        hits = tuple(expert for expert, here in zip(need, here_K, strict=True) if here)
        misses = tuple(expert for expert, here in zip(need, here_K, strict=True) if not here)
        before = self._used if self._at == (context.step, layer) else frozenset()
        self._at, self._used = (context.step, layer), before.union(need)
        self._touch(layer, need_K if not before else np.array([e for e in need if e not in before], dtype=np.int64))
        admitted, evicted = self._decide(layer, misses, need_K)
        return Decision(hits=hits, misses=misses, admitted=admitted, evicted=evicted)

    def place(self, layer: int, expert: int) -> bool:
        """Gives a free slot to an expert that no event has asked for. False where it has one, or none is free for its
        layer.
        """
        taken = int(np.maximum(self._count_L, self.budget.floor).sum())
        if self._resident_LE[layer, expert] or (
            self._count_L[layer] >= self.budget.floor and taken >= self.budget.slots
        ):
            return False
        self._resident_LE[layer, expert] = True
        self._count_L[layer] += 1
        return True

    def settle(self, context: Context) -> Decision:
        """The step is over: what a policy decides with all of its routing known. Most decide nothing here."""
        return Decision()

    # What a policy says

    def _begin(self, step: int) -> None:  # noqa: B027  (most policies do nothing)
        """A new step; `self._step` is still the last one, -1 before the first."""

    @abstractmethod
    def _touch(self, layer: int, need: Integers) -> None:
        """These experts were used."""

    @abstractmethod
    def _values(self, rows: slice) -> npt.NDArray[Any]:
        """[rows, E] how much each expert is worth in a slot; the least is evicted."""

    def _decide(self, layer: int, misses: tuple[int, ...], need: Integers) -> Moves:
        """Who comes and who goes because of an event."""
        if not misses or not self.budget.slots:
            return (), ()
        self._keep_LE[layer, need] = True
        moves = self._fill([layer] * len(misses), misses, layer)
        self._keep_LE[layer, need] = False
        return moves

    def _fill(self, layers: Sequence[int], experts: Sequence[int], layer: int) -> Moves:
        """Admits newcomers, given in ascending order, but for `_keep_LE`. Without sharing all are of `layer`."""
        first, rows = (0, slice(None)) if self.budget.shared else (layer, slice(layer, layer + 1))
        changes = fill(
            self._values(rows),
            first,
            self._resident_LE,
            self._keep_LE,
            self._count_L,
            self.budget.slots,
            self.budget.floor,
            self._margin,
            np.array(layers),
            np.array(experts),
        ).tolist()
        changes.sort(key=lambda change: change[2] >= 0)  # free slots first; the order stays otherwise
        admitted = tuple((layer, expert) for layer, expert, _, _ in changes)
        return admitted, tuple((layer, expert) for _, _, layer, expert in changes if layer >= 0)
