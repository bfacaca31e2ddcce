"""Moves that start before the router has spoken: planned from the layer's last counts, corrected by re-splitting alone.

The weights of such an early plan travel while attention runs. When the counts are there, the rows are split anew over
all holders, the newcomers among them, and nothing else moves. Whether that is the faster way is found out by the model
on the counts of the steps so far. Pure: the same calls give the same plans on every rank.

P: ranks, E: experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .model import arrivals, price
from .plan import Plan, chunks_needed, native
from .problem import Integers, Problem

MEMORY = 4
"""A comparison of the two ways forgets one of so many parts of what the ones before have shown."""
PLANNING_SHARE = 50
"""Plans that nobody follows are made so often that they take one of so many parts of the layers' time."""


class EarlyPlans:
    """One layer's plans, made in time or early.

    In each step that plans its layers call `begin` when weights can set out, then `plan` when the counts are known.

    Args:
        planner: makes plans, with their modelled and native times; where there is room for no guests, it splits rows.
    """

    def __init__(self, planner: Callable[[Problem], Plan]) -> None:
        self.saved_ns = 0
        """By how much early moves were faster by the model, in the last comparisons, older ones counting less."""
        self.gap_ns = 0
        """How long weights that set out early travel before the counts are known, as all ranks agreed last."""
        self._planner = planner
        self._seen: tuple[Integers, tuple[int, ...]] | None = None  # the last counts, of so many tokens of each rank
        self._tokens_P: tuple[int, ...] | None = None
        self._early: Plan | None = None
        self._owed_ns = 0  # so much time of the layer must pass until a plan for comparison is made again

    @property
    def pays(self) -> bool:
        """Whether moves start early; not before the model has once shown it."""
        return self.saved_ns > 0

    def begin(self, tokens_P: Sequence[int], problem_of: Callable[[Integers], Problem]) -> Plan | None:
        """The plan whose transfers start now, in a step of so many tokens; None when none do.

        `problem_of` gives the layer's problem for rows [P, E].
        """
        self._tokens_P = tuple(tokens_P)
        self._early = None
        if self.pays and self._seen is not None:
            expected_PE = expected_rows(*self._seen, self._tokens_P)
            self._early = early_plan(problem_of(expected_PE), self._planner, self.gap_ns)
        return self._early if self._early is not None and self._early.transfers else None

    def plan(self, problem: Problem, gap_ns: int) -> Plan:
        """The layer's plan for its counts. After an early one it has that one's transfers and no others.

        `gap_ns` is what weights could travel between the last calls of `begin` and `plan`, agreed by all ranks.
        """
        self.gap_ns = gap_ns
        tokens_P, self._tokens_P = self._tokens_P, None
        early, self._early = self._early, None
        if tokens_P is None:
            return self._planner(problem)
        seen, self._seen = self._seen, (problem.rows_PE, tokens_P)
        due, planning_ns = self._owed_ns <= 0, problem.rates.plan_ns
        if early is not None and early.transfers:
            plan = corrected(problem, early, self._planner, gap_ns)
            if due:
                self._compare(plan.modelled_ns, self._planner(problem).modelled_ns, planning_ns)
            elif plan.modelled_ns > plan.native_ns:  # a plan in time is never slower than none
                self._compare(plan.modelled_ns, plan.native_ns, 0)
        else:
            plan = self._planner(problem)
            cost_ns = 0
            if early is None and due and seen is not None:
                expected_PE = expected_rows(*seen, tokens_P)
                early = early_plan(replace(problem, rows_PE=expected_PE), self._planner, gap_ns)
                cost_ns = 2 * planning_ns
            if early is not None:
                early_ns = plan.modelled_ns + planning_ns
                if early.transfers:
                    early_ns = corrected(problem, early, self._planner, gap_ns).modelled_ns
                self._compare(early_ns, plan.modelled_ns, cost_ns)
        self._owed_ns -= plan.modelled_ns
        return plan

    def _compare(self, early_ns: int, late_ns: int, cost_ns: int) -> None:
        """What the two ways take for the same counts; finding out took `cost_ns`."""
        self.saved_ns += late_ns - early_ns - self.saved_ns // MEMORY
        if cost_ns:
            self._owed_ns = cost_ns * PLANNING_SHARE


def expected_rows(rows_PE: Integers, then_P: Sequence[int], now_P: Sequence[int]) -> Integers:
    """[P, E] rows of a step of `now_P` tokens, if they choose as those of an earlier step of `then_P` did. A rank that
    had none then chooses like all others together.

    >>> expected_rows(np.array([[6, 2], [0, 0]]), [4, 0], [2, 8]).tolist()
    [[3, 1], [12, 4]]
    """
    then, now = (np.array(tokens, dtype=np.int64)[:, None] for tokens in (then_P, now_P))
    own_PE = rows_PE * now // np.maximum(then, 1)
    all_PE = rows_PE.sum(0) * now // max(1, int(then.sum()))
    return np.where(then > 0, own_PE, all_PE)


def early_plan(problem: Problem, planner: Callable[[Problem], Plan], gap_ns: int) -> Plan:
    """What to move for the expected rows: whole experts, each from a rank that has it between steps.

    Nobody passes on what it got, which would have to wait until the layer runs. What then would come after the time by
    which the planner would be through with the layer stays where it is.
    """
    plan = planner(replace(_hiding(problem, gap_ns), most_parts=1))
    useful = []
    for t in plan.transfers:
        assert t.parts == 1, f"{plan.planner} cuts an expert that cannot be cut"
        if plan.rows_EP[t.expert, t.destination]:
            source = t.source if problem.holds_PE[t.source, t.expert] else int(problem.home_E[t.expert])
            useful.append(replace(t, source=source))
    rows_EP, transfers = plan.rows_EP.copy(), []
    for t, arrival_ns in zip(useful, arrivals(problem, replace(plan, transfers=tuple(useful))), strict=True):
        if arrival_ns <= plan.modelled_ns + gap_ns + problem.rates.hidden_ns:
            transfers.append(t)
        else:
            rows_EP[t.expert, problem.home_E[t.expert]] += rows_EP[t.expert, t.destination]
            rows_EP[t.expert, t.destination] = 0
    return replace(plan, rows_EP=rows_EP, transfers=tuple(transfers))


def corrected(problem: Problem, early: Plan, planner: Callable[[Problem], Plan], gap_ns: int) -> Plan:
    """The plan for the exact counts whose transfers are those of the early one, with `modelled_ns` and `native_ns`.

    Rows stay at home, go over all holders as the planner splits them, newcomers too, or as the early plan split those
    that it expected, whichever is fastest. The time includes that of planning twice, and it is not over before all
    transfers are.
    """
    holds_PE = problem.holds_PE.copy()
    for t in early.transfers:
        holds_PE[t.destination, t.expert] = 1
    split = planner(replace(problem, holds_PE=holds_PE, room_P=np.zeros_like(problem.room_P), most_parts=1))
    assert not split.transfers, f"{split.planner} moves an expert where there is no room"
    arrived_ns = max(arrivals(problem, early), default=0) - problem.rates.hidden_ns - gap_ns
    home = replace(native(problem), transfers=early.transfers)
    ways = [(max(split.native_ns, arrived_ns), home)]  # where the experts are does not change it
    rows_EP = _in_shares(problem, early)
    alike = replace(early, rows_EP=rows_EP, chunks=chunks_needed(problem, rows_EP.sum(0)))
    for way in (split, alike):
        if not way.is_native:
            moving = replace(way, transfers=early.transfers)
            ways.append((max(price(_hiding(problem, gap_ns), moving), arrived_ns), moving))
    best_ns, best = min(ways, key=lambda way: way[0])
    return replace(best, modelled_ns=best_ns + problem.rates.plan_ns, native_ns=split.native_ns)


def _in_shares(problem: Problem, early: Plan) -> Integers:
    """[E, P] the problem's rows, each expert's in the shares of the early plan; at home where that expected none."""
    loads_E, expected_E = problem.loads_E, early.rows_EP.sum(1)
    ends_EP = early.rows_EP.cumsum(1) * loads_E[:, None] // np.maximum(expected_E, 1)[:, None]
    rows_EP = np.diff(ends_EP, axis=1, prepend=0)
    none_E = np.flatnonzero(expected_E == 0)
    rows_EP[none_E, problem.home_E[none_E]] = loads_E[none_E]
    return rows_EP


def _hiding(problem: Problem, gap_ns: int) -> Problem:
    """The problem of transfers that are under way for so long before the experts can begin."""
    rates = problem.rates
    return replace(problem, rates=replace(rates, hidden_ns=rates.hidden_ns + gap_ns))
