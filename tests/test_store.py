"""The expert store over a fake source: what is where, in which order, and what happens when reading fails."""

import threading
from concurrent.futures import wait

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine import store as store_module
from moeyard.engine.config import parse_budget
from moeyard.engine.expert_files import AlignedBuffer
from moeyard.engine.offload_plan import POLICIES
from moeyard.engine.readers import Priority, Readers
from moeyard.engine.store import ExpertLate, ExpertStore
from moeyard.engine.store_size import READS_IN_FLIGHT, StoreSize, share_out
from moeyard.engine.wants import Outcome, Want
from moeyard.scheduler.residency.slots import Budget, Context

LAYERS, EXPERTS = 3, 8
SIZE = 10


class Fake:
    """Writes (layer, expert) into `contents`, on threads as an engine's readers do; fails, or waits, where told to."""

    def __init__(self, size):
        self.contents = [None] * size.places
        self.reads = []
        self.fails = set()
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Semaphore(0)
        self.in_flight = self.most_in_flight = self.at_hand = 0
        self._lock = threading.Lock()
        buffers = [AlignedBuffer(1) for _ in range(size.buffers)]
        self.readers = Readers(self, buffers, threads=size.readers)

    def pieces(self, layer, expert):
        return [0]

    def read_piece(self, layer, expert, piece, buffer):
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.begun.release()
            assert self.go.wait(30)
            self.reads.append((layer, expert))
            if (layer, expert) in self.fails:
                raise OSError("no such luck")
        finally:
            with self._lock:
                self.in_flight -= 1
        return SIZE

    def check(self, layer, expert):
        pass

    def copy(self, layer, expert, buffer, into):
        self.contents[into["place"]] = (layer, expert)

    def fetch(self, layer, expert, place, priority):
        self.contents[place] = None
        return self.readers.submit(layer, expert, {"place": place}, priority)

    def promote(self, read, priority):
        self.readers.promote(read, priority)

    def abandon(self, read):
        self.readers.abandon(read)

    def nbytes(self, layer, expert):
        return SIZE

    def bytes_read(self, read):
        return self.at_hand

    def in_the_way(self, read):
        return 2 * self.readers.in_flight(read)

    def close(self, timeout_s):
        self.readers.close(timeout_s)


@pytest.fixture
def make():
    stores = []

    def made(slots=4, staging=2, readers=1, policy="lru", floor=0, ahead=0):
        budget = Budget(layers=LAYERS, experts=EXPERTS, slots=slots, floor=floor)
        size = sized(slots, staging, readers, ahead)
        fake = Fake(size)
        stores.append(ExpertStore(size, POLICIES[policy](budget), fake))
        stores[-1].begin_step()
        return stores[-1], fake

    yield made
    for store in stores:
        store._source.go.set()
        store.close()


def sized(slots, staging, readers, ahead=0):
    return StoreSize(
        expert=SIZE, scratch=3, slots=slots, staging=staging, readers=readers, ahead=ahead, buffers=readers + 1
    )


def scores(store):
    """Of a step, for the policy that goes by them."""
    return np.random.default_rng(store.step).random((LAYERS, EXPERTS))


def run(store, fake, layer, experts):
    """The experts of an event in the order in which they run; each must be in its place then."""
    visit = store.visit(layer, experts, scores(store))
    ran = []
    for places in visit:
        for place in places:
            assert fake.contents[place] == (layer, visit.experts[len(ran)])
            ran.append(fake.contents[place])
    assert [expert for _, expert in ran] == list(visit.experts)
    assert sorted(visit.experts) == sorted(set(experts))
    return visit.experts


EVENTS = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS), st.booleans()),
    max_size=25,
)


PRIORITIES = st.sampled_from([Priority.NEXT_LAYER, Priority.LATER])


@settings(deadline=None, max_examples=100)
@given(
    events=EVENTS,
    slots=st.integers(0, 12),
    staging=st.integers(1, 4),
    readers=st.integers(1, 3),
    policy=st.sampled_from(list(POLICIES)),
    ahead=st.integers(0, 3),
    data=st.data(),
)
def test_every_expert_is_in_its_place_and_the_counts_are_the_policys(
    events, slots, staging, readers, policy, ahead, data
):
    ahead = min(ahead, staging - 1)
    floor = data.draw(st.integers(0, slots // LAYERS))
    budget = Budget(layers=LAYERS, experts=EXPERTS, slots=slots, floor=floor)
    size = sized(slots, staging, readers, ahead)
    fake = Fake(size)
    store, twin = ExpertStore(size, POLICIES[policy](budget), fake), POLICIES[policy](budget)
    hits = misses = admitted = 0
    try:
        store.begin_step()
        for layer, experts, new_step in events:
            if new_step:
                store.begin_step()
            order = run(store, fake, layer, experts)
            decision = twin.step(layer, experts, Context(step=store.step, scores_LE=scores(store)))
            hits, misses = hits + len(decision.hits), misses + len(decision.misses)
            admitted += len(decision.admitted)
            if not ahead:
                assert set(order[: len(decision.hits)]) == set(decision.hits)  # what is there runs first
            guess = data.draw(st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), max_size=5))
            store.fetch_ahead(
                Want(layer=at, expert=expert, chance=data.draw(st.floats(0, 1)), priority=data.draw(PRIORITIES))
                for at, expert in guess
            )
            resident = {(at, e) for at in range(LAYERS) for e in range(EXPERTS) if twin.resident_LE[at, e]}
            assert store.resident == resident
            assert store.figures.resident_bytes == SIZE * len(resident) <= SIZE * slots
    finally:
        store.close()
    figures = store.figures
    assert (figures.hits, figures.misses) == (hits, misses)
    assert figures.read_bytes - (figures.ahead_bytes - figures.ahead_used_bytes) == SIZE * misses
    assert ahead or figures.read_bytes == SIZE * len(fake.reads)
    assert figures.ahead_used_bytes <= figures.ahead_bytes and figures.ahead_ready <= figures.ahead <= misses
    assert figures.admitted_bytes == SIZE * admitted
    assert store.most_used <= size.nbytes
    assert fake.most_in_flight <= readers


def test_what_is_there_runs_while_the_others_are_read(make):
    store, fake = make()
    run(store, fake, 0, [1, 2])
    fake.go.clear()
    visit = store.visit(0, [0, 1, 2, 3])
    assert visit.experts == (1, 2, 0, 3)
    groups = iter(visit)
    assert [fake.contents[place] for place in next(groups)] == [(0, 1), (0, 2)]
    fake.go.set()
    assert sum(len(places) for places in groups) == 2


def test_more_misses_than_places_stream_through(make):
    store, fake = make(slots=0, staging=2, readers=2)
    assert run(store, fake, 1, range(EXPERTS)) == tuple(range(EXPERTS))
    assert fake.reads.__len__() == EXPERTS
    assert store.most_used == store.size.nbytes == 2 * SIZE + 3 * 3
    assert not store.resident


def wants(*experts, layer=0, chance=0.5, **more):
    return [Want(layer=layer, expert=expert, chance=chance, **more) for expert in experts]


def settle(store):
    """Until nothing is being read."""
    assert not wait([held.read for held in store._held.values() if held.read is not None], 30).not_done


def test_what_was_read_ahead_is_there_when_the_router_asks_for_it(make):
    store, fake = make(slots=2, staging=5, readers=2, ahead=2)
    heard = []
    store.heard = lambda want, *what: heard.append((want.by, *what))
    store.fetch_ahead(wants(1, 2, by="me"))
    settle(store)
    assert store.figures.resident_bytes == 0  # not by asking: the policy decides about slots
    fake.go.clear()
    visit = store.visit(0, [1, 2, 3])
    groups = iter(visit)
    assert visit.experts == (1, 2, 3)
    assert [fake.contents[place] for place in next(groups)] == [(0, 1), (0, 2)]
    fake.go.set()
    assert sum(len(places) for places in groups) == 1
    figures = store.figures
    assert (figures.misses, figures.ahead, figures.ahead_ready) == (3, 2, 2)
    assert (figures.ahead_bytes, figures.ahead_used_bytes, figures.read_bytes) == (2 * SIZE, 2 * SIZE, 3 * SIZE)
    assert heard == [("me", Outcome(nbytes=SIZE, used=True, hidden=SIZE))] * 2
    assert store.figures.admitted_bytes == SIZE * len(store.resident) == 2 * SIZE


def test_a_router_makes_a_read_ahead_urgent_and_reads_nothing_twice(make):
    store, fake = make(slots=2, staging=5, readers=1, ahead=3)
    fake.go.clear()
    store.fetch_ahead(wants(0, layer=1) + wants(5, layer=2, chance=0.9, priority=Priority.LATER) + wants(6, layer=1))
    assert fake.begun.acquire(timeout=30)
    visit = store.visit(1, [3, 6])
    fake.go.set()
    assert visit.experts == (6, 3)
    for _ in visit:
        pass
    settle(store)
    assert fake.reads == [(1, 0), (1, 6), (1, 3), (2, 5)]  # 0 had begun when it became clear that nobody wants it
    assert store.figures.ahead_used_bytes == SIZE


def test_what_is_not_there_yet_hides_a_part_and_what_is_under_way_delays(make):
    store, fake = make(slots=2, staging=5, readers=2, ahead=2)
    heard = []
    store.heard = lambda want, outcome: heard.append((want.expert, outcome))
    fake.go.clear()
    store.fetch_ahead(wants(1, 2, layer=1))
    assert fake.begun.acquire(timeout=30)
    fake.at_hand = 3
    visit = store.visit(1, [1, 3])
    fake.go.set()
    for _ in visit:
        pass
    right, wrong = (1, Outcome(nbytes=SIZE, used=True, hidden=3)), (2, Outcome(nbytes=SIZE))
    assert right in heard
    # One of the two was under way: what is needed delays nobody, what is not needed makes the other wait.
    assert set(heard) <= {right, wrong, (2, Outcome(delay=2))}
    heard.clear()
    fake.go.clear()
    store.fetch_ahead(wants(4, layer=2, chance=0.9))
    assert fake.begun.acquire(timeout=30)
    while not store._held[2, 4].read.running():
        pass
    visit = store.visit(0, [5])
    assert heard == [(4, Outcome(delay=2))]
    fake.go.set()
    for _ in visit:
        pass
    heard.clear()
    settle(store)
    store.visit(1, [1])
    assert heard == []  # nobody waits


def test_wrong_ones_are_forgotten_when_the_router_has_spoken(make):
    store, fake = make(slots=2, staging=5, readers=2, ahead=2)
    heard = []
    store.heard = lambda want, *what: heard.append((want.by, *what))
    store.fetch_ahead(wants(1, 2, by="me"))
    settle(store)
    run(store, fake, 0, [5])
    assert not store._ahead and heard == [("me", Outcome(nbytes=SIZE))] * 2  # it has delayed nobody
    assert store.figures.ahead_bytes == 2 * SIZE and not store.figures.ahead_used_bytes
    assert store.figures.read_bytes == 3 * SIZE


def test_a_layer_that_needs_nothing_here_forgets_what_was_read_ahead_for_it(make):
    """As one of several ranks does, whose experts no token has chosen."""
    store, fake = make(slots=2, staging=5, readers=2, ahead=2)
    heard = []
    store.heard = lambda want, outcome: heard.append((want.by, outcome))
    store.fetch_ahead(wants(1, by="me") + wants(2, layer=1, by="me"))
    settle(store)
    visit = store.visit(0, [])
    assert visit.experts == () and [held.at for held in store._ahead] == [(1, 2)]
    assert heard == [("me", Outcome(nbytes=SIZE))] and store.figures.misses == 0
    run(store, fake, 1, [2])
    assert heard[1:] == [("me", Outcome(nbytes=SIZE, used=True, hidden=SIZE))]


def test_the_likely_push_out_the_unlikely_and_one_place_is_left(make):
    store, fake = make(slots=2, staging=3, readers=1, ahead=2)
    store.fetch_ahead(wants(1, chance=0.4) + wants(2, chance=0.5) + wants(3, chance=0.3) + wants(4, chance=0.6))
    assert {held.at[1] for held in store._ahead} == {2, 4}
    settle(store)
    run(store, fake, 1, range(EXPERTS))  # who waits for places takes those of others
    assert sorted(store._free) and not store._in_use


def test_a_read_ahead_that_failed_is_done_again_for_the_one_who_needs_it(make):
    store, fake = make(slots=2, staging=3, readers=1, ahead=2)
    fake.fails = {(0, 1)}
    store.fetch_ahead(wants(1))
    settle(store)
    fake.fails = set()
    assert run(store, fake, 0, [1]) == (1,)
    assert fake.reads == [(0, 1), (0, 1)]


def test_who_is_computed_elsewhere_is_not_waited_for_and_gets_its_slot_when_the_layer_is_done(make):
    store, fake = make(slots=3, staging=2)
    run(store, fake, 0, [1])
    seen = []
    store.ask(0, [1, 2, 5, 6], lambda *lists: seen.append(lists) or ([6], [5, 2]))
    visit = store.visit(0, [1, 2, 5, 6])
    assert seen == [([1], [], [2, 5, 6])]
    assert (visit.experts, visit.elsewhere) == ((1, 6), [5, 2])
    groups = [[fake.contents[place] for place in places] for places in visit]
    assert groups == [[(0, 1)], [(0, 6)]]
    settle(store)
    assert fake.reads[:2] == [(0, 1), (0, 6)] and store.resident == {
        (0, 1),
        *(at for at in [(0, 6)] if at in store._stays),
    }
    assert (store.figures.hits, store.figures.misses) == (1, 4)
    fake.reads.clear()
    stay = [expert for expert in (2, 5) if (0, expert) in store._stays]
    assert stay and run(store, fake, 0, stay) == tuple(stay)
    assert not fake.reads and store.figures.hits == 1 + len(stay)  # they had come meanwhile


def test_a_read_behind_the_layers_becomes_urgent_is_done_again_or_given_up(make):
    store, fake = make(slots=2, staging=2, readers=1)
    elsewhere = lambda here, coming, missing: ([], missing)  # noqa: E731

    def behind(layer, experts):
        fake.go.clear()
        store.ask(layer, experts, elsewhere)
        list(store.visit(layer, experts))
        assert {held.at for held in store._behind} == {(layer, e) for e in experts}

    behind(0, [1, 2])
    visit = store.visit(0, [1, 2])
    assert not store._behind and visit.experts == (1, 2)
    assert {held.read.priority for held in store._in_use} == {Priority.DEMAND}
    fake.go.set()
    assert sum(len(places) for places in visit) == 2 and store.figures.hits == 0
    store.begin_step()
    behind(1, [3, 4])  # in the places of the others
    fake.fails = {(1, 3)}
    fake.go.set()
    settle(store)
    fake.fails = set()
    assert run(store, fake, 1, [3, 4]) == (4, 3)
    store.begin_step()
    behind(2, [5, 6])
    fake.go.set()
    store.begin_step()
    run(store, fake, 0, range(EXPERTS))  # they lose their slots before they have come
    assert not store._behind


@settings(deadline=None, max_examples=60)
@given(
    events=EVENTS,
    slots=st.integers(0, 12),
    staging=st.integers(1, 4),
    policy=st.sampled_from(list(POLICIES)),
    seed=st.integers(0, 99),
)
def test_whoever_is_computed_elsewhere_the_others_are_in_their_places(events, slots, staging, policy, seed):
    rng = np.random.default_rng(seed)  # not hypothesis's own: what is missing depends on the reads' threads
    size = sized(slots, staging, 2, 0)
    fake = Fake(size)
    store = ExpertStore(size, POLICIES[policy](Budget(layers=LAYERS, experts=EXPERTS, slots=slots)), fake)
    store.begin_step()
    computed = 0

    def choose(here, coming, missing):
        order = rng.permutation(missing).tolist()
        cut = rng.integers(0, len(order) + 1)
        return order[:cut], order[cut:]

    try:
        for layer, experts, new_step in events:
            if new_step:
                store.begin_step()
            store.ask(layer, experts, choose)
            visit = store.visit(layer, experts, scores(store))
            ran = [fake.contents[place] for places in visit for place in places]
            assert ran == [(layer, expert) for expert in visit.experts]
            assert sorted((*visit.experts, *visit.elsewhere)) == sorted(set(experts))
            computed += len(set(experts))
            guess = rng.integers(0, EXPERTS, rng.integers(0, 6))
            store.stream(wants(*guess.tolist(), layer=(layer + 1) % LAYERS))
            assert len(store._ahead) < staging
    finally:
        store.close()
    assert store.figures.hits + store.figures.misses == computed
    assert store.most_used <= store.size.nbytes


@pytest.mark.parametrize("policy", POLICIES)
def test_a_read_that_fails_ends_the_visit_and_nothing_else(make, policy):
    store, fake = make(slots=3, policy=policy)
    run(store, fake, 0, [0])
    for bad in range(EXPERTS):
        fake.fails = {(1, bad)}
        store.begin_step()
        if (1, bad) not in store.resident:
            with pytest.raises(OSError, match="no such luck"):
                run(store, fake, 1, range(EXPERTS))
        fake.fails = set()
        for layer in range(LAYERS):  # nothing is where it is not, and all can be run again
            run(store, fake, layer, range(EXPERTS))
            assert store.figures.resident_bytes == SIZE * len(store.resident) <= 3 * SIZE


def test_a_visit_that_is_broken_off_gives_its_places_back(make):
    store, fake = make(slots=2, staging=1)
    for _ in range(5):
        next(iter(store.visit(0, range(EXPERTS))))
        store.begin_step()
    for layer in range(LAYERS):
        run(store, fake, layer, range(EXPERTS))


def test_a_disk_that_does_not_answer_is_named_and_not_waited_for(make, monkeypatch):
    monkeypatch.setattr(store_module, "READ_TIMEOUT_S", 0.05)
    store, fake = make(slots=2)
    fake.go.clear()
    with pytest.raises(ExpertLate, match=r"expert 3 of MoE layer 2 was not read within 0\.05 s"):
        run(store, fake, 2, [3, 4])
    for _ in range(3):  # its place may still be written to: there is none left, and that is bounded too
        with pytest.raises(ExpertLate, match=r"expert \d of MoE layer 0 was not read within 0\.05 s"):
            run(store, fake, 0, [0, 1, 2])
    fake.go.set()
    monkeypatch.setattr(store_module, "READ_TIMEOUT_S", 30)
    run(store, fake, 2, [3, 4])
    run(store, fake, 0, [0])


def test_forgetting_empties_it(make):
    store, fake = make()
    run(store, fake, 0, range(EXPERTS))
    store.forget(POLICIES["lfu"](Budget(layers=LAYERS, experts=EXPERTS, slots=4)))
    assert not store.resident
    assert store.figures == store_module.StoreFigures()
    store.begin_step()
    run(store, fake, 0, range(EXPERTS))
    assert store.figures.misses == EXPERTS


@given(budget=st.integers(0, 10**6), expert=st.integers(1, 10**4), scratch=st.integers(1, 10**4))
def test_a_budget_is_never_exceeded_and_never_wasted(budget, expert, scratch):
    if budget < expert + scratch:
        with pytest.raises(ValueError, match=r"^expert_memory gives .* needs .*; set --expert-memory to as much$"):
            share_out(budget, expert, scratch)
        return
    size = share_out(budget, expert, scratch)
    assert budget - expert < size.nbytes <= budget
    assert size.slots >= 0
    assert 1 <= size.readers <= READS_IN_FLIGHT
    if size.ahead:
        assert (size.staging, size.ahead, size.buffers) == (2 * size.readers + 1, size.readers, size.readers + 1)
        assert 4 * (size.staging * expert + size.reading) <= budget
    else:
        assert (size.readers, size.buffers) == (1, 1)
        assert size.staging == 2 or (size.staging, size.slots) == (1, 0) or size.staging == 1


def test_budgets_are_sizes_or_shares():
    assert parse_budget("25%", 1000) == 250
    assert parse_budget(" 6.3 %", 1000) == 63
    assert parse_budget("1KiB", 7) == 1024
    for text in ("0%", "101%", "-1%"):
        with pytest.raises(ValueError, match="expert_memory"):
            parse_budget(text, 1000, "expert_memory")
