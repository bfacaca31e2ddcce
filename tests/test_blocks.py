"""The block pool against a model that knows every block's content as plain tokens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moeyard.scheduler.blocks import BlockPool
from moeyard.scheduler.requests import Request

Content = tuple[str, tuple[int, ...]]  # salt, all tokens from the start to the block's end


def admit(pool: BlockPool, request: Request) -> bool:
    matched = pool.match_prefix(request)
    if not pool.can_allocate(pool.blocks_needed(request, matched)):
        return False
    pool.allocate(request, matched)
    request.started = True
    return True


def compute(pool: BlockPool, request: Request, n: int | None = None) -> None:
    left = request.num_tokens - request.computed
    request.computed += left if n is None else min(n, left)
    pool.publish(request)


def run(pool: BlockPool, tokens: list[int], salt: str = "", name: str = "r") -> Request:
    """A request that is admitted and computed whole."""
    request = Request(name, tokens, len(tokens) + 64, cache_salt=salt)
    assert admit(pool, request)
    compute(pool, request)
    return request


class PoolMachine(RuleBasedStateMachine):
    """Random requests over two token ids, so that prefixes are often shared, in a pool that is often full."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 3), prefix_cache=st.booleans())
    def start(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_cache)
        self.live: list[Request] = []
        self.content: dict[int, Content] = {}
        self.lru: list[int] = []
        self.queried = self.hits = self.count = 0

    def contents(self, request: Request) -> list[Content]:
        """Of the request's full blocks."""
        size = self.pool.block_size
        ends = range(size, request.num_tokens + 1, size)
        return [(request.cache_salt, tuple(request.tokens[:end])) for end in ends]

    def expected_match(self, request: Request) -> list[int]:
        found = []
        for content in self.contents(request):
            blocks = [b for b, c in self.content.items() if c == content]
            if not blocks or len(content[1]) == request.num_tokens:
                break
            found += blocks
        return found

    def note_taken(self, blocks: list[int], used: set[int]) -> None:
        """New blocks must be blanks, and only when these are used up the least recently freed ones."""
        blanks = set(range(self.pool.num_blocks)) - used - set(self.lru)
        evicted = self.lru[: max(len(blocks) - len(blanks), 0)]
        if evicted:
            assert set(blocks) == blanks | set(evicted)
        else:
            assert set(blocks) <= blanks
        for block in evicted:
            self.lru.remove(block)
            del self.content[block]

    def used(self) -> set[int]:
        return {b for r in self.live for b in r.block_table}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        salt=st.sampled_from(["", "a"]),
        extra=st.integers(0, 12),
    )
    def add(self, tokens: list[int], salt: str, extra: int) -> None:
        self.count += 1
        request = Request(str(self.count), tokens, len(tokens) + extra, cache_salt=salt)
        expected, used = self.expected_match(request), self.used()
        assert self.pool.match_prefix(request) == expected
        total = self.pool.blocks_for(request.num_tokens)
        fits = total - len(set(expected) & used) <= self.pool.num_blocks - len(used)
        assert admit(self.pool, request) == fits
        if not fits:
            assert not request.block_table
            return
        assert request.block_table[: len(expected)] == expected and len(request.block_table) == total
        assert request.computed == len(expected) * self.pool.block_size < request.num_tokens
        if self.pool.prefix_cache:
            self.queried += request.num_tokens
            self.hits += request.computed
        self.lru = [b for b in self.lru if b not in expected]
        self.note_taken(request.block_table[len(expected) :], used | set(expected))
        self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), n=st.integers(1, 5))
    def compute(self, data: st.DataObject, n: int) -> None:
        request = data.draw(st.sampled_from(self.live))
        compute(self.pool, request, n)
        if self.pool.prefix_cache:
            for i, content in enumerate(self.contents(request)[: request.computed // self.pool.block_size]):
                if content not in self.content.values():
                    self.content[request.block_table[i]] = content

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        request = data.draw(st.sampled_from(self.live))
        if request.computed < request.num_tokens or request.num_tokens == request.max_total:
            return
        request.tokens.append(token)
        used, table = self.used(), list(request.block_table)
        full = request.computed == len(table) * self.pool.block_size
        assert self.pool.may_append(request) == (not full or len(used) < self.pool.num_blocks)
        new = request.block_table[len(table) :]
        assert request.block_table[: len(table)] == table
        if full and not new:
            request.tokens.pop()
            return
        assert len(new) == full
        self.note_taken(new, used)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        table = request.block_table
        self.live.remove(request)
        self.pool.free(request)
        assert request.block_table == [] and request.computed == 0
        self.lru += [b for b in reversed(table) if b not in self.used() and b in self.content]

    @rule()
    def reset(self) -> None:
        if self.used():
            with pytest.raises(RuntimeError, match="in use"):
                self.pool.reset_prefix_cache()
        else:
            self.pool.reset_prefix_cache()
            self.content.clear()
            self.lru.clear()

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.live)
        assert self.pool.used == len(self.used())
        assert self.pool.used + self.pool.num_free == self.pool.num_blocks
        assert (self.pool.queried_tokens, self.pool.hit_tokens) == (self.queried, self.hits)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_one_token_is_always_left_to_compute() -> None:
    pool = BlockPool(16, 4)
    run(pool, list(range(8)))
    for length, matched in ((8, 1), (9, 2), (4, 0), (5, 1), (1, 0)):
        assert len(pool.match_prefix(Request("x", [*range(length)], 64))) == matched


def test_nothing_is_found_before_it_is_computed() -> None:
    pool = BlockPool(16, 4)
    request = Request("a", list(range(12)), 16)
    assert admit(pool, request)
    other = Request("b", list(range(12)), 16)
    for computed, found in ((3, 0), (7, 1), (8, 2)):
        compute(pool, request, computed - request.computed)
        assert len(pool.match_prefix(other)) == found


def test_equal_blocks_behind_different_prefixes_are_different() -> None:
    pool = BlockPool(16, 2)
    run(pool, [1, 2, 7, 7, 0])
    assert len(pool.match_prefix(Request("x", [1, 2, 7, 7, 0], 64))) == 2
    assert pool.match_prefix(Request("x", [3, 4, 7, 7, 0], 64)) == []
    assert pool.match_prefix(Request("x", [7, 7, 1, 2, 0], 64)) == []


def test_salt_isolates_all_blocks() -> None:
    pool = BlockPool(16, 2)
    run(pool, [1, 2, 3, 4, 5], salt="tenant-a")
    for salt, found in (("tenant-a", 2), ("tenant-b", 0), ("", 0), ("\ud800", 0)):
        assert len(pool.match_prefix(Request("x", [1, 2, 3, 4, 5], 64, cache_salt=salt))) == found


def test_tokens_that_python_hashes_alike_are_different() -> None:
    assert hash((-1, 5)) == hash((-2, 5))
    pool = BlockPool(16, 2)
    run(pool, [-1, 5, 0])
    assert pool.match_prefix(Request("x", [-2, 5, 0], 64)) == []


def test_prefix_cache_off_finds_and_counts_nothing() -> None:
    pool = BlockPool(16, 2, prefix_cache=False)
    request = run(pool, [1, 2, 3, 4, 5])
    assert pool.match_prefix(Request("x", [1, 2, 3, 4, 5], 64)) == []
    assert (pool.queried_tokens, pool.hit_tokens, request.block_hashes) == (0, 0, [])


def test_tails_are_evicted_first() -> None:
    pool = BlockPool(4, 1)
    pool.free(run(pool, [1, 2, 3, 4]))
    for evicted in range(4):
        assert len(pool.match_prefix(Request("x", [1, 2, 3, 4, 9], 8))) == 4 - evicted
        assert admit(pool, Request("y", [100 + evicted], 1))


def test_least_recently_freed_is_evicted_first() -> None:
    pool = BlockPool(4, 2)
    a, b = run(pool, [1, 1, 1, 1]), run(pool, [2, 2, 2, 2])
    pool.free(b)
    pool.free(a)
    run(pool, [3, 3, 3, 3])
    assert len(pool.match_prefix(Request("x", [1, 1, 1, 1, 0], 8))) == 2
    assert pool.match_prefix(Request("x", [2, 2, 2, 2, 0], 8)) == []


def test_a_hit_saves_cached_blocks_from_eviction() -> None:
    pool = BlockPool(4, 2)
    pool.free(run(pool, [1, 1, 2, 2]))
    pool.free(run(pool, [3, 3, 4, 4]))
    request = run(pool, [1, 1, 2, 2, 5, 5, 6, 6])
    assert len(set(request.block_table)) == 4
    pool.check_integrity([request])


def test_tokens_are_hashed_once() -> None:
    pool = BlockPool(64, 4)
    request = run(pool, list(range(40)))
    hashes = request.block_hashes
    first = list(hashes)
    pool.free(request)
    assert admit(pool, request)
    compute(pool, request)
    for _ in range(4):
        request.tokens.append(7)
        assert pool.may_append(request)
        compute(pool, request)
    assert request.block_hashes is hashes and hashes[:10] == first and len(hashes) == 11
    assert all(kept is before for kept, before in zip(hashes, first, strict=False))


def test_tables_stay_consecutive_while_requests_grow_side_by_side() -> None:
    pool = BlockPool(16 * 24, 16)
    requests = [Request(str(i), [i] * 64, 192) for i in range(16)]
    assert all(admit(pool, r) for r in requests)
    for request in requests:
        compute(pool, request)
    for _ in range(128):
        for request in requests:
            request.tokens.append(0)
            assert pool.may_append(request)
            compute(pool, request)
    for request in requests:
        table = request.block_table
        assert table == list(range(table[0], table[0] + 12))


def test_room_to_grow_is_not_reserved() -> None:
    """A request that may grow to the whole pool leaves the rest of it to others."""
    pool = BlockPool(8, 2)
    requests = [Request(str(i), [i, i], 16) for i in range(8)]
    assert all(admit(pool, r) for r in requests)
    assert pool.num_free == 0
    pool.check_integrity(requests)


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0)])
def test_sizes_below_one_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(*arguments)


def test_check_integrity_sees_a_leak() -> None:
    pool = BlockPool(8, 2)
    request = run(pool, [1, 2, 3])
    pool.check_integrity([request])
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity()
    pool.free(request)
    pool.check_integrity()
