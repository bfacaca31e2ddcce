"""The messages by which a plan's weights travel: which bytes over which ranks, and in which chunks.

A node's links to other nodes are those of its ranks. A transfer between two nodes that goes from rank to rank uses one
of them, and a hot rank's is busy when its neighbours' are idle. So every link gets an equal share of the bytes that
leave its node, and of those that come, with as few pieces as that needs: Ethereal's minimal flow splitting
(arXiv 2407.00550), for the links of ranks instead of a switch's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from typing import NamedTuple

from .plan import Plan, Transfer
from .problem import FS, Problem

MOST_CHUNKS = 64
"""Of a piece: each is a message that its receiver prepares for."""


class Stripe(NamedTuple):
    """Bytes `start` to `stop` of a plan's transfer number `transfer`: from its source to its destination over `ranks`,
    which has both at its ends.
    """

    transfer: int
    start: int
    stop: int
    ranks: tuple[int, ...]


class Message(NamedTuple):
    """Bytes of a transfer on one hop of their way."""

    transfer: int
    start: int
    stop: int
    sender: int
    receiver: int


def messages(problem: Problem, plan: Plan, bytes_N: Sequence[int], rank: int | None = None) -> list[Message]:
    """All messages of a plan whose transfers have these sizes, or those from and to a rank. Between two ranks they go
    in this order, and what a message passes on has come by one before it, so that nobody waits in a circle.
    """
    node_P = problem.node_P.tolist()
    stripes_N: list[list[Stripe]] = [[] for _ in plan.transfers]
    for it in choose(problem, plan.transfers, bytes_N):
        stripes_N[it.transfer].append(it)
    hops_N = _hops(plan.transfers, [max(len(it.ranks) for it in of) - 1 for of in stripes_N])
    found = []
    for index, of in enumerate(stripes_N):
        mine = of if rank is None else [it for it in of if rank in it.ranks]
        # Chunk by chunk, so that a transfer's stripes are under way at the same time.
        parts = []
        for number, it in enumerate(mine):
            size, chunks = it.stop - it.start, _chunks(problem, it, hops_N[index], node_P)
            parts += [
                (chunk, number, it.start + size * chunk // chunks, it.start + size * (chunk + 1) // chunks)
                for chunk in range(chunks)
            ]
        for _, number, start, stop in sorted(parts):
            way = mine[number].ranks
            found += [Message(index, start, stop, a, b) for a, b in pairwise(way) if rank is None or rank in (a, b)]
    return found


def choose(problem: Problem, transfers: Sequence[Transfer], bytes_N: Sequence[int]) -> list[Stripe]:
    """Stripes, if by the model they are faster than each transfer from rank to rank."""
    straight = [
        Stripe(i, 0, n, (t.source, t.destination)) for i, (t, n) in enumerate(zip(transfers, bytes_N, strict=True))
    ]
    node_P = problem.node_P.tolist()
    width = max(Counter(node_P).values(), default=1)
    if width == 1 or all(node_P[t.source] == node_P[t.destination] for t in transfers):
        return straight
    # Smaller ones would take longer to start than to send.
    least = problem.rates.far_alpha_ns * FS // max(1, problem.rates.far_fs_per_byte * width)
    striped = stripes(transfers, bytes_N, node_P, max(1, least))
    return striped if time_ns(problem, striped) < time_ns(problem, straight) else straight


def stripes(
    transfers: Sequence[Transfer], bytes_N: Sequence[int], node_P: Sequence[int], least: int = 1
) -> list[Stripe]:
    """Stripes in which every rank sends an equal share of what leaves its node, and receives one of what comes to it,
    but for `least` bytes here and there, below which no transfer is cut. A node of L ranks makes at most L - 1 pieces
    more than there were to send, and L - 1 more than there were to receive.

    Ranks 0 and 1 are a node, 2 and 3 another. Rank 0 sends two experts of 6 bytes to rank 2: the first goes straight,
    the second over the neighbours of both.

    >>> for it in stripes([Transfer(0, 0, 2), Transfer(1, 0, 2)], [6, 6], [0, 0, 1, 1]): print(it)
    Stripe(transfer=0, start=0, stop=6, ranks=(0, 2))
    Stripe(transfer=1, start=0, stop=6, ranks=(0, 1, 3, 2))

    A single one is cut once:

    >>> [(it.start, it.stop, it.ranks) for it in stripes([Transfer(0, 0, 2)], [6], [0, 0, 1, 1])]
    [(0, 3, (0, 2)), (3, 6, (0, 1, 3, 2))]
    """
    far = [i for i, t in enumerate(transfers) if node_P[t.source] != node_P[t.destination]]
    links: dict[int, list[int]] = {}
    for p, node in enumerate(node_P):
        links.setdefault(node, []).append(p)
    number_P = [links[node].index(p) for p, node in enumerate(node_P)]
    # First who sends, then who receives what each sends: (transfer, start, stop, sender, receiver).
    pieces = [(i, 0, bytes_N[i], transfers[i].source, transfers[i].destination) for i in far]
    for end in (3, 4):
        of_node: dict[int, list[tuple[int, int, int, int, int]]] = {}
        for piece in pieces:
            of_node.setdefault(node_P[piece[end]], []).append(piece)
        pieces = []
        for node, here in sorted(of_node.items()):
            sizes, owners = [piece[2] - piece[1] for piece in here], [number_P[piece[end]] for piece in here]
            for piece, parts in zip(here, share_out(sizes, owners, len(links[node]), least), strict=True):
                start = piece[1]
                for link, size in parts:
                    p = links[node][link]
                    pieces.append((piece[0], start, start + size, *((p, piece[4]) if end == 3 else (piece[3], p))))
                    start += size
    found = [
        Stripe(i, 0, n, (t.source, t.destination))
        for i, (t, n) in enumerate(zip(transfers, bytes_N, strict=True))
        if node_P[t.source] == node_P[t.destination]
    ]
    for i, start, stop, sender, receiver in pieces:
        way = (transfers[i].source, sender, receiver, transfers[i].destination)
        found.append(Stripe(i, start, stop, tuple(dict.fromkeys(way))))
    return sorted(found, key=lambda it: (it.transfer, it.start))


def share_out(
    sizes_N: Sequence[int], owners_N: Sequence[int], links: int, least: int = 1
) -> list[list[tuple[int, int]]]:
    """The pieces (link, size) of each flow, in order, so that all links carry as much: at most `links - 1` more pieces
    than flows.

    Each link takes of its owner's flows what its share allows, and what is left over of all of them, side by side, goes
    to the links with room. A link with own flows left is cut once, and so is what is left over at the end of each
    link's room but the last: fewer cuts than links.

    >>> share_out([9, 3, 6], [0, 0, 1], 3)
    [[(0, 6), (2, 3)], [(2, 3)], [(1, 6)]]
    """
    total = sum(sizes_N)
    room_L = [total * (link + 1) // links - total * link // links for link in range(links)]
    left: list[tuple[int, int]] = []
    taken: list[list[tuple[int, int]]] = [[] for _ in sizes_N]
    for n, (size, owner) in enumerate(zip(sizes_N, owners_N, strict=True)):
        own = min(size, max(0, room_L[owner]))
        own = 0 if own < least else size if size - own < least else own
        room_L[owner] -= own
        if own:
            taken[n].append((owner, own))
        if size > own:
            left.append((n, size - own))
    free = [link for link in range(links) if room_L[link] > 0]
    for n, size in left:
        while size:
            while len(free) > 1 and room_L[free[0]] < least:
                free.pop(0)
            link = free[0] if free else owners_N[n]
            part = size if len(free) < 2 or size - room_L[link] < least else room_L[link]
            room_L[link] -= part
            size -= part
            taken[n].append((link, part))
    return [_joined(parts) for parts in taken]


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring pieces on one link are one."""
    joined: list[tuple[int, int]] = []
    for link, size in parts:
        if joined and joined[-1][0] == link:
            size += joined.pop()[1]
        joined.append((link, size))
    return joined


def time_ns(problem: Problem, ways: Sequence[Stripe]) -> int:
    """How long the busiest links need for these, by the model: a rank's link to other nodes has its part of their
    bundle's rate.
    """
    rates, node_P = problem.rates, problem.node_P.tolist()
    width = Counter(node_P)
    far_P = [rates.far_fs_per_byte * width[node] for node in node_P]
    # Start-ups and femtoseconds of each rank's links: out and in within its node, out and in between nodes.
    starts, busy = ([[0] * len(node_P) for _ in range(4)] for _ in range(2))
    for it in ways:
        size = it.stop - it.start
        for a, b in pairwise(it.ranks):
            far = 0 if node_P[a] == node_P[b] else 2
            for link, p in ((far, a), (far + 1, b)):
                starts[link][p] += 1
                busy[link][p] += size * (far_P[p] if far else rates.near_fs_per_byte)
    alphas = (rates.near_alpha_ns, rates.near_alpha_ns, rates.far_alpha_ns, rates.far_alpha_ns)
    return max(
        n * alpha + fs // FS
        for alpha, starts_P, busy_P in zip(alphas, starts, busy, strict=True)
        for n, fs in zip(starts_P, busy_P, strict=True)
    )


def _hops(transfers: Sequence[Transfer], own_N: Sequence[int]) -> list[int]:
    """How many hops a transfer's weights make in all, with those before and after it on the longest way."""
    before_N, after_N = [0] * len(transfers), [0] * len(transfers)
    came: dict[tuple[int, int], int] = {}
    for i, t in enumerate(transfers):
        if (first := came.get((t.source, t.expert))) is not None:
            before_N[i] = before_N[first] + own_N[first]
        if t.parts == 1:
            came[t.destination, t.expert] = i
    for i in reversed(range(len(transfers))):
        t = transfers[i]
        first = came.get((t.source, t.expert))
        if first is not None and t.parts == 1:
            after_N[first] = max(after_N[first], own_N[i] + after_N[i])
    return [before + own + after for before, own, after in zip(before_N, own_N, after_N, strict=True)]


def _chunks(problem: Problem, piece: Stripe, hops: int, node_P: list[int]) -> int:
    """Into how many messages a piece is cut so that hops overlap: n chunks over h hops of equal links take
    (h - 1 + n) * (alpha + bytes / n * rate), which is least for n = sqrt((h - 1) * bytes * rate / alpha).
    """
    if hops == 1:
        return 1
    rates = problem.rates
    far = node_P[piece.ranks[0]] != node_P[piece.ranks[-1]]
    alpha = rates.far_alpha_ns if far else rates.near_alpha_ns
    rate = rates.far_fs_per_byte if far else rates.near_fs_per_byte
    size = piece.stop - piece.start
    return max(1, min(MOST_CHUNKS, size, isqrt((hops - 1) * size * rate // FS // max(1, alpha))))
