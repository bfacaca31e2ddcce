"""Where a prompt belongs: keys of its prefix, and the two ranks that a key maps to.

The two rings are those of DualMap (arXiv 2602.06502): every key has two candidate ranks, found by two independent hash
functions, so that equal prefixes meet on two ranks and different ones spread over all. Every hash is blake2b, so that
processes, runs and machines agree.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b

Key = int | bytes
"""Stands for a prefix: equal keys mean equal tokens from the start of the prompt to the end of one block."""

VIRTUAL_NODES = 128
"""Places of a rank on each ring; the arcs of 8 ranks then differ by about a tenth."""
COMMON_COUNT = 64
"""A prefix is common when this many of the last `COMMON_COUNT * ranks` requests have it: more than one rank's share."""


def prefix_keys(ids: Sequence[int], block_size: int, salt: str = "", limit: int | None = None) -> tuple[bytes, ...]:
    """One key for each leading full block of a prompt, at most `limit` of them: the hashes of `BlockPool`."""
    count = len(ids) // block_size
    if limit is not None:
        count = min(count, limit)
    digest = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32).digest()
    tokens = array("i", ids[: count * block_size])
    data, step = tokens.tobytes(), block_size * tokens.itemsize
    keys = []
    for at in range(0, len(data), step):
        digest = blake2b(digest + data[at : at + step], digest_size=32).digest()
        keys.append(digest)
    return tuple(keys)


class TwoRings:
    """Two consistent-hash rings over the same ranks. A rank that comes or goes moves only the arcs next to its own."""

    def __init__(self, ranks: Iterable[int] = ()) -> None:
        self._rings: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])  # (place, rank), sorted
        for rank in ranks:
            self.add(rank)

    def add(self, rank: int) -> None:
        for ring, points in enumerate(self._rings):
            for node in range(VIRTUAL_NODES):
                insort(points, (_place(f"{rank}/{node}".encode(), ring), rank))

    def remove(self, rank: int) -> None:
        for points in self._rings:
            points[:] = [point for point in points if point[1] != rank]

    def candidates(self, key: Key) -> tuple[int, ...]:
        """Two different ranks; the only one, or none, when there are no two.

        The first rank of the second ring that is not the first candidate is the second one.
        """
        first = self._after(key, 0)
        return tuple(first if not first else first + self._after(key, 1, but=first[0]))

    def _after(self, key: Key, ring: int, but: int | None = None) -> list[int]:
        points = self._rings[ring]
        data = key if isinstance(key, bytes) else str(key).encode()
        start = bisect_right(points, (_place(data, ring), -1))
        for i in range(len(points)):
            rank = points[(start + i) % len(points)][1]
            if rank != but:
                return [rank]
        return []


def _place(data: bytes, ring: int) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=b"ring %d" % ring).digest(), "big")


class CommonPrefixes:
    """Chooses the key of a prompt: its shortest prefix, of at least `key_blocks` blocks, that is not common.

    A prefix that many requests share, such as a system prompt, would send them all to the same two ranks; what comes
    after it tells them apart. A prefix that was common stays so until it is half as frequent, so that keys do not
    flicker. Memory: of each prompt in the window, one more block is counted than it shares with earlier ones.
    """

    def __init__(self, key_blocks: int) -> None:
        self.key_blocks = key_blocks
        self._window: deque[tuple[Key, ...]] = deque()  # what each of the last requests added to the counts
        self._counts: Counter[Key] = Counter()
        self._common: set[Key] = set()

    def key_index(self, keys: Sequence[Key]) -> int:
        """Where in `keys` the prompt's key is. The end, when all its full blocks are common: it belongs nowhere."""
        start = self._start(keys)
        return next((i for i in range(start, len(keys)) if keys[i] not in self._common), len(keys))

    def count(self, keys: Sequence[Key], ranks: int) -> None:
        """Takes note of one more request; `ranks` is the number of ranks there are."""
        counted = []
        for key in keys[self._start(keys) :]:
            self._counts[key] += 1
            counted.append(key)
            if self._counts[key] >= COMMON_COUNT:
                self._common.add(key)
            elif self._counts[key] == 1:
                break  # new: so is all that follows
        self._window.append(tuple(counted))
        while len(self._window) > COMMON_COUNT * ranks:
            for key in self._window.popleft():
                self._counts[key] -= 1
                if self._counts[key] < COMMON_COUNT // 2:
                    self._common.discard(key)
                if not self._counts[key]:
                    del self._counts[key]

    def _start(self, keys: Sequence[Key]) -> int:
        return max(min(self.key_blocks, len(keys)) - 1, 0)
