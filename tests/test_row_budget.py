"""Chunks by memory: every chunk fits, no fewer chunks would do, and too little memory is said at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.scheduler.row_budget import LEAST_PARTS, MOST_PARTS, RowBudget


def budget(*bytes_P, row=10, pair=3, most_pairs=2):
    return RowBudget(bytes_P=bytes_P, row_bytes=row, pair_bytes=pair, most_pairs=most_pairs)


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 16, 64]), st.integers(1, 3), st.integers(1, 5000))
def test_the_fewest_chunks_of_which_each_fits(seed, parts, ranks, room):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 30, (ranks, parts, ranks))
    pairs = rows + rng.integers(0, 30, rows.shape)
    it = budget(*[room + int(n) for n in rng.integers(0, 900, ranks)])
    degree = it.least_degree(rows, pairs)

    def fits(degree):
        per = parts // degree
        return all(
            10 * rows[:, c * per : (c + 1) * per, p].sum() + 3 * pairs[:, c * per : (c + 1) * per, p].sum()
            <= it.bytes_P[p]
            for c in range(degree)
            for p in range(ranks)
        )

    assert fits(degree) or degree == parts
    assert not any(fits(d) for d in (1, 2, 4, 8, 16, 32) if d < degree)


@given(st.integers(1, 4096), st.integers(1, 16), st.integers(16, 10**6))
def test_what_is_said_to_fit_fits_wherever_it_goes(tokens, ranks, room):
    it = budget(*[room] * ranks)
    degree = it.least_even_degree([tokens] * ranks)
    assert degree == MOST_PARTS or ranks * -(-tokens // degree) * (10 + 2 * 3) <= room
    try:
        parts = it.parts(tokens)
    except ValueError as error:
        assert "max_batched_tokens" in str(error)
        return
    assert LEAST_PARTS <= parts <= MOST_PARTS
    all_to_one = np.zeros((ranks, parts, ranks), dtype=np.int64)
    all_to_one[:, :, -1] = -(-tokens // parts)
    need = all_to_one.sum(0).max() * (10 + 2 * 3)
    assert need <= room
    assert it.least_degree(all_to_one, all_to_one * 2) <= parts


def test_the_remedy_that_the_error_names_works():
    it = budget(16 * 100, 16 * 90)
    with pytest.raises(ValueError, match="set --max-batched-tokens 2880 or less"):
        it.parts(3000)
    assert it.parts(2880) == MOST_PARTS


def test_pairs_that_a_rank_takes_at_once():
    assert budget(130, 26, 1).most_pairs_P.tolist() == [10, 2, 1]
