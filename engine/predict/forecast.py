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
from .meter import Meter


class Forecast:
    """Owns the predictors and tells them how each step goes.

    About a layer the one is asked that was right most often of late, of those that know of it and whose word is worth
    reading ahead. Who does not guess goes before them, and is asked about all layers to come.

    Args:
        trained: who says which experts are worth a slot: the mean of them. They err differently, and the mean is better
            than each.
        others: who only says what is next.
        least_chance: an expert that is needed with a smaller probability is not worth reading ahead.
        depth: how many layers ahead.
    """

    def __init__(
        self,
        trained: Sequence[Meter],
        others: Sequence[Meter],
        layers: int,
        experts: int,
        *,
        least_chance: float,
        depth: int = 4,
    ) -> None:
        self.meters = [*trained, *others]
        self._trained = list(trained)
        self._by_name = {meter.name: meter for meter in self.meters}
        self.beside: list[Predictor] = []
        """Are told the same, and asked by `next_of` alone, after the others."""
        self._layers = layers
        self._least = least_chance
        self._depth = depth
        self._none_LE: Floats = np.zeros((layers, experts), dtype=np.float32)
        self._running = False

    def add(self, meter: Meter) -> None:
        """One more that only says what is next; between steps."""
        self.meters.append(meter)
        self._by_name[meter.name] = meter

    @property
    def _all(self) -> list[Predictor]:
        return [*self.meters, *self.beside]

    def begin_step(self, rows: Sequence[Rows]) -> None:
        """No rows: nothing is predicted in this step."""
        self._running = bool(rows)
        if self._running:
            for predictor in self._all:
                predictor.begin_step(rows)

    def routed(self, layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """A router has chosen: ids in any order with their weights, -1 for none."""
        if not self._all or not self._running:
            return
        worth_TK = weights_TK.float().masked_fill(ids_TK < 0, -torch.inf)
        sorted_TK = ids_TK.gather(-1, worth_TK.argsort(dim=-1, descending=True, stable=True)).cpu().numpy()
        for predictor in self._all:
            predictor.routed(layer, sorted_TK)

    def end_step(self) -> None:
        if self._running:
            for predictor in self._all:
                predictor.end_step()

    def forget(self, request_id: str) -> None:
        for predictor in self._all:
            predictor.forget(request_id)

    def heard(self, by: str, nbytes: int, used: bool) -> None:
        """What became of bytes that were read ahead."""
        if by in self._by_name:
            self._by_name[by].heard(nbytes, used)

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
        exact = any(meter.exact for meter in self.meters)
        for ahead in range(layer + 1, self._layers if exact else min(layer + 1 + self._depth, self._layers)):
            name, chance_E = self._ask(ahead, every=ahead == layer + 1, guess=ahead <= layer + self._depth)
            if chance_E is None:
                continue
            priority = Priority.NEXT_LAYER if ahead == layer + 1 else Priority.LATER
            for expert in np.argsort(-chance_E, kind="stable").tolist():
                if chance_E[expert] < self._least:
                    break
                yield Want(layer=ahead, expert=expert, chance=float(chance_E[expert]), priority=priority, by=name)

    def figures(self) -> dict[str, list[float]]:
        """`Stats.predictors`."""
        return {meter.name: meter.measured().to_list() for meter in self.meters}

    def _ask(self, layer: int, every: bool, guess: bool) -> tuple[str, Floats | None]:
        """The best one's word; `every` asks all where their words are compared, so that it is known who that is.
        Without `guess` only who knows.
        """
        best: tuple[str, Floats | None] = ("", None)
        for meter in sorted(self.meters, key=lambda m: (not m.exact, -m.recall)):
            if not (guess or meter.exact) or (best[1] is not None and not (every and meter.compares)):
                break
            if meter.reads and (chance_E := meter.upcoming(layer)) is not None and best[1] is None:
                best = meter.name, chance_E
        return best
