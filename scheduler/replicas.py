"""Which data-parallel rank gets a request, and when: the queue in front of ranks that each have their own KV cache.

`DualMap` follows DualMap (arXiv 2602.06502); `RoundRobin` and `LeastLoaded` are what it is compared with. All three
release by the same rule: a rank is sent its next request only while it has less than one step's tokens to prefill, so
that the rest can still be moved. `now` is in seconds of any one clock. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from .rank_load import Entry, Item, RankLoad
from .rings import CommonPrefixes, Key, TwoRings, prefix_keys

__all__ = ["DualMap", "Item", "Key", "LeastLoaded", "RoundRobin", "Router", "prefix_keys"]

SEARCHES_PER_TARGET = 20
"""How often in a target's time an overloaded rank's queue, which may be long, is searched for requests to move."""


class Router:
    """The queue that the policies share.

    Args:
        ranks: their numbers.
        block_size: tokens in a KV block, of which `Item.prefix_keys` has one key each.
        ttft_target_s: wanted seconds to the first token. Only `DualMap` decides by it.
        budget_tokens: prompt tokens of one step of a rank.
        cache_blocks: KV blocks of a rank, to estimate what it still has.
        prefill_rate: tokens per second that a rank is thought to prefill until it is measured.
        key_blocks: fewest leading blocks that tell prompts apart. Only `DualMap` decides by it.

    Raises ValueError for a size that is not positive.
    """

    def __init__(
        self,
        ranks: Iterable[int],
        *,
        block_size: int,
        ttft_target_s: float,
        budget_tokens: int,
        cache_blocks: int = 65_536,
        prefill_rate: float = 5_000.0,
        key_blocks: int = 1,
    ) -> None:
        sizes = {"block_size": block_size, "ttft_target_s": ttft_target_s, "budget_tokens": budget_tokens}
        sizes |= {"cache_blocks": cache_blocks, "prefill_rate": prefill_rate, "key_blocks": key_blocks}
        for name, value in sizes.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self.block_size = block_size
        self.ttft_target_s = ttft_target_s
        self.budget_tokens = budget_tokens
        self.cache_blocks = cache_blocks
        self.prefill_rate = prefill_rate
        self.key_blocks = key_blocks
        self._ranks: dict[int, RankLoad] = {}
        self._entries: dict[str, Entry] = {}
        for rank in ranks:
            self.add_rank(rank)

    # Ranks

    @property
    def ranks(self) -> list[int]:
        """In rising order."""
        return list(self._ranks)

    def add_rank(self, rank: int) -> None:
        """A rank whose KV cache is empty. Raises ValueError for one that is there."""
        if rank in self._ranks:
            raise ValueError(f"rank {rank} is there already; remove it first")
        self._ranks[rank] = RankLoad(rank, self.block_size, self.cache_blocks, self.budget_tokens, self.prefill_rate)
        self._ranks = dict(sorted(self._ranks.items()))

    def remove_rank(self, rank: int) -> list[Item]:
        """Nothing more goes to this rank. Returns the requests that waited for it, oldest place first.

        The router has forgotten those: the caller enqueues them again. What was released to the rank stays known until
        `finished`; to send it elsewhere, say `finished`, then `enqueue` it with the tokens it has got.
        """
        items = [entry.item for entry in self._rank(rank).waiting.values()]
        for item in items:
            self.finished(item.request_id)
        del self._ranks[rank]
        return items

    # Requests

    @property
    def waiting(self) -> int:
        """Requests that were not released yet."""
        return sum(len(rank.waiting) for rank in self._ranks.values())

    def depth(self, rank: int) -> int:
        """Requests that wait for this rank."""
        return len(self._rank(rank).waiting)

    def unprefilled(self, rank: int) -> int:
        """Estimated tokens that were released to this rank and are still to be prefilled."""
        return self._rank(rank).sent_tokens

    def rank_of(self, request_id: str) -> int:
        """The rank that the request waits for or was released to. Raises KeyError for one that is not known."""
        return self._entries[request_id].rank.id

    def enqueue(self, item: Item, now: float) -> int:
        """Chooses a rank, which may change until `release`, and returns it. Raises RuntimeError when there is none."""
        assert item.request_id not in self._entries, f"{item.request_id} is queued twice"
        if not self._ranks:
            raise RuntimeError(f"{item.request_id}: there is no rank to queue it for")
        self._advance(now)
        entry = Entry(item, now)
        rank = self._choose(entry)
        rank.add(entry)
        self._entries[item.request_id] = entry
        return rank.id

    def release(self, now: float) -> list[tuple[str, int]]:
        """Moves what should be moved, then returns (request id, rank) of those to send now, in this order."""
        self.migrate(now)
        released = []
        for rank in self._ranks.values():
            while rank.waiting and rank.sent_tokens < self.budget_tokens:
                entry = next(iter(rank.waiting.values()))
                rank.send(entry)
                released.append((entry.item.request_id, rank.id))
        return released

    def started(self, request_id: str, now: float, cached_tokens: int | None = None) -> None:
        """The first token of a released request is there; `cached_tokens` of its prompt were cached, if known."""
        self._advance(now)
        entry = self._entries[request_id]
        assert request_id in entry.rank.sent, f"{request_id} started, but it was not sent or has started before"
        entry.rank.advance(now)  # it may be one that was removed
        entry.rank.start(entry, entry.uncached if cached_tokens is None else entry.item.prompt_len - cached_tokens)

    def finished(self, request_id: str) -> None:
        """The request ended, however and whenever: also one that waits. Raises KeyError for one that is not known."""
        entry = self._entries.pop(request_id)
        entry.rank.remove(entry)

    def migrate(self, now: float) -> int:
        """Moves waiting requests to better ranks where the policy does such a thing; returns how many."""
        self._advance(now)
        return 0

    def _choose(self, entry: Entry) -> RankLoad:
        raise NotImplementedError

    def _advance(self, now: float) -> None:
        for rank in self._ranks.values():
            rank.advance(now)

    def _rank(self, rank: int) -> RankLoad:
        if rank not in self._ranks:
            raise ValueError(f"rank {rank} is not there; there are {self.ranks}")
        return self._ranks[rank]


class RoundRobin(Router):
    """The next rank in turn."""

    _last = -1

    def _choose(self, entry: Entry) -> RankLoad:
        self._last = min((r for r in self._ranks if r > self._last), default=min(self._ranks))
        return self._ranks[self._last]


class LeastLoaded(Router):
    """The rank with the fewest prompt and output tokens of unfinished requests."""

    def _choose(self, entry: Entry) -> RankLoad:
        return min(self._ranks.values(), key=lambda rank: (rank.outstanding, rank.id))


class DualMap(Router):
    """Two candidates per prefix (arXiv 2602.06502): reuse of KV while it is fast enough, then balance.

    The candidate with the longer cached prefix gets the request unless its estimated time to first token exceeds half
    the target; then the one with the smaller estimate. On an overloaded rank, waiting requests move to their other
    candidate, those that gain most first. Additions to the paper:

    - A prefix that many requests share is no key (`CommonPrefixes`). Having it cached is no reason to choose a rank
      either, else a rank that has just come would not be chosen before the others are overloaded.
    - A prompt without a key has every rank for a candidate, and so has one that neither of its two candidates would
      serve within the target.
    """

    @cached_property
    def _rings(self) -> TwoRings:
        return TwoRings()

    @cached_property
    def _prefixes(self) -> CommonPrefixes:
        return CommonPrefixes(self.key_blocks)

    def add_rank(self, rank: int) -> None:
        super().add_rank(rank)
        self._rings.add(rank)
        self._find_candidates()

    def remove_rank(self, rank: int) -> list[Item]:
        items = super().remove_rank(rank)
        self._rings.remove(rank)
        self._find_candidates()
        return items

    def _find_candidates(self) -> None:
        for rank in self._ranks.values():
            for entry in rank.waiting.values():
                entry.candidates = self._candidates(entry)

    def _candidates(self, entry: Entry) -> list[RankLoad]:
        """In the order in which ties are broken: by the rings, since the lowest rank would fill one cache first."""
        if entry.key is None:
            return list(self._ranks.values())
        return [self._ranks[rank] for rank in self._rings.candidates(entry.key)]

    def _choose(self, entry: Entry) -> RankLoad:
        item = entry.item
        self._prefixes.count(item.prefix_keys, len(self._ranks))
        index = self._prefixes.key_index(item.prefix_keys)
        entry.key = item.prefix_keys[index] if index < len(item.prefix_keys) else None
        ranks = entry.candidates = self._candidates(entry)
        without_own = item.prompt_len - index * self.block_size
        best = min(ranks, key=lambda rank: (min(rank.uncached(item), without_own), rank.outstanding))
        if best.ttft(item) > self.ttft_target_s / 2:
            best = _fastest(ranks, item)
            if best.ttft(item) > self.ttft_target_s:
                best = _fastest(self._ranks.values(), item)
        return best

    def migrate(self, now: float) -> int:
        """Relieves every rank whose backlog, or whose longest wait so far, exceeds the target."""
        self._advance(now)
        moved = 0
        for rank in self._ranks.values():
            if now >= rank.next_search_s and self._overloaded(rank, now):
                rank.next_search_s = now + self.ttft_target_s / SEARCHES_PER_TARGET
                moved += self._relieve(rank, now)
        return moved

    def _overloaded(self, rank: RankLoad, now: float) -> bool:
        if not rank.waiting:
            return False
        target = self.ttft_target_s
        return rank.backlog_s() > target or now - min(entry.since for entry in rank.waiting.values()) > target

    def _relieve(self, source: RankLoad, now: float) -> int:
        """Every move shortens the moved request's estimate and delays no other one, so this cannot go round."""
        backlogs = {rank.id: rank.backlog_s() for rank in self._ranks.values()}
        offers = []
        ahead = source.sent_s()
        for place, entry in enumerate(source.waiting.values()):
            ahead += entry.uncached * source.seconds_per_token  # to its first token, if it stays
            for other in entry.candidates:
                if other is not source and backlogs[other.id] < ahead:
                    gain = ahead - other.ttft(entry.item)
                    if gain > 0:
                        offers.append((-gain, place, other.id, ahead, entry))
        offers.sort(key=lambda offer: offer[:3])
        moved: list[tuple[int, float]] = []  # place, seconds that those behind it gain
        for _, place, other_id, stay, entry in offers:
            other = self._ranks[other_id]
            stay -= sum(seconds for before, seconds in moved if before < place)
            if entry.rank is not source or other.ttft(entry.item) >= stay:
                continue
            moved.append((place, entry.uncached * source.seconds_per_token))
            source.remove(entry)
            other.add(entry)
            if not self._overloaded(source, now):
                break
        return len(moved)


def _fastest(ranks: Iterable[RankLoad], item: Item) -> RankLoad:
    """The first of equals."""
    return min(ranks, key=lambda rank: (rank.ttft(item), rank.outstanding))
