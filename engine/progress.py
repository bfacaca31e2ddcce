"""Where a rank is, and where its time goes: read by the heartbeat while the main loop computes or waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("attention", "plan", "dispatch", "experts", "combine", "wait", "shared", "move")
"""What a step's time is split into; `wait` is for other ranks, in any exchange."""
MAX_SPANS = 100_000
"""Spans kept while nobody takes them."""

Span = tuple[str, int, int, int, int]


class Progress:
    """The main loop's place: `step`, `layer` (-1 outside of layers) and `phase` ("" outside of a step).

    `totals_ns` sums the time of each phase; while one is inside another, only the inner one counts. With `recording`,
    `spans` collects `(phase, step, layer, start, length)` in nanoseconds of the monotonic clock.
    """

    def __init__(self, recording: bool = False) -> None:
        self.step = 0
        self.layer = -1
        self.phase = ""
        self.recording = recording
        self.totals_ns = dict.fromkeys(PHASES, 0)
        self.step_ns = 0
        """All steps, in phases or not."""
        self.spans: list[Span] = []
        self._inner_ns = 0

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        outer_phase, outer_inner = self.phase, self._inner_ns
        self.phase, self._inner_ns = phase, 0
        start = time.monotonic_ns()
        try:
            yield
        finally:
            length = time.monotonic_ns() - start
            self.totals_ns[phase] += length - self._inner_ns
            self.phase, self._inner_ns = outer_phase, outer_inner + length
            if self.recording and len(self.spans) < MAX_SPANS:
                self.spans.append((phase, self.step, self.layer, start, length))

    def take_spans(self) -> list[Span]:
        spans, self.spans = self.spans, []
        return spans
