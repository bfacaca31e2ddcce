"""The routers: no request is lost or sent twice, keys move only where they must, and DualMap's decisions one by one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moeyard.scheduler.blocks import BlockPool
from moeyard.scheduler.rank_load import Entry
from moeyard.scheduler.replicas import DualMap, Item, LeastLoaded, RoundRobin, Router, prefix_keys
from moeyard.scheduler.requests import Request
from moeyard.scheduler.rings import COMMON_COUNT, CommonPrefixes, TwoRings

POLICIES = [DualMap, RoundRobin, LeastLoaded]
BLOCK = 4
RATE = 100.0  # tokens per second of a rank


def make(policy: type[Router] = DualMap, ranks: int = 2, **options) -> Any:
    options = {"ttft_target_s": 2.0, "budget_tokens": 10, "prefill_rate": RATE} | options
    return policy(range(ranks), block_size=BLOCK, **options)


def item(name: object, tokens: int = 40, keys: tuple = ()) -> Item:
    return Item(request_id=str(name), prompt_len=tokens, prefix_keys=keys)


def chain(name: int, blocks: int) -> tuple[int, ...]:
    return tuple(1000 * name + block for block in range(blocks))


def serve(router: Router, request: Item, now: float) -> float:
    """Runs one request alone, at the rank's rate; returns when its first token is there."""
    router.enqueue(request, now)
    assert [name for name, _ in router.release(now)] == [request.request_id]
    now += request.prompt_len / RATE
    router.started(request.request_id, now, 0)
    router.finished(request.request_id)
    return now


# Keys and rings


def key_of(prefixes: CommonPrefixes, keys: tuple[int, ...]) -> int | None:
    index = prefixes.key_index(keys)
    return keys[index] if index < len(keys) else None


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 5), st.text(max_size=3))
def test_prefix_keys_are_the_hashes_of_the_block_pool(ids: list[int], block_size: int, salt: str) -> None:
    pool, request = BlockPool(64, block_size), Request("r", [*ids, 0], 64, cache_salt=salt)
    pool.match_prefix(request)
    keys = prefix_keys(ids, block_size, salt)
    assert list(keys) == request.block_hashes and len(keys) == len(ids) // block_size
    assert prefix_keys(ids, block_size, salt, limit=2) == keys[:2]


@given(st.sets(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 40), st.integers())
@settings(max_examples=60, deadline=None)
def test_a_rank_that_comes_or_goes_takes_the_place_of_others_or_leaves_its_own(
    ranks: set[int], other: int, first_key: int
) -> None:
    without, whole = TwoRings(sorted(ranks - {other})), TwoRings(sorted(ranks | {other}))
    grown = TwoRings(sorted(ranks - {other}))
    grown.add(other)
    shrunk = TwoRings(sorted(ranks | {other}))
    shrunk.remove(other)
    for key in range(first_key, first_key + 50):
        before, after = without.candidates(key), whole.candidates(key)
        assert set(after) - set(before) <= {other}
        assert len(set(after)) == len(after) == min(2, len(ranks | {other}))
        assert grown.candidates(key) == after and shrunk.candidates(key) == before


def test_about_two_keys_in_n_move_and_shares_are_even() -> None:
    old, new = TwoRings(range(8)), TwoRings(range(9))
    keys = [str(i).encode() for i in range(4000)]
    pairs = [(old.candidates(key), new.candidates(key)) for key in keys]
    moved = sum(set(a) != set(b) for a, b in pairs) / len(keys)
    assert 0.75 * 2 / 9 < moved < 1.25 * 2 / 9
    for place in (0, 1):
        for rank in range(8):
            assert 0.6 / 8 < sum(a[place] == rank for a, _ in pairs) / len(keys) < 1.4 / 8


def test_candidates_are_the_same_in_every_process() -> None:
    rings = TwoRings(range(8))
    assert [rings.candidates(key) for key in (0, 1, 2, b"a", b"b")] == [(2, 7), (1, 5), (6, 7), (3, 6), (1, 5)]
    assert TwoRings().candidates(1) == () and TwoRings([3]).candidates(1) == (3,)


def test_the_key_goes_on_behind_a_prefix_that_is_common() -> None:
    prefixes = CommonPrefixes(1)
    system = (1, 2)
    assert key_of(prefixes, (*system, 7)) == 1
    for i in range(3 * COMMON_COUNT):
        prefixes.count((*system, 1000 + i), 8)
    assert key_of(prefixes, (*system, 7, 8)) == 7
    assert key_of(prefixes, system) is None and key_of(prefixes, ()) is None
    assert key_of(prefixes, (5, 6)) == 5
    for i in range(8 * COMMON_COUNT):  # until nobody has sent it for a whole window
        prefixes.count((9000 + i,), 8)
    assert key_of(prefixes, (*system, 7)) == 1


def test_a_common_prefix_stays_so_until_it_is_half_as_frequent() -> None:
    prefixes = CommonPrefixes(1)
    for _ in range(COMMON_COUNT):
        prefixes.count((1,), 4)
    filler = iter(range(10, 10_000))
    for _ in range(3 * COMMON_COUNT + COMMON_COUNT // 2):
        prefixes.count((next(filler),), 4)
    assert key_of(prefixes, (1, 2)) == 2
    prefixes.count((next(filler),), 4)
    assert key_of(prefixes, (1, 2)) == 1


@pytest.mark.parametrize(("keys", "expected"), [((1, 2, 3, 4), 3), ((1, 2), 2), ((1,), 1), ((), None)])
def test_the_key_covers_at_least_key_blocks_or_the_whole_prompt(keys: tuple, expected: int | None) -> None:
    assert key_of(CommonPrefixes(3), keys) == expected


def test_counts_are_those_of_the_window() -> None:
    prefixes = CommonPrefixes(1)
    for i in range(1000):
        prefixes.count((i % 7, i, -i), 1)
    assert len(prefixes._window) == COMMON_COUNT and sum(prefixes._counts.values()) <= 3 * COMMON_COUNT


# What all policies share


class RouterMachine(RuleBasedStateMachine):
    """Random requests, ranks and times against a list of who waits, who was sent and who has started."""

    @initialize(policy=st.sampled_from(POLICIES), ranks=st.integers(1, 4), budget=st.integers(1, 60))
    def start(self, policy: type[Router], ranks: int, budget: int) -> None:
        self.router = make(policy, ranks, budget_tokens=budget, cache_blocks=8)
        self.ranks, self.now, self.count = set(range(ranks)), 0.0, 0
        self.waiting: dict[str, Item] = {}
        self.sent: dict[str, int] = {}
        self.started: dict[str, int] = {}

    @precondition(lambda self: self.ranks)
    @rule(tokens=st.integers(1, 200), family=st.integers(0, 3), shared=st.integers(0, 9))
    def enqueue(self, tokens: int, family: int, shared: int) -> None:
        self.count += 1
        blocks = tokens // BLOCK
        keys = chain(family, blocks)[:shared] + chain(self.count + 9, blocks)[shared:]
        request = item(self.count, tokens, keys)
        assert self.router.enqueue(request, self.now) in self.ranks
        self.waiting[request.request_id] = request

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def migrate(self) -> None:
        self.router.migrate(self.now)

    @rule()
    def release(self) -> None:
        for name, rank in self.router.release(self.now):
            del self.waiting[name]  # each at most once
            assert rank in self.ranks and self.router.rank_of(name) == rank
            self.sent[name] = rank
        for rank in self.ranks:
            full = self.router.unprefilled(rank) >= self.router.budget_tokens
            assert full or not self.router.depth(rank)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), known=st.booleans())
    def begin(self, data: st.DataObject, known: bool) -> None:
        name = data.draw(st.sampled_from(list(self.sent)))
        self.router.started(name, self.now, 0 if known else None)
        self.started[name] = self.sent.pop(name)

    @precondition(lambda self: self.waiting or self.sent or self.started)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*self.waiting, *self.sent, *self.started]))
        self.router.finished(name)
        for names in (self.waiting, self.sent, self.started):
            names.pop(name, None)

    @rule(rank=st.integers(0, 5))
    def add_rank(self, rank: int) -> None:
        if rank in self.ranks:
            with pytest.raises(ValueError, match=f"rank {rank} is there"):
                self.router.add_rank(rank)
        else:
            self.router.add_rank(rank)
            self.ranks.add(rank)

    @precondition(lambda self: len(self.ranks) > 1)
    @rule(data=st.data())
    def remove_rank(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.ranks)))
        items = self.router.remove_rank(rank)
        self.ranks.remove(rank)
        assert all(self.waiting[i.request_id] is i for i in items)
        assert self.router.waiting == len(self.waiting) - len(items)
        for i in items:
            assert self.router.enqueue(i, self.now) in self.ranks

    @invariant()
    def books_agree(self) -> None:
        assert self.router.ranks == sorted(self.ranks)
        assert self.router.waiting == len(self.waiting) == sum(self.router.depth(rank) for rank in self.ranks)
        for name in self.waiting:
            assert self.router.rank_of(name) in self.ranks
        for name, rank in [*self.sent.items(), *self.started.items()]:
            assert self.router.rank_of(name) == rank
        for load in self.router._ranks.values():
            assert load.waiting_tokens == sum(e.uncached for e in load.waiting.values())
            assert load.sent_tokens == sum(e.uncached for e in load.sent.values())
            assert all(e.uncached >= 1 for e in [*load.waiting.values(), *load.sent.values()])
            assert len(load._cached) <= 8 and load.seconds_per_token >= 0 and load.backlog_s() >= 0

    def teardown(self) -> None:
        if not hasattr(self, "router"):
            return
        for name in [*self.waiting, *self.sent, *self.started]:
            self.router.finished(name)
        for load in self.router._ranks.values():
            assert not load.outstanding and not load._expected and load.backlog_s() == 0


TestRouter = RouterMachine.TestCase
TestRouter.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", POLICIES)
@given(lengths=st.lists(st.integers(1, 30), max_size=20), budget=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_rank_is_sent_more_only_below_the_budget(policy: type[Router], lengths: list[int], budget: int) -> None:
    router = make(policy, 2, budget_tokens=budget)
    for i, tokens in enumerate(lengths):
        router.enqueue(item(i, tokens), 0.0)
    left = dict.fromkeys(map(str, range(len(lengths))), None)
    running: dict[int, list[str]] = {0: [], 1: []}
    while left:
        for name, rank in router.release(0.0):
            assert sum(lengths[int(other)] for other in running[rank]) < budget
            running[rank].append(name)
        rank = max(running, key=lambda r: len(running[r]))
        name = running[rank].pop(0)
        router.started(name, 0.0)
        router.finished(name)
        del left[name]


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_histories_give_equal_decisions(policy: type[Router]) -> None:
    def history() -> list:
        router = make(policy, 5, ttft_target_s=0.5)
        log: list = []
        for i in range(300):
            log.append(router.enqueue(item(i, 10 + i % 37, chain(i % 11, 2)), i / 50))
            log += (sent := router.release(i / 50))
            for name, _ in sent[: i % 3]:
                router.started(name, i / 50 + 0.01)
                router.finished(name)
        return log

    assert history() == history()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_removed_rank_keeps_what_it_was_sent(policy: type[Router]) -> None:
    router = make(policy, 1)
    for i in range(3):
        router.enqueue(item(i), 0.0)
    assert router.release(0.0) == [("0", 0)]
    assert [i.request_id for i in router.remove_rank(0)] == ["1", "2"]
    assert router.ranks == [] and router.waiting == 0 and router.release(1.0) == []
    with pytest.raises(RuntimeError, match="no rank"):
        router.enqueue(item("new"), 1.0)
    router.started("0", 1.0)  # its last words
    router.finished("0")
    with pytest.raises(KeyError):
        router.finished("1")
    router.add_rank(0)
    assert router.enqueue(item("0"), 2.0) == 0


@pytest.mark.parametrize(
    "name", ["block_size", "ttft_target_s", "budget_tokens", "cache_blocks", "prefill_rate", "key_blocks"]
)
def test_sizes_must_be_positive(name: str) -> None:
    options: dict[str, Any] = {"block_size": 4, "ttft_target_s": 1.0, "budget_tokens": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        DualMap([0], **options)


@pytest.mark.parametrize("call", ["depth", "unprefilled", "remove_rank"])
def test_unknown_ranks_are_named(call: str) -> None:
    with pytest.raises(ValueError, match="rank 7 is not there"):
        getattr(make(), call)(7)


def test_mistakes_of_the_caller_are_found() -> None:
    router = make()
    router.enqueue(item("a"), 0.0)
    with pytest.raises(AssertionError, match="a is queued twice"):
        router.enqueue(item("a"), 0.0)
    with pytest.raises(AssertionError, match="was not sent"):
        router.started("a", 0.0)


# The simple policies


def test_round_robin_takes_turns_also_when_ranks_change() -> None:
    router = make(RoundRobin, 3)
    assert [router.enqueue(item(i), 0.0) for i in range(4)] == [0, 1, 2, 0]
    router.remove_rank(1)
    router.add_rank(5)
    assert [router.enqueue(item(i), 0.0) for i in range(10, 15)] == [2, 5, 0, 2, 5]


def test_least_loaded_counts_unfinished_tokens() -> None:
    router = make(LeastLoaded, 3)
    assert [router.enqueue(item(i, n), 0.0) for i, n in enumerate([50, 20, 30, 20, 5])] == [0, 1, 2, 1, 2]
    router.release(0.0)
    router.started("0", 1.0)
    assert router.enqueue(item("x", 1), 1.0) == 2  # it still decodes
    router.finished("0")
    assert router.enqueue(item("y", 1), 1.0) == 0
    other = make(LeastLoaded, 2)
    other.enqueue(Item(request_id="long", prompt_len=1, output_len=100), 0.0)
    assert [other.enqueue(item(i), 0.0) for i in range(3)] == [1, 1, 1]


# DualMap


def test_a_conversation_stays_where_its_prefix_is() -> None:
    router = make(ranks=8)
    now, homes = 0.0, set()
    for turn in range(1, 6):
        request = item(turn, 20 * turn, chain(1, 5 * turn))
        homes.add(router.enqueue(request, now))
        router.release(now)
        now += 1.0
        router.started(request.request_id, now)
        router.finished(request.request_id)
    assert len(homes) == 1


def busy(seconds: float) -> tuple[Any, int]:
    """A router of two ranks; the prefix `chain(1, 10)` is cached on the returned one, which is busy for a time."""
    router = make()
    now = serve(router, item("first", 40, chain(1, 10)), 0.0)
    home = 0 if router._ranks[0]._cached else 1
    assert len(router._ranks[home]._cached) == 10
    load = router._ranks[home]
    load.advance(now)
    tokens = round(seconds / load.seconds_per_token)
    load.add(Entry(item("long", tokens), now))  # by hand: the router might choose the other rank
    return router, home


@pytest.mark.parametrize(("seconds", "stays"), [(0.0, True), (0.8, True), (1.2, False)])
def test_the_cached_prefix_wins_up_to_half_the_target(seconds: float, stays: bool) -> None:
    router, home = busy(seconds)
    chosen = router.enqueue(item("next", 48, chain(1, 12)), 1.0)
    assert (chosen == home) == stays


def test_without_a_cached_prefix_the_candidate_with_less_to_do_gets_it() -> None:
    router = make()
    first = router.enqueue(item("a", 40, chain(1, 10)), 0.0)
    assert router.enqueue(item("b", 10, chain(2, 2)), 0.0) == 1 - first
    assert router.enqueue(item("c", 10, chain(3, 2)), 0.0) == 1 - first
    assert router.enqueue(item("d", 10, chain(1, 2)), 0.0) == first  # what is queued there will be cached


def test_beyond_the_target_on_both_candidates_every_rank_is_one() -> None:
    router = make(ranks=6)
    key = chain(1, 10)
    pair = set(router._rings.candidates(key[0]))
    homes = [router.enqueue(item(i, 90, (key[0], *chain(i + 2, 20))), 0.0) for i in range(12)]
    assert set(homes[:4]) == pair  # within 2 s at 100 tokens a second
    assert set(homes) - pair


def test_a_prompt_without_a_full_block_may_go_anywhere() -> None:
    router = make(ranks=5)
    assert [router.enqueue(item(i, 3), 0.0) for i in range(6)] == [0, 1, 2, 3, 4, 0]


def test_a_common_system_prompt_does_not_crowd_two_ranks() -> None:
    router, now, count = make(ranks=8, ttft_target_s=1e9), 0.0, dict.fromkeys(range(8), 0)
    for i in range(600):
        now += 1.0
        rank = router.enqueue(item(i, 24, (1, 2, *chain(i + 9, 4))), now)
        router.release(now)
        router.started(str(i), now + 0.5)
        router.finished(str(i))
        if i >= 300:
            count[rank] += 1
    assert max(count.values()) < 2.5 * 300 / 8 and min(count.values()) > 0


def hotspot(ranks: int = 2) -> tuple[Any, int]:
    """All that waits is on one rank, and the other has just come free."""
    router = make(ranks=ranks, ttft_target_s=100.0)
    serve(router, item("first", 40, chain(1, 10)), 0.0)
    for i in range(6):
        router.enqueue(item(i, 100, (*chain(1, 10), *chain(20 + i, 15))), 1.0)
    home = router.rank_of("0")
    assert router.depth(home) == 6
    router.release(1.0)
    router.ttft_target_s = 2.0  # as if load had come that was not foreseen
    return router, home


def test_an_overloaded_rank_gives_away_what_gains_most_until_it_is_not() -> None:
    router, home = hotspot()
    assert router.depth(home) == 5
    assert router.migrate(1.0) == 3
    # Each has 60 tokens to prefill at home, of 3.6 s in all. The last one moves first, and its 100 tokens take 1.0 s;
    # the next two find the common blocks queued there and take 0.6 s each. Then 1.8 s are left at home.
    assert [router.rank_of(str(i)) == home for i in range(6)] == [True, True, True, False, False, False]
    assert list(router._ranks[1 - home].waiting) == ["5", "4", "3"]
    assert router._ranks[home].backlog_s() == pytest.approx(1.8)
    assert router._ranks[1 - home].backlog_s() == pytest.approx(2.2)


def test_a_queue_is_not_searched_at_every_token() -> None:
    router, _ = hotspot()
    router.ttft_target_s = 1.0
    assert router.migrate(1.0) > 0
    router._relieve = lambda *_: pytest.fail("searched again")
    router.migrate(1.04)


def test_a_long_wait_is_a_hotspot_too() -> None:
    router, home = hotspot()
    router.ttft_target_s = 5.0
    assert router.migrate(1.5) == 0  # a backlog of less than 5 s
    moved = [router.migrate(now) for now in (2.0, 4.0, 6.1)]  # nothing starts: the rank hangs
    assert sum(moved) == router.depth(1 - home) == 5


def test_a_new_rank_takes_waiting_requests() -> None:
    router, home = hotspot(1)
    assert router.migrate(1.0) == 0
    router.add_rank(7)  # of two ranks, each is a candidate of every key
    assert router.migrate(2.0) > 0
    assert {router.rank_of(str(i)) for i in range(6)} == {home, 7}


def test_nothing_moves_where_nothing_is_gained() -> None:
    router = make(ttft_target_s=1.0)
    for i in range(20):
        router.enqueue(item(i, 100, chain(i, 25)), 0.0)
    assert {router.depth(0), router.depth(1)} == {10}
    assert router.migrate(0.0) == 0


def test_the_prefill_rate_is_measured() -> None:
    router = make(ranks=1)
    load = router._ranks[0]
    assert load.seconds_per_token == pytest.approx(1 / RATE)
    now = 0.0
    for i in range(40):
        router.enqueue(item(i, 100), now)
        router.release(now)
        now += 4.0
        router.started(str(i), now, 60)
        router.finished(str(i))
        now += 100.0  # idle time is not slow time
    assert load.seconds_per_token == pytest.approx(0.1, rel=1e-3)


def test_a_rank_that_is_late_looks_ever_busier() -> None:
    router = make(ranks=1)
    load = router._ranks[0]
    router.enqueue(item("a", 100), 0.0)
    router.release(0.0)
    seen = []
    for now in (0.0, 0.75, 1.0, 1.5, 3.0):
        load.advance(now)
        seen.append(load.backlog_s())
    assert seen == pytest.approx([1.0, 0.25, 0.0, 0.5, 2.0])
    router.enqueue(item("b", 50), 3.0)
    router.release(3.0)
    router.finished("a")  # given up: what it took says nothing about the next one
    assert load.backlog_s() == pytest.approx(0.5)


def test_the_estimate_of_the_cache_forgets_the_least_recently_used() -> None:
    router = make(ranks=1, cache_blocks=10)
    load = router._ranks[0]
    now = 0.0
    for name in (1, 2, 1, 3):
        now = serve(router, item(f"{name} at {now}", 16, chain(name, 4)), now)
    assert [load.uncached(item("x", 17, chain(name, 4))) for name in (1, 2, 3)] == [1, 9, 1]
    assert load.uncached(item("x", 16, chain(3, 4))) == 4  # one token is always computed


def test_an_aborted_prompt_is_not_taken_for_cached() -> None:
    router = make(ranks=1)
    router.enqueue(item("a", 17, chain(1, 4)), 0.0)
    assert router._ranks[0].uncached(item("x", 17, chain(1, 4))) == 1
    router.release(0.0)
    router.finished("a")
    assert router._ranks[0].uncached(item("x", 17, chain(1, 4))) == 17
