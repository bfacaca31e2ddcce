"""One layer's moves that start while attention runs: when they start, and how long they can travel until the counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..scheduler.balance.early import EarlyPlans
from ..scheduler.balance.plan import Plan
from ..scheduler.balance.problem import Integers, Problem

if TYPE_CHECKING:
    from .balance import Balancer
    from .balanced_layer import BalancedLayer

_MOST_US = 2**31 - 1


class EarlyMoves:
    """Makes the plans of a layer, which it may begin before the layer's counts are known. Of each rank in step."""

    def __init__(self, balancer: Balancer, layer: BalancedLayer) -> None:
        self.plans = EarlyPlans(partial(balancer.make, layer))
        self._balancer = balancer
        self._layer = layer
        self._gap = _Stopwatch(balancer.group.device)

    @property
    def gap_us(self) -> int:
        """From `travelling` to `counted` in the last step that had them, on this rank; 0 before the first."""
        return min(self._gap.last_us, _MOST_US)

    def begin(self, tokens_P: Sequence[int]) -> Plan | None:
        """The layer before has ended, or the step begins: the plan whose transfers are to start now, if any."""
        balancer = self._balancer
        started = time.perf_counter_ns()
        plan = self.plans.begin(tokens_P, self._expect)
        balancer.figures.plan_ns += time.perf_counter_ns() - started
        if plan is not None:
            balancer.figures.early += 1
            balancer.last_digest ^= plan.digest ^ self._layer.holders_digest
        return plan

    def _expect(self, rows_PE: Integers) -> Problem:
        self.problem = self._balancer.problem(self._layer, rows_PE)
        """That the last early plan was made for."""
        return self.problem

    def travelling(self) -> None:
        """What starts early has started."""
        self._gap.start()

    def counted(self) -> None:
        """The layer's counts are known."""
        self._gap.stop()

    def plan(self, gap_us: int, problem: Problem) -> Plan:
        """The layer's plan for its counts; `gap_us` is the smallest of all ranks' gaps."""
        return self.plans.plan(problem, gap_us * 1000)


class _Stopwatch:
    """Time on a device between two moments: on a GPU, between what was enqueued at them."""

    def __init__(self, device: torch.device) -> None:
        self.last_us = 0
        """Between the last `start` but one and its `stop`: of a GPU's the last one may not be over."""
        self._cuda = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        self._ns = [0, 0]
        self._stopped = False

    def start(self) -> None:
        if self._stopped:
            self.last_us = self._elapsed_us()
        self._stopped = False
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)
        self._stopped = True

    def _mark(self, which: int) -> None:
        if self._cuda:
            self._events[which].record()
        else:
            self._ns[which] = time.monotonic_ns()

    def _elapsed_us(self) -> int:
        if self._cuda:
            self._events[1].synchronize()
            return round(self._events[0].elapsed_time(self._events[1]) * 1000)
        return (self._ns[1] - self._ns[0]) // 1000
