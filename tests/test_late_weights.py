"""Weights that come too late for their layer: homes compute the rows, no result changes, and the next plans wait."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import world
from hypothesis import given
from hypothesis import strategies as st
from test_balanced_layer import EXPERTS, KEEPING, Steps, chunked, cut, move, move_on, random_plan, spread

from moeyard.engine.arrivals import Arrival
from moeyard.engine.group import RankLost
from moeyard.engine.progress import Progress
from moeyard.scheduler import placement
from moeyard.scheduler.balance.patience import WINDOW, Patience
from moeyard.scheduler.balance.plan import native

LONG_NS = 50 * 10**9


class Held:
    """Keeps back what a rank sends to some others, until `release`."""

    def __init__(self, group, to):
        self.group, self.to, self.kept = group, to, []
        self._send = group.send_weights
        group.send_weights = self.send

    def send(self, position, packed):
        if position not in self.to:
            return self._send(position, packed)
        self.kept.append((position, packed))
        return SimpleNamespace(wait=lambda: None)

    def release(self):
        self.group.send_weights = self._send
        for position, packed in self.kept:
            self._send(position, packed).wait()


class Slow:
    """Sends in its turn what a rank sends, now and then late by far more than a layer takes."""

    def __init__(self, group, rng):
        self._send, self._rng = group.send_weights, rng
        self._thread = ThreadPoolExecutor(1)
        group.send_weights = self.send

    def send(self, position, packed):
        sent = self._thread.submit(self._after, self._rng.choice([0, 0.3], p=[0.9, 0.1]), position, packed)
        return SimpleNamespace(wait=lambda: sent.result(60))

    def _after(self, seconds, position, packed):
        with torch.inference_mode():
            time.sleep(seconds)
            self._send(position, packed).wait()


def in_room(planner):
    """Native where there is no room for guests: the levers do not look."""
    return lambda problem: planner(problem) if problem.room_P.any() else native(problem)


CASES = {  # what is moved, to whom what rank 0 sends is kept back, how many transfers are late
    "all": (move, (1, 2), 2),
    "one of two": (move, (1,), 1),
    "a relay": (move_on, (1,), 2),
    "after a relay": (move_on, (2,), 1),
    "a part": (cut, (1,), 1),
    "all parts": (cut, (1, 2), 2),
    "in chunks": (chunked, (1, 2), 2),
    "guests that stay": (spread(0), (1,), 1),
}


def late_layers(group):
    facts = {}
    for name, (planner, to, late) in CASES.items():
        table = placement.linear(EXPERTS, group.size)
        steps = Steps(group, table, slots=3, layers=2, rates=KEEPING)
        balancer = steps.balancer
        source = 1 if name == "after a relay" else 0
        hurried = group.position in to or (name == "a relay" and group.position == 2)
        balancer.patience = SimpleNamespace(wait_ns=lambda over_ns, w=hurried: 10**7 if w else LONG_NS, came=abs)
        held = Held(group, to if group.position == source else ())
        rooms, acted = [], []

        def seen(problem, planner=planner, rooms=rooms):
            rooms.append(problem.room_P.any())
            return in_room(planner)(problem)

        steps.run(seen)
        acted.append((balancer.figures.transfers, balancer.figures.late, balancer.late is not None, steps.held[0]))
        for index in (0, 1, 0):  # all layers share the room
            steps.run(seen, index)
        steps.run(None)  # and a step without plans
        acted.append((balancer.figures.transfers, balancer.figures.late, balancer.late is not None, steps.held[0]))
        group.put("held", 1)
        group.get_all("held", 30)
        held.release()
        for coming in balancer.late._coming.values():
            assert all(arrival.came(time.monotonic_ns() + LONG_NS) for _, _, arrival in coming)
        balancer.patience = SimpleNamespace(wait_ns=lambda over_ns: LONG_NS, came=abs)
        steps.run(seen)
        acted.append((balancer.figures.transfers, balancer.figures.late, balancer.late is not None, steps.held[0]))
        facts[name] = (late, steps.wrong, rooms, acted)
        del group.send_weights
    return facts


def test_homes_compute_what_late_guests_were_to(ranks):
    results = ranks.run(late_layers)
    assert all(facts == results[0] for facts in results)
    for name, (late, wrong, rooms, (first, meanwhile, then)) in results[0].items():
        assert not wrong, name
        assert rooms == [True, False, False, False, True], name
        moved = 2
        assert first == meanwhile == (moved, late, True, []), name
        assert then[:3] == (2 * moved, late, False), name
        assert then[3] == ([(1, 0), (2, 0)] if name == "guests that stay" else then[3])


def never(group):
    table = placement.linear(EXPERTS, group.size)
    Steps(group, table, slots=3).run(move)  # what is compiled takes its time
    group.timeout_s = 5
    group = world.next_group(group)
    steps = Steps(group, table, slots=3, rates=KEEPING)
    steps.balancer.patience = SimpleNamespace(wait_ns=lambda over_ns: 10**7, came=abs)
    held = Held(group, (1,))
    steps.run(in_room(move))
    text = ""
    if group.position == 1:
        try:
            while steps.balancer.open:
                time.sleep(0.05)
        except RankLost as error:
            text = str(error)
    group.put("lost", 1)
    group.get_all("lost", 60)
    group.close()
    return steps.wrong, len(held.kept), text


def test_weights_that_never_come_are_a_lost_rank(ranks):
    (wrong, kept, _), (_, _, text), _ = ranks.run(never)
    assert not wrong and kept == 1
    assert "the exchange with the other ranks broke" in text


def any_of_them_late(group):
    """Steps of all kinds, where a rank waits or does not: who is late is chance, but all ranks know it."""
    own = np.random.default_rng([7, group.position])
    rng = np.random.default_rng(7)
    rates = dataclasses.replace(KEEPING, far_alpha_ns=1, far_fs_per_byte=10**8)  # stripes and chunks
    table = placement.replicated([50, 3, 9, 1, 0, 30, 2], group.size, placement.slots_needed(EXPERTS, group.size) + 1)
    steps = Steps(group, table, slots=3, layers=2, rates=rates, node_P=[0, 0, 1])
    steps.balancer.patience = SimpleNamespace(wait_ns=lambda over_ns: [0, LONG_NS][own.integers(2)], came=abs)
    Slow(group, np.random.default_rng([8, group.position]))
    for _ in range(80):
        index = int(rng.integers(2))
        steps.run(random_plan(rng) if rng.integers(5) else None, index)
    figures = dataclasses.asdict(steps.balancer.figures) | {"plan_ns": 0}
    del group.send_weights
    return steps.wrong, figures, steps.held, [plan.digest for plan in steps.plans]


def test_whichever_are_late_the_result_is_the_same(ranks):
    results = ranks.run(any_of_them_late)
    for wrong, *facts in results:
        assert not wrong
        assert tuple(facts) == results[0][1:]
    assert results[0][1]["late"] and results[0][1]["transfers"] > results[0][1]["late"]


@pytest.fixture(scope="module")
def ranks():
    it = world.World(3)
    yield it
    it.close()


def asked(answers, timeout_s=50):
    """An arrival on a GPU, whose exchange is complete when these say so."""
    group = SimpleNamespace(device=SimpleNamespace(type="cuda"), timeout_s=timeout_s, progress=Progress())
    work = SimpleNamespace(is_completed=lambda: next(answers), wait=lambda: None)
    return Arrival(group, lambda call: call(), work, None)


def test_on_a_gpu_the_exchange_is_asked():
    arrival = asked(iter([False, False, False, True]))
    assert not arrival.came(0) and not arrival.at_ns
    assert arrival.came(time.monotonic_ns() + LONG_NS) and arrival.at_ns
    with pytest.raises(RuntimeError, match="did not come within 0 s"):
        asked(iter([False]), timeout_s=0).came(0)


@given(st.lists(st.integers(-5, 1000), max_size=3 * WINDOW), st.integers(0, 3000), st.integers(0, 3000))
def test_patience_is_as_long_as_doing_it_over_and_longer_than_jitter(delays, over_ns, most_ns):
    patience = Patience(most_ns)
    for delay in delays:
        patience.came(delay)
    wait_ns = patience.wait_ns(over_ns)
    if len(delays) < WINDOW:
        assert wait_ns == most_ns
    else:
        assert wait_ns == min(most_ns, max(over_ns, *(2 * d for d in delays[-WINDOW:]), 0))


def test_what_is_given_up_doubles_the_next_wait():
    patience = Patience(10**6)
    for _ in range(WINDOW):
        patience.came(10)
    waits = []
    for _ in range(4):
        waits.append(patience.wait_ns(5))
        patience.came(waits[-1])
    assert waits == [20, 40, 80, 160]
    for _ in range(WINDOW):
        patience.came(3)
    assert patience.wait_ns(5) == 6
