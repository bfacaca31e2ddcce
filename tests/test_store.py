"""The expert store over a fake source: what is where, in which order, and what happens when reading fails."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine import store as store_module
from moeyard.engine.config import parse_budget
from moeyard.engine.offload import POLICIES
from moeyard.engine.store import READS_IN_FLIGHT, ExpertLate, ExpertStore, StoreSize, share_out
from moeyard.scheduler.residency.slots import Budget, Context

LAYERS, EXPERTS = 3, 8
SIZE = 10


class Fake:
    """Writes (layer, expert) into `contents`; fails, or waits, where it is told to."""

    def __init__(self, places):
        self.contents = [None] * places
        self.reads = []
        self.fails = set()
        self.go = threading.Event()
        self.go.set()
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()

    def read_into(self, layer, expert, place):
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.contents[place] = None
            assert self.go.wait(30)
            self.reads.append((layer, expert))
            if (layer, expert) in self.fails:
                raise OSError("no such luck")
            self.contents[place] = (layer, expert)
            return SIZE
        finally:
            with self._lock:
                self.in_flight -= 1


@pytest.fixture
def make():
    stores = []

    def made(slots=4, staging=2, readers=1, policy="lru", floor=0):
        budget = Budget(layers=LAYERS, experts=EXPERTS, slots=slots, floor=floor)
        size = StoreSize(expert=SIZE, scratch=3, slots=slots, staging=staging, readers=readers)
        fake = Fake(size.places)
        stores.append(ExpertStore(size, POLICIES[policy](budget), fake))
        stores[-1].begin_step()
        return stores[-1], fake

    yield made
    for store in stores:
        store.close()


def run(store, fake, layer, experts):
    """The experts of an event in the order in which they run; each must be in its place then."""
    visit = store.visit(layer, experts)
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


@settings(deadline=None, max_examples=60)
@given(
    events=EVENTS,
    slots=st.integers(0, 12),
    staging=st.integers(1, 4),
    readers=st.integers(1, 3),
    policy=st.sampled_from(list(POLICIES)),
    data=st.data(),
)
def test_every_expert_is_in_its_place_and_the_counts_are_the_policys(events, slots, staging, readers, policy, data):
    floor = data.draw(st.integers(0, slots // LAYERS))
    budget = Budget(layers=LAYERS, experts=EXPERTS, slots=slots, floor=floor)
    size = StoreSize(expert=SIZE, scratch=3, slots=slots, staging=staging, readers=readers)
    fake = Fake(size.places)
    store, twin = ExpertStore(size, POLICIES[policy](budget), fake), POLICIES[policy](budget)
    hits = misses = admitted = 0
    try:
        store.begin_step()
        for layer, experts, new_step in events:
            if new_step:
                store.begin_step()
            order = run(store, fake, layer, experts)
            decision = twin.step(layer, experts, Context(step=store.step))
            hits, misses = hits + len(decision.hits), misses + len(decision.misses)
            admitted += len(decision.admitted)
            assert set(order[: len(decision.hits)]) == set(decision.hits)  # what is there runs first
            resident = {(at, e) for at in range(LAYERS) for e in range(EXPERTS) if twin.resident_LE[at, e]}
            assert store.resident == resident
            assert store.figures.resident_bytes == SIZE * len(resident) <= SIZE * slots
    finally:
        store.close()
    figures = store.figures
    assert (figures.hits, figures.misses) == (hits, misses)
    assert figures.read_bytes == SIZE * misses == SIZE * len(fake.reads)
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
    assert store.most_used == store.size.nbytes == 2 * SIZE + 2 * 3
    assert not store.resident


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
    with pytest.raises(ExpertLate, match="1 reads of experts did not end"):
        run(store, fake, 0, [0])  # its place may still be written to
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
    assert size.staging == size.readers + 1 or (size.staging, size.slots) == (1, 0) or size.staging == 1
    if size.readers > 1:
        assert 2 * (size.staging * expert + size.reading) <= budget


def test_budgets_are_sizes_or_shares():
    assert parse_budget("25%", 1000) == 250
    assert parse_budget(" 6.3 %", 1000) == 63
    assert parse_budget("1KiB", 7) == 1024
    for text in ("0%", "101%", "-1%"):
        with pytest.raises(ValueError, match="expert_memory"):
            parse_budget(text, 1000, "expert_memory")
