"""The routing-path predictor: what it is trained on, token by token as in bulk, what it learns, and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moeyard.bench.predictor_scores import path_scores, recalls
from moeyard.bench.token_trace import TokenTrace
from moeyard.engine.next_use import NextUse, future_use
from moeyard.engine.predict import path_network
from moeyard.engine.predict.base import Rows
from moeyard.engine.predict.path import PathPredictor
from moeyard.engine.predict.path_network import MOST_USES, PathNetwork, PathShape
from moeyard.engine.predict.path_training import LENGTH, Windows, train
from moeyard.engine.routing_history import History

LAYERS, EXPERTS, TOP_K, VOCAB = 3, 8, 2, 40


def by_token(seed: int, sequences: int = 12, length: int = 60) -> tuple[TokenTrace, np.ndarray]:
    """Routing that is a function of the token's id, and the ids, which are random."""
    table = np.random.default_rng(7).permuted(np.tile(np.arange(EXPERTS), (VOCAB, LAYERS, 1)), axis=-1)[..., :TOP_K]
    token_T = np.random.default_rng(seed).integers(0, VOCAB, sequences * length)
    start_S = np.arange(sequences) * length
    return TokenTrace(table[token_T], start_S, np.arange(sequences), tuple(map(str, range(sequences)))), token_T


@pytest.fixture(scope="module")
def network() -> PathNetwork:
    torch.set_num_threads(1)
    trace, token_T = by_token(0, sequences=40)
    return train(trace.topk_TLK, trace.start_S, EXPERTS, token_T=token_T, vocab=VOCAB, epochs=15, hidden=64, digest="m")


def uneven() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of lengths that no window divides, one of a single token; some cells are empty."""
    trace, token_T = by_token(3, sequences=1, length=90)
    topk_TLK = trace.topk_TLK.copy()
    topk_TLK[np.random.default_rng(0).random(topk_TLK.shape) < 0.05] = -1
    return topk_TLK, np.array([0, 41, 42]), token_T


def test_a_row_has_the_state_before_its_token_and_what_comes_then() -> None:
    topk_TLK, start_S, token_T = uneven()
    windows = Windows(topk_TLK, start_S, EXPERTS, token_T)
    no_B = np.zeros(len(windows), dtype=bool)
    batch = windows.batch(np.arange(len(windows)), no_B, no_B, no_B)
    last, previous, roots, tokens = (part.numpy() for part in batch.inputs)
    later_TLE = future_use(topk_TLK, start_S, EXPERTS, path_network.HALF_LIFE)
    history = History(LAYERS, EXPERTS)
    for t in range(len(topk_TLK)):
        if t in start_S:
            history, first = History(LAYERS, EXPERTS), t
        assert np.array_equal(last[t], np.full((LAYERS, TOP_K), -1) if history.last_LK is None else history.last_LK)
        if history.previous_LK is not None:
            assert np.array_equal(previous[t], history.previous_LK)
        np.testing.assert_allclose(history.rate_roots(TOP_K / EXPERTS), roots[t], rtol=2e-3)
        assert tokens[t].tolist() == [token_T[t - w] if t - w >= first else -1 for w in range(4)]
        used_LE = np.zeros((LAYERS, EXPERTS))
        for layer, ids in enumerate(topk_TLK[t]):
            used_LE[layer, ids[ids >= 0]] = 1
        assert np.array_equal(batch.used[t, 0], used_LE)
        np.testing.assert_allclose(batch.used[t, 1] * MOST_USES, later_TLE[t], rtol=2e-3, atol=1e-3)
        history.observe(topk_TLK[t])


def test_rows_that_know_less() -> None:
    topk_TLK, start_S, token_T = uneven()
    windows = Windows(topk_TLK, start_S, EXPERTS, token_T)
    chosen = np.array([1, 1, 1])  # tokens 16 to 31
    no, yes = np.zeros(3, dtype=bool), np.ones(3, dtype=bool)
    full = windows.batch(chosen, no, no, no)
    stale = windows.batch(chosen, no, yes, np.array([False, True, False]))
    unknown = windows.batch(chosen, yes, no, no)
    assert torch.equal(full.used, stale.used) and torch.equal(full.used, unknown.used)
    assert (unknown.inputs[3][:, 0] == -1).all() and torch.equal(unknown.inputs[3][:, 1:], full.inputs[3][:, 1:])
    for part in (0, 1, 2):
        begin = full.inputs[part][0].expand_as(stale.inputs[part][:LENGTH])
        assert torch.equal(stale.inputs[part][:LENGTH], begin)
    assert (stale.inputs[0][LENGTH : 2 * LENGTH] == -1).all() and (stale.inputs[1][LENGTH : 2 * LENGTH] == -1).all()
    even = np.sqrt(TOP_K / EXPERTS)
    np.testing.assert_allclose(stale.inputs[2][LENGTH : 2 * LENGTH], even, rtol=1e-5)


def test_it_learns_what_tokens_use(network: PathNetwork) -> None:
    """On sequences that it has not seen, and it knows that random tokens say nothing of those after them."""
    trace, token_T = by_token(1)
    scores = path_scores(network, trace, token_T)
    assert recalls(scores.before_TLE, trace, trace.domain_S, 1).mean() > 0.9
    blind = path_scores(network, trace, np.full(len(token_T), VOCAB))  # ids that it never saw
    assert recalls(blind.before_TLE, trace, trace.domain_S, 1).mean() < 0.5
    used_share = scores.before_TLE.sum() / (len(token_T) * LAYERS * TOP_K)
    assert 0.8 < used_share < 1.25  # probabilities


def test_step_by_step_it_says_what_it_says_in_bulk(network: PathNetwork) -> None:
    trace, token_T = by_token(2, sequences=2, length=25)
    ridge = NextUse.fit(trace.topk_TLK, trace.start_S, EXPERTS)
    scores = path_scores(network, trace, token_T)
    kept_TLE = (scores.after_TLE + ridge.scores(trace.topk_TLK, trace.start_S)) / 2
    plain, mean = PathPredictor(network), PathPredictor(network, ridge)
    for t in range(25):
        for live, wanted_TLE in ((plain, scores.after_TLE), (mean, kept_TLE)):
            rows = [t, 25 + t]  # two sequences in a step, the second one first
            ids_TLK = trace.topk_TLK[rows[::-1]]
            live.begin_step(
                [
                    Rows(request_id="a", first=1, token_ids=[int(token_T[t])], start=t),
                    Rows(request_id="b", first=0, token_ids=[int(token_T[25 + t])], start=t),
                ]
            )
            for layer in range(LAYERS):
                wanted = 1 - (1 - scores.before_TLE[rows, layer]).prod(0)
                found = live.upcoming(layer)
                assert found is not None
                np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4)
                before = live.future()
                assert before is not None
                before = before.copy()
                live.routed(layer, ids_TLK[:, layer])
                after = live.future()
                assert after is not None
                used = scores.before_TLE[rows, layer].sum(0)  # by this step: it counts until the layer has chosen
                share = path_network.KEPT
                np.testing.assert_allclose(before[layer], used + share * after[layer], rtol=2e-3, atol=1e-3)
                assert np.array_equal(np.delete(before, layer, 0), np.delete(after, layer, 0))
            live.end_step()
            kept = live.future()
            assert kept is not None
            assert t == 24 or np.allclose(kept, wanted_TLE[rows].sum(0), rtol=2e-3, atol=1e-3)
    plain.forget("a")
    plain.forget("unknown")
    plain.begin_step([])
    assert plain.future() is None and plain.upcoming(0) is None


def test_of_each_sequence_alone_it_says_what_the_next_token_uses(network: PathNetwork) -> None:
    trace, token_T = by_token(2, sequences=2, length=25)
    asked, silent = PathPredictor(network), PathPredictor(network)
    assert asked.next_of("a") is None
    for t in range(12):
        for live in (asked, silent):
            names = "ab" if t < 6 else "a"  # then b waits
            live.begin_step(
                [
                    Rows(request_id=name, first=first, token_ids=[int(token_T[25 * first + t])], start=t)
                    for first, name in enumerate(names)
                ]
            )
            for layer in range(LAYERS):
                live.routed(layer, trace.topk_TLK[[t, 25 + t], layer][: len(names)])
            live.end_step()
        if t in (5, 11):
            kept = silent.future()  # evaluates all of the step at once
            assert kept is not None
        for name in "ab":
            state = asked._states[name]
            next_BLE, _ = asked._evaluate([(state, (-1,))])
            found, other = asked.next_of(name), silent.next_of(name)
            assert found is not None and other is not None
            np.testing.assert_allclose(found, next_BLE[0], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(other, found, rtol=1e-4, atol=1e-6)
            assert state.tokens == (t + 1 if name == "a" else min(t, 5) + 1)
            assert found.min() >= 0 and found.max() <= 1
    asked.forget("b")
    assert asked.next_of("b") is None and asked.next_of("a") is not None


def test_prompts_preemption_and_tokens_taken_back(network: PathNetwork) -> None:
    trace, token_T = by_token(5, sequences=1, length=40)

    def step(live: PathPredictor, start: int, end: int) -> np.ndarray:
        live.begin_step([Rows(request_id="a", first=0, token_ids=token_T[start:end].tolist(), start=start)])
        said = np.stack([said_E for layer in range(LAYERS) if (said_E := live.upcoming(layer)) is not None])
        for layer in range(LAYERS):
            live.routed(layer, trace.topk_TLK[start:end, layer])
        live.end_step()
        return said

    whole, pieces = PathPredictor(network), PathPredictor(network)
    said_LE = step(whole, 0, 30)
    layer_N, ids_N = np.unique(
        [(la, e) for ids in trace.topk_TLK[:30] for la in range(LAYERS) for e in ids[la]], axis=0
    ).T
    assert said_LE[layer_N, ids_N].mean() > 0.9  # what any of 30 tokens uses
    for start in range(0, 30, 5):
        step(pieces, start, start + 5)
    first, second = whole.future(), pieces.future()
    assert first is not None and second is not None
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(step(whole, 30, 31), step(pieces, 30, 31), rtol=1e-4, atol=1e-5)
    step(whole, 29, 32)  # the last two were taken back
    fresh = PathPredictor(network)
    np.testing.assert_allclose(step(whole, 0, 3), step(fresh, 0, 3), rtol=1e-5)  # preempted
    fresh.begin_step([Rows(request_id="b", first=0, token_ids=[VOCAB + 5, -3], start=17)])  # a cached prefix
    fresh.end_step()  # an error ended the step before any layer
    assert fresh.future() is not None


def test_files(network: PathNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "p.npz")
    network.save(path)
    again = PathNetwork.load(path, "m")
    trace, token_T = by_token(1, sequences=2)
    for mine, other in zip(*(path_scores(n, trace, token_T).__dict__.values() for n in (network, again)), strict=True):
        np.testing.assert_allclose(mine, other, atol=0.02)
    assert again.digest == "m" and again.shape == network.shape
    with pytest.raises(ValueError, match="made for the model m, not x; make one for it with moeyard train-predictor"):
        PathNetwork.load(path, "x")
    (tmp_path / "text").write_text("no zip")
    NextUse.fit(trace.topk_TLK, trace.start_S, EXPERTS).save(str(tmp_path / "ridge.npz"))
    for name in ("text", "ridge.npz", "none"):
        with pytest.raises(ValueError, match="this is no routing-path network; make one with"):
            PathNetwork.load(str(tmp_path / name))
    monkeypatch.setattr(path_network, "VERSION", 2)
    with pytest.raises(ValueError, match="version 1, not 2"):
        PathNetwork.load(path)
    with pytest.raises(ValueError, match="give a file that can be written"):
        network.save(str(tmp_path / "no" / "p.npz"))


def test_a_large_model_has_a_small_file(tmp_path: Path) -> None:
    for layers, experts, top_k in ((24, 32, 4), (48, 128, 8)):
        large = PathNetwork(PathShape(layers=layers, experts=experts, top_k=top_k, vocab=201_088))
        large.save(str(tmp_path / "p.npz"))
        assert (tmp_path / "p.npz").stat().st_size < 20e6


def test_tokens_share_a_table_that_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_network, "BUCKETS", 24)
    trace, token_T = by_token(0, sequences=40)
    small = train(trace.topk_TLK, trace.start_S, EXPERTS, token_T=token_T, vocab=VOCAB, epochs=15, hidden=64)
    assert small.token.shape[0] == 25
    trace, token_T = by_token(1)
    assert recalls(path_scores(small, trace, token_T).before_TLE, trace, trace.domain_S, 1).mean() > 0.7


def test_wrong_recordings() -> None:
    trace, token_T = by_token(0, sequences=2)
    for experts, vocab, epochs, text in (
        (4, VOCAB, 1, "topk has ids"),
        (EXPERTS, 3, 1, "token_ids must be 120 numbers from 0 to 2"),
        (EXPERTS, VOCAB, 0, "epochs is 0"),
    ):
        with pytest.raises(ValueError, match=text):
            train(trace.topk_TLK, trace.start_S, experts, token_T=token_T, vocab=vocab, epochs=epochs)
