"""What the predictors of several ranks say together.

Each rank predicts for its own tokens, over the experts of all ranks, and tells the others in a note: before a step's
layers with the step's agreement, then with each layer's exchange (`dispatch.Note`). So a rank knows with which
probability any rank's tokens use an expert that it has, and reads that ahead. Ranks may have different predictors, or
none that is worth asking: what they say orders reads, and nothing else.

When the step is over each rank tells what became of the bytes that it read on whose word, in the exchange that the end
of a step has anyway. So a predictor is judged by what it was worth on all ranks.

P: ranks, M: predictors of a rank at most, L: MoE layers, E: experts of a layer, A: layers ahead, N: bytes of a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..readers import Priority
from ..wants import Outcome, Want
from .base import Array, Floats, Rows
from .forecast import DEPTH, Forecast
from .meter import Meter
from .notes import Bytes, NoteFormat

PREDICTORS = 4
"""Of a rank, at most."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Expected:
    """Of a layer: how probable each expert that this rank has is needed here [E], and who of all ranks finds that most
    probable, with a predictor each [P].
    """

    chance_E: Floats
    rank_E: Array
    by_P: Array


class SharedForecast(Forecast):
    """A rank's part. Alone in its group, before `join` and after the loss of all others, it is a plain `Forecast`.

    In a step: `announce`, `say` and `hear` of layer -1, `begin_step`; in each layer `routed`, `say`, `hear`, and then
    what it is asked; `end_step`, and `settle` with all ranks' tallies.
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
        super().__init__(trained, others, layers, experts, least_chance=least_chance, depth=depth)
        assert len(self.meters) <= PREDICTORS
        self._format = NoteFormat(depth, experts)
        self._announced = False
        self._own_LE: Floats | None = None
        """What this rank's predictors say of the future, since the last `say`."""
        self._future_LE: Floats = np.zeros((layers, experts), dtype=np.float32)
        self.join(0, 1)

    def join(self, position: int, size: int) -> None:
        """The rank has this position in another group. What was said in the last one is forgotten."""
        layers, experts = self._future_LE.shape
        self._position, self._size = position, size
        self._here_LPE = np.zeros((layers, size, experts), dtype=bool)
        self._others_LE: Floats = np.zeros((layers, experts), dtype=np.float32)
        """Discounted uses by other ranks' tokens, of each layer as it was when it last ran."""
        self._expected: dict[int, _Expected] = {}
        self._heard_PM4 = np.zeros((size, PREDICTORS, 4), dtype=np.int64)
        """Bytes that were read here on the word of all ranks' predictors: in vain, used, hidden, and what that delayed.
        """

    def place(self, layer: int, here_PE: Array) -> None:
        """Which experts each rank's tokens find at this rank, by a layer's table."""
        self._here_LPE[layer] = False
        self._here_LPE[layer, :, : here_PE.shape[1]] = here_PE

    def elsewhere(self, layer: int) -> Array:
        """[E] which experts of a layer this rank's tokens find at others."""
        here_E: Array = self._here_LPE[layer, self._position]
        return ~here_E if self._size > 1 else np.zeros_like(here_E)

    # Before the step's agreement, and in each layer

    def announce(self, rows: Sequence[Rows]) -> None:
        """The next step, with these rows of this rank: `begin_step` will come for it when the ranks have agreed."""
        self._announced = False
        self.begin_step(rows)
        self._announced = True

    def begin_step(self, rows: Sequence[Rows]) -> None:
        if self._announced:
            self._announced = False
            return
        self._expected.clear()
        self._own_LE = None
        super().begin_step(rows)

    def say(self, layer: int) -> Bytes:
        """[N] what this rank expects when a layer's router has chosen; -1 before the first."""
        chance_AE: Floats = np.zeros((self._depth, self._format.experts), dtype=np.float32)
        by_A, future_E = np.zeros(self._depth, dtype=np.uint8), None
        if self._running:
            depth_M = [self._depth if meter.exact else self.depth_of(meter).layers for meter in self.meters]
            for ahead in range(layer + 1, min(layer + 1 + self._depth, self._layers)):
                by, chance_E = self._ask(ahead, ahead - layer, depth_M)
                if chance_E is not None:
                    chance_AE[ahead - layer - 1], by_A[ahead - layer - 1] = chance_E, by
            if layer >= 0:
                self._own_LE = super().future()
                future_E = self._own_LE[layer]
        return self._format.pack(chance_AE, by_A, future_E)

    def hear(self, layer: int, notes_PN: Bytes) -> None:
        """All ranks have said what they expect at this layer."""
        said = self._format.unpack(notes_PN)
        if layer >= 0:
            said.future_PE[self._position] = 0
            self._others_LE[layer] = said.future_PE.sum(0)
        if not said.chance_PAE.any():
            self._expected = {}
            return
        here_PAE = self._here_LPE[layer + 1 : layer + 1 + self._depth].transpose(1, 0, 2)
        chance_PAE = said.chance_PAE[:, : here_PAE.shape[1]] * here_PAE
        chance_AE, rank_AE = 1 - np.prod(1 - chance_PAE, axis=0), chance_PAE.argmax(0)
        self._expected = {
            layer + 1 + at: _Expected(chance_E=chance_E, rank_E=rank_E, by_P=said.by_PA[:, at])
            for at, (chance_E, rank_E) in enumerate(zip(chance_AE, rank_AE, strict=True))
        }

    def future(self) -> Floats:
        """Also of other ranks' sequences; a layer's as they were when it last ran."""
        if self._size == 1:
            return super().future()
        own_LE = super().future() if self._own_LE is None else self._own_LE
        return np.add(own_LE, self._others_LE, out=self._future_LE)

    def wants(self, layer: int) -> Iterator[Want]:
        """What of this rank's experts the layers after one will probably need, for the tokens of all ranks."""
        if self._size == 1:
            yield from super().wants(layer)
            return
        for ahead in range(layer + 1, min(layer + 1 + self._depth, self._layers)):
            if (expected := self._expected.get(ahead)) is None:
                continue
            priority = Priority.NEXT_LAYER if ahead == layer + 1 else Priority.LATER
            likely_N = np.flatnonzero(expected.chance_E >= self._least)
            for expert in likely_N[np.argsort(-expected.chance_E[likely_N], kind="stable")].tolist():
                rank, chance = int(expected.rank_E[expert]), float(expected.chance_E[expert])
                by = rank, int(expected.by_P[rank])
                yield Want(layer=ahead, expert=expert, chance=chance, priority=priority, by=by)

    # What it was worth

    def heard(self, want: Want, outcome: Outcome) -> None:
        """`want.by` is the position of a rank and the number of its predictor."""
        if isinstance(want.by, int):
            super().heard(want, outcome)
        elif want.by[0] < self._size:  # of an earlier group there may be more
            self._heard_PM4[want.by][int(outcome.used)] += outcome.nbytes
            self._heard_PM4[want.by][2:] += outcome.hidden, outcome.delay

    def add(self, meter: Meter) -> None:
        super().add(meter)
        assert len(self.meters) <= PREDICTORS

    def _measure_depths(self) -> None:
        """With several ranks it is not known how far ahead what was read was said: the depths stay."""
        if self._size == 1:
            super()._measure_depths()
        else:
            self._time.clear()

    def end_step(self) -> None:
        """Of several ranks the step is over with `settle`."""
        if self._size == 1:
            super().end_step()

    def tally(self) -> list[int]:
        """What became, since the last one, of the bytes that were read here: for `settle`, on all ranks."""
        tally: list[int] = self._heard_PM4.ravel().tolist()
        self._heard_PM4[:] = 0
        return tally

    def settle(self, tallies: Sequence[Sequence[int]]) -> None:
        """The end of a step, with the tallies of all ranks: this rank's predictors hear what they were worth there."""
        all_M4 = np.array(tallies).reshape(self._size, *self._heard_PM4.shape)[:, self._position].sum(0)
        for meter, (wasted, used, hidden, delay) in zip(self.meters, all_M4.tolist(), strict=False):
            meter.heard(Outcome(nbytes=wasted, delay=delay))
            meter.heard(Outcome(nbytes=used, used=True, hidden=hidden))
        super().end_step()
