"""Predicted next use: its target, the fit against the equations solved as they stand, token by token as in bulk."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest

from moeyard.engine import next_use, routing_history
from moeyard.engine.next_use import NextUse, future_use
from moeyard.scheduler.residency.oracles import Belady
from moeyard.scheduler.residency.policies import LRU, PredictedUse, default_policy
from moeyard.scheduler.residency.replay import excess_closed, replay
from moeyard.scheduler.residency.slots import Budget

LAYERS, EXPERTS, TOP_K = 2, 12, 2


def walks(seed: int, sequences: int = 20, length: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Routing in which layer 0 tells whether what layer 1 uses will be used again soon. Some cells are empty."""
    rng = np.random.default_rng(seed)
    topk = np.empty((sequences * length, LAYERS, TOP_K), dtype=np.int64)
    lasting, pair = False, np.arange(TOP_K)
    for t in range(len(topk)):
        if t % length == 0 or rng.random() < 0.2:
            lasting, pair = not lasting, rng.choice(EXPERTS, TOP_K, replace=False)
        topk[t, 0] = rng.choice(EXPERTS // 2, TOP_K, replace=False) + (0 if lasting else EXPERTS // 2)
        topk[t, 1] = pair if lasting else rng.choice(EXPERTS, TOP_K, replace=False)
        if rng.random() < 0.03:
            topk[t, 0, 1] = -1
    return topk, np.arange(sequences) * length


def test_the_target_is_discounted_future_use() -> None:
    topk, start_S = walks(0, sequences=3, length=9)
    found = future_use(topk, start_S, EXPERTS, half_life=2.0)
    ends = [*start_S[1:], len(topk)]
    for start, end in zip(start_S, ends, strict=True):
        for t in range(start, end):
            want = np.zeros((LAYERS, EXPERTS))
            for later in range(t + 1, end):
                for layer in range(LAYERS):
                    for expert in topk[later, layer]:
                        if expert >= 0:
                            want[layer, expert] += 2 ** (-(later - t - 1) / 2)
            np.testing.assert_allclose(found[t], want, rtol=1e-5)


def test_rates_are_uses_per_token_drawn_to_the_even_one() -> None:
    history = routing_history.History(1, 3)
    for ids in ([0, 1], [0, -1]):
        history.observe(np.array([ids]))
    even = 0.5
    decay = 2 ** (-1 / routing_history.RATE_HALF_LIVES[0])
    tokens = 1 + decay
    want = (np.array([1 + decay, decay, 0]) + 2 * even) / (tokens + 2)
    found = history.features(even).reshape(-1, 3)
    np.testing.assert_allclose(found[len(routing_history.RATE_HALF_LIVES)], want, rtol=1e-6)
    np.testing.assert_allclose(found[0], np.sqrt(want), rtol=1e-6)
    assert history.previous_LK is not None and history.previous_LK.tolist() == [[0, 1]]


def test_the_fit_solves_the_ridge_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all features of a layer in one matrix, in double precision; chunks that end inside sequences."""
    monkeypatch.setattr(routing_history, "CHUNK", 100)
    topk, start_S = walks(1, sequences=12, length=31)
    model = NextUse.fit(topk, start_S, EXPERTS, half_life=2.0)
    even = float((topk >= 0).mean() * TOP_K / EXPERTS)
    parts = list(routing_history.features(topk, start_S, EXPERTS, even))
    assert len(parts) == 4
    cross = np.concatenate([part.numpy() for part, _ in parts]).astype(np.float64)
    own = np.concatenate([part.numpy() for _, part in parts]).astype(np.float64)
    target = future_use(topk, start_S, EXPERTS, 2.0).astype(np.float64)
    scores = model.scores(topk, start_S)
    for layer in range(LAYERS):
        x = np.concatenate([cross, own[:, layer]], axis=1)
        x = (x - x.mean(0)) / (x.std(0) + 1e-3)
        penalty = np.full(x.shape[1], next_use.CROSS_RIDGE)
        penalty[cross.shape[1] :] = next_use.OWN_RIDGE
        y = target[:, layer]
        weights = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ (y - y.mean(0)))
        np.testing.assert_allclose(scores[:, layer], x @ weights + y.mean(0), atol=2e-4)


def test_token_by_token_is_as_in_bulk() -> None:
    """And predictions of several sequences add up; a sequence starts without what came before it."""
    model = NextUse.fit(*walks(1), EXPERTS)
    topk, start_S = walks(2, sequences=3, length=11)
    scores = model.scores(topk, start_S)
    last = []
    for start in start_S:
        history = model.history()
        for t in range(start, start + 11):
            history.observe(topk[t])
            np.testing.assert_allclose(model.predict([history]), scores[t], atol=1e-5)
        last.append(history)
    np.testing.assert_allclose(model.predict([*last, model.history()]), scores[start_S + 10].sum(0), atol=1e-5)
    assert not model.predict([]).any()


def test_what_it_learns_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted on some sequences, it avoids on others far more misses than what only counts, with few copies."""
    monkeypatch.setattr(next_use, "CROSS_RIDGE", 50.0)
    monkeypatch.setattr(next_use, "OWN_RIDGE", 50.0)
    model = NextUse.fit(*walks(3, sequences=60), EXPERTS)
    topk, start_S = walks(4)
    budget = Budget.per_layer(LAYERS, EXPERTS, 4)
    lru, best = replay(LRU(budget), topk), replay(Belady(budget, topk, bypass=True), topk)
    scores = model.scores(topk, start_S)

    def closed(misses: int) -> float:
        return excess_closed(misses, lru.misses, best.misses)

    predicted = replay(PredictedUse(budget), topk, lambda step: scores[step])
    assert closed(predicted.misses) > closed(replay(default_policy(budget), topk).misses) + 0.2
    careful = replay(PredictedUse(budget, margin=0.25), topk, lambda step: scores[step])
    assert careful.copies < predicted.copies < lru.copies
    upside_down = replay(PredictedUse(budget), topk, lambda step: -scores[step])
    assert closed(upside_down.misses) < 0


def test_it_is_kept_in_a_file_with_its_model(tmp_path: Path) -> None:
    model = NextUse.fit(*walks(1, sequences=3), EXPERTS, digest="abc")
    path = str(tmp_path / "next_use.npz")
    model.save(path)
    topk, start_S = walks(2, sequences=2)
    for digest in ("abc", None):
        loaded = NextUse.load(path, digest)
        assert (loaded.digest, loaded.half_life, loaded.even) == ("abc", model.half_life, model.even)
        np.testing.assert_array_equal(loaded.scores(topk, start_S), model.scores(topk, start_S))
    with pytest.raises(ValueError, match="made for the model abc, not def"):
        NextUse.load(path, "def")
    with pytest.raises(ValueError, match="give a file that can be written"):
        model.save(str(tmp_path / "no" / "x.npz"))


def test_what_is_no_predictor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    model = NextUse.fit(*walks(1, sequences=3), EXPERTS)
    arrays = {name: getattr(model, name) for name in next_use._ARRAYS}
    arrays |= {"version": np.array(1), "even": np.array(0.5), "half_life": np.array(3.0), "digest": np.array("")}
    np.savez(path, **arrays)
    NextUse.load(str(path))
    for change in ({"version": np.array(2)}, {"bias_LE": model.bias_LE[:, :-1]}, {"own_LFE": model.own_LFE[:1]}):
        np.savez(path, **(arrays | change))
        with pytest.raises(ValueError, match="no predictor of next use"):
            NextUse.load(str(path))
    np.savez(path, topk=np.zeros(3))
    with pytest.raises(ValueError, match="no predictor of next use"):
        NextUse.load(str(path))
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="no predictor of next use"):
        NextUse.load(str(path))
    with pytest.raises(ValueError, match="no predictor of next use"):
        NextUse.load(str(tmp_path / "missing.npz"))


def test_traces_that_cannot_be_fitted() -> None:
    topk, start_S = walks(1, sequences=2)
    with pytest.raises(ValueError, match="ids from"):
        NextUse.fit(topk, start_S, EXPERTS - 4)
    with pytest.raises(ValueError, match="half_life is 0"):
        NextUse.fit(topk, start_S, EXPERTS, half_life=0)
    model = NextUse.fit(topk, start_S, EXPERTS)
    with pytest.raises(ValueError, match="tokens of 2 layers"):
        model.scores(topk[:, :1], start_S)


def test_the_documented_example() -> None:
    result = doctest.testmod(next_use)
    assert result.attempted and not result.failed
