"""Linear layers that pack panels of a weight, against loops in float64, at sizes that divide nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from moeyard.kernels import many_rows, panel
from moeyard.kernels.expert_loop import expert_loop
from moeyard.kernels.grouped_linear import grouped_gate_up_silu, grouped_linear
from moeyard.kernels.many_rows import MANY_ROWS, fits, many_linear
from moeyard.kernels.sort_rows import sort_rows

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def tensor(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_near(actual, expected, dtype):
    assert actual.dtype is dtype and actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1.0)
    assert error < (1e-5 if dtype is torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, k, rows",
    [
        (1, 2, 1),
        (7, 34, 5),
        (panel.PANEL, 64, panel.TILE_ROWS),
        (3 * panel.PANEL + 9, 130, 41),
        (70, 2 * panel.UNITS + 6, 13),  # K in several blocks, in either type
        (66, 40, many_rows.ROWS + 5),
    ],
)
def test_one_weight(n, k, rows, dtype):
    x, weight, bias = tensor(rows, k, dtype=dtype), tensor(n, k, dtype=dtype), tensor(n, dtype=dtype)
    expected = x.double() @ weight.double().T
    assert_near(many_linear(x, weight, None), expected, dtype)
    picked = torch.arange(rows - 1, -1, -1, dtype=torch.int32)
    assert_near(many_linear(x, weight, bias, picked), (expected + bias.double()).flip(0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_split_over_threads_without_a_seam(dtype):
    x, weight = tensor(20, 600, dtype=dtype), tensor(1027, 600, dtype=dtype)
    assert_near(many_linear(x, weight, None), x.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    x, weight = tensor(40, 2 * panel.UNITS + 10, dtype=dtype), tensor(77, 2 * panel.UNITS + 10, dtype=dtype)
    alone = torch.cat([many_linear(row[None], weight, None) for row in x])
    for rows in (2, 5, 6, 7, 13, 40):
        assert torch.equal(many_linear(x[:rows], weight, None), alone[:rows])


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_random_routings(data):
    experts, top_k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    tokens = data.draw(st.integers(1, 30))
    dim, width = 2 * data.draw(st.integers(1, 40)), 2 * data.draw(st.integers(1, 50))
    dtype = data.draw(st.sampled_from(DTYPES))
    listed = data.draw(st.booleans())
    ids = torch.tensor(
        data.draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    ).view(tokens, top_k)
    x = tensor(tokens, dim, dtype=dtype)
    up, down = tensor(experts, 2 * width, dim, dtype=dtype), tensor(experts, dim, width, dtype=dtype, seed=1)
    rows = sort_rows(ids, experts)
    used = rows.experts_G.tolist()
    down_of = [down[e] for e in used] if listed else down
    if not used:
        return
    h = grouped_gate_up_silu(x, up, rows.starts, rows.experts_G, rows.token_R, way=MANY_ROWS)
    y = grouped_linear(h, down_of, rows.starts, None if listed else rows.experts_G, way=MANY_ROWS)
    expert_R = torch.repeat_interleave(torch.arange(experts), rows.counts_E)
    for row, (token, expert) in enumerate(zip(rows.token_R.tolist(), expert_R.tolist(), strict=True)):
        gate, value = (up[expert].double() @ x[token].double()).chunk(2)
        assert_near(h[row], F.silu(gate) * value, dtype)
        assert_near(y[row], down[expert].double() @ h[row].double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_loop_over_experts_gives_the_same_with_panels(bias, dtype):
    slots, dim, width = 4, 24, 10
    x, counts = tensor(7, dim, dtype=dtype), torch.tensor([3, 0, 21, 1])
    up, down = tensor(slots, 2 * width, dim, dtype=dtype), tensor(slots, dim, width, dtype=dtype)
    biases = [tensor(slots, n, dtype=dtype) for n in (2 * width, dim)] if bias else [None, None]
    tokens = torch.randint(7, (25,), dtype=torch.int32)

    def gate(h):
        a, b = h.chunk(2, dim=-1)
        return F.silu(a) * b

    expected = expert_loop(x, tokens, counts, up, down, gate, *biases)
    assert_near(expert_loop(x, tokens, counts, up, down, gate, *biases, panels=True), expected.double(), dtype)


def test_rows_of_odd_bfloat16_are_refused():
    x, weight = tensor(3, 5, dtype=torch.bfloat16), tensor(4, 5, dtype=torch.bfloat16)
    assert not fits(weight) and fits(weight.float())
    with pytest.raises(ValueError, match="FEW_ROWS"):
        many_linear(x, weight, None)
