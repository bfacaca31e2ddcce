"""Routing of simulated steps: sums, one copy per token and expert, what is even, what is drawn, what is recorded."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.bench import routing
from moeyard.bench.routing import (
    Trace,
    can_deal,
    capped,
    counted,
    dealt,
    drawn,
    read_trace,
    token_experts,
    zipf_weights,
)


def is_routing(rows_PE, tokens: int, top_k: int) -> bool:
    return (
        rows_PE.dtype == np.int64
        and (rows_PE.sum(1) == tokens * top_k).all()
        and rows_PE.min() >= 0
        and rows_PE.max() <= tokens
    )


# Even and skewed by design


@st.composite
def deals(draw):
    experts = draw(st.integers(1, 40))
    top_k = draw(st.integers(1, experts))
    hot = draw(st.integers(0, experts))
    percent = draw(st.integers(0, 100))
    return draw(st.integers(1, 9)), draw(st.integers(0, 50)), experts, top_k, hot, percent


@given(deals())
def test_dealt_is_routing_with_the_share_and_even_inside_it(deal) -> None:
    ranks, tokens, experts, top_k, hot, percent = deal
    if not can_deal(experts, top_k, hot, percent):
        with pytest.raises(ValueError, match="do not fit"):
            dealt(*deal)
        return
    rows_PE = dealt(*deal)
    assert rows_PE.shape == (ranks, experts)
    assert is_routing(rows_PE, tokens, top_k)
    assert rows_PE[:, :hot].sum() == ranks * tokens * top_k * percent // 100
    for part_PE in (rows_PE[:, :hot], rows_PE[:, hot:]):
        if part_PE.shape[1]:
            assert (np.ptp(part_PE, axis=1) <= 1).all() and np.ptp(part_PE.sum(0)) <= 1


def test_dealt_by_hand() -> None:
    # Of 2 x 2 x 2 copies half to experts 0 and 1, the others to 2, 4, 3, 2; rank 1 goes on where rank 0 stopped.
    assert dealt(2, 2, 5, 2, hot=2, percent=50).tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]]


@pytest.mark.parametrize("tokens", [1, 7, 128, 4096])
def test_balanced_leaves_no_rank_idle(tokens: int) -> None:
    """SGLang #37741: what was to be balanced routing left half of 16 ranks without any row."""
    loads_E = dealt(16, tokens, 256, 8).sum(0)
    loads_P = loads_E.reshape(16, 16).sum(1)
    assert np.ptp(loads_E) <= 1 and np.ptp(loads_P) <= 2 and loads_P.min() > 0


@pytest.mark.parametrize(
    ("experts", "top_k", "hot", "percent", "possible"),
    [
        (128, 4, 4, 95, True),
        (128, 4, 1, 25, True),
        (128, 4, 1, 26, False),
        (256, 8, 4, 50, True),
        (256, 8, 4, 80, False),
        (256, 8, 16, 95, True),
        (256, 8, 0, 1, False),
        (8, 8, 4, 50, True),
        (8, 8, 4, 40, False),  # the others would have more than one copy for each token
    ],
)
def test_shares_that_different_experts_per_token_allow(experts, top_k, hot, percent, possible) -> None:
    assert can_deal(experts, top_k, hot, percent) is possible


@given(deals())
def test_tokens_can_be_found_for_any_counts(deal) -> None:
    _, tokens, experts, top_k, hot, percent = deal
    if not tokens or not can_deal(experts, top_k, hot, percent):
        return
    rows_E = dealt(*deal)[-1]
    ids_TK = token_experts(rows_E, tokens)
    assert ids_TK.shape == (tokens, top_k)
    assert all(len(set(ids)) == top_k for ids in ids_TK.tolist())
    assert (np.bincount(ids_TK.ravel(), minlength=experts) == rows_E).all()


@pytest.mark.parametrize("rows_E", [[3, 1], [2, 1]])
def test_counts_that_no_router_gives(rows_E: list[int]) -> None:
    with pytest.raises(ValueError, match="are not 2 tokens"):
        token_experts(np.array(rows_E), 2)


# Drawn


@pytest.mark.parametrize("exact_draws", [1 << 22, 1 << 10], ids=["tokens", "counts"])
def test_drawn_is_routing_and_repeats(monkeypatch, exact_draws: int) -> None:
    monkeypatch.setattr(routing, "EXACT_DRAWS", exact_draws)
    weights_E = zipf_weights(24, 1.2, np.arange(24))

    def draw(seed: int):
        return drawn(weights_E, 4, 300, 6, np.random.default_rng(seed))

    assert is_routing(draw(1), 300, 6)
    assert (draw(1) == draw(1)).all() and (draw(1) != draw(2)).any()
    assert draw(1).sum(0)[0] > draw(1).sum(0)[12] > 0


def test_tokens_draw_one_expert_after_the_other() -> None:
    weights = [4.0, 2.0, 1.0, 1.0]
    shares = np.zeros(4)
    for order in permutations(range(4), 2):  # first, then second among those that are left
        chance = weights[order[0]] / 8 * weights[order[1]] / (8 - weights[order[0]])
        shares[list(order)] += chance
    rows_PE = drawn(np.array(weights), 1, 100_000, 2, np.random.default_rng(0))
    assert rows_PE[0] / 100_000 == pytest.approx(shares, abs=0.006)  # four standard deviations


def test_drawn_counts_have_the_spread_of_drawn_tokens(monkeypatch) -> None:
    weights_E = zipf_weights(16, 1.2, np.arange(16))
    by_tokens_PE = drawn(weights_E, 400, 200, 4, np.random.default_rng(0))
    monkeypatch.setattr(routing, "EXACT_DRAWS", 1 << 19)
    by_counts_PE = drawn(weights_E, 400, 200, 4, np.random.default_rng(0))
    assert by_counts_PE.mean(0) == pytest.approx(by_tokens_PE.mean(0), abs=1.5)
    assert by_counts_PE.std(0) == pytest.approx(by_tokens_PE.std(0), rel=0.35)


@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 100), min_size=1, max_size=20),
    st.integers(1, 5),
    st.integers(0, 40),
    st.integers(1, 4),
    st.integers(0, 9),
)
@settings(max_examples=60)
def test_counted_is_routing(shares, top_k: int, tokens: int, ranks: int, seed: int) -> None:
    shares_E = np.array(shares)
    if (shares_E > 0).sum() < top_k:
        with pytest.raises(ValueError, match=f"top-{top_k} needs"):
            capped(shares_E, top_k)
        return
    capped_E = capped(shares_E, top_k)
    assert capped_E.sum() == pytest.approx(top_k) and 0 <= capped_E.min() <= capped_E.max() <= 1
    assert is_routing(counted(shares_E, ranks, tokens, top_k, np.random.default_rng(seed)), tokens, top_k)


def test_capped_gives_the_rest_to_the_others() -> None:
    assert capped(np.array([8.0, 1.0, 1.0, 0.0]), 2).tolist() == [1.0, 0.5, 0.5, 0.0]


# Recorded


def trace_file(path: Path, **arrays) -> str:
    np.savez(path / "t.npz", **{name: np.array(value) for name, value in arrays.items()})  # type: ignore[arg-type]
    return str(path / "t.npz")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_recorded_tokens_go_to_ranks_in_order_and_begin_again(tmp_path: Path) -> None:
    path = trace_file(tmp_path, topk=[[[0, 1], [3, 2]], [[1, 2], [3, 0]], [[0, 2], [1, -1]], [[2, 1], [3, 1]]])
    trace = read_trace(path)
    assert (trace.name, trace.layers, trace.experts, trace.top_k) == ("t", 2, 4, 2)
    # Layer 0: rank 0 has tokens 0 to 2, rank 1 tokens 2, 3 and 0.
    assert trace.rows(0, 2, 3, 2, rng()).tolist() == [[2, 2, 2, 0], [2, 2, 2, 0]]
    assert trace.rows(0, 2, 1, 2, rng()).tolist() == [[1, 1, 0, 0], [1, 0, 1, 0]]
    assert trace.rows(0, 2, 1, 2, rng(), start=0.25).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]
    # Layer 1, a missing choice; more tokens than were recorded.
    assert trace.rows(1, 1, 9, 2, rng()).tolist() == [[2, 4, 3, 7]]


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 5), st.floats(0, 0.99))
def test_recorded_tokens_are_what_a_loop_counts(ranks: int, tokens: int, layer: int, start: float) -> None:
    topk = np.random.default_rng(1).integers(0, 7, (11, 6, 3))
    trace = Trace("t", topk, None, 7, 3)
    for p, rows_E in enumerate(trace.rows(layer, ranks, tokens, 3, rng(), start)):
        first = int((start + p / ranks) * 11)
        ids = [expert for i in range(tokens) for expert in topk[(first + i) % 11, layer]]
        assert (rows_E == np.bincount(ids, minlength=7)).all()


def test_recorded_loads_are_drawn_from_enough_steps(tmp_path: Path) -> None:
    steps = [[[6, 2, 0, 0]], [[0, 0, 4, 4]]]
    trace = read_trace(trace_file(tmp_path, counts=steps))
    assert (trace.layers, trace.experts, trace.top_k) == (1, 4, None)
    # A step is enough for four tokens: each rank has its own, of which one copy per token is taken.
    assert trace.rows(0, 2, 4, 2, rng()).tolist() == [[4, 4, 0, 0], [0, 0, 4, 4]]
    # 64 rows are more than both steps.
    rows_PE = trace.rows(0, 2, 32, 2, rng())
    assert is_routing(rows_PE, 32, 2) and (rows_PE > 0).all()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"ids": [1]}, "no array topk or counts"),
        ({"topk": [[1, 2]]}, "must be integers"),
        ({"topk": [[[0.5]]]}, "must be integers"),
        ({"counts": np.zeros((0, 2, 3), dtype=int)}, "must be integers"),
        ({"topk": [[[-1, -1]]]}, "without any row"),
        ({"counts": [[[0, 0], [1, 2]]]}, "without any row"),
    ],
)
def test_what_is_not_a_trace_is_refused(tmp_path: Path, arrays: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        read_trace(trace_file(tmp_path, **arrays))
    assert "--trace" in str(error.value)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("no")
    for name in ("x.npz", "missing.npz"):
        with pytest.raises(ValueError, match="--trace"):
            read_trace(str(tmp_path / name))
