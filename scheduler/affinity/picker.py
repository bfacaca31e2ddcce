"""The picker that the batching scheduler asks: which requests decode in this step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..requests import Request
from .choice import choose
from .ready import Bools, Integers, Ready
from .ways import WAYS


@dataclass(kw_only=True)
class AffinityPicker:
    """Runs those together that share missing experts; a request is passed over `most_waits` times at most, or as often
    as the order of service makes it wait where that is more.

    `predict` gives [X] booleans, the experts that a request's next token will probably use; `missing_bytes` gives [X]
    bytes, 0 for the experts that are resident now. The other values are those of `Ready`. `steps` counts the steps
    picked, `changed` those that were not in order, and `saved_ns` what these save by the model.
    """

    predict: Callable[[Request], Bools]
    missing_bytes: Callable[[], Integers]
    most: int
    most_waits: int
    read_fs_per_byte: int
    step_ns: int = 0
    ways: tuple[str, ...] = tuple(WAYS)
    steps: int = 0
    changed: int = 0
    saved_ns: int = 0

    def pick(self, ready: Sequence[Request]) -> tuple[str, ...]:
        if len(ready) <= self.most:  # all run, whatever they need
            self.steps += 1
            return tuple(request.id for request in ready)
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
        self.steps += 1
        self.changed += choice.way != "in-order"
        self.saved_ns += choice.total_in_order_ns - choice.total_ns
        return tuple(ready[row].id for row in choice.rows)
