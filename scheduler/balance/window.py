"""Tables for decode steps: from the counts of the last window, which holder computes which token's rows of an expert.

A decode step is too short to plan from its own counts. It reads a table that was made off its path and moves nothing:
rows are only divided anew over the ranks that hold an expert by placement or as a kept guest.

P: ranks, E: experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .places import PLACES, Places
from .problem import PS, Integers, Problem


class Window:
    """Counts of each layer since its last table, and the tables.

    The version changes with every table, so that ranks can tell whether they read the same ones. No clock, no
    exchange: ranks that add the same counts have the same tables.

    Args:
        layers, experts, ranks: numbers of them.
        length: steps whose counts make a table.
    """

    def __init__(self, layers: int, experts: int, ranks: int, length: int) -> None:
        if length < 1:
            raise ValueError(f"length is {length}; a window has at least 1 step")
        self.length = length
        self.version = 0
        self._rows_LPE = np.zeros((layers, ranks, experts), dtype=np.int64)
        self._steps_L = [0] * layers
        self._tables: dict[int, Integers] = {}

    def add(self, layer: int, rows_PE: Integers) -> None:
        """One step's counts: the rows that each rank's own tokens have for each expert."""
        self._rows_LPE[layer] += rows_PE
        self._steps_L[layer] += 1

    def due(self, layer: int) -> bool:
        """Whether the layer's window is full: `renew` it."""
        return self._steps_L[layer] >= self.length

    def table(self, layer: int) -> Integers | None:
        """[P, E, 8] the table in force; None while every expert is computed at home."""
        return self._tables.get(layer)

    def renew(self, layer: int, problem: Problem) -> Integers | None:
        """Ends the layer's window. The new table if its modelled step is more than 1 % shorter, else None.

        `problem` says who holds what and what work costs; its rows are replaced by the window's.
        """
        steps = self._steps_L[layer]
        assert steps, f"layer {layer} has no counts"
        problem = replace(problem, rows_PE=self._rows_LPE[layer].copy())
        self._rows_LPE[layer] = 0
        self._steps_L[layer] = 0
        present = self._tables.get(layer)
        old = native_table(problem) if present is None else present
        assert _valid(problem, old), f"layer {layer}: a rank of the table lost its expert; `withdraw` that first"
        new = split_table(problem, steps)
        old_ns, new_ns = table_ns(problem, old, steps), table_ns(problem, new, steps)
        if (old_ns - new_ns) * 100 <= old_ns:
            return None
        self._tables[layer] = new
        self.version += 1
        return new

    def withdraw(self, layer: int, rank: int, expert: int, home: int) -> bool:
        """A guest goes: what the layer's table sends there goes home from now on. Whether that changed the table.

        To be published before the guest's slot is used for anything else.
        """
        table = self._tables.get(layer)
        if table is None or not (table[:, expert] == rank).any():
            return False
        table = table.copy()  # a reader may have the old one
        table[:, expert][table[:, expert] == rank] = home
        self._tables[layer] = table
        self.version += 1
        return True

    def clear(self) -> None:
        """Forgets all counts and tables: experts or ranks have changed."""
        self._rows_LPE[:] = 0
        self._steps_L = [0] * len(self._steps_L)
        self.version += bool(self._tables)
        self._tables.clear()


def native_table(problem: Problem) -> Integers:
    """[P, E, 8] every expert's home."""
    return np.broadcast_to(problem.home_E[None, :, None], (problem.ranks, problem.experts, PLACES)).copy()


def table_ns(problem: Problem, table: Integers, steps: int) -> int:
    """Modelled ns of the slowest rank in a mean step, with rows of `steps` steps, and an eighth of a source's rows in
    each place.

    An expert of which a rank gets less than a row per step is streamed that much less often.
    """
    rows_EP = np.zeros((problem.experts, problem.ranks), dtype=np.int64)
    np.add.at(rows_EP, (np.arange(problem.experts)[None, :, None], table), problem.rows_PE[:, :, None])
    streams_P = np.minimum(rows_EP, PLACES * steps).sum(0)
    rates = problem.rates
    rows_P = rows_EP.sum(0)
    peak = int(np.maximum(rates.expert_ps * streams_P, max(rates.row_ps, rates.wire_ps) * rows_P).max(initial=0))
    return (rates.base_ns if rows_EP.any() else 0) - (-peak // (PLACES * steps * PS))


def split_table(problem: Problem, steps: int) -> Integers:
    """[P, E, 8] for each source rank, expert and place of a token the rank that computes it; it holds the expert.

    The goal is a short mean step of the slowest rank, by `table_ns`. As streaming counts, an expert of few rows is not
    divided: that is how METRO and TEMPO win at decode sizes, and this is TEMPO's way with places for rows. It starts
    from all at home, from the experts by rows, the largest first, each whole to the holder that is then done first,
    and, where rows bind, from even rows. From there,

    1. the slowest rank gives an expert, or as many places of it as make the two ranks even, to another holder;
    2. where that does not help, up to three whole experts change places in a chain;
    3. in the best of the ends, what is away from home for nothing goes back.

    Of the places that move, those whose source is the new rank go first, then those of its node. Never longer than
    all at home, and all at home where nothing is won. On small random problems (the test has some 70) it is never
    longer than the best assignment of whole experts.

    Two experts with a replica each and 10 rows in a step, on a rank that needs as long for an expert as for 100 rows:
    one moves as a whole. With 1,000 rows of one, half of its places do.

    >>> from .problem import Rates
    >>> def example(rows_E):
    ...     return Problem(np.array([rows_E, [0, 0]]), np.ones((2, 2)), np.array([0, 0]), np.array([0, 0]),
    ...         1, np.array([0, 0]), np.array([9999, 9999]), Rates(base_ns=0, expert_ps=100, row_ps=1))
    >>> split_table(example([10, 10]), steps=1)[0].tolist()
    [[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]]
    >>> split_table(example([1000, 0]), steps=1)[0].tolist()
    [[0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]
    """
    assert steps > 0, "a table is made from at least 1 step"
    native = Places(problem, steps)
    native_ps = native.peak()
    if (problem.holds_PE.sum(0) < 2).all() or not native_ps:
        return native_table(problem)
    greedy = Places(problem, steps)
    greedy.one_by_one()
    native.search()
    greedy.search()
    best = min(native, greedy, key=Places.peak)  # the first of equals
    if best.row_ps * max(best.rows_P) == best.peak():
        even = Places(problem, steps)
        even.even_rows()
        even.search()
        best = min(best, even, key=Places.peak)
    if best.peak() >= native_ps:
        return native_table(problem)
    best.go_home()
    return best.fill(native_table(problem))


def _valid(problem: Problem, table: Integers) -> bool:
    return bool(problem.holds_PE[table, np.arange(problem.experts)[None, :, None]].all())
