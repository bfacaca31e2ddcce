"""The local search behind `window`: which rank computes which places of an expert.

A place is an eighth of the rows that one source has for an expert. Loads are in eighths of a row, so that the load of
a place is its source's rows. P: ranks, E: experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from .problem import Integers, Problem
from .resplit import balance
from .whole import holders

PLACES = 8
"""A token's place is its index in its rank's batch, modulo this."""

_SPREAD = (0, 4, 2, 6, 1, 5, 3, 7)
"""The order in which places are given out: the ranks take turns, also in the first few places."""
_STEPS = 300
"""Most improvements of a search, as in TEMPO."""
_TRIES = 4_000
"""Most moves that a search looks at in chains."""
_DEPTH = 3
"""Most moves in a chain."""
_SWEEPS = 16
"""Of edge balance: it is finer than places by then."""


class Places:
    """Where the places of each expert with rows are, and what that makes each rank stream and compute."""

    def __init__(self, problem: Problem, steps: int) -> None:
        self.problem, self.holders_E = problem, holders(problem.holds_PE)
        self.full = PLACES * steps  # an expert that is streamed in every step
        self.expert_ps, self.row_ps = problem.rates.expert_ps, max(problem.rates.row_ps, problem.rates.wire_ps)
        self.home_E: list[int] = problem.home_E.tolist()
        self.node_P: list[int] = problem.node_P.tolist()
        self.rows_EP: list[list[int]] = problem.rows_PE.T.tolist()  # of a source, and so the load of one of its places
        ranks = problem.ranks
        self.streams_P, self.rows_P = [0] * ranks, [0] * ranks
        self.experts_P: list[dict[int, int]] = [{} for _ in range(ranks)]  # expert -> load
        self.places: dict[tuple[int, int], list[int]] = {}  # (expert, rank) -> places of each source
        for e, rows_P in enumerate(self.rows_EP):
            if any(rows_P):
                self.places[e, self.home_E[e]] = [PLACES] * ranks
                self.put(e, self.home_E[e], PLACES * sum(rows_P))
        self.tries = _TRIES

    def ps(self, rank: int, more_streams: int = 0, more_rows: int = 0) -> int:
        return max(
            self.expert_ps * (self.streams_P[rank] + more_streams), self.row_ps * (self.rows_P[rank] + more_rows)
        )

    def ps_with(self, rank: int, expert: int, load: int) -> int:
        """The rank's time with that much more, or less, of an expert."""
        here = self.experts_P[rank].get(expert, 0)
        return self.ps(rank, min(here + load, self.full) - min(here, self.full), load)

    def peak(self) -> int:
        return max(map(self.ps, range(len(self.rows_P))), default=0)

    def put(self, expert: int, rank: int, load: int) -> None:
        """More of an expert, or less; its places are not changed."""
        experts = self.experts_P[rank]
        here = experts.pop(expert, 0)
        if here + load:
            experts[expert] = here + load
        self.streams_P[rank] += min(here + load, self.full) - min(here, self.full)
        self.rows_P[rank] += load

    def move_places(self, expert: int, source: int, rank: int, moved_P: Sequence[int]) -> None:
        old = self.places[expert, source]
        left = [here - n for here, n in zip(old, moved_P, strict=True)]
        if any(left):
            self.places[expert, source] = left
        else:
            del self.places[expert, source]
        there = self.places.get((expert, rank), [0] * len(left))
        self.places[expert, rank] = [here + n for here, n in zip(there, moved_P, strict=True)]

    def give_some(self, expert: int, source: int, rank: int, places_P: Sequence[int], load: int) -> None:
        """Places of an expert, of that load together, go from one rank to another."""
        self.put(expert, source, -load)
        self.put(expert, rank, load)
        self.move_places(expert, source, rank, places_P)

    def even_rows(self) -> None:
        """Rows over all holders, as evenly as places can: edge balance, which no single moves lead to."""
        loads_E = [PLACES * sum(rows_P) for rows_P in self.rows_EP]
        split_EP = balance(loads_E, self.problem.holds_PE, self.home_E, sweeps=_SWEEPS)
        for e, home in enumerate(self.home_E):
            for rank in self.holders_E[e]:
                here = self.experts_P[home].get(e, 0)
                wanted = min(here, int(split_EP[e, rank]))
                if rank == home or not wanted:
                    continue
                places_P, load = self.pick(e, home, rank, wanted)
                if load:
                    self.give_some(e, home, rank, places_P, load)

    def one_by_one(self) -> None:
        """All experts from nothing: by load, each to the holder that is then done first."""
        order = sorted(((e, source) for e, source in self.places), key=lambda x: -self.experts_P[x[1]][x[0]])
        loads = [self.experts_P[source][e] for e, source in order]
        for (e, source), load in zip(order, loads, strict=True):
            self.put(e, source, -load)
        for (e, source), load in zip(order, loads, strict=True):
            stream = min(load, self.full)
            _, _, _, rank = min(
                (self.ps(p, stream, load), self.streams_P[p] + stream, p != source, p) for p in self.holders_E[e]
            )
            self.put(e, rank, load)
            if rank != source:
                self.move_places(e, source, rank, self.places[e, source])

    def search(self) -> None:
        """Steps that make a slowest rank faster and none as slow, until there is none left."""
        for _ in range(_STEPS):
            peak = self.peak()
            slowest = next((p for p in range(len(self.rows_P)) if self.ps(p) == peak), -1)
            if not peak or not (self.give(slowest, peak) or self.chain(slowest, peak)):
                return

    def give(self, slowest: int, peak: int) -> bool:
        """The best single move off the slowest rank."""
        best: tuple[int, int, int, int] = (peak, 0, 0, 0)
        best_places: list[int] = []
        for e, here in sorted(self.experts_P[slowest].items()):
            for rank in self.holders_E[e]:
                if rank == slowest or self.ps(rank) >= peak:
                    continue
                even = {
                    (self.rows_P[slowest] - self.rows_P[rank]) // 2,
                    (self.streams_P[slowest] - self.streams_P[rank]) // 2,
                }
                for wanted in sorted({here, *(n for n in even if 0 < n < here)}):
                    load = wanted
                    if max(self.ps_with(slowest, e, -load), self.ps_with(rank, e, load)) >= best[0]:
                        continue
                    places, load = self.pick(e, slowest, rank, load)
                    ps = max(self.ps_with(slowest, e, -load), self.ps_with(rank, e, load))
                    if (ps, load, e, rank) < best:
                        best, best_places = (ps, load, e, rank), places
        ps, load, e, rank = best
        if ps >= peak:
            return False
        self.give_some(e, slowest, rank, best_places, load)
        return True

    def pick(self, expert: int, source: int, rank: int, load: int) -> tuple[list[int], int]:
        """Places of an expert on `source` of about that load, and their load: `rank`'s own first, then its node's."""
        here_P, rows_P = self.places[expert, source], self.rows_EP[expert]
        here = self.experts_P[source].get(expert, 0)
        if load >= here:
            return here_P, here
        order = sorted(
            (p for p, n in enumerate(here_P) if n and rows_P[p]),
            key=lambda p: (p != rank, self.node_P[p] != self.node_P[rank], -rows_P[p], p),
        )
        picked_P, left = [0] * len(rows_P), load
        for p in order:
            picked_P[p] = min(here_P[p], left // rows_P[p])
            left -= picked_P[p] * rows_P[p]
        # One more of the smallest, if that is nearer.
        smallest = min((p for p in order if picked_P[p] < here_P[p]), key=lambda p: (rows_P[p], p), default=-1)
        if smallest >= 0 and 2 * left > rows_P[smallest]:
            picked_P[smallest] += 1
            left -= rows_P[smallest]
        return (picked_P, load - left) if load - left < here else (here_P, here)  # with those without rows

    def chain(self, slowest: int, peak: int) -> bool:
        """The first chain of moves of whole experts after which all its ranks are below the peak."""
        moves = self.links(slowest, [slowest], peak)
        for e, source, rank in moves:
            self.move_places(e, source, rank, self.places[e, source])
        return bool(moves)

    def links(self, rank: int, path: list[int], peak: int) -> list[tuple[int, int, int]]:
        """Moves that bring `rank`, the last of the path, below the peak; they are made in loads, not in places."""
        for e, load in sorted(self.experts_P[rank].items()):
            if self.ps_with(rank, e, -load) >= peak:
                continue
            for other in self.holders_E[e]:
                if other in path[1:] or other == rank or self.tries <= 0:
                    continue
                self.tries -= 1
                self.put(e, rank, -load)
                self.put(e, other, load)
                if self.ps(other) < peak:
                    return [(e, rank, other)]
                if len(path) < _DEPTH and other != path[0]:
                    rest = self.links(other, [*path, other], peak)
                    if rest:
                        return [(e, rank, other), *rest]
                self.put(e, other, -load)
                self.put(e, rank, load)
        return []

    def go_home(self) -> None:
        """What is away from home for nothing goes back, the smallest loads first."""
        peak = self.peak()
        away = sorted(
            (self.experts_P[p][e], e, p) for e, p in self.places if p != self.home_E[e] and e in self.experts_P[p]
        )
        for load, e, rank in away:
            if self.ps_with(self.home_E[e], e, load) <= peak:
                self.give_some(e, rank, self.home_E[e], self.places[e, rank], load)

    def fill(self, table: Integers) -> Integers:
        """The table of all at home, with what is elsewhere written into it."""
        for e in {e for e, _ in self.places}:
            parts = [(rank, self.places[e, rank]) for rank in self.holders_E[e] if (e, rank) in self.places]
            if parts == [(self.home_E[e], [PLACES] * len(self.rows_P))]:
                continue
            for source in range(len(self.rows_P)):
                ranks = [rank for rank, places_P in parts for _ in range(places_P[source])]
                for turn, rank in zip(_SPREAD, ranks, strict=True):
                    table[source, e, (turn + source + e) % PLACES] = rank
        return table
