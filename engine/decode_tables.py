"""Tables for steps too short to make plans of their own: planned between steps from the last window's counts.

W of those steps make a window. Where an expert has several holders, the ranks then tell each other what their tokens
chose in it, and plan new tables for some layers, one after the other between the next steps: for so many, in turn, that
planning takes a fiftieth of the time. A table is read on the device; nothing in a step waits for it.

P: ranks, E: experts, Q: places of tokens.
"""

from __future__ import annotations

import time
from collections import deque
from hashlib import blake2b

import numpy as np
import torch

from ..scheduler.balance.places import PLACES
from ..scheduler.balance.problem import PS, Integers
from ..scheduler.balance.window import Window, table_ns
from ..scheduler.step_plan import StepPlan
from .balance import Balancer
from .balanced_layer import BalancedLayer

WINDOW_STEPS = 64
PLANNING_SHARE = 50
_MOST_US = 2**31 - 1


class DecodeTables:
    """The tables of one engine's layers. The same on every rank of the group: made from the same counts, at the same
    step.

    Args:
        top_k: experts per token.
        length: W.
    """

    def __init__(self, balancer: Balancer, top_k: int, length: int = WINDOW_STEPS) -> None:
        self.digest = 0
        """Of all tables that were ever in force: it travels with the step's plan."""
        self._balancer = balancer
        self._top_k = top_k
        self._length = length
        self._layers = [balancer.layers[index] for index in sorted(balancer.layers)]
        self._windows = {
            layer.index: Window(1, len(layer.home_E), balancer.group.size, length) for layer in self._layers
        }
        self._turns = list(self._layers)
        """Who waited longest for a table first."""
        self._due: deque[tuple[BalancedLayer, Integers, int]] = deque()
        self._pause = self._since = 0  # steps between two tables, steps since the last one
        self._planned, self._plan_ns, self._step_ns = 0, 0, balancer.group.progress.step_ns
        # Counts when the window began, plus those of other steps since; counts before a step that is another.
        self._base: torch.Tensor | None = None
        self._mark: torch.Tensor | None = None
        self._steps = self._rows = self._all_steps = 0

    def advance(self, plan: StepPlan) -> None:
        """Before a step with this plan runs, on every rank."""
        self._since += 1
        if self._due and self._since > self._pause:
            self._since = 0
            self._renew(*self._due.popleft())
        choosing = [layer for layer in self._turns if layer.has_choice]
        if not choosing:
            self._restart()
            return
        if self._base is None:
            self._begin()
        assert self._base is not None
        if self._mark is not None:  # a step with plans of its own: what its tokens chose is not these steps'
            self._base += self._counts() - self._mark
            self._mark = None
        if self._steps >= self._length and not self._due:
            if self._can_pay():
                self._exchange(choosing)
            self._begin()
        self._all_steps += 1
        if plan.balanced:
            self._mark = self._counts()
        else:
            self._steps += 1
            self._rows += sum(plan.tokens_P) * self._top_k

    def guest_left(self, index: int, rank: int, expert: int) -> None:
        """A guest goes: a table that sends rows there sends them home from now on."""
        layer, window = self._balancer.layers[index], self._windows[index]
        if window.withdraw(0, rank, expert, int(layer.home_E[expert])) and layer.table_PEQ is not None:
            self._publish(layer, window.table(0))

    def clear(self) -> None:
        """Every layer's rows go to the nearest homes, and the window begins anew."""
        self._due.clear()
        self._restart()
        for layer in self._layers:
            self._windows[layer.index].clear()
            if layer.table_PEQ is not None:
                self._publish(layer, None)

    # The window

    def _restart(self) -> None:
        self._base = self._mark = None

    def _begin(self) -> None:
        self._base = self._counts()
        self._steps = self._rows = self._all_steps = 0
        self._step_ns = self._balancer.group.progress.step_ns

    def _counts(self) -> torch.Tensor:
        """This rank's tokens for each expert of all layers since the start, on the device."""
        return torch.cat([layer.counts() for layer in self._layers])

    def _can_pay(self) -> bool:
        """Whether tables for the window's rows could be worth the exchange and the planning: all work on one rank
        against all spread evenly.
        """
        rates, ranks = self._balancer.rates, self._balancer.group.size
        streamings = min(self._rows, self._steps * max(len(layer.home_E) for layer in self._layers))
        work_ps = max(rates.expert_ps * streamings, max(rates.row_ps, rates.wire_ps) * self._rows)
        return work_ps * (ranks - 1) // ranks > rates.plan_ns * PS

    def _exchange(self, choosing: list[BalancedLayer]) -> None:
        """All ranks' counts of the window; those whose turn it is get new tables."""
        assert self._base is not None
        sizes = [len(layer.home_E) for layer in self._layers]
        window = dict(zip(self._windows, (self._counts() - self._base).split(sizes), strict=True))
        mine = torch.cat([window[layer.index] for layer in choosing]).to("cpu", torch.int32)
        step_us = (self._balancer.group.progress.step_ns - self._step_ns) // self._all_steps // 1000
        plan_us = self._plan_ns // max(1, self._planned) // 1000
        times = torch.tensor([min(step_us, _MOST_US), min(plan_us, _MOST_US)], dtype=torch.int32)
        counts = self._balancer.group.all_gather_counts(torch.cat([times, mine]))
        self._pause = pause(int(counts[:, 0].min()), int(counts[:, 1].max()), self._length)
        self._since = self._pause
        parts = counts[:, 2:].split([len(layer.home_E) for layer in choosing], dim=1)
        for layer, rows_PE in list(zip(choosing, parts, strict=True))[: self._length // (self._pause + 1)]:
            self._due.append((layer, rows_PE.numpy().astype(np.int64), self._steps))
            self._turns.remove(layer)
            self._turns.append(layer)

    # Tables

    def _renew(self, layer: BalancedLayer, rows_PE: Integers, steps: int) -> None:
        """A table for the rows of so many steps, if it is better than the one in force and than the nearest homes."""
        if not layer.has_choice:
            return
        started = time.perf_counter_ns()
        window = self._windows[layer.index]
        problem = self._balancer.problem(layer, rows_PE)
        window.add(0, rows_PE)
        for _ in range(steps - 1):  # only the sum over the window is known
            window.add(0, np.zeros_like(rows_PE))
        window.renew(0, problem)
        table = window.table(0)
        if table is not None:  # which it has compared with the first home of each expert
            near_ns = table_ns(problem, np.repeat(layer.nearest_PE[..., None], PLACES, axis=2), steps)
            if (near_ns - table_ns(problem, table, steps)) * 100 <= near_ns:
                table = None
        if table is not layer.table_PEQ:
            self._publish(layer, table)
            self._balancer.figures.tables += table is not None
        self._plan_ns += time.perf_counter_ns() - started
        self._planned += 1

    def _publish(self, layer: BalancedLayer, table_PEQ: Integers | None) -> None:
        layer.publish(table_PEQ)
        text = repr((self.digest, layer.index)).encode() + (b"" if table_PEQ is None else table_PEQ.tobytes())
        self.digest = int.from_bytes(blake2b(text, digest_size=7).digest(), "big")


def pause(step_us: int, plan_us: int, length: int) -> int:
    """Steps between two tables, so that planning takes `1 / PLANNING_SHARE` of the time; one table in a window of
    `length` steps is made in any case, and no more while a time is not known (0).

    >>> pause(20_000, 4_000, 64), pause(20_000, 300, 64), pause(100, 300, 64), pause(20_000, 0, 64)
    (9, 0, 63, 63)
    """
    if not step_us or not plan_us:
        return length - 1
    return min(length, -(-plan_us * PLANNING_SHARE // step_us)) - 1
