"""A part of `balance_bound`'s programme: when experts can have left the ranks that hold them, and what that leaves.

Work on an expert elsewhere begins when all of it has left its holders: a whole copy of it, or the last part of its
slice group. Links of holders carry one transfer after the other, so that of a rank's hot experts one leaves after the
other, and the later it is, the less can be done elsewhere.
P: ranks, L: experts with rows, J: pairs of one and a holder.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import NamedTuple, Protocol

import numpy as np

from ..scheduler.balance.model import transfer_ns
from ..scheduler.balance.problem import PS, Integers, Problem

RESOLUTIONS = ((2, (32, 16)), (4, (32, 10)), (12, (24, 6)), (1 << 60, (12, 3)))
"""For up to so many kinds of experts that may leave: into how many are cut the time in which they can leave, and that
between an expert's first leave and its second. More make the bound sharper, and slower.
"""
SHARES = 3
"""Of what a passed-on copy brings of its expert's slice group."""
ENOUGH_KINDS = 16
"""Kinds of experts from which on no more ranks are looked at."""
FINE = 1 << 20


class Rows(Protocol):
    def add(self, limits: Integers, *terms: tuple[Integers, Integers, Integers | int]) -> None: ...


class Departure(NamedTuple):
    """One way to leave. `uses`: by the end of an interval, holders' links were busy for so long (ns of near links);
    then so much work (ps) is done elsewhere at most.
    """

    uses: tuple[tuple[int, int], ...]
    work_ps: int


class Held(NamedTuple):
    """How many ranks hold an expert, and in how many nodes if there are several: 0 if not."""

    ranks: int
    nodes: int


class Leaving:
    """What experts can do elsewhere when they have left by some time, for plans that are done at `ns`."""

    def __init__(self, problem: Problem, ns: int, most_holders: int, intervals: int, gaps: int) -> None:
        rates = problem.rates
        self.problem, self.ns, self.gaps = problem, ns, gaps
        self.row = max(rates.row_ps, rates.wire_ps)
        self.several = len(np.unique(problem.node_P)) > 1
        parts = range(1, min(problem.most_parts, problem.ranks - 1) + 1)
        self.near = [0] + [k * transfer_ns(problem, k, False) for k in parts]  # of all parts together
        self.far = [0] + [k * transfer_ns(problem, k, True) for k in parts]
        self.dearer = min(f * FINE // max(1, n) for n, f in zip(self.near[1:], self.far[1:], strict=True))
        """A far link's time by a near one's, at least, in FINEths."""
        self.usable = self.near[1] > 0 and (not self.several or self.dearer > 0)
        self.last_ns = ns + rates.hidden_ns - rates.guest_ns
        first = self.near[1] // most_holders
        if self.several:
            first = first * self.dearer // (FINE + self.dearer)
        edges = np.linspace(first - 1, max(first, self.last_ns), intervals + 1).astype(np.int64).tolist()
        edges += [at - 1 for at in (n * self.near[1] for n in range(1, intervals)) if at < self.last_ns]
        self.edges: list[int] = sorted(set(edges))
        self.known: dict[tuple[int, Held], list[Departure]] = {}
        self.spreads: dict[Held, list[int]] = {}

    def left_ps(self, at: int) -> int:
        """What a guest that arrives then has time for."""
        rates = self.problem.rates
        return max(0, self.ns - max(0, at - rates.hidden_ns) - rates.guest_ns) * PS

    def copy_ps(self, at: int) -> int:
        """Work of a whole copy that arrives then."""
        left = self.left_ps(at)
        return left if left >= self.problem.rates.expert_ps else 0

    def copies(self, held: Held, first: list[int]) -> list[int]:
        """Work (ps) of whole copies of which the first arrives at each of these times."""
        rates = self.problem.rates
        at = np.add.outer(np.array(first, dtype=np.int64), np.array(self.spread(held), dtype=np.int64))
        left = np.maximum(0, self.ns - np.maximum(0, at - rates.hidden_ns) - rates.guest_ns) * PS
        left[left < rates.expert_ps] = 0
        works: list[int] = left.sum(1).tolist()
        return works

    def spread(self, held: Held) -> list[int]:
        """How long after the first whole copy others come (ns), if all ranks that have one send it on at once, and all
        nodes, as fast as links can be, whatever else they carry. Without holders: what comes of one copy.
        """
        if held not in self.spreads:
            found: list[int] = []
            links = [(0, False)] * held.ranks + [(0, True)] * held.nodes
            if not held.ranks:
                found.append(0)
                links = [(self.near[1], False)] + [(self.far[1], True)] * self.several
            while links and len(found) < self.problem.ranks - held.ranks:
                at, far = heappop(links)
                if at > self.last_ns:
                    break
                found.append(at)
                heappush(links, (at + (self.far if far else self.near)[1], far))
                heappush(links, (at + self.near[1], False))
                if far:  # the first of a node
                    heappush(links, (at + self.far[1], True))
            self.spreads[held] = found
        return self.spreads[held]

    def group(self, load: int, held: Held, at: int, least: int, most: int) -> int:
        """Work (ps) of a slice group of `least` to `most` parts whose last part arrives then."""
        rates, left, work = self.problem.rates, self.left_ps(at), 0
        for parts in range(least, min(most, len(self.near) - 1, self.problem.ranks - held.ranks) + 1):
            if left <= 0 or left * parts < rates.expert_ps:
                continue
            rows = load
            if rates.row_ps:
                rows = min(rows, left * parts // rates.row_ps)
            if rates.wire_ps:
                rows = min(rows, left // rates.wire_ps)
            work = max(work, rows * self.row)
            if rows == load or rates.wire_ps * parts >= rates.row_ps > 0:
                break  # more parts are no more work
        return work

    def ways(self, load: int, held: Held) -> list[Departure]:
        """For an expert of so many rows, held by these: all that may be best."""
        if (load, held) not in self.known:
            self.known[load, held] = self._ways(load, held)
        return self.known[load, held]

    def _ways(self, load: int, held: Held) -> list[Departure]:
        most_parts = min(len(self.near) - 1, self.problem.ranks - held.ranks)
        starts, most, found = self.edges[:-1], load * self.row, []
        one_copy = Held(0, 0)
        whole_ns = self.near[1]

        def kind(busy_ns: int, works: list[int], gap: tuple[int, int] = (0, 0)) -> None:
            """By interval; then, up to `gap[0]` ns later, links were busy for gap[1] more."""
            for i, work in enumerate(works):
                work = min(most, work)
                if work and not (i + 1 < len(works) and works[i + 1] >= most):  # else a later one is as good
                    uses: tuple[tuple[int, int], ...] = ((i, busy_ns),)
                    if gap[1]:
                        end = self.edges[i + 1] + gap[0]
                        at = next((j for j, edge in enumerate(self.edges[1:]) if edge >= end), len(starts) - 1)
                        uses = (*uses, (at, gap[1])) if at > i else ((i, busy_ns + gap[1]),)
                    found.append(Departure(uses, work))

        def later(busy_ns: int, more_ns: int, first: list[list[int]], then: list[list[int]]) -> None:
            """A second leave after each gap, over holders' links."""
            for i in range(self.gaps + 1):
                end = (i + 1) * step if i < self.gaps else self.edges[-1]
                before = max(0, more_ns - end * own // FINE - 1) if i < self.gaps else 0
                works = [a + b if a else 0 for a, b in zip(first[i], then[i], strict=True)]
                kind(busy_ns + before, works, (end, more_ns - before))

        def by_copy(group_ns: int, grouped: list[list[int]]) -> None:
            """One whole copy, the group after a gap. The copy's link brings a share of it, and is late for others."""
            others = FINE + (far_rate if self.several else 0)
            for i in range(self.gaps):
                end = (i + 1) * step
                thirds = [
                    self.copies(held, [at + i * step + wait * whole_ns // 2 for at in starts]) for wait in range(3)
                ]
                for share in range(SHARES):
                    least = i * step * share // SHARES
                    brings = end * (share + 1) * others // (SHARES * FINE) + 1
                    delay = 0 if self.several else least
                    passed_on = max(0, end - (min(self.near[1], self.far[1]) if self.several else self.near[1]) - delay)
                    # In several nodes, and later, others that have it by then may bring parts, too.
                    if (self.several and passed_on) or 4 * end > 5 * self.near[1]:
                        brings, delay = group_ns, 0
                    total = max(0, group_ns - brings - passed_on)
                    before = max(0, total - end * own // FINE - 1)
                    passed = self.copies(one_copy, [at + delay for at in starts])
                    works = [
                        at_once + others_too - self.copy_ps(at + delay) + more
                        if at_once and more
                        else 0  # without one of them it is another way
                        for at, at_once, others_too, more in zip(starts, firsts, passed, grouped[i], strict=True)
                    ]
                    kind(whole_ns + before, works, (end, total - before))
                    for third in range(3):  # another whole copy after the group
                        works2 = [a + b if a and b else 0 for a, b in zip(works, thirds[third], strict=True)]
                        if third < 2:
                            until = end + (third + 1) * whole_ns // 2 + 1
                            kind(whole_ns + before, works2, (until, total - before + whole_ns))
                        else:
                            kind(whole_ns + before, works2, (self.edges[-1], total - before + whole_ns))
            last = [a + b for a, b in zip(lone, grouped[self.gaps], strict=True)]
            kind(whole_ns, last)
            kind(whole_ns, [a + b for a, b in zip(last, again[self.gaps], strict=True)], (self.edges[-1], whole_ns))

        step = self.gap_ns()
        firsts = [self.copy_ps(at) for at in starts]
        lone = self.copies(one_copy, starts)
        again = [self.copies(held, [at + i * step for at in starts]) for i in range(self.gaps + 1)]
        far_rate = FINE * FINE // max(1, self.dearer) + 1
        own = held.ranks * FINE + held.nodes * far_rate
        kind(whole_ns, lone)
        later(whole_ns, whole_ns, [lone] * (self.gaps + 1), again)
        if most_parts >= 2:
            least = 2
            while least <= most_parts:
                upto = min(most_parts, max(least, 2 * least - 3))
                works = [self.group(load, held, at, least, upto) for at in starts]
                kind(min(self.near[least : upto + 1]), works)
                least = upto + 1
            group_ns = min(self.near[2 : most_parts + 1])
            grouped = [
                [self.group(load, held, at + i * step, 2, most_parts) for at in starts] for i in range(self.gaps + 1)
            ]
            by_copy(group_ns, grouped)
            with_group = [[a + b for a, b in zip(lone, some, strict=True)] for some in grouped]
            later(whole_ns, whole_ns, with_group, again)
            later(group_ns, whole_ns, [grouped[0]] * (self.gaps + 1), again)
        return found

    def gap_ns(self) -> int:
        """All gaps together are the time of one whole copy and a quarter."""
        return max(1, self.near[1] * 5 // (4 * self.gaps))


def _class(load: int, few: int) -> int:
    """The same for loads that differ by less than a 16th, and for those that are done while the weights are read."""
    if load <= few:
        return 0
    return load if load < 32 else load >> (load.bit_length() - 5) | load.bit_length() << 5


def _pools(problem: Problem, pairs: tuple[Integers, Integers], class_L: list[int]) -> list[int]:
    """[P] for each rank the first one in its node that has experts of the same loads, none of which others hold.

    Whatever one of them can do the others can, so that it is enough to know what they can do together.
    """
    rank_J, expert_J = pairs
    holders_L = np.bincount(expert_J, minlength=len(class_L))
    first: dict[tuple[int, tuple[int, ...]], int] = {}
    pools = []
    for p in range(problem.ranks):
        mine = expert_J[rank_J == p]
        if (holders_L[mine] > 1).any():
            pools.append(p)
            continue
        classes = tuple(sorted(class_L[i] for i in mine.tolist()))
        pools.append(first.setdefault((int(problem.node_P[p]), classes), p))
    return pools


def add_departures(
    problem: Problem,
    ns: int,
    pairs: tuple[Integers, Integers],
    loads_L: Integers,
    first_away: int,
    first: int,
    rows: Rows,
) -> list[int]:
    """Adds when the experts of ranks that have more than they can do can have left them.

    `pairs` are (rank, which of the experts with rows) of holders; columns from `first_away` on are the experts' work
    elsewhere. Returns the limits of the new columns, from `first` on: of each way of experts that are alike how many go
    that way, and of each interval and link the time (ns of a near link) that it is busy for them.
    """
    rates, node_P = problem.rates, problem.node_P.tolist()
    rank_J, expert_J = pairs
    row = max(rates.row_ps, rates.wire_ps)
    work_P = np.zeros(problem.ranks, dtype=np.int64)
    shares_L = np.maximum(loads_L * row, rates.expert_ps) // np.bincount(expert_J, minlength=len(loads_L))
    np.add.at(work_P, rank_J, shares_L[expert_J])
    busy_P = work_P > ns * PS
    class_L = [_class(load, rates.expert_ps // row) for load in loads_L.tolist()]
    pool_P = _pools(problem, pairs, class_L)
    alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
    looked_at: set[int] = set()
    hottest = sorted({pool_P[p] for p in np.flatnonzero(busy_P).tolist()}, key=lambda p: (-int(work_P[p]), p))
    for pool in hottest:
        if len(alike) >= ENOUGH_KINDS:
            break
        looked_at.add(pool)
        for i in np.unique(expert_J[busy_P[rank_J] & (np.array(pool_P)[rank_J] == pool)]).tolist():
            held = rank_J[expert_J == i].tolist()
            if all(busy_P[p] for p in held) and (len(held) == 1 or pool_P[held[0]] == pool):
                alike.setdefault((tuple(pool_P[p] for p in held), class_L[i]), []).append(i)
    if not alike:
        return []
    kinds = [(pools, some) for (pools, _), some in alike.items()]
    resolution = next((it for upto, it in RESOLUTIONS if len(kinds) <= upto), RESOLUTIONS[-1][1])
    leaving = Leaving(problem, ns, max(len(pools) for pools, _ in kinds), *resolution)
    if not leaving.usable:
        return []
    ranks_of = {pool: pool_P.count(pool) for pool in set(pool_P)}
    most: list[int] = []
    links: dict[tuple[bool, int], list[tuple[int, Integers, Integers]]] = {}  # (far, whose): interval, columns, times
    nought = np.zeros(1, dtype=np.int64)
    counted: dict[tuple[bool, int], list[tuple[int, Departure]]] = {}  # (node, which): column, way
    for held, some in kinds:
        nodes = sorted({node_P[p] for p in held}) if leaving.several else []
        ways = leaving.ways(max(int(loads_L[i]) for i in some), Held(len(held), len(nodes)))
        columns = first + len(most) + np.arange(len(ways))
        most += [len(some)] * len(ways)
        works = np.array([it.work_ps for it in ways], dtype=np.int64)
        away = first_away + np.array(some, dtype=np.int64)
        rows.add(nought, (np.zeros_like(away), away, 1), (np.zeros_like(columns), columns, -works))
        rows.add(nought + len(some), (np.zeros_like(columns), columns, 1))
        if len(held) == 1:
            counted.setdefault((False, held[0]), []).extend(zip(columns.tolist(), ways, strict=True))
            for node in nodes:
                counted.setdefault((True, node), []).extend(zip(columns.tolist(), ways, strict=True))
        uses: dict[int, list[tuple[int, int]]] = {}
        for column, it in zip(columns.tolist(), ways, strict=True):
            for interval, busy in it.uses:
                uses.setdefault(interval, []).append((column, busy))
        over = [(False, p) for p in held] + [(True, node) for node in nodes]
        for interval, them in sorted(uses.items()):
            chosen, busy_ns = (np.array(it, dtype=np.int64) for it in zip(*them, strict=True))
            if len(over) == 1:
                links.setdefault(over[0], []).append((interval, chosen, busy_ns))
                continue
            carried = first + len(most) + np.arange(len(over))
            busiest = leaving.edges[interval + 1] * max(ranks_of.values())
            most += [busiest * FINE // min(FINE, max(1, leaving.dearer)) + 1] * len(over)
            rows.add(nought, (np.zeros_like(chosen), chosen, busy_ns), (np.zeros_like(carried), carried, -1))
            for column, link in zip(carried.tolist(), over, strict=True):
                links.setdefault(link, []).append((interval, np.array([column]), np.ones(1, dtype=np.int64)))
    for (far, whose), used in sorted(links.items(), key=lambda it: it[0]):
        for end in sorted({interval for interval, _, _ in used}):
            columns = np.concatenate([some for interval, some, _ in used if interval <= end])
            times = np.concatenate([busy for interval, _, busy in used if interval <= end])
            limit = leaving.edges[end + 1] * (FINE if far else ranks_of[whose])
            rows.add(nought + limit, (np.zeros_like(columns), columns, times * (leaving.dearer if far else 1)))
    # Experts that have left are whole numbers.
    near_ns = leaving.near[1]
    for (by_node, whose), those in sorted(counted.items(), key=lambda it: it[0]):
        pools = [pool for node, pool in counted if not node and node_P[pool] == whose]
        links_of = sum(ranks_of[pool] for pool in pools) * FINE if by_node else FINE
        if leaving.several:
            links_of += FINE * FINE // leaving.dearer + 1
        if not by_node and whose in looked_at:
            must = 0
            for p in (p for p in np.flatnonzero(busy_P).tolist() if pool_P[p] == whose):
                mine = expert_J[rank_J == p]
                if (np.bincount(expert_J, minlength=len(loads_L))[mine] == 1).all():
                    loads = sorted(loads_L[mine].tolist(), reverse=True)
                    must += _must_leave(problem, ns, leaving, loads, [it for _, it in those], links_of)
            columns = np.array([column for column, _ in those], dtype=np.int64)
            rows.add(nought - must, (np.zeros_like(columns), columns, -1))
        of_those = np.array([column for column, _ in those], dtype=np.int64)
        # Of each way when its first and its last use ends, and how long the links were busy.
        ends = np.array([[it.uses[0][0], it.uses[-1][0]] for _, it in those], dtype=np.int64).reshape(-1, 2)
        first_ns = np.array([it.uses[0][1] for _, it in those], dtype=np.int64)
        later_ns = np.array([it.uses[1][1] if len(it.uses) > 1 else 0 for _, it in those], dtype=np.int64)
        for interval, until in enumerate(leaving.edges[1:]):
            count = until * links_of // FINE // near_ns
            times = (first_ns * (ends[:, 0] <= interval) + later_ns * (ends[:, 1] <= interval)) // near_ns
            taking = np.flatnonzero(times)
            if len(taking):
                most_of_them = nought + count * (1 if by_node else ranks_of[whose])
                rows.add(most_of_them, (np.zeros_like(taking), of_those[taking], times[taking]))
    return most


def _must_leave(
    problem: Problem, ns: int, leaving: Leaving, loads: list[int], ways: list[Departure], links: int
) -> int:
    """How many of a rank's experts, whose loads go down, leave at least; its links are so many FINEths of a near one.

    Those that leave are done elsewhere for the most part, or their weights need not be read.
    """
    expert_ps, row = problem.rates.expert_ps, leaving.row
    excess = row * sum(loads) - ns * PS
    fewest = len(loads) - ns * PS // expert_ps if expert_ps else 0
    count = 0
    while excess > 0 and count < len(loads):
        # The next one can have left when links have carried so many.
        sent = -(-(count + 1) * leaving.near[1] * FINE // links) - 1
        best = max((it.work_ps for it in ways if leaving.edges[it.uses[0][0] + 1] >= sent), default=0)
        if not best:
            return len(loads) + 1
        excess -= min(best, row * loads[count])
        count += 1
    return max(count, fewest, 0)
