"""What the predictors say together: scores for the residency policy, and which experts to read ahead.

L: MoE layers, E: experts of a layer, M: predictors, T: tokens of a step, K: experts per token.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..readers import Priority
from ..wants import Outcome, Want
from .base import Floats, Predictor, Rows
from .depth import Depth
from .meter import Meter

DEPTH = 4
"""Layers about which is asked at first."""
MOST_AHEAD = 8
"""Layers that those who guess look ahead at the most."""


class Forecast:
    """Owns the predictors and tells them how each step goes.

    About a layer the one is asked that was right most often of late, of those that know of it and whose word is worth
    reading ahead. Who does not guess goes before them, and is asked about all layers to come.

    Args:
        trained: who says which experts are worth a slot: the mean of them. They err differently, and the mean is better
            than each.
        others: who only says what is next.
        least_chance: an expert that is needed with a smaller probability is not worth reading ahead.
        depth: how many layers ahead at first at the most. Each predictor's `Depth` follows what is measured then, for
            steps of each size apart, by powers of two of their tokens.
    """

    def __init__(
        self,
        trained: Sequence[Meter],
        others: Sequence[Meter],
        layers: int,
        experts: int,
        *,
        least_chance: float,
        depth: int = DEPTH,
    ) -> None:
        self.meters = [*trained, *others]
        self._trained = list(trained)
        self.beside: list[Predictor] = []
        """Are told the same, and asked by `next_of` alone, after the others."""
        self._layers = layers
        self._least = least_chance
        self._depth = depth
        self._depths: dict[tuple[str, int], Depth] = {}
        self._power = 0
        """Of two, of the step's tokens."""
        self._time: dict[str, _Time] = {}
        self.idle_layers: Callable[[], int] = lambda: 0
        """Of the store."""
        self._idle = 0
        """Of them known."""
        self._none_LE: Floats = np.zeros((layers, experts), dtype=np.float32)
        self._running = False

    def add(self, meter: Meter) -> None:
        """One more that only says what is next; between steps."""
        self.meters.append(meter)

    @property
    def _all(self) -> list[Predictor]:
        return [*self.meters, *self.beside]

    def begin_step(self, rows: Sequence[Rows]) -> None:
        """No rows: nothing is predicted in this step."""
        self._running = bool(rows)
        self._power = sum(len(row.token_ids) for row in rows).bit_length()
        if self._running:
            for predictor in self._all:
                predictor.begin_step(rows)

    def routed(self, layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """A router has chosen: ids in any order with their weights, -1 for none."""
        if not self._all or not self._running:
            return
        if any(predictor.ordered for predictor in self._all):
            worth_TK = weights_TK.float().masked_fill(ids_TK < 0, -torch.inf)
            ids_TK = ids_TK.gather(-1, worth_TK.argsort(dim=-1, descending=True, stable=True))
        chosen_TK = ids_TK.cpu().numpy()
        for predictor in self._all:
            predictor.routed(layer, chosen_TK)

    def end_step(self) -> None:
        if self._running:
            for predictor in self._all:
                predictor.end_step()
            self._measure_depths()

    def forget(self, request_id: str) -> None:
        for predictor in self._all:
            predictor.forget(request_id)

    def heard(self, want: Want, outcome: Outcome) -> None:
        """What became of bytes that were read ahead on the word of `meters[want.by]`."""
        meter: Meter = self.meters[want.by]
        meter.heard(outcome)
        if want.ahead <= MOST_AHEAD:
            of = self._time_of(meter)
            of.gained_D[want.ahead - 1] += round(outcome.hidden * meter.ns_per_byte)
            of.spent_D[want.ahead - 1] += round(outcome.delay * meter.ns_per_byte)
            of.late += outcome.used and outcome.hidden < outcome.nbytes

    def depth_of(self, meter: Meter) -> Depth:
        """In steps of as many tokens as the last one."""
        at = meter.name, self._power
        if at not in self._depths:
            self._depths[at] = Depth(min(meter.reach, self._depth), MOST_AHEAD)
        return self._depths[at]

    def _time_of(self, meter: Meter) -> _Time:
        return self._time.setdefault(meter.name, _Time())

    def _measure_depths(self) -> None:
        """A step is over."""
        idle, self._idle = self.idle_layers() - self._idle, self.idle_layers()
        for meter in self.meters:
            if meter.reads and not meter.exact:
                of = self._time_of(meter)
                self.depth_of(meter).step(of.gained_D, of.spent_D, idle=max(0, idle), late=of.late)
        self._time.clear()

    def future(self) -> Floats:
        """[L, E] discounted uses; zeros while nobody knows."""
        if not self._running:
            return self._none_LE
        found = [future_LE for meter in self._trained if (future_LE := meter.future()) is not None]
        if not found:
            return self._none_LE
        return found[0] if len(found) == 1 else sum(found[1:], found[0]) / np.float32(len(found))

    def next_of(self, request_id: str) -> Floats | None:
        """[L, E] of a sequence's next token, by the first who knows; None while nobody does."""
        found = (predictor.next_of(request_id) for predictor in self._all)
        return next((chance_LE for chance_LE in found if chance_LE is not None), None)

    def wants(self, layer: int) -> Iterator[Want]:
        """What the layers after one will probably need: the next layer first, in each the most probable first."""
        if not self._running:
            return
        depth_M = [self._layers if meter.exact else self.depth_of(meter).layers for meter in self.meters]
        for ahead in range(layer + 1, min(layer + 1 + max(depth_M, default=0), self._layers)):
            by, chance_E = self._ask(ahead, ahead - layer, depth_M)
            if chance_E is None:
                continue
            priority = Priority.NEXT_LAYER if ahead == layer + 1 else Priority.LATER
            for expert in np.argsort(-chance_E, kind="stable").tolist():
                if chance_E[expert] < self._least:
                    break
                yield Want(
                    layer=ahead,
                    expert=expert,
                    chance=float(chance_E[expert]),
                    priority=priority,
                    by=by,
                    ahead=ahead - layer,
                )

    def figures(self) -> dict[str, list[float]]:
        """`Stats.predictors`."""
        found = {}
        for meter in self.meters:
            layers = self._layers if meter.exact else self.depth_of(meter).layers
            found[meter.name] = dataclasses.replace(meter.measured(), layers_ahead=float(layers)).to_list()
        return found

    def _ask(self, layer: int, ahead: int, depth_M: Sequence[int]) -> tuple[int, Floats | None]:
        """The number and the word on a layer of the best one that looks so many layers ahead; about the next layer all
        are asked where their words are compared, so that it is known who that is.
        """
        best: tuple[int, Floats | None] = (0, None)
        for by, meter in sorted(enumerate(self.meters), key=lambda it: (not it[1].exact, -it[1].recall)):
            if best[1] is not None and not (ahead == 1 and meter.compares):
                break
            if not meter.reads or ahead > depth_M[by]:
                continue
            begun = time.perf_counter_ns()
            chance_E = meter.upcoming(layer)
            if ahead <= MOST_AHEAD:
                self._time_of(meter).spent_D[ahead - 1] += time.perf_counter_ns() - begun
            if chance_E is not None and best[1] is None:
                best = by, chance_E
        return best


@dataclass(eq=False)
class _Time:
    """Nanoseconds of a step that a predictor hid and took, by layers ahead, and its reads that came too late."""

    gained_D: list[int] = field(default_factory=lambda: [0] * MOST_AHEAD)
    spent_D: list[int] = field(default_factory=lambda: [0] * MOST_AHEAD)
    late: int = 0
