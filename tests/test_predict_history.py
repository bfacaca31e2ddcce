"""Predictors that need no training: against plain slow computations, and that each knows what it is there for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine.predict import history
from moeyard.engine.predict.base import Rows
from moeyard.engine.predict.history import Coactivation, DecayedCounts

LAYERS, EXPERTS, TOP_K = 3, 7, 2


def tokens(seed: int, count: int) -> np.ndarray:
    """[count, L, K] different experts, here and there none."""
    rng = np.random.default_rng(seed)
    topk = np.array([[rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)] for _ in range(count)])
    return np.where(rng.random(topk.shape) < 0.05, -1, topk)


def rows(**counts: tuple[int, int]) -> list[Rows]:
    """Rows one after the other; of each sequence its start and its number of tokens."""
    found, first = [], 0
    for request, (start, count) in counts.items():
        found.append(Rows(request_id=request, first=first, token_ids=[0] * count, start=start))
        first += count
    return found


def run(live: DecayedCounts, step: list[Rows], ids_TLK: np.ndarray) -> None:
    live.begin_step(step)
    for layer in range(LAYERS):
        live.routed(layer, ids_TLK[:, layer])
    live.end_step()


def used(topk: np.ndarray) -> np.ndarray:
    """[T, L, E] 1 where an expert was used."""
    return (topk[:, :, :, None] == np.arange(EXPERTS)).any(2).astype(float)


def rate(own_TE: np.ndarray, all_TE: np.ndarray) -> np.ndarray:
    """[E] of one layer: a sequence's rates from its own uses and those of all text, written down."""
    age_T = len(own_TE) - 1 - np.arange(len(own_TE))
    weight_T = 2 ** (-age_T / 4) + 0.3 * 2 ** (-age_T / 32)
    prior = history.PRIOR_TOKENS
    return (weight_T @ own_TE + prior * all_TE.mean(0)) / (weight_T.sum() + prior)


def any_of(chances: list[np.ndarray]) -> np.ndarray:
    return 1 - np.prod([1 - chance for chance in chances], axis=0)


def close(found: np.ndarray | None, want: np.ndarray, atol: float = 1e-5) -> None:
    assert found is not None
    np.testing.assert_allclose(found, want, atol=atol)


PLAN = [
    {"a": (0, 7)},
    {"a": (7, 1), "b": (0, 1), "c": (0, 4)},
    {"b": (1, 1), "a": (8, 1), "c": (4, 1)},
    {"c": (5, 3), "a": (0, 2)},  # a was preempted
    {"a": (2, 1), "c": (8, 1)},
]


def test_the_next_token_of_each_sequence() -> None:
    """Its own rates when it ran last, also of one that is not in every step."""
    live, (one, two) = DecayedCounts(LAYERS, EXPERTS), (tokens(3, 9), tokens(4, 2))
    assert live.next_of("a") is None
    run(live, rows(a=(0, 3), b=(0, 2)), np.concatenate([one[:3], two]))
    all_TLE = used(np.concatenate([one[:3], two]))
    want = [rate(used(two)[:, layer], all_TLE[:, layer]) for layer in range(LAYERS)]
    close(live.next_of("b"), np.stack(want))
    for t in range(3, 9):
        run(live, rows(a=(t, 1)), one[t : t + 1])
    close(live.next_of("b"), np.stack(want))
    all_TLE = np.concatenate([all_TLE, used(one[3:])])
    close(live.next_of("a"), np.stack([rate(used(one)[:, layer], all_TLE[:, layer]) for layer in range(LAYERS)]))
    live.forget("a")
    assert live.next_of("a") is None


@pytest.mark.parametrize("kind", [DecayedCounts, Coactivation])
def test_counts_are_rates_of_the_sequences_and_of_all_text(kind: type[DecayedCounts]) -> None:
    live = kind(LAYERS, EXPERTS)
    assert live.future() is None and live.upcoming(0) is None
    streams = {name: used(tokens(seed, 20)) for seed, name in enumerate("abc")}
    ids = {name: tokens(seed, 20) for seed, name in enumerate("abc")}
    everything = np.zeros((0, LAYERS, EXPERTS))
    to_future = 1 / (1 - 2 ** (-1 / 3))
    last: dict[tuple[str, int], np.ndarray] = {}
    for number, step in enumerate(PLAN):
        live.begin_step(rows(**step))
        if number:
            for layer in range(LAYERS) if kind is DecayedCounts else ():
                each = [
                    rate(streams[name][:start, layer], everything[:, layer])
                    for name, (start, count) in step.items()
                    for _ in range(count)
                ]
                close(live.upcoming(layer), any_of(each))
        ids_TLK = np.concatenate([ids[name][start : start + count] for name, (start, count) in step.items()])
        everything = np.concatenate([everything, used(ids_TLK)])
        for layer in range(LAYERS):
            live.routed(layer, ids_TLK[:, layer])
            assert live.upcoming(layer) is None
            for name, (start, count) in step.items():
                last[name, layer] = rate(streams[name][: start + count, layer], everything[:, layer])
            found = live.future()
            assert found is not None
            # Also of those that are not in the step, as they were
            each = [rates_E for (_, of), rates_E in last.items() if of == layer]
            close(found[layer], to_future * np.sum(each, axis=0), atol=1e-4)
        live.end_step()
    before = live.future()
    live.forget("a")
    live.forget("unknown")
    after = live.future()
    assert before is not None and after is not None and (after < before).all()
    live.forget("c")
    assert live.future() is None


def test_coactivation_is_odds_times_odds() -> None:
    live = Coactivation(LAYERS, EXPERTS)
    ids_TLK = tokens(3, 40)
    was, own = used(ids_TLK), used(ids_TLK[:30])
    run(live, rows(a=(0, 30)), ids_TLK[:30])
    run(live, rows(b=(0, 9)), ids_TLK[30:39])
    live.begin_step(rows(a=(30, 1)))
    assert live.upcoming(0) is None and live.upcoming(2) is None  # nothing is known of this token
    live.routed(0, ids_TLK[39:, 0])

    def odds(chance: np.ndarray) -> np.ndarray:
        return np.log(chance / (1 - chance))

    for layer in (1, 2):
        usual = was[:39, layer].mean(0)
        want = odds(rate(own[:, layer], was[:39, layer]))
        for expert in ids_TLK[39, 0][ids_TLK[39, 0] >= 0]:
            together = was[:39, 0, expert] @ was[:39, layer]
            # The token itself is among those who used the expert
            chance = (together + history.PAIR_PRIOR * usual) / (was[:, 0, expert].sum() + history.PAIR_PRIOR)
            want += (odds(chance) - odds(usual)) / math.sqrt(TOP_K)
        close(live.upcoming(layer), 1 / (1 + np.exp(-want)), atol=1e-4)
    live.routed(1, ids_TLK[39:, 1])
    nearer = live.upcoming(2)
    assert nearer is not None and live.upcoming(1) is None


def test_coactivation_finds_layers_that_go_together() -> None:
    """Layer 2 follows layer 0, and nothing else tells what is next."""
    rng = np.random.default_rng(0)
    counts, together = DecayedCounts(LAYERS, EXPERTS), Coactivation(LAYERS, EXPERTS)
    hits = {counts.name: 0, together.name: 0}
    for t in range(600):
        ids_LK = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)])
        ids_LK[2] = (ids_LK[0] + 3) % EXPERTS
        for live in (counts, together):
            live.begin_step(rows(a=(t, 1)))
            live.routed(0, ids_LK[None, 0])
            found = live.upcoming(2)
            if t >= 400:
                assert found is not None
                hits[live.name] += len({*np.argsort(-found)[:TOP_K]} & {*ids_LK[2]})
            live.routed(1, ids_LK[None, 1])
            live.routed(2, ids_LK[None, 2])
            live.end_step()
    assert hits["coactivation"] > 0.95 * 400 and hits["counts"] < 0.6 * 400


def test_counts_follow_a_sequence() -> None:
    """A sequence that stays with two experts is told from one that stays with two others, and from what is new."""
    live = DecayedCounts(LAYERS, EXPERTS)
    ids_TLK = np.broadcast_to(np.array([[[0, 1]], [[2, 3]]]), (2, LAYERS, TOP_K))
    for t in range(30):
        run(live, rows(a=(t, 1), b=(t, 1)), ids_TLK)
    for name, experts in (("a", {0, 1}), ("b", {2, 3})):
        live.begin_step(rows(**{name: (30, 1)}))
        found = live.upcoming(1)
        assert found is not None and {*np.argsort(-found)[:2].tolist()} == experts and found.max() > 0.85
    live.begin_step(rows(c=(0, 1)))
    close(live.upcoming(1), np.array([0.5] * 4 + [0] * 3))


def test_old_text_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """And halving the counts changes no chance."""
    ids_TLK = tokens(5, 301)
    plain, live = Coactivation(LAYERS, EXPERTS), Coactivation(LAYERS, EXPERTS)
    monkeypatch.setattr(history, "PAIR_PRIOR", 0.0)
    for t in range(300):
        run(plain, rows(a=(t, 1)), ids_TLK[t : t + 1])
        if t == 299:
            monkeypatch.setattr(history, "MEMORY_TOKENS", 200)
        run(live, rows(a=(t, 1)), ids_TLK[t : t + 1])
        monkeypatch.undo()
        monkeypatch.setattr(history, "PAIR_PRIOR", 0.0)
    assert live._tokens_L.tolist() == [150] * LAYERS and plain._tokens_L.tolist() == [300] * LAYERS
    found = []
    for one in (plain, live):
        one.begin_step(rows(a=(300, 1)))
        one.routed(0, ids_TLK[300:, 0])
        found.append(one.upcoming(1))
    assert found[0] is not None
    close(found[1], found[0], atol=0.03)  # the token itself weighs twice as much


def test_options_that_cannot_be() -> None:
    for layers, experts, sequences, name in ((0, 1, 1, "layers"), (1, 0, 1, "experts"), (1, 1, 0, "sequences")):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            DecayedCounts(layers, experts, sequences)


some_rows = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 6), st.integers(0, 5), st.integers(0, 9)), max_size=5
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([DecayedCounts, Coactivation]),
    st.lists(
        st.tuples(
            some_rows,
            st.lists(st.integers(-1, LAYERS + 1), max_size=4),
            st.integers(0, 12),
            st.integers(0, EXPERTS + 2),
            st.booleans(),
            st.sampled_from(["", "a", "x"]),
        ),
        max_size=6,
    ),
    st.integers(0, 99),
)
def test_they_never_raise(kind: type[DecayedCounts], steps: list, seed: int) -> None:
    """Unordered layers, too few rows, more experts than there are, steps that do not end."""
    rng = np.random.default_rng(seed)
    live = kind(LAYERS, EXPERTS, sequences=3)
    for step, layers, tokens, top_k, ends, forgotten in steps:
        live.begin_step(
            [Rows(request_id=name, first=first, token_ids=[0] * count, start=at) for name, first, count, at in step]
        )
        for layer in layers:
            live.routed(layer, rng.integers(-2, EXPERTS + 3, size=(tokens, top_k)))
            for later in range(-1, LAYERS + 2):
                upcoming = live.upcoming(later)
                assert upcoming is None or (upcoming.shape == (EXPERTS,) and (upcoming >= 0).all())
                assert upcoming is None or (upcoming <= 1).all()
        if ends:
            live.end_step()
        live.forget(forgotten)
        future = live.future()
        assert future is None or (future.shape == (LAYERS, EXPERTS) and np.isfinite(future).all())
