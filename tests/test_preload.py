"""Empty slots are filled after the start with what was used most before, and nobody waits for that."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import test_store
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import generate, prompts, reference
from test_store import EVENTS, EXPERTS, LAYERS, Fake, run

from moeyard.engine import constants, moe, offload_plan, usage
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.offload_plan import POLICIES
from moeyard.engine.readers import Priority
from moeyard.engine.store import ExpertStore
from moeyard.engine.wants import Want
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import DiskCost
from moeyard.scheduler.residency.preload import preload_order
from moeyard.scheduler.residency.slots import Budget, Context

make = test_store.make
ALL = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A cache of its own, and nothing is measured for it."""
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: 4)
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    monkeypatch.setattr(offload_plan, "disk_constants", lambda files, progress: SimpleNamespace(values=disk))
    monkeypatch.setattr(constants, "directory", lambda: tmp_path / "cache" / "constants")
    return tmp_path / "cache" / "usage"


def finish(store):
    deadline = time.monotonic() + 30
    while store.tend():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# Who


@given(st.data())
def test_the_most_used_and_each_layers_share(data):
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    slots = data.draw(st.integers(0, layers * experts))
    budget = Budget(layers=layers, experts=experts, slots=slots, floor=data.draw(st.integers(0, slots // layers)))
    counts = np.array(data.draw(st.lists(st.integers(0, 5), min_size=layers * experts, max_size=layers * experts)))
    counts_LE = counts.reshape(layers, experts)
    order = preload_order(counts_LE, budget)
    assert len(order) == len(set(order)) <= slots
    assert [counts_LE[at] for at in order] == sorted((counts_LE[at] for at in order), reverse=True)
    assert all(counts_LE[at] > 0 for at in order)
    chosen_LE = np.zeros((layers, experts), dtype=bool)
    for at in order:
        chosen_LE[at] = True
    for layer in range(layers):
        left = counts_LE[layer][~chosen_LE[layer]]
        if chosen_LE[layer].any() and left.size:
            assert counts_LE[layer][chosen_LE[layer]].min() >= left.max()
        if chosen_LE[layer].sum() < budget.floor:
            assert not left.any()
    # all of them find a slot
    policy = POLICIES["lru"](budget)
    assert all(policy.place(*at) for at in order)


@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 4), max_size=4), st.booleans()), max_size=30))
def test_a_policy_stays_within_its_budget_and_keeps_its_floors(events):
    budget = Budget(layers=3, experts=5, slots=7, floor=2)
    policy = POLICIES["default"](budget)
    for step, (layer, experts, place) in enumerate(events):
        before_LE = policy.resident_LE
        if place:
            for expert in sorted(experts):
                free = before_LE.sum() < 7 and not before_LE[layer, expert]
                found = policy.place(layer, expert)
                assert not found or free
                assert policy.resident_LE[layer, expert] == (found or before_LE[layer, expert])
                before_LE = policy.resident_LE
        else:
            decision = policy.step(layer, experts, Context(step=step))
            assert set(decision.hits) == {e for e in experts if before_LE[layer, e]}
        counts_L = policy.resident_LE.sum(1)
        assert np.maximum(counts_L, 2).sum() <= 7, "what is left of each layer's share is still free"


# The store


def test_slots_are_filled_in_order_and_hit(make):
    store, fake = make(slots=4, staging=3, ahead=1)
    order = [(1, 3), (0, 2), (2, 7), (1, 1), (0, 0)]
    store.preload(order)
    assert fake.reads == [], "only when there is time"
    finish(store)
    assert fake.reads == order[:4] and store.resident == set(order[:4])
    assert store.figures.preloaded == 4 and store.figures.resident_bytes == 4 * test_store.SIZE
    assert store.figures.ahead_bytes == 0 and store.most_used <= store.size.nbytes
    run(store, fake, 1, [1, 3])
    assert (store.figures.hits, store.figures.misses) == (2, 0) and fake.reads == order[:4]


def test_what_a_layer_waits_for_goes_first(make):
    """A read for an empty slot that is under way ends after its piece; those that wait, wait."""
    store, fake = make(slots=6, staging=3)
    fake.go.clear()
    store.preload(ALL)
    store.tend()
    assert fake.begun.acquire(timeout=30)
    visit = store.visit(2, [5, 6], test_store.scores(store))
    assert [read.priority for read in (held.read for held in store._early)] == [Priority.BACKGROUND] * len(store._early)
    fake.go.set()
    for _ in visit:
        pass
    asked = [at for at in fake.reads if at[0] == 2]
    assert asked == [(2, 5), (2, 6)] and fake.reads.index((2, 6)) <= 2
    finish(store)
    assert len(store.resident) == 6


def test_one_that_is_on_its_way_is_not_read_again_when_it_is_needed(make):
    store, fake = make(slots=4, staging=3, ahead=1)
    fake.go.clear()
    store.preload([(0, 1), (0, 2)])
    store.tend()
    store.fetch_ahead([Want(layer=0, expert=2, chance=0.9)])
    visit = store.visit(0, [1, 2], test_store.scores(store))
    fake.go.set()
    for _ in visit:
        pass
    finish(store)
    assert sorted(fake.reads) == [(0, 1), (0, 2)] and store.resident == {(0, 1), (0, 2)}
    assert (store.figures.misses, store.figures.ahead, store.figures.preloaded) == (2, 0, 0)


def test_a_read_that_fails_ends_it(make):
    store, fake = make(slots=4, staging=3)
    fake.fails = {(0, 1)}
    store.preload([(0, 0), (0, 1), *ALL[5:]])
    finish(store)
    assert (0, 1) not in store.resident and len(store.resident) <= 4
    assert run(store, fake, 0, [0]) == (0,)


@settings(max_examples=60)
@given(events=EVENTS, policy=st.sampled_from(sorted(POLICIES)), order=st.permutations(ALL), ahead=st.integers(0, 1))
def test_all_is_in_its_place_whoever_came_first(events, policy, order, ahead):
    size = test_store.sized(slots=5, staging=4, readers=1, ahead=ahead)
    fake = Fake(size)
    store = ExpertStore(size, POLICIES[policy](Budget(layers=LAYERS, experts=EXPERTS, slots=5, floor=1)), fake)
    try:
        store.begin_step()
        store.preload(order)
        for layer, experts, step in events:
            if step:
                store.begin_step()
                store.tend()
            run(store, fake, layer, experts)
            assert len(store._stays) + len(store._early) <= 5
        finish(store)
        assert store.most_used <= size.nbytes
        assert store.resident == {tuple(at) for at in np.argwhere(store._policy.resident_LE).tolist()}
        assert all(fake.contents[store._held[at].place] == at for at in store.resident)
    finally:
        store.close()


# The engine


def engine_of(path, memory="25%"):
    options = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_memory": "8MiB", "block_size": 8}
    return Engine(EngineConfig(model=str(path), expert_memory=memory, progress=False, predictor="none", **options))


def test_the_next_start_fills_its_slots_with_what_was_used(home, tmp_path):
    path, text = tiny.save("qwen3_moe", tmp_path / "model", num_experts=32), prompts(131, 1, longest=6)
    wanted = reference(path, text, 4)
    first = engine_of(path)
    assert not first.tend(), "nothing is known yet"
    assert generate(first, text, 4) == wanted
    counts = [layer.counts_E.numpy() for layer in first._experts.layers]
    cold = first.stats(with_experts=False)
    assert not home.exists()
    first.remember()
    first.close()

    second = engine_of(path)
    store = second._offload.store
    assert second.tend()
    finish(second)
    assert 0 < len(store.resident) <= store.size.slots and store.figures.misses == 0
    least = min(counts[layer][expert] for layer, expert in store.resident)
    assert least > 0
    assert generate(second, text, 4) == wanted
    warm = second.stats(with_experts=False)
    assert warm.expert_preloaded == len(store.resident) and cold.expert_preloaded == 0
    assert warm.expert_misses < cold.expert_misses and warm.expert_hits > cold.expert_hits
    second.remember()
    second.close()
    (file,) = home.iterdir()
    with np.load(file) as kept:
        assert (kept["counts_LE"] == 2 * np.array(counts)).all()


def test_counts_that_do_not_count(home, caplog, monkeypatch):
    usage.add("d", np.zeros((2, 3), dtype=np.int64))
    assert usage.load("d", 2, 3) is None and not home.exists()
    usage.add("d", np.full((2, 3), 4))
    assert usage.load("d", 2, 3).tolist() == [[4] * 3] * 2
    assert usage.load("d", 2, 4) is None and usage.load("e", 2, 3) is None
    monkeypatch.setattr(usage, "MOST_USES", 20)
    usage.add("d", np.full((2, 3), 4))
    assert usage.load("d", 2, 3).tolist() == [[4] * 3] * 2, "halved"
    with caplog.at_level("WARNING", logger="moeyard.usage"):
        usage.path_of("d").write_bytes(b"cut")
        assert usage.load("d", 2, 3) is None
        no_folder = usage.path_of("d") / "constants"
        monkeypatch.setattr(constants, "directory", lambda: no_folder)
        usage.add("d", np.full((2, 3), 4))
    assert "it is made anew" in caplog.text and "is not kept for the next start" in caplog.text
