"""The pickers that the batching scheduler asks: which requests decode in this step, where not all may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..requests import Request
from .choice import choose
from .ready import Bools, Integers, Ready
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
    """Runs those together that share missing experts; a request is passed over `most_waits` times at most, or as often
    as the order of service makes it wait where that is more.

    `predict` gives [X] booleans, the experts that a request's next token will probably use; `missing_bytes` gives [X]
    bytes, 0 for the experts that are resident now. The other values are those of `Ready`. `changed` counts the steps
    that were not in order, and `saved_ns` what these save by the model, each its share of the schedule that it begins.
    """

    predict: Callable[[Request], Bools]
    missing_bytes: Callable[[], Integers]
    most_waits: int
    read_fs_per_byte: int
    step_ns: int = 0
    ways: tuple[str, ...] = tuple(WAYS)
    changed: int = 0
    saved_ns: int = 0

    def _rows(self, ready: Sequence[Request]) -> Sequence[int]:
        choice = choose(
            Ready(
                needs_RX=np.stack([self.predict(request) for request in ready]),
                missing_bytes_X=self.missing_bytes(),
                passed_over_R=np.array([request.passed_over for request in ready], dtype=np.int64),
                most=self.most,
                most_waits=self.most_waits,
                read_fs_per_byte=self.read_fs_per_byte,
                step_ns=self.step_ns,
            ),
            self.ways,
        )
        self.changed += choice.way != "in-order"
        self.saved_ns += (choice.total_in_order_ns - choice.total_ns) // len(choice.schedule)
        return choice.rows
