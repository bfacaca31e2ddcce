"""What a predictor is worth: how often it is right, what it costs, and whether to go on asking it.

A predictor is asked while the time that it hides is more than the time that it takes: its own, and that in which layers
wait for the end of reads on its word before their own may begin. What is read for nothing while the disk has nothing
else to do takes no time. Below that it rests, and is tried again after a while, each time after twice as long.

L: MoE layers, E: experts of a layer, T: tokens of a step, K: experts per token.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..wants import Outcome
from .base import Array, Floats, Predictor, Rows

TRIAL_STEPS = 32
"""Over so many steps a balance is drawn."""
REST_STEPS, LONGEST_REST = 128, 1 << 16
"""How long a predictor rests after its first bad balance, and at most after many in a row."""
HALF_LIFE = 256.0
"""Of the figures, in steps."""
MEASURED_STEP = 4
"""In one of so many steps is counted how often a predictor is right: to compare takes time too."""

_Result = TypeVar("_Result")


class Switch:
    """On or off, by balances of what was gained and spent. Without a clock: steps are its time."""

    def __init__(self, trial: int = TRIAL_STEPS, rest: int = REST_STEPS, longest: int = LONGEST_REST) -> None:
        assert trial >= 1 and 1 <= rest <= longest
        self.on = True
        self.trial, self.first_rest, self.longest = trial, rest, longest
        self.rest = rest
        """Steps of the next rest."""
        self._left = trial
        self._balance = 0

    def step(self, gained_ns: int, spent_ns: int) -> None:
        """A step is over, with what became known in it."""
        self._balance += gained_ns - spent_ns
        self._left -= 1
        if self._left:
            return
        if not self.on:
            self.on = True  # for a trial
        elif self._balance > 0:
            self.rest = self.first_rest
        else:
            self.on = False
        self._balance = 0
        self._left = self.trial if self.on else self.rest
        if not self.on:
            self.rest = min(2 * self.rest, self.longest)


@dataclass(kw_only=True)
class Measured:
    """Sums in which a step counts half after `HALF_LIFE` steps. They add up over ranks."""

    used: float = 0.0
    """Experts that layers used, in the steps that were compared; of them named among the first k, and the first 2k,
    where k is how many the layer used.
    """
    right_k: float = 0.0
    right_2k: float = 0.0
    likely: float = 0.0
    """Experts that were not in memory and were given at least the chance at which they are read ahead; of them used."""
    likely_used: float = 0.0
    ns: float = 0.0
    """Time in the predictor, and the tokens of all steps."""
    tokens: float = 0.0
    read_bytes: float = 0.0
    """Read ahead on its word, and of them used."""
    used_bytes: float = 0.0
    on: float = 0.0
    """Ranks that ask it now. No sum over time."""
    layers_ahead: float = 0.0
    """How far ahead it is asked now, 0 where that is not known. Nor this."""

    def to_list(self) -> list[float]:
        """The fields in their order, as they travel in `Stats.predictors`."""
        return list(dataclasses.astuple(self))

    @classmethod
    def from_list(cls, values: Sequence[float]) -> Measured:
        return cls(**{field.name: value for field, value in zip(dataclasses.fields(cls), values, strict=True)})

    @property
    def recall_k(self) -> float | None:
        """None where nothing was seen; so are the others."""
        return _share(self.right_k, self.used)

    @property
    def recall_2k(self) -> float | None:
        return _share(self.right_2k, self.used)

    @property
    def depth(self) -> float | None:
        return self.layers_ahead or None

    @property
    def precision(self) -> float | None:
        return _share(self.likely_used, self.likely)

    @property
    def us_per_token(self) -> float | None:
        return _share(self.ns / 1000, self.tokens)

    @property
    def useful_share(self) -> float | None:
        return _share(self.used_bytes, self.read_bytes)

    def fade(self) -> None:
        """A step goes by."""
        for field in dataclasses.fields(self):
            if field.name not in ("on", "layers_ahead"):
                setattr(self, field.name, getattr(self, field.name) * _FADE)


_FADE = 2.0 ** (-1 / HALF_LIFE)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def add_up(ranks: Iterable[dict[str, list[float]]]) -> dict[str, list[float]]:
    """The sums of several ranks by predictor, as in `Stats.predictors`."""
    total: dict[str, list[float]] = {}
    for rank in ranks:
        for name, values in rank.items():
            before = total.get(name, [0.0] * len(values))
            total[name] = [a + b for a, b in zip(before, values, strict=True)]
    return total


class Meter(Predictor):
    """A predictor with a meter: told and asked in its place, and told by the store what became of its word.

    There is a switch for each power of two of a step's tokens, because what can be gained and what it costs changes
    with them. The predictor is told of all steps while any of them is on, so that it misses nothing, and is left alone
    otherwise; what it then missed, it must bear.

    Args:
        predictor: whose name it takes.
        ns_per_byte: how long the disk takes for a byte.
        resident: [E] for a layer, which experts need not be read. None: precision is not measured.
        least_chance: from which an expert is read ahead.
        judged: whether the store tells of all that it is good for. Without that it is measured but stays on.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        ns_per_byte: float,
        resident: Callable[[int], Array] | None = None,
        least_chance: float = 0.5,
        judged: bool = True,
    ) -> None:
        assert ns_per_byte >= 0
        self.predictor = predictor
        self.name, self.ordered = predictor.name, predictor.ordered
        self.exact, self.reach = predictor.exact, predictor.reach
        self.ns_per_byte = ns_per_byte
        self._resident = resident
        self._least = least_chance
        self._judged = judged
        self._measured = Measured()
        self._switches: dict[int, Switch] = {}
        self._switch = Switch()
        self._told = False
        self._steps = 0
        self._compares = False
        self._open = False
        self._ns = 0
        self._tokens = 0
        self._used_bytes = 0
        self._read_bytes = 0
        self._hidden_bytes = 0
        self._delay_bytes = 0
        self._said: dict[int, Floats] = {}
        self._likely: dict[int, Array] = {}
        self._future_LE: Floats | None = None
        self._next_LE: Floats | None = None
        """What was last said of the future before this step."""

    @property
    def on(self) -> bool:
        """Whether it is asked, in steps of as many tokens as the last one."""
        return self._switch.on or not self._judged

    @property
    def reads(self) -> bool:
        """Whether reading ahead on its word pays, in steps of as many tokens as the last one."""
        return self._switch.on

    @property
    def compares(self) -> bool:
        """Whether what it says in this step is compared with what the routers choose."""
        return self._compares

    @property
    def recall(self) -> float:
        """Of late, at k; 0 while nothing was seen. Without the copy that `measured` makes."""
        return self._measured.recall_k or 0.0

    def measured(self) -> Measured:
        return dataclasses.replace(self._measured, on=float(self.on))

    def heard(self, outcome: Outcome) -> None:
        """What became of bytes that were read ahead on the predictor's word."""
        self._read_bytes += outcome.nbytes
        self._used_bytes += outcome.nbytes if outcome.used else 0
        self._hidden_bytes += outcome.hidden
        self._delay_bytes += outcome.delay

    # As the predictor

    def begin_step(self, rows: Sequence[Rows]) -> None:
        self._close()  # a step that failed
        self._open = True
        self._tokens = sum(len(row.token_ids) for row in rows)
        self._switch = self._switches.setdefault(self._tokens.bit_length(), Switch())
        self._told = not self._judged or any(switch.on for switch in self._switches.values())
        self._compares = self._steps % MEASURED_STEP == 0
        self._steps += 1
        self._next_LE, self._future_LE = self._future_LE, None
        self._said.clear()
        self._likely.clear()
        if self._told:
            self._timed(lambda: self.predictor.begin_step(rows))

    def upcoming(self, layer: int) -> Floats | None:
        if not self._told or not self.on:
            return None
        chance_E = self._timed(lambda: self.predictor.upcoming(layer))
        if self._compares and chance_E is not None:
            self._said[layer] = chance_E
            if self._resident is not None:
                likely_E = (chance_E >= self._least) & ~self._resident(layer)
                self._likely[layer] = self._likely[layer] | likely_E if layer in self._likely else likely_E
        return chance_E

    def future(self) -> Floats | None:
        if not self._told or not self.on:
            return None
        future_LE = self._timed(self.predictor.future)
        if future_LE is not None and self._steps % MEASURED_STEP == 0:  # the next one is compared
            self._future_LE = future_LE.copy()
        return future_LE

    def next_of(self, request_id: str) -> Floats | None:
        """Asked between steps, for other ends than reading: it does not count here."""
        return self.predictor.next_of(request_id) if self._told else None

    def routed(self, layer: int, ids_TK: Array) -> None:
        if self._compares:
            self._compare(layer, ids_TK)
        if self._told:
            self._timed(lambda: self.predictor.routed(layer, ids_TK))

    def end_step(self) -> None:
        if self._told:
            self._timed(self.predictor.end_step)
        self._close()

    def forget(self, request_id: str) -> None:
        self._timed(lambda: self.predictor.forget(request_id))

    def _timed(self, call: Callable[[], _Result]) -> _Result:
        begun = time.perf_counter_ns()
        try:
            return call()
        finally:
            self._ns += time.perf_counter_ns() - begun

    def _compare(self, layer: int, ids_TK: Array) -> None:
        said_E = self._said.pop(layer, None)
        if said_E is None and self._next_LE is not None:
            said_E = self._next_LE[layer]
        if said_E is None:
            return
        used_E = np.zeros(len(said_E), dtype=bool)
        used_E[ids_TK[ids_TK >= 0]] = True
        used = int(used_E.sum())
        right = used_E[np.argsort(-said_E, kind="stable")[: 2 * used]].cumsum()
        figures = self._measured
        figures.used += used
        if used:
            figures.right_k += int(right[used - 1])
            figures.right_2k += int(right[-1])
        if (likely_E := self._likely.pop(layer, None)) is not None:
            figures.likely += int(likely_E.sum())
            figures.likely_used += int((likely_E & used_E).sum())

    def _close(self) -> None:
        """The end of a step: what it brought and took."""
        if not self._open:
            return
        self._open = False
        figures = self._measured
        figures.fade()
        figures.ns += self._ns
        figures.tokens += self._tokens
        figures.read_bytes += self._read_bytes
        figures.used_bytes += self._used_bytes
        spent_ns = self._ns + round(self._delay_bytes * self.ns_per_byte)
        self._switch.step(round(self._hidden_bytes * self.ns_per_byte), spent_ns)
        self._ns = self._tokens = self._read_bytes = self._used_bytes = self._hidden_bytes = self._delay_bytes = 0
