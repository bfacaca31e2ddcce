"""The compiled replay counts what the policies themselves do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.scheduler.residency.compiled_replay import replay_compiled
from moeyard.scheduler.residency.oracles import Belady
from moeyard.scheduler.residency.policies import LFU, LRU, DecayedFrequency, default_policy
from moeyard.scheduler.residency.replay import replay
from moeyard.scheduler.residency.slots import Budget

LAYERS, EXPERTS = 3, 7


def trace(seed: int, steps: int = 60, top_k: int = 3) -> np.ndarray:
    """Uneven, with some places empty, a layer without any now and then, and experts named twice."""
    rng = np.random.default_rng(seed)
    ids = rng.zipf(1.4, (steps, LAYERS, top_k)) % (EXPERTS + 1) - 1
    ids[rng.random((steps, LAYERS)) < 0.1] = -1
    return ids.astype(np.int16)


@given(st.integers(0, 99), st.integers(0, LAYERS * EXPERTS), st.integers(0, EXPERTS), st.integers(0, 60))
def test_figures_are_the_same(seed: int, slots: int, floor: int, warm_up: int) -> None:
    topk = trace(seed)
    budget = Budget(layers=LAYERS, experts=EXPERTS, slots=slots, floor=min(floor, slots // LAYERS))
    for make in (
        lambda: LRU(budget),
        lambda: default_policy(budget),
        lambda: DecayedFrequency(budget),
        lambda: DecayedFrequency(budget, half_lives=(2, 5, 9), weights=(1, 0.2, 0.7), margin=0.1),
        lambda: Belady(budget, topk, bypass=True),
        lambda: Belady(budget, topk, bypass=False),
    ):
        assert replay_compiled(make(), topk, warm_up) == replay(make(), topk, warm_up=warm_up)


def test_what_it_does_not_know_is_left_to_python() -> None:
    assert replay_compiled(LFU(Budget(layers=LAYERS, experts=EXPERTS, slots=5)), trace(0)) is None


def test_experts_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="experts are 0 to 6; the budget has 0 to 5"):
        replay_compiled(LRU(Budget(layers=LAYERS, experts=6, slots=5)), np.arange(7).reshape(1, 1, 7).repeat(3, 1))
    with pytest.raises(ValueError, match="the trace has 2 layers; the budget has 3"):
        replay_compiled(LRU(Budget(layers=LAYERS, experts=6, slots=5)), np.zeros((4, 2, 1), dtype=int))
