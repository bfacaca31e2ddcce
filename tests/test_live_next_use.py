"""Next use within the step: after it as the fitted model says in bulk, within it against a plain slow computation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine.next_token import NextToken
from moeyard.engine.next_use import NextUse
from moeyard.engine.predict import counting
from moeyard.engine.predict.base import Rows
from moeyard.engine.predict.next_use import LiveNextUse
from moeyard.engine.routing_history import FEATURES, rank_weights

LAYERS, EXPERTS, TOP_K = 3, 7, 2
SIZE = LAYERS * EXPERTS


@pytest.fixture(scope="module")
def model() -> NextUse:
    """Any weights will do."""
    rng = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return NextUse(
        now_NN=some(SIZE, SIZE),
        rank_NN=some(SIZE, SIZE),
        before_NN=some(SIZE, SIZE),
        own_LFE=some(LAYERS, FEATURES * EXPERTS, EXPERTS),
        bias_LE=some(LAYERS, EXPERTS),
        even=TOP_K / EXPERTS,
        half_life=3.0,
    )


@pytest.fixture(scope="module")
def with_next_token(model: NextUse) -> NextUse:
    return model.with_next_token(walks(8, 4000), np.arange(10) * 400)


def walks(seed: int, count: int) -> np.ndarray:
    """As `tokens`, but each layer often chooses what the one before it did, now and then what it chose itself."""
    rng = np.random.default_rng(seed)
    topk = tokens(seed, count)
    for t in range(1, count):
        for layer in range(LAYERS):
            if rng.random() < 0.2:
                topk[t, layer] = topk[t - 1, layer]
            elif layer and rng.random() < 0.8:
                topk[t, layer] = topk[t, layer - 1]
    return topk


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


def run(live: LiveNextUse, step: list[Rows], ids_TLK: np.ndarray) -> None:
    live.begin_step(step)
    for layer in range(LAYERS):
        live.routed(layer, ids_TLK[:, layer])
    live.end_step()


def settled(model: NextUse, topk: np.ndarray) -> np.ndarray:
    """[L, E] after the last of these tokens of one sequence."""
    if not len(topk):
        return np.zeros((LAYERS, EXPERTS))
    return model.scores(topk, np.array([0]))[-1]


def row_in_step(model: NextUse, past: np.ndarray, now: np.ndarray, layer: int) -> np.ndarray:
    """[E] of `layer`, at the moment when it is routed: from features written down one by one."""
    everything = np.concatenate([past, now])
    history = model.history()
    for ids_LK in everything:
        history.observe(ids_LK)
    found = model.bias_LE[layer] + history.features(model.even)[layer] @ model.own_LFE[layer]
    columns = slice(layer * EXPERTS, (layer + 1) * EXPERTS)
    for other in range(LAYERS):
        last, previous = (everything[-1:], everything[-2:-1]) if other <= layer else (past[-1:], past[-1:])
        for weight, expert in zip(rank_weights(TOP_K), last[0, other] if len(last) else [], strict=False):
            if expert >= 0:
                at = other * EXPERTS + expert
                found = found + model.now_NN[at, columns] + weight * model.rank_NN[at, columns]
        for expert in previous[0, other] if len(previous) else []:
            if expert >= 0:
                found = found + model.before_NN[other * EXPERTS + expert, columns]
    return found


def close(found: np.ndarray | None, want: np.ndarray, atol: float = 1e-4) -> None:
    assert found is not None
    np.testing.assert_allclose(found, want, atol=atol, rtol=1e-5)


def test_after_the_step_it_is_the_models_score(model: NextUse) -> None:
    live, topk = LiveNextUse(model), tokens(1, 90)
    scores = model.scores(topk, np.array([0, 40]))
    for t, ids_LK in enumerate(topk):
        start = t if t < 40 else t - 40
        run(live, rows(a=(start, 1)), ids_LK[None])
        close(live.future(), scores[t])
        assert live.future() is live.future()  # nothing is copied to be looked at


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_within_the_step_what_is_not_known_yet_is_as_it_was(model: NextUse, chunk: int) -> None:
    live, topk = LiveNextUse(model), tokens(2, 20)
    for start in range(0, 20, chunk):
        past, now = topk[:start], topk[start : start + chunk]
        live.begin_step(rows(a=(start, chunk)))
        want = settled(model, past)
        close(live.future(), want)
        for layer in range(LAYERS):
            live.routed(layer, now[:, layer])
            want = want.copy()
            want[layer] = row_in_step(model, past, now, layer)
            close(live.future(), want)
        live.end_step()
        close(live.future(), settled(model, topk[: start + chunk]))


def test_chunks_are_tokens_one_by_one(model: NextUse) -> None:
    topk = tokens(3, 40)
    for cuts in ([40], [1, 39], [17, 1, 20, 2]):
        live, start = LiveNextUse(model), 0
        for count in cuts:
            run(live, rows(a=(start, count)), topk[start : start + count])
            start += count
        close(live.future(), settled(model, topk))


def test_of_a_long_chunk_the_end_counts(model: NextUse) -> None:
    topk = tokens(4, counting.REACH + 300)
    live = LiveNextUse(model)
    run(live, rows(a=(0, len(topk))), topk)
    close(live.future(), settled(model, topk), atol=1e-3)


def test_a_batch_is_the_sum_of_its_sequences(model: NextUse) -> None:
    """Which come, go, and are chunks and single tokens in one step; also of those that are not in it."""
    live = LiveNextUse(model, sequences=4)
    topk = {name: tokens(seed, 30) for seed, name in enumerate("abcdef")}
    plan = [
        {"a": (0, 7)},
        {"a": (7, 1), "b": (0, 1), "c": (0, 4)},
        {"b": (1, 1), "a": (8, 1), "c": (4, 1)},
        {"c": (5, 1), "d": (0, 2), "a": (9, 1)},
        {"d": (2, 1), "e": (0, 3), "f": (0, 1)},  # take the places of b and c, which wait longest
        {"d": (3, 1), "e": (3, 1), "f": (1, 1)},
    ]
    waits: list[dict[str, int]] = [{}, {}, {}, {"b": 2}, {"a": 10}, {"a": 10}]
    for step, waiting in zip(plan, waits, strict=True):
        others = np.zeros((LAYERS, EXPERTS)) + sum(settled(model, topk[name][:n]) for name, n in waiting.items())
        live.begin_step(rows(**step))
        ids_TLK = np.concatenate([topk[name][start : start + count] for name, (start, count) in step.items()])
        want = np.sum([settled(model, topk[name][:start]) for name, (start, _) in step.items()], axis=0)
        close(live.future(), want + others)
        for layer in range(LAYERS):
            live.routed(layer, ids_TLK[:, layer])
            want[layer] = 0
            for name, (start, count) in step.items():
                want[layer] += row_in_step(model, topk[name][:start], topk[name][start : start + count], layer)
            close(live.future(), want + others)
        live.end_step()
        after = [settled(model, topk[name][: start + count]) for name, (start, count) in step.items()]
        close(live.future(), np.sum(after, axis=0) + others)
    live.forget("d")
    close(live.future(), others + settled(model, topk["e"][:4]) + settled(model, topk["f"][:2]))
    live.forget("never seen")


def test_a_sequence_that_goes_back_begins_anew(model: NextUse) -> None:
    live, topk = LiveNextUse(model), tokens(5, 30)
    run(live, rows(a=(0, 12)), topk[:12])
    run(live, rows(a=(12, 1)), topk[12:13])
    run(live, rows(a=(0, 13)), topk[13:26])  # preempted, computed again
    close(live.future(), settled(model, topk[13:26]))
    run(live, rows(a=(5, 2)), topk[:2])  # preempted, and some of it was found in the prefix cache
    close(live.future(), settled(model, topk[:2]))
    live.forget("a")
    assert live.future() is None
    run(live, rows(a=(7, 1)), topk[2:3])
    close(live.future(), settled(model, topk[2:3]))


def test_no_more_than_the_first_sequences_are_followed(model: NextUse) -> None:
    live, topk = LiveNextUse(model, sequences=2), tokens(6, 12).reshape(3, 4, LAYERS, TOP_K)
    for t in range(4):
        run(live, rows(a=(t, 1), b=(t, 1), c=(t, 1)), topk[:, t])
    close(live.future(), settled(model, topk[0]) + settled(model, topk[1]))
    with pytest.raises(ValueError, match="sequences is 0"):
        LiveNextUse(model, sequences=0)


def test_layers_without_a_router_chose_nothing(model: NextUse) -> None:
    live, topk = LiveNextUse(model), tokens(7, 6)
    for t, ids_LK in enumerate(topk):
        live.begin_step(rows(a=(t, 1)))
        live.routed(0, ids_LK[None, 0])
        live.routed(2, ids_LK[None, 2])
        live.end_step()
    topk[:, 1] = -1
    close(live.future(), settled(model, topk))


def test_chances_within_the_step_are_those_of_the_recording(with_next_token: NextUse) -> None:
    model, topk = with_next_token, walks(9, 12)
    found = model.next_token
    assert found is not None
    live, scores = LiveNextUse(model), model.scores(topk, np.array([0]))

    def want(t: int, layer: int, ahead: int) -> np.ndarray:
        return found.chances(layer, ahead, topk, scores, np.array([t]))[0]

    for t, ids_LK in enumerate(topk):
        live.begin_step(rows(a=(t, 1)))
        for layer in range(LAYERS):
            if t:
                close(live.upcoming(layer), want(t, layer, 0), atol=1e-5)
        for routed in range(LAYERS):
            live.routed(routed, ids_LK[None, routed])
            assert live.upcoming(routed) is None
            for layer in range(routed + 1, LAYERS):
                if t:
                    close(live.upcoming(layer), want(t, layer, layer - routed), atol=1e-5)
        live.end_step()
        assert live.upcoming(0) is None


def test_the_next_token_of_each_sequence(with_next_token: NextUse) -> None:
    """Also of one that is not in every step."""
    model, (one, two) = with_next_token, (walks(13, 8), walks(14, 8))
    live, found = LiveNextUse(model), with_next_token.next_token
    assert found is not None and live.next_of("a") is None

    def known(name: str, topk: np.ndarray, t: int) -> None:
        scores = model.scores(topk, np.array([0]))
        want_LE = np.concatenate([found.chances(layer, 0, topk, scores, np.array([t])) for layer in range(LAYERS)])
        close(live.next_of(name), want_LE, atol=1e-5)

    run(live, rows(a=(0, 3), b=(0, 2)), np.concatenate([one[:3], two[:2]]))
    for t in range(3, 7):
        known("a", one, t)
        known("b", two, 2)
        run(live, rows(a=(t, 1)), one[t : t + 1])
    live.forget("a")
    assert live.next_of("a") is None and LiveNextUse(dataclasses.replace(model, next_token=None)).next_of("b") is None


def test_chances_of_several_tokens(with_next_token: NextUse) -> None:
    """That any of them uses an expert: of a batch, of a chunk, and of a sequence that begins."""
    model, topk = with_next_token, walks(10, 30)
    alone: list[np.ndarray] = []
    for step in ({"a": (0, 4)}, {"b": (0, 9)}):
        live = LiveNextUse(model)
        run(live, rows(**step), topk[: next(iter(step.values()))[1]])
        live.begin_step(rows(**{name: (count, 1) for name, (_, count) in step.items()}))
        found = live.upcoming(1)
        assert found is not None
        alone.append(found)
    live = LiveNextUse(model)
    assert live.upcoming(1) is None
    run(live, rows(a=(0, 4), b=(0, 9)), np.concatenate([topk[:4], topk[:9]]))
    live.begin_step(rows(a=(4, 1), b=(9, 3)))
    close(live.upcoming(1), 1 - (1 - alone[0]) * (1 - alone[1]) ** 3, atol=1e-5)
    live.begin_step(rows(c=(0, 1)))
    assert model.next_token is not None
    used = np.bincount(walks(8, 4000)[:, 1].ravel() + 1, minlength=EXPERTS + 1)[1:] / 4000
    close(live.upcoming(1), used, atol=0.1)  # what is known of all text
    live.forget("c")
    assert live.upcoming(1) is None and live.future() is None
    assert LiveNextUse(model, 1).upcoming(0) is None


def test_chances_are_how_often_it_happens(with_next_token: NextUse) -> None:
    """On text that was not fitted on; and who has been through the layer before knows more."""
    model, topk = with_next_token, walks(11, 900)
    found = model.next_token
    assert found is not None
    scores, now = model.scores(topk, np.array([0])), np.arange(1, 900)
    used = (topk[now, 1][:, :, None] == np.arange(EXPERTS)).any(1)
    errors = []
    for ahead in (0, 1):
        chance = found.chances(1, ahead, topk, scores, now)
        assert chance.min() >= 0 and chance.max() <= 1
        for low in (0.1, 0.3, 0.5, 0.7):
            here = (chance >= low) & (chance < low + 0.2)
            assert not here.sum() > 200 or abs(used[here].mean() - chance[here].mean()) < 0.1
        errors.append(((chance - used) ** 2).mean())
    assert errors[1] < 0.8 * errors[0]


def test_the_next_token_is_kept_in_the_file(with_next_token: NextUse, tmp_path: Path) -> None:
    path = str(tmp_path / "x.npz")
    with_next_token.save(path)
    loaded = NextUse.load(path).next_token
    assert loaded is not None and with_next_token.next_token is not None
    for name in ("weight_DLFE", "bias_DLE", "mean_LE", "chance_DB"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(with_next_token.next_token, name))
    broken = dataclasses.replace(with_next_token.next_token, mean_LE=np.zeros((LAYERS, EXPERTS + 1)))
    dataclasses.replace(with_next_token, next_token=broken).save(path)
    with pytest.raises(ValueError, match="no predictor of next use"):
        NextUse.load(path)


def test_what_the_next_token_cannot_be_fitted_on(model: NextUse) -> None:
    topk = tokens(12, 4)
    scores = model.scores(topk, np.arange(4))
    with pytest.raises(ValueError, match="record longer ones"):
        NextToken.fit(topk, np.arange(4), scores)
    with pytest.raises(ValueError, match="depth is -1"):
        NextToken.fit(topk, np.array([0]), scores, depth=-1)


some_rows = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 6), st.integers(0, 5), st.integers(0, 9)), max_size=5
)


@settings(max_examples=150, deadline=None)
@given(
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
def test_it_never_raises(with_next_token: NextUse, steps: list, seed: int) -> None:
    """Unordered layers, too few rows, more experts than there are, steps that do not end."""
    rng = np.random.default_rng(seed)
    live = LiveNextUse(with_next_token, sequences=3)
    for step, layers, tokens, top_k, ends, forgotten in steps:
        live.begin_step(
            [
                Rows(request_id=name, first=first, token_ids=[0] * count, start=start)
                for name, first, count, start in step
            ]
        )
        for layer in layers:
            live.routed(layer, rng.integers(-2, EXPERTS + 3, size=(tokens, top_k)))
            upcoming = live.upcoming(layer + 1)
            assert upcoming is None or (upcoming.shape == (EXPERTS,) and 0 <= upcoming.min() <= upcoming.max() <= 1)
        if ends:
            live.end_step()
        live.forget(forgotten)
        future = live.future()
        assert future is None or (future.shape == (LAYERS, EXPERTS) and np.isfinite(future).all())
