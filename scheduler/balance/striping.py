"""The messages by which a plan's weights travel: which bytes over which ranks, and in which chunks.

A node's links to other nodes are those of its ranks. A transfer between two nodes that goes from rank to rank uses one
of them, and a hot rank's is busy when its neighbours' are idle. So every link gets an equal share of the bytes that
leave its node, and of those that come, with as few pieces as that needs: Ethereal's minimal flow splitting
(arXiv 2407.00550), for the links of ranks instead of a switch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from .plan import Plan, Transfer
from .problem import FS, Problem

MOST_CHUNKS = 64
"""Of a piece: each is a message that its receiver prepares for."""


@dataclass(frozen=True)
class Stripe:
    """Bytes `start` to `stop` of a plan's transfer number `transfer`: from its source to its destination over `ranks`,
    which has both at its ends.
    """

    transfer: int
    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Message:
    """Bytes of a transfer on one hop of their way."""

    transfer: int
    start: int
    stop: int
    sender: int
    receiver: int


def messages(problem: Problem, plan: Plan, bytes_N: Sequence[int]) -> list[Message]:
    """All messages of a plan whose transfers have these sizes: the same on every rank. Between two ranks they go in
    this order, and what a message passes on has come by one before it, so that nobody waits in a circle.
    """
    node_P = problem.node_P.tolist()
    pieces = choose(problem, plan.transfers, bytes_N)
    of_transfer: list[list[Stripe]] = [[] for _ in plan.transfers]
    for piece in pieces:
        of_transfer[piece.transfer].append(piece)
    hops_N = _hops(plan.transfers, [max(len(piece.ranks) - 1 for piece in it) for it in of_transfer])
    found = []
    for index, stripes_S in enumerate(of_transfer):
        chunks_S = [_chunks(problem, it, hops_N[index], node_P) for it in stripes_S]
        for chunk in range(max(chunks_S)):
            for it, chunks in zip(stripes_S, chunks_S, strict=True):
                if chunk < chunks:
                    size = it.stop - it.start
                    start, stop = it.start + size * chunk // chunks, it.start + size * (chunk + 1) // chunks
                    found += [Message(index, start, stop, a, b) for a, b in zip(it.ranks, it.ranks[1:], strict=False)]
    return found


def choose(problem: Problem, transfers: Sequence[Transfer], bytes_N: Sequence[int]) -> list[Stripe]:
    """Stripes, if by the model they are faster than each transfer from rank to rank."""
    straight = [
        Stripe(i, 0, n, (t.source, t.destination)) for i, (t, n) in enumerate(zip(transfers, bytes_N, strict=True))
    ]
    node_P = problem.node_P.tolist()
    if all(node_P[t.source] == node_P[t.destination] for t in transfers) or len(set(node_P)) == len(node_P):
        return straight
    width = max(node_P.count(node) for node in set(node_P))
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
    # First who sends, then who receives what each sends: (transfer, start, stop, sender, receiver).
    pieces = [(i, 0, bytes_N[i], transfers[i].source, transfers[i].destination) for i in far]
    for end in (3, 4):
        cut = []
        for node in sorted(set(node_P)):
            links = [p for p, other in enumerate(node_P) if other == node]
            here = [piece for piece in pieces if node_P[piece[end]] == node]
            owners = [links.index(piece[end]) for piece in here]
            shared = share_out([piece[2] - piece[1] for piece in here], owners, len(links), least)
            for piece, parts in zip(here, shared, strict=True):
                start = piece[1]
                for link, size in parts:
                    ends = (links[link], piece[4]) if end == 3 else (piece[3], links[link])
                    cut.append((piece[0], start, start + size, *ends))
                    start += size
        pieces = cut
    found = [Stripe(i, 0, bytes_N[i], (t.source, t.destination)) for i, t in enumerate(transfers) if i not in far]
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
    links = {node: node_P.count(node) for node in set(node_P)}
    busy: dict[tuple[str, bool, int], int] = {}
    for it in ways:
        for a, b in zip(it.ranks, it.ranks[1:], strict=False):
            far = node_P[a] != node_P[b]
            alpha = rates.far_alpha_ns if far else rates.near_alpha_ns
            rate = rates.far_fs_per_byte if far else rates.near_fs_per_byte
            for side, rank in (("out", a), ("in", b)):
                key = (side, far, rank)
                width = links[node_P[rank]] if far else 1
                busy[key] = busy.get(key, 0) + alpha + (it.stop - it.start) * rate * width // FS
    return max(busy.values(), default=0)


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
    rates = problem.rates
    far = any(node_P[p] != node_P[piece.ranks[0]] for p in piece.ranks)
    alpha = rates.far_alpha_ns if far else rates.near_alpha_ns
    rate = rates.far_fs_per_byte if far else rates.near_fs_per_byte
    size = piece.stop - piece.start
    return max(1, min(MOST_CHUNKS, size, isqrt((hops - 1) * size * rate // FS // max(1, alpha))))
