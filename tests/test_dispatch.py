"""The local dispatcher, which every other one must equal."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine.dispatch import LocalDispatcher


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 7), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_equals_a_loop_over_tokens_and_choices(tokens, choices, slots, seed):
    torch.manual_seed(seed)
    x = torch.randn(tokens, 3)
    ids = torch.randint(-1, slots, (tokens, choices))
    weights = torch.rand(tokens, choices)
    scales = torch.randn(slots)
    dispatcher = LocalDispatcher(slots)
    rows, counts, state = dispatcher.dispatch(x, ids, weights)
    assert counts.tolist() == [int((ids == s).sum()) for s in range(slots)]
    assert rows.shape[0] == int((ids >= 0).sum())
    slot_of_row = torch.repeat_interleave(torch.arange(slots), counts)
    out = dispatcher.combine(rows * scales[slot_of_row, None], state)
    wanted = torch.zeros(tokens, 3)
    for t in range(tokens):
        for k in range(choices):
            if ids[t, k] >= 0:
                wanted[t] += weights[t, k] * scales[ids[t, k]] * x[t]
    torch.testing.assert_close(out, wanted)


def test_rows_of_a_slot_are_in_token_order():
    x = torch.arange(4.0)[:, None]
    rows, counts, _ = LocalDispatcher(3).dispatch(x, torch.tensor([[1], [0], [1], [1]]), torch.ones(4, 1))
    assert rows[:, 0].tolist() == [1, 0, 2, 3]
    assert counts.tolist() == [1, 3, 0]
