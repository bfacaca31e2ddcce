"""Recorded routing through a residency policy: what it hits, reads and copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from .slots import Context, Decision, Place, Policy


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Sums over the events of a replay; all but the steps count experts."""

    steps: int
    hits: int
    misses: int
    """Read from where they are, to be run there or to be copied."""
    copies: int
    """Into a slot."""
    used: int
    """Copies that were hit before they were evicted, or before the trace's end."""

    @property
    def touched(self) -> int:
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        return self.hits / self.touched if self.touched else 0.0


def replay(
    policy: Policy,
    topk_TLK: npt.NDArray[Any],
    scores: Callable[[int], npt.NDArray[Any]] | None = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> Tally:
    """Runs the trace [T steps, L layers, K] (-1: none) from its beginning; each (step, layer) is one event.

    Args:
        scores: of a step the predicted use [L, E] after it; for policies that use a predictor.
        progress: is told numbers of finished steps, from time to time.
    """
    hits = misses = copies = used = told = 0
    fresh: set[Place] = set()

    def moved(decision: Decision) -> int:
        fresh.difference_update(decision.evicted)
        fresh.update(decision.admitted)
        return len(decision.admitted)

    for step, ids_LK in enumerate(topk_TLK.tolist()):
        context = Context(step=step)
        for layer, ids in enumerate(ids_LK):
            decision = policy.step(layer, [i for i in ids if i >= 0], context)
            hits += len(decision.hits)
            misses += len(decision.misses)
            if fresh:
                first = fresh.intersection([(layer, expert) for expert in decision.hits])
                used += len(first)
                fresh.difference_update(first)
            if decision.admitted:
                copies += moved(decision)
        if scores is not None:
            context = Context(step=step, scores_LE=scores(step))
        copies += moved(policy.settle(context))
        if step - told >= 255:
            progress(step + 1 - told)
            told = step + 1
    progress(len(topk_TLK) - told)
    return Tally(steps=len(topk_TLK), hits=hits, misses=misses, copies=copies, used=used)


def excess_closed(misses: int, lru: int, least: int) -> float:
    """How much of LRU's misses over the least possible ones a policy avoids: 0 is LRU, 1 is the least possible."""
    return (lru - misses) / (lru - least) if lru != least else float(misses == least)
