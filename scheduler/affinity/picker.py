"""The pickers that the batching scheduler asks: which requests decode in this step, where not all may."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..requests import Request
from .choice import choose
from .ready import Bools, Integers, Ready, Schedule
from .ways import WAYS


@dataclass(kw_only=True)
class InOrder:
    """At most `most` requests decode in a step: those that were passed over longest, then in order of admission.

    `steps` counts the steps picked, `chosen` those in which there were more requests than room, `passed_over` how often
    a request was, and `longest` is how many steps in a row at most.
    """

    most: int
    steps: int = 0
    chosen: int = 0
    passed_over: int = 0
    longest: int = 0

    def pick(self, ready: Sequence[Request]) -> tuple[str, ...]:
        self.steps += 1
        if len(ready) <= self.most:  # all run, whatever they need
            return tuple(request.id for request in ready)
        self.chosen += 1
        rows = frozenset(self._rows(ready))
        left = [request for row, request in enumerate(ready) if row not in rows]
        self.passed_over += len(left)
        self.longest = max([self.longest, *(request.passed_over + 1 for request in left)])
        return tuple(request.id for row, request in enumerate(ready) if row in rows)

    def _rows(self, ready: Sequence[Request]) -> Sequence[int]:
        """Of more requests than there is room for."""
        return sorted(range(len(ready)), key=lambda row: -ready[row].passed_over)[: self.most]


@dataclass(kw_only=True)
class AffinityPicker(InOrder):
    """Runs those together that share missing experts: in rounds, in each of which every request decodes once.

    A round is a schedule, chosen once. When what is left of it does not fill a step, some of the next round fill it up.
    So with n requests and s = ceil(n / most) one is passed over less than 2 s times in a row: early in a round, late in
    the next one.

    `predict` gives [X] booleans, the experts that a request's next token will probably use; `missing_bytes` gives [X]
    bytes, 0 for the experts that are resident now. The other values are those of `Ready`. `changed` counts the steps
    that are not of an order of service, and `saved_ns` what they save by the model.
    """

    predict: Callable[[Request], Bools]
    missing_bytes: Callable[[], Integers]
    read_fs_per_byte: int
    step_ns: int = 0
    ways: tuple[str, ...] = tuple(WAYS)
    changed: int = 0
    saved_ns: int = 0
    _left: list[str] = field(default_factory=list, init=False)
    """Who is to decode in this round, step after step."""
    _ahead: frozenset[str] = field(default=frozenset(), init=False)
    """Who has decoded in the next round already."""
    _way: str = field(default="", init=False)
    _saved_ns: int = field(default=0, init=False)
    """By a step of this round."""

    def pick(self, ready: Sequence[Request]) -> tuple[str, ...]:
        if len(ready) <= self.most:  # all decode
            self._left, self._ahead = [], frozenset()
        return super().pick(ready)

    def _rows(self, ready: Sequence[Request]) -> Sequence[int]:
        row_of = {request.id: row for row, request in enumerate(ready)}
        left = [id for id in self._left if id in row_of]  # some may have ended
        if not left:
            begins = [request for request in ready if request.id not in self._ahead] or ready
            left, self._ahead = [request.id for request in begins], frozenset()
            if len(left) >= self.most:
                left = [begins[row].id for step in self._schedule(begins) for row in step]
        step, self._left = left[: self.most], left[self.most :]
        if len(step) < self.most:
            first = self._schedule(ready, frozenset(step))[0]
            self._ahead = frozenset(ready[row].id for row in first) - frozenset(step)
            step = [ready[row].id for row in first]
        self.changed += self._way != "in-order"
        self.saved_ns += self._saved_ns
        return [row_of[id] for id in step]

    def _schedule(self, ready: Sequence[Request], due: Collection[str] = ()) -> Schedule:
        """Of all these, with those that are due in its first step."""
        steps = -(-len(ready) // self.most)
        passed_over = [steps if r.id in due else min(r.passed_over, steps - 1) for r in ready]
        choice = choose(
            Ready(
                needs_RX=np.stack([self.predict(request) for request in ready]),
                missing_bytes_X=self.missing_bytes(),
                passed_over_R=np.array(passed_over, dtype=np.int64),
                most=self.most,
                most_waits=steps,
                read_fs_per_byte=self.read_fs_per_byte,
                step_ns=self.step_ns,
            ),
            self.ways,
        )
        self._way, self._saved_ns = choice.way, (choice.total_in_order_ns - choice.total_ns) // steps
        return choice.schedule
