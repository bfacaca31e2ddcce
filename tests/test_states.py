"""Slots for requests' states: one for whoever runs, whatever happens to it."""

import random

import pytest

from moeyard.scheduler.batching import Scheduler
from moeyard.scheduler.blocks import BlockPool
from moeyard.scheduler.requests import Request
from moeyard.scheduler.states import NO_SLOT, StateSlots


def test_the_lowest_free_slot_is_given_out():
    slots = StateSlots(3)
    a, b, c, d = (Request(name, [1], 2) for name in "abcd")
    for request in (a, b, c):
        slots.allocate(request)
    assert [a.state_slot, b.state_slot, c.state_slot] == [0, 1, 2]
    slots.free(b)
    slots.free(a)
    assert (slots.used, slots.num_free, a.state_slot) == (1, 2, NO_SLOT)
    slots.allocate(d)
    assert d.state_slot == 0
    slots.check_integrity([c, d])
    with pytest.raises(ValueError, match="num_slots is 0"):
        StateSlots(0)


def test_no_slot_is_left_after_random_requests_with_aborts_and_preemptions():
    rng = random.Random(0)
    slots = StateSlots(6)
    scheduler = Scheduler(BlockPool(40, 4, prefix_cache=False), 8, 32, states=slots)
    requests = [Request(str(i), [0] * rng.randint(1, 50), 50 + rng.randint(1, 40)) for i in range(200)]
    new, restarts = iter(requests), 0
    while scheduler.has_work or next(new, None) is not None:
        for request in (r for _ in range(rng.randint(0, 4)) if (r := next(new, None)) is not None):
            scheduler.add(request)
        step = scheduler.schedule()
        scheduler.check_integrity()
        assert len(scheduler.running) <= 6
        if rng.random() < 0.05 and step.tokens:
            scheduler.restart(step.tokens)  # a step that was given up
            restarts += 1
            scheduler.check_integrity()
            continue
        if rng.random() < 0.2 and step.tokens:
            scheduler.abort(rng.choice([*step.tokens]))
        scheduler.commit(step)
        for request_id in step.samples:
            if scheduler.append(request_id, 0):
                request = scheduler.get(request_id)
                if request.num_tokens == request.max_total:
                    scheduler.finish(request_id)
    assert scheduler.preemptions and restarts
    assert slots.used == 0
    scheduler.check_integrity()
