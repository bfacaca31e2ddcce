"""Residency policies against naive lists and exhaustive search, the rules that all of them keep, and their replay."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.residency import oracles
from moeyard.scheduler.residency.oracles import Belady, Foresight
from moeyard.scheduler.residency.policies import LFRU, LFU, LRU, DecayedFrequency, PredictedUse, default_policy
from moeyard.scheduler.residency.replay import Tally, excess_closed, replay
from moeyard.scheduler.residency.slots import Budget, Context, Decision, Policy

POLICIES: dict[str, Callable[[Budget, np.ndarray], Policy]] = {
    "lru": lambda budget, trace: LRU(budget),
    "lfu": lambda budget, trace: LFU(budget),
    "lfru": lambda budget, trace: LFRU(budget),
    "decayed": lambda budget, trace: DecayedFrequency(budget),
    "margin": lambda budget, trace: DecayedFrequency(budget, half_lives=(2,), margin=0.5),
    "default": lambda budget, trace: default_policy(budget),
    "predicted": lambda budget, trace: PredictedUse(budget, margin=0.1),
    "belady": lambda budget, trace: Belady(budget, trace, bypass=False),
    "belady-bypass": lambda budget, trace: Belady(budget, trace, bypass=True),
    "foresight": lambda budget, trace: Foresight(budget, trace, 2),
}
ADMIT_ALL = ("lru", "lfu", "lfru", "belady")


def made(rng: np.random.Generator, steps: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """A trace with locality, and some cells empty."""
    weights = rng.dirichlet(np.full(experts, 0.5), size=(1 + steps // 6, layers))
    topk = np.empty((steps, layers, top_k), dtype=np.int64)
    for t, layer in itertools.product(range(steps), range(layers)):
        clocks = rng.standard_exponential(experts) / (weights[t // 6, layer] + 1e-9)
        topk[t, layer] = np.argsort(clocks)[:top_k]
    topk[rng.random(topk.shape) < 0.1] = -1
    return topk


def decisions(policy: Policy, topk: np.ndarray, order: Callable[[list[int]], list[int]] = list) -> list[Decision]:
    rng = np.random.default_rng(7)
    found = []
    for step, ids_LK in enumerate(topk.tolist()):
        for layer, ids in enumerate(ids_LK):
            found.append(policy.step(layer, order([i for i in ids if i >= 0]), Context(step=step)))
        scores = rng.random((policy.budget.layers, policy.budget.experts))
        found.append(policy.settle(Context(step=step, scores_LE=scores)))
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Budget, np.ndarray]:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    slots = draw(st.integers(0, layers * experts))
    budget = Budget(layers=layers, experts=experts, slots=slots, floor=draw(st.integers(0, slots // layers)))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    return budget, made(rng, draw(st.integers(1, 25)), layers, experts, draw(st.integers(1, min(3, experts))))


# Rules of all


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_the_rules(name: str, case: tuple[Budget, np.ndarray]) -> None:
    """Capacity and floors are kept, lookups are of the state before, and nobody who is in use goes."""
    budget, topk = case
    policy = POLICIES[name](budget, topk)
    views = [policy.residents_of(layer) for layer in range(budget.layers)]
    here: set[tuple[int, int]] = set()
    rng = np.random.default_rng(7)
    for step, ids_LK in enumerate(topk.tolist()):
        used: set[tuple[int, int]] = set()
        for layer in range(budget.layers + 1):
            if layer < budget.layers:
                need = {i for i in ids_LK[layer] if i >= 0}
                used |= {(layer, i) for i in need}
                found = policy.step(layer, need, Context(step=step))
                assert set(found.hits) == {i for i in need if (layer, i) in here}
                assert sorted(found.hits + found.misses) == sorted(need)
                protected = {(layer, i) for i in need}
                assert set(found.admitted) <= {(layer, i) for i in found.misses}
            else:
                scores = rng.random((budget.layers, budget.experts))
                found = policy.settle(Context(step=step, scores_LE=scores))
                assert not found.hits and not found.misses
                protected = used
            assert len(set(found.admitted)) == len(found.admitted) >= len(found.evicted) == len(set(found.evicted))
            assert set(found.admitted) <= protected - here and set(found.evicted) <= here - protected
            counts = [sum(at == layer for at, _ in here) for layer in range(budget.layers)]
            here = (here - set(found.evicted)) | set(found.admitted)
            assert len(here) <= budget.slots
            for layer, before in enumerate(counts):
                assert sum(at == layer for at, _ in here) >= min(before, budget.floor)
            missing = sum(max(0, budget.floor - sum(at == layer for at, _ in here)) for layer in range(budget.layers))
            assert budget.slots - len(here) >= missing, "a floor's free slots were given away"
            assert {(int(at), int(i)) for at, i in np.argwhere(policy.resident_LE)} == here
            assert {(at, i) for at, view_E in enumerate(views) for i in np.flatnonzero(view_E).tolist()} == here
            assert not any(view_E.flags.writeable for view_E in views)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_events_are_atomic_and_decisions_the_same(name: str, case: tuple[Budget, np.ndarray]) -> None:
    budget, topk = case
    first = decisions(POLICIES[name](budget, topk), topk)
    assert decisions(POLICIES[name](budget, topk), topk) == first
    backwards = decisions(POLICIES[name](budget, topk), topk, lambda ids: sorted(ids, reverse=True) + ids[:1])
    assert backwards == first


@pytest.mark.parametrize("name", ADMIT_ALL)
@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_who_admits_all_copies_all_that_fits(name: str, case: tuple[Budget, np.ndarray]) -> None:
    budget, topk = case
    if budget.floor < topk.shape[2]:
        return
    tally = replay(POLICIES[name](budget, topk), topk)
    assert tally.copies == tally.misses


@pytest.mark.parametrize("name", POLICIES)
def test_sharing_is_seen(name: str) -> None:
    """One layer that repeats itself and one that does not: shared slots go where they are of use, floors stay."""
    rng = np.random.default_rng(0)
    topk = np.stack([np.arange(400) % 6, rng.permutation(400) % 40], axis=1)[:, :, None]
    budget = Budget(layers=2, experts=40, slots=8, floor=1)
    policy = POLICIES[name](budget, topk)
    for step, ids_L in enumerate(topk[:, :, 0].tolist()):
        for layer, i in enumerate(ids_L):
            policy.step(layer, [i], Context(step=step))
        soon = np.zeros((2, 40))
        soon[0, :6] = 1.0
        policy.settle(Context(step=step, scores_LE=soon))
    counts = policy.resident_LE.sum(1)
    assert counts.sum() == 8 and counts.min() >= 1
    if name in ("decayed", "default", "predicted", "belady-bypass"):  # the others admit most of what comes, or all
        assert counts[0] >= 6


# Each against its definition


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_lru_and_lfu_are_the_naive_lists(case: tuple[Budget, np.ndarray]) -> None:
    _, topk = case
    slots = topk.shape[2] + 1
    experts = 6
    for policy, key in (
        (LRU(Budget.per_layer(topk.shape[1], experts, slots)), lambda uses: uses[-1]),
        (LFU(Budget.per_layer(topk.shape[1], experts, slots)), lambda uses: (len(uses), uses[-1])),
    ):
        uses: dict[tuple[int, int], list[int]] = {}
        caches: list[list[int]] = [[] for _ in range(topk.shape[1])]
        for step, ids_LK in enumerate(topk.tolist()):
            for layer, ids in enumerate(ids_LK):
                need = sorted(i for i in ids if i >= 0)
                found = policy.step(layer, need, Context(step=step))
                cache = caches[layer]
                assert list(found.misses) == [i for i in need if i not in cache]
                for i in need:
                    uses.setdefault((layer, i), []).append(step)
                came = [i for i in need if i not in cache]
                came.sort(key=lambda i: (-len(uses[layer, i]), i) if isinstance(policy, LFU) else i)
                for i in came:
                    if len(cache) == slots:
                        others = sorted(set(cache) - set(need))
                        cache.remove(min(others, key=lambda i: key(uses[layer, i])))
                    cache.append(i)
                assert np.flatnonzero(policy.resident_LE[layer]).tolist() == sorted(cache)


def fewest_misses(needs: list[frozenset[int]], slots: int, admit_all: bool) -> int:
    """By trying everything that the rules allow."""
    best = {frozenset[int](): 0}
    for need in needs:
        after: dict[frozenset[int], int] = {}
        for here, misses in best.items():
            misses += len(need - here)
            stay, may = here & need, sorted((here | need) - (here & need))
            for size in range(min(slots - len(stay), len(may)) + 1):
                for chosen in itertools.combinations(may, size):
                    now = stay | frozenset(chosen)
                    if admit_all and len(need & now) < min(len(need), slots):
                        continue
                    after[now] = min(after.get(now, misses), misses)
        best = after
    return min(best.values())


@pytest.mark.parametrize("bypass", [True, False])
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**20), steps=st.integers(2, 9), experts=st.integers(3, 5), data=st.data())
def test_belady_has_the_fewest_misses(bypass: bool, seed: int, steps: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, 1 if bypass else 2))
    slots = data.draw(st.integers(top_k, 3))
    misses, fewest = belady_and_fewest(seed, steps, experts, top_k, slots, bypass)
    assert misses == fewest


def belady_and_fewest(seed: int, steps: int, experts: int, top_k: int, slots: int, bypass: bool) -> tuple[int, int]:
    topk = made(np.random.default_rng(seed), steps, 1, experts, top_k)
    needs = [frozenset(int(i) for i in ids if i >= 0) for ids in topk[:, 0]]
    tally = replay(Belady(Budget.per_layer(1, experts, slots), topk, bypass), topk)
    return tally.misses, fewest_misses(needs, slots, not bypass)


def test_experts_in_use_cost_belady_with_bypass_next_to_nothing() -> None:
    """An event may not evict what it uses itself, so that a tie earlier on can matter: the rule does not see that."""
    found = [belady_and_fewest(seed, 4 + seed % 6, 3 + seed % 3, 2, 2 + seed % 2, True) for seed in range(400)]
    assert all(misses >= fewest for misses, fewest in found)
    assert sum(misses for misses, _ in found) <= 1.02 * sum(fewest for _, fewest in found)


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_foresight_of_everything_is_belady_with_bypass(case: tuple[Budget, np.ndarray]) -> None:
    budget, topk = case
    best = replay(Belady(budget, topk, bypass=True), topk)
    assert replay(Foresight(budget, topk, len(topk)), topk).misses == best.misses
    for name in POLICIES:
        if budget.floor >= topk.shape[2] and name != "predicted":
            assert replay(POLICIES[name](budget, topk), topk).misses >= best.misses or budget.shared


def run(policy: Policy, *events: list[int]) -> list[Decision]:
    return [policy.step(0, experts, Context(step=step)) for step, experts in enumerate(events)]


def test_lfru_weighs_frequency_by_age() -> None:
    """Expert 0: 3 uses, last 5 steps ago: 3 / 6. Expert 1: 2 uses, 2 steps ago: 2 / 3. LFU evicts 1."""
    events = [[0], [0], [0], [1], [9], [1], [9], [2]]
    found = run(LFRU(Budget.per_layer(1, 10, 3)), *events)
    assert found[-1].evicted == ((0, 0),)
    assert run(LFU(Budget.per_layer(1, 10, 3)), *events)[-1].evicted == ((0, 1),)


def test_decayed_admission_needs_more_than_the_margin() -> None:
    """Half-life 1: the resident has 1.5, then 0.75; a newcomer's first use is 1."""
    for margin, admitted in ((0.24, ((0, 1),)), (0.25, ()), (1.0, ())):
        policy = DecayedFrequency(Budget.per_layer(1, 3, 1), half_lives=(1,), margin=margin)
        assert run(policy, [0], [0], [1])[-1] == Decision(
            misses=(1,), admitted=admitted, evicted=((0, 0),) if admitted else ()
        )


def test_scores_decay_in_steps_that_are_left_out_and_count_what_was_bypassed() -> None:
    policy = DecayedFrequency(Budget.per_layer(1, 3, 1), half_lives=(1,))
    policy.step(0, [0], Context(step=0))
    policy.step(0, [0], Context(step=1))
    assert policy.step(0, [1], Context(step=2)).admitted  # 1 against 0.75
    policy = DecayedFrequency(Budget.per_layer(1, 3, 1), half_lives=(2,))
    found = run(policy, [0], [0], [0], [1], [1])
    assert not found[3].admitted and found[4].admitted  # 1.71 against 1.10: the first use counted


def test_two_half_lives_tell_bursts_from_lasting_use() -> None:
    """Expert 0 is used every fourth step for long, 1 three times in a row. A slow half-life keeps the first."""
    events = [[0] if step % 4 == 0 else [] for step in range(60)] + [[1], [1], [1]]
    fast = run(DecayedFrequency(Budget.per_layer(1, 2, 1), half_lives=(2,)), *events)
    assert any(found.admitted for found in fast[-3:])
    both = run(DecayedFrequency(Budget.per_layer(1, 2, 1), half_lives=(2, 64), weights=(1, 0.5)), *events)
    assert not any(found.admitted for found in both[-3:])


def test_predicted_use_decides_when_the_step_is_over() -> None:
    policy = PredictedUse(Budget.per_layer(1, 4, 2), margin=0.1)
    scores = np.array([[0.5, 0.45, 0.9, 0.2]])
    first = policy.step(0, [3, 0], Context(step=0))
    assert first == Decision(misses=(0, 3))
    assert policy.settle(Context(step=0, scores_LE=scores)).admitted == ((0, 0), (0, 3))
    policy.step(0, [1, 2], Context(step=1))
    # 2 for 3; 1 does not beat 0
    assert policy.settle(Context(step=1, scores_LE=scores)) == Decision(admitted=((0, 2),), evicted=((0, 3),))
    policy.step(0, [3, 2], Context(step=2))
    with pytest.raises(ValueError, match="scores_LE are missing"):
        policy.settle(Context(step=2))
    with pytest.raises(ValueError, match="finite"):
        policy.settle(Context(step=2, scores_LE=scores * np.nan))
    with pytest.raises(ValueError, match="step 3"):
        policy.settle(Context(step=3, scores_LE=scores))


def test_shared_slots_go_to_the_best_of_all_layers() -> None:
    policy = PredictedUse(Budget(layers=2, experts=2, slots=1))
    policy.step(0, [0], Context(step=0))
    policy.step(1, [1], Context(step=0))
    scores = np.array([[0.5, 0.0], [0.0, 0.6]])
    assert policy.settle(Context(step=0, scores_LE=scores)).admitted == ((1, 1),)


def test_a_copy_counts_as_used_once_and_only_while_it_is_there() -> None:
    """0 is copied, hit twice and evicted; copied again it is hit by none. 1 is evicted without a hit."""
    topk = np.array([0, 0, 0, 1, 0])[:, None, None]
    assert replay(LRU(Budget.per_layer(1, 2, 1)), topk) == Tally(steps=5, hits=2, misses=3, copies=3, used=1)


# Errors, and the replay


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"experts": 0}, "experts is 0"),
        ({"slots": 9}, "slots is 9"),
        ({"slots": -1}, "slots is -1"),
        ({"floor": 2}, "floor is 2"),
        ({"floor": -1}, "floor is -1"),
    ],
)
def test_budgets_that_cannot_be(fields: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Budget(**{"layers": 2, "experts": 4, "slots": 3, "floor": 1} | fields)


def test_what_policies_refuse() -> None:
    budget = Budget.per_layer(1, 2, 1)
    for make, says in (
        (lambda: DecayedFrequency(budget, half_lives=(0,)), "half_lives"),
        (lambda: DecayedFrequency(budget, half_lives=(1, 2)), "as many of both"),
        (lambda: DecayedFrequency(budget, weights=(-1,)), "weights"),
        (lambda: DecayedFrequency(budget, margin=-1), "margin is -1"),
        (lambda: PredictedUse(budget, margin=float("nan")), "margin is nan"),
        (lambda: Foresight(budget, np.zeros((1, 1, 1), dtype=int), 0), "window is 0"),
        (lambda: LRU(budget).step(1, [0], Context(step=0)), "layer is 1"),
        (lambda: LRU(budget).step(0, [2], Context(step=0)), "experts are"),
        (lambda: Belady(budget, np.zeros((1, 1, 1), dtype=int), True).step(0, [1], Context(step=0)), "not the trace's"),
        (lambda: Belady(budget, np.zeros((1, 1, 1), dtype=int), True).step(0, [0], Context(step=1)), "trace has 1"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
    policy = LRU(budget)
    policy.step(0, [0], Context(step=4))
    with pytest.raises(ValueError, match="step is 3 after 4"):
        policy.step(0, [0], Context(step=3))


def test_a_replay_worked_out_by_hand() -> None:
    """Two slots; a b c a b c: LRU never hits; Belady keeps a, with bypass also what comes for nothing."""
    topk = np.array([0, 1, 2, 0, 1, 2])[:, None, None]
    budget = Budget.per_layer(1, 3, 2)
    told: list[int] = []
    lru = replay(LRU(budget), topk, progress=told.append)
    assert lru == Tally(steps=6, hits=0, misses=6, copies=6, used=0) and lru.touched == sum(told) == 6
    best = replay(Belady(budget, topk, bypass=True), topk)
    assert best == Tally(steps=6, hits=2, misses=4, copies=2, used=2)
    plain = replay(Belady(budget, topk, bypass=False), topk)
    assert plain == Tally(steps=6, hits=2, misses=4, copies=4, used=2)
    assert excess_closed(5, lru.misses, best.misses) == 0.5
    assert best.hit_rate == 2 / 6


def test_a_perfect_predictor_is_nearly_belady() -> None:
    """With 1 / distance as the score, and copies that fall as the margin grows."""
    topk = made(np.random.default_rng(3), 300, 3, 16, 2)
    budget = Budget.per_layer(3, 16, 4)
    distance = np.full((300, 3, 16), np.inf)
    ahead = np.full((3, 16), np.inf)
    for step in range(299, -1, -1):
        distance[step] = ahead = ahead + 1
        for layer, expert in np.argwhere(topk[step] >= 0):
            ahead[layer, topk[step, layer, expert]] = 0
    lru, best = replay(LRU(budget), topk), replay(Belady(budget, topk, bypass=True), topk)
    found = [replay(PredictedUse(budget, margin), topk, lambda step: 1 / distance[step]) for margin in (0.0, 0.2, 0.6)]
    assert excess_closed(found[0].misses, lru.misses, best.misses) == 1.0
    assert found[0].copies > found[1].copies > found[2].copies
    default = replay(default_policy(budget), topk)
    assert default.copies < lru.copies / 2


def test_the_documented_example() -> None:
    result = doctest.testmod(oracles)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", ["lfu", "lfru", "decayed", "default"])
def test_a_layer_in_chunks_counts_an_expert_once(name: str) -> None:
    budget = Budget(layers=2, experts=6, slots=12)
    whole: Any = POLICIES[name](budget, np.empty(0))
    parts: Any = POLICIES[name](budget, np.empty(0))
    for step in range(4):
        for layer in range(2):
            whole.step(layer, [0, 1, 2, 3], Context(step=step))
            for chunk in ([0, 1], [1, 2], [3], [0, 3]):
                decision = parts.step(layer, chunk, Context(step=step))
                assert step == 0 or decision.hits == tuple(chunk)
    if name == "lfu":
        assert np.array_equal(whole._uses_LE, parts._uses_LE) and whole._uses_LE.max() == 4
    elif name == "lfru":
        assert np.array_equal(whole._values(slice(None)), parts._values(slice(None)))
    else:
        assert np.array_equal(whole._decayed_HLE, parts._decayed_HLE)
