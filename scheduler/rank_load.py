"""What a router knows of a rank: the requests it was given, how fast it prefills, and what its KV cache should hold."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass

from .rings import Key

RATE_HALF_LIFE_S = 30.0
"""Busy seconds after which a measurement of a rank's prefill rate counts half."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A request as a router sees it.

    `prefix_keys` are those of the prompt's leading full blocks (function `prefix_keys`); fewer than there are only make
    the estimate of what is cached too low. `output_len` is the number of tokens that it may add, 0 when unknown.
    """

    request_id: str
    prompt_len: int
    prefix_keys: tuple[Key, ...] = ()
    output_len: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_len + self.output_len


class Entry:
    """A request that has not finished."""

    __slots__ = ("candidates", "item", "key", "rank", "since", "uncached")

    def __init__(self, item: Item, now: float) -> None:
        self.item = item
        self.since = now  # when it was enqueued
        self.key: Key | None = None  # on the rings
        self.candidates: list[RankLoad] = []
        self.rank: RankLoad
        self.uncached = 0  # tokens to prefill, estimated when it was given to `rank`


class RankLoad:
    """What is known of a rank. Its requests are in `waiting`, then `sent`, then (once prefilled) in neither."""

    def __init__(self, rank: int, block_size: int, cache_blocks: int, prior_tokens: int, prior_rate: float) -> None:
        self.id = rank
        self.waiting: dict[str, Entry] = {}
        self.sent: dict[str, Entry] = {}
        self.waiting_tokens = self.sent_tokens = 0  # to prefill
        self.outstanding = 0  # prompt and output tokens of all unfinished requests
        self._block_size, self._cache_blocks = block_size, cache_blocks
        self._cached: OrderedDict[Key, None] = OrderedDict()  # least recently used first
        self._expected: Counter[Key] = Counter()  # of the requests that are still to be prefilled here
        self._done_s, self._done_tokens = prior_tokens / prior_rate, float(prior_tokens)
        self._prefill_s = 0.0  # busy since the last prompt was done
        self._now = 0.0
        self.next_search_s = -math.inf  # for requests to move away

    # Prefix cache

    def uncached(self, item: Item) -> int:
        """Tokens of a new request's prompt to prefill here, at least 1; what is queued here counts as cached."""
        hits = 0
        for key in item.prefix_keys[: (item.prompt_len - 1) // self._block_size]:
            if key not in self._cached and key not in self._expected:
                break
            hits += 1
        return item.prompt_len - hits * self._block_size

    def _remember(self, keys: tuple[Key, ...]) -> None:
        for key in reversed(keys):  # the tail is forgotten first, as in `BlockPool`
            self._cached[key] = None
            self._cached.move_to_end(key)
        while len(self._cached) > self._cache_blocks:
            self._cached.popitem(last=False)

    # Time

    def advance(self, now: float) -> None:
        if self.sent:
            self._prefill_s += max(0.0, now - self._now)
        self._now = max(now, self._now)

    @property
    def seconds_per_token(self) -> float:
        return self._done_s / self._done_tokens

    def sent_s(self) -> float:
        """Seconds until what was sent here is prefilled, from the last `advance` on; prompts are done in turn.

        A prompt that is late is taken to need as long again as it is late: a rank that hangs must not look idle.
        """
        if not self.sent:
            return 0.0
        first = next(iter(self.sent.values())).uncached
        late = self._prefill_s - first * self.seconds_per_token
        return abs(late) + (self.sent_tokens - first) * self.seconds_per_token

    def backlog_s(self) -> float:
        """`sent_s` and what waits behind it."""
        return self.sent_s() + self.waiting_tokens * self.seconds_per_token

    def ttft(self, item: Item) -> float:
        """Estimated seconds to the first token of a request that would be queued here now."""
        return self.backlog_s() + self.uncached(item) * self.seconds_per_token

    # The life of a request

    def add(self, entry: Entry) -> None:
        entry.rank = self
        entry.uncached = self.uncached(entry.item)
        self.waiting[entry.item.request_id] = entry
        self.waiting_tokens += entry.uncached
        self.outstanding += entry.item.tokens
        self._expected.update(entry.item.prefix_keys)

    def send(self, entry: Entry) -> None:
        del self.waiting[entry.item.request_id]
        self.waiting_tokens -= entry.uncached
        self.sent[entry.item.request_id] = entry
        self.sent_tokens += entry.uncached

    def start(self, entry: Entry, prefilled: int) -> None:
        decay = 0.5 ** (self._prefill_s / RATE_HALF_LIFE_S)
        self._done_s = self._done_s * decay + self._prefill_s
        self._done_tokens = self._done_tokens * decay + prefilled
        self._prefill_s = 0.0
        self._unsend(entry)
        self._remember(entry.item.prefix_keys)

    def remove(self, entry: Entry) -> None:
        """Gives up a request in any state."""
        self.outstanding -= entry.item.tokens
        if self.waiting.pop(entry.item.request_id, None):
            self.waiting_tokens -= entry.uncached
            self._forget_expected(entry)
        elif entry.item.request_id in self.sent:
            if entry is next(iter(self.sent.values())):
                self._prefill_s = 0.0
            self._unsend(entry)

    def _unsend(self, entry: Entry) -> None:
        del self.sent[entry.item.request_id]
        self.sent_tokens -= entry.uncached
        self._forget_expected(entry)

    def _forget_expected(self, entry: Entry) -> None:
        for key in entry.item.prefix_keys:
            if self._expected[key] == 1:
                del self._expected[key]
            else:
                self._expected[key] -= 1
