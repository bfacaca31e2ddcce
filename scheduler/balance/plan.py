"""A balancing plan: the rows that each rank computes of each expert, and what moves for it: weights, shared tokens.

P: ranks, E: experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from .problem import Integers, Problem


class BadPlan(ValueError):
    """A plan breaks a rule: it would lose rows, or ask for what is not there."""


@dataclass(frozen=True, order=True)
class Transfer:
    """Weights of `expert` go from `source` to `destination`: all, or column part `part` of `parts` equal ones.

    A part is 1/parts of the expert's intermediate columns: its rows of the gate and up projections and its columns of
    the down projection. The parts' outputs add up to the expert's.
    """

    expert: int
    source: int
    destination: int
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, order=True)
class SharedMove:
    """The shared experts of so many `tokens` of the rank `source`, its last ones, are computed by `destination`."""

    source: int
    destination: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Who computes what in one layer of one step. The same on every rank; all integers.

    `rows_EP[e, p]` rows of expert e are computed by rank p, with the whole expert, held or transferred. The
    `sliced_E[e]` rows of expert e are computed by all ranks of its slice group: those that the transfers with
    `parts > 1` bring a part to, at most one group per expert, which has every part once.

    `transfers` are sent in this order by each link. A source holds the expert, or gets all of it by an earlier
    transfer. `chunks` is the number of parts into which the tokens are cut because of memory. `shared` is in order.
    """

    planner: str
    rows_EP: Integers
    sliced_E: Integers
    transfers: tuple[Transfer, ...] = ()
    chunks: int = 1
    modelled_ns: int = 0
    native_ns: int = 0
    bound_ns: int = 0
    shared: tuple[SharedMove, ...] = ()

    @property
    def is_native(self) -> bool:
        """Whether the plan is to do nothing."""
        return self.at_home and not self.shared

    @property
    def at_home(self) -> bool:
        """Whether every expert's rows are computed at its home."""
        return self.planner == "native"

    @property
    def digest(self) -> int:
        """A number of 31 bits that travels with the next exchange; what the plan does, not how it was found."""
        text = (
            self.rows_EP.tobytes() + self.sliced_E.tobytes() + repr((self.transfers, self.chunks, self.shared)).encode()
        )
        return int.from_bytes(blake2b(text, digest_size=4).digest(), "big") & 0x7FFFFFFF

    def moved_bytes(self, problem: Problem) -> int:
        return sum(part_bytes(problem.expert_bytes, t.parts) for t in self.transfers)

    def segments(self, expert: int) -> list[tuple[int, int]]:
        """(rank, rows) of what is computed with the whole expert."""
        return [(int(p), int(self.rows_EP[expert, p])) for p in np.flatnonzero(self.rows_EP[expert])]

    def group(self, expert: int) -> list[int]:
        """The ranks of an expert's slice group, in order of parts; empty without one."""
        return [t.destination for t in sorted(self.transfers) if t.expert == expert and t.parts > 1]


def native(problem: Problem) -> Plan:
    """Every expert at its home: plain expert parallelism."""
    rows_EP = np.zeros((problem.experts, problem.ranks), dtype=np.int64)
    rows_EP[np.arange(problem.experts), problem.home_E] = problem.loads_E
    return Plan(
        "native", rows_EP, np.zeros(problem.experts, dtype=np.int64), chunks=chunks_needed(problem, rows_EP.sum(0))
    )


def part_bytes(expert_bytes: int, parts: int) -> int:
    """Bytes of one of `parts` column parts."""
    return -(-expert_bytes // parts)


def chunks_needed(problem: Problem, rows_P: Sequence[int] | Integers) -> int:
    """Parts into which the tokens must be cut so that no rank gets more rows at a time than fit."""
    return int(max(1, (-(-np.asarray(rows_P) // problem.most_rows_P)).max(initial=1)))


def received_rows(plan: Plan) -> Integers:
    """[P] rows that arrive at each rank, of whole and of sliced experts."""
    rows_P = plan.rows_EP.sum(0)
    for transfer in plan.transfers:
        if transfer.parts > 1:
            rows_P[transfer.destination] += plan.sliced_E[transfer.expert]
    return rows_P


def check(problem: Problem, plan: Plan) -> None:
    """Raises BadPlan naming the first rule that the plan breaks: each row once, weights where they are needed, each
    transfer once and of use, memory.
    """
    if (plan.rows_EP < 0).any() or (plan.sliced_E < 0).any():
        raise BadPlan("rows below 0")
    wrong = np.flatnonzero(plan.rows_EP.sum(1) + plan.sliced_E != problem.loads_E)
    if len(wrong):
        e = int(wrong[0])
        raise BadPlan(f"expert {e} has {problem.loads_E[e]} rows; {plan.rows_EP[e].sum() + plan.sliced_E[e]} planned")
    has_PE = problem.holds_PE.astype(bool)  # a copy
    bytes_P = np.zeros(problem.ranks, dtype=np.int64)
    groups: dict[int, list[Transfer]] = {}
    for t in plan.transfers:
        if not has_PE[t.source, t.expert]:
            raise BadPlan(f"{t}: the source does not have the expert")
        if has_PE[t.destination, t.expert]:
            raise BadPlan(f"{t}: the destination has the expert already")
        bytes_P[t.destination] += part_bytes(problem.expert_bytes, t.parts)
        if t.parts == 1:
            if t.part:
                raise BadPlan(f"{t}: a whole expert is part 0")
            has_PE[t.destination, t.expert] = True
        else:
            groups.setdefault(t.expert, []).append(t)
    for e, group in groups.items():
        if sorted(t.part for t in group) != list(range(group[0].parts)) or len({t.parts for t in group}) > 1:
            raise BadPlan(f"expert {e}: a slice group has every part once")
        if len({t.destination for t in group}) < len(group):
            raise BadPlan(f"expert {e}: two parts on one rank")
        if not plan.sliced_E[e]:
            raise BadPlan(f"expert {e}: parts move for no rows")
        if any(has_PE[t.destination, e] for t in group):
            raise BadPlan(f"expert {e}: a part goes where the whole expert is")
    for e in np.flatnonzero(plan.sliced_E).tolist():
        if e not in groups:
            raise BadPlan(f"expert {e} has sliced rows and no parts")
    lost = np.argwhere((plan.rows_EP > 0) & ~has_PE.T)
    if len(lost):
        raise BadPlan(f"rank {lost[0][1]} is to compute expert {lost[0][0]}, which it does not have")
    if (bytes_P > problem.room_P).any():
        p = int(np.flatnonzero(bytes_P > problem.room_P)[0])
        raise BadPlan(f"rank {p} has room for {problem.room_P[p]} bytes of guests; {bytes_P[p]} planned")
    _check_shared(problem, plan)
    if plan.chunks < chunks_needed(problem, received_rows(plan)):
        raise BadPlan(f"{plan.chunks} chunks; {chunks_needed(problem, received_rows(plan))} are needed")


def _check_shared(problem: Problem, plan: Plan) -> None:
    sources, destinations = {m.source for m in plan.shared}, {m.destination for m in plan.shared}
    if sources & destinations:
        raise BadPlan(f"rank {min(sources & destinations)} gives shared tokens away and gets some")
    if any(m.tokens < 1 for m in plan.shared):
        raise BadPlan("a move of no shared tokens")
    pairs = [(m.source, m.destination) for m in plan.shared]
    if pairs != sorted(set(pairs)):
        raise BadPlan("moves of shared tokens are not in order, each once")
    for p in sorted(sources):
        tokens = sum(m.tokens for m in plan.shared if m.source == p)
        if tokens > problem.tokens_P[p]:
            raise BadPlan(f"rank {p} has {problem.tokens_P[p]} shared tokens; {tokens} planned to go elsewhere")
