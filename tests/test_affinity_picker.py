"""Requests that are picked to decode together: in the scheduler nobody starves, prompts go on, and no block is lost."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import FakeEngine, alone

from moeyard.scheduler.affinity.picker import AffinityPicker
from moeyard.scheduler.requests import Request


def by_kind(most: int) -> AffinityPicker:
    """Requests whose ids end in the same digit need the same ten experts, and each one of its own."""

    def predict(request: Request) -> np.ndarray:
        needs_X = np.zeros(200, dtype=bool)
        kind = int(request.id) % 10
        needs_X[10 * kind : 10 * kind + 10] = True
        needs_X[100 + int(request.id) % 100] = True
        return needs_X

    return AffinityPicker(
        predict=predict,
        missing_bytes=lambda: np.full(200, 1000, dtype=np.int64),
        most=most,
        read_fs_per_byte=10**6,
        step_ns=1000,
    )


def test_requests_of_a_kind_decode_together() -> None:
    """Two kinds admitted in turn. In order every step would have both."""
    picker = by_kind(most=2)
    engine = FakeEngine(picker=picker)
    for id in ("10", "21", "30", "41"):
        engine.add(id, [1, 2, 3], 9)
    engine.drain()
    decodes = [sorted(step.tokens) for step in engine.steps if max(step.tokens.values()) == 1]
    assert decodes[:4] == [["10", "30"], ["21", "41"]] * 2
    assert picker.changed >= 1 and picker.saved_ns > 0 and picker.steps == len(decodes)
    for request in engine.requests.values():
        assert request.tokens == alone(request)


def test_without_room_to_choose_all_decode() -> None:
    plain, picked = FakeEngine(), FakeEngine(picker=by_kind(most=8))
    for engine in (plain, picked):
        for id in ("10", "21", "32"):
            engine.add(id, [1, 2, 3], 5)
        engine.drain()
    assert [step.tokens for step in plain.steps] == [step.tokens for step in picked.steps]


def test_prompts_go_on_in_the_room_that_is_left() -> None:
    """One of four decodes in a step, and a long prompt takes all of the rest of it."""
    engine = FakeEngine(num_blocks=200, max_num_seqs=8, max_batched_tokens=8, picker=by_kind(most=1))
    for id in ("10", "21", "32", "43"):
        engine.add(id, [1], 30)
    engine.step()
    engine.add("54", list(range(70)), 2)
    chunks = [engine.step().tokens for _ in range(10)]
    assert [step.get("54") for step in chunks] == [7] * 10
    assert all(len(step) == 2 for step in chunks)
    engine.drain()


def test_the_last_token_of_a_prompt_is_not_passed_over() -> None:
    engine = FakeEngine(num_blocks=200, max_num_seqs=8, max_batched_tokens=8, picker=by_kind(most=1))
    for id in ("10", "20", "30"):
        engine.add(id, [1], 30)
    engine.step()
    engine.add("41", list(range(8)), 2)  # 7 tokens beside one that decodes, then one
    assert engine.step().tokens["41"] == 7
    step = engine.step()
    assert step.tokens["41"] == 1 and step.samples[-1] == "41" and len(step.tokens) == 2
    engine.drain()


class Odd:
    """Picks anything, the newest above all; the order of service when somebody waits too long."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def pick(self, ready: Sequence[Request]) -> Collection[str]:
        late = [request.id for request in ready if request.passed_over >= 5]
        return [ready[-1].id, *late] if self.rng.random() < 0.7 else [self.rng.choice(ready).id, *late]


@given(seed=st.integers(0, 2**32 - 1), odd=st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_request_ends_with_its_own_tokens_whatever_is_picked(seed: int, odd: bool) -> None:
    """With preemption, prefixes, aborts and chunks; the fake engine reads each token's whole KV."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    num_blocks = rng.randint(4, 40)
    seqs = rng.randint(1, 12)
    picker: Odd | AffinityPicker = Odd(rng) if odd else by_kind(rng.randint(1, seqs))
    engine = FakeEngine(num_blocks, block_size, seqs, seqs + rng.randint(0, 20), rng.random() < 0.7, picker)
    longest = min(num_blocks * block_size, 40)
    todo = list(range(60))
    aborted: set[str] = set()
    waits = 0
    for _ in range(5000):
        while todo and rng.random() < 0.4:
            total = rng.randint(2, longest)
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, total - 1))]
            engine.add(str(todo.pop(0)), prompt, total - len(prompt))
        alive = [*engine.scheduler.running, *engine.scheduler.waiting]
        gone = (rng.choice(alive).id,) if alive and rng.random() < 0.02 else ()
        aborted |= {*gone}
        engine.step(gone)
        waits = max([waits, *(request.passed_over for request in engine.scheduler.running)])
        if not todo and not engine.scheduler.has_work:
            break
    assert not engine.scheduler.has_work and not todo
    assert waits <= (5 if isinstance(picker, Odd) else 2 * -(-seqs // picker.most) - 1)
    for request in engine.requests.values():
        if request.id not in aborted:
            assert request.tokens == alone(request)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
def test_all_decode_as_often(most: int) -> None:
    """Also when rounds do not end with a full step."""
    engine = FakeEngine(num_blocks=400, max_num_seqs=8, picker=by_kind(most))
    for id in ("10", "20", "30", "40", "50", "60", "70", "81"):
        engine.add(id, [1, 2], 40)
    seen, full = 0, 0
    while engine.scheduler.has_work:
        engine.step()
        lengths = [len(request.tokens) for request in engine.scheduler.running]
        if len(lengths) == 8:
            assert max(lengths) - min(lengths) <= 2
            full += len(engine.steps[-1].tokens) == most
        seen = max([seen, *(request.passed_over for request in engine.scheduler.running)])
    assert 0 < seen < 2 * -(-8 // most)
    assert full >= 38 * 8 // most - 1


def test_a_picker_that_picks_nobody_is_a_defect() -> None:
    class Nobody:
        def pick(self, ready: Sequence[Request]) -> Collection[str]:
            return ()

    engine = FakeEngine(picker=Nobody())
    engine.add("1", [1], 3)
    engine.step()
    with pytest.raises(AssertionError, match="picked"):
        engine.step()
