"""Locality of routing: against the definitions written out, and on traces whose values are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler import locality
from moeyard.scheduler.locality import hit_rate, segment_groups, segment_hit_rate, skew

EXPERTS = 5


@st.composite
def traces(draw):
    """[T, L, K] with missing experts here and there, and the starts of its sequences."""
    tokens, layers, top_k = draw(st.tuples(st.integers(1, 14), st.integers(1, 3), st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    topk = np.array([[rng.permutation(EXPERTS)[:top_k] for _ in range(layers)] for _ in range(tokens)])
    topk[rng.random(topk.shape) < draw(st.sampled_from([0, 0.2]))] = -1
    topk[0, 0, 0] = EXPERTS - 1 if EXPERTS - 1 not in topk[0, 0, 1:] else topk[0, 0, 0]
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=3))) if tokens > 1 else []
    return topk, np.array([0, *cuts])


def places(topk, start):
    """For each sequence, for each token in order: the (layer, expert) pairs that it uses."""
    ends = [*start[1:], len(topk)]
    return [
        [[(layer, int(e)) for layer, ids in enumerate(token) for e in ids if e >= 0] for token in topk[a:b]]
        for a, b in zip(start, ends, strict=True)
    ]


def slow_groups(topk, start, length):
    """SRP as defined: all thresholds, all windows, all pairs."""
    windows = [s[i : i + length] for s in places(topk, start) for i in range(len(s) - length + 1)]
    pairs = list(itertools.product(range(topk.shape[1]), range(EXPERTS)))
    counts = [[sum(pair in token for token in window) for pair in pairs] for window in windows]
    uses = sum(map(sum, counts))
    if not uses:
        return None
    found = []
    for tau in range(1, length + 1):
        match = sum(c for row in counts for c in row if c >= tau)
        predicted = length * sum(c >= tau for row in counts for c in row)
        found.append((2 * match / (predicted + uses), -tau, predicted / uses))
    best = max(found)
    return best[0], best[2]


def slow_hits(topk, start, slots, key):
    """A cache as defined. `key(sequence, token, done, pair)` is the worth of a pair once the first `done` uses of the
    token were counted."""
    hits = uses = 0
    for sequence in places(topk, start):
        cached, seen = set(), []
        for t, token in enumerate(sequence):
            hits += sum(pair in cached or (pair not in seen and len({*seen, *token[:n]}) < slots)
                        for n, pair in enumerate(token))  # fmt: skip
            uses += len(token)
            seen += token
            worth = {pair: key(sequence, t, seen, pair) for pair in cached | set(token)}
            assert len(set(worth.values())) == len(worth)
            cached = set(sorted(worth, key=worth.get)[-slots:])
    return hits / uses


def last(seen, pair):
    return max(i for i, other in enumerate(seen) if other == pair)


def next_use(sequence, t, seen, pair):
    later = [(u, token.index(pair)) for u, token in enumerate(sequence) if u > t and pair in token]
    return (1, -later[0][0], -later[0][1]) if later else (0, last(seen, pair), 0)


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 6))
def test_groups_are_the_best_of_all_thresholds(made, length):
    topk, start = made
    found, want = segment_groups(topk, start, EXPERTS, length), slow_groups(topk, start, length)
    assert (found is None) == (want is None)
    if found is not None:
        assert (found.f1, found.size) == pytest.approx(want)


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 9), st.integers(1, 6))
def test_caches_are_those_of_the_definition(made, slots, length):
    topk, start = made
    if (topk < 0).all():
        return

    def segment(sequence, t, seen, pair):
        return sum(pair in token for token in sequence[t + 1 : t + length]), last(seen, pair)

    keys = {
        "lru": lambda sequence, t, seen, pair: last(seen, pair),
        "lfu": lambda sequence, t, seen, pair: (seen.count(pair), last(seen, pair)),
        "belady": next_use,
    }
    for rule, key in keys.items():
        assert hit_rate(topk, start, EXPERTS, slots, rule) == pytest.approx(slow_hits(topk, start, slots, key))
    got = segment_hit_rate(topk, start, EXPERTS, slots, length)
    assert got == pytest.approx(slow_hits(topk, start, slots, segment))


def test_routing_that_never_changes():
    topk = np.tile([[0, 1], [2, 3]], (40, 1, 1))
    groups = segment_groups(topk, np.array([0, 20]), 8, 16)
    assert groups is not None and (groups.f1, groups.size) == (1, 1)
    assert segment_groups(topk, np.array([0, 20]), 8, 32) is None  # no sequence is so long
    assert hit_rate(topk, np.array([0]), 8, 4, "lru") == 1
    assert [(s.peak, s.gini) for s in skew(topk, 8)] == [(4, 0.75)] * 2


def test_routing_in_turn_has_known_values():
    """One expert at a time, 0 1 2 3 0 1 2 3 ...: in any 8 tokens each is used twice."""
    topk, start = np.arange(400).reshape(-1, 1, 1) % 4, np.array([0])
    groups = segment_groups(topk, start, 4, 8)
    assert groups is not None and (groups.f1, groups.size) == (pytest.approx(0.4), 4)  # 2 * 8 / (32 + 8)
    assert hit_rate(topk, start, 4, 3, "lru") == pytest.approx(3 / 400)  # what is next was just evicted
    assert hit_rate(topk, start, 4, 3, "belady") > 0.6
    assert segment_hit_rate(topk, start, 4, 3, 4) > 0.6 > segment_hit_rate(topk, start, 4, 3, 1) == 3 / 400
    assert [(s.peak, s.gini) for s in skew(topk, 4)] == [(1, 0)]


def test_longer_knowledge_of_the_future_lies_between_lru_and_belady():
    rng = np.random.default_rng(0)
    topk = np.array([[rng.permutation(16)[:2] for _ in range(3)] for _ in range(500)])
    rates = [segment_hit_rate(topk, np.array([0]), 16, 12, length) for length in (1, 4)]
    assert rates[0] == hit_rate(topk, np.array([0]), 16, 12, "lru")  # a segment of 1: only what is past
    assert rates[0] < rates[1] < hit_rate(topk, np.array([0]), 16, 12, "belady")


def test_a_layer_that_nothing_uses_and_what_cannot_be():
    topk = np.array([[[0, 1], [-1, -1]], [[0, -1], [-1, -1]]])
    assert skew(topk, 3)[1] == locality.Skew(peak=1.0, gini=0.0)
    assert locality.distinct(topk) == 0.75 and locality.longest([0, 1], 6) == 5
    with pytest.raises(ValueError, match="slots is 0"):
        hit_rate(topk, np.array([0]), 3, 0, "lru")
