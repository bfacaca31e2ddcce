"""Linear layers for few rows, plain and grouped by expert, against loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.kernels.grouped_linear import combine, grouped_gate_up_silu, grouped_linear
from moeyard.kernels.small_linear import small_linear
from moeyard.kernels.sort_rows import sort_rows, sort_rows_in

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
    """Close to a float64 result, within the rounding of the dtype."""
    assert actual.dtype is dtype
    step = 1e-5 if dtype is torch.float32 else 2**-8
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=1.5 * step, atol=0.02 * step * max(scale, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 100), (1, 1), (7, 31), (130, 64), (64, 65), (515, 257)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 9, 23])
def test_small_linear(dtype, shape, rows):
    n, k = shape
    x, weight, bias = tensor(rows, k, dtype=dtype), tensor(n, k, dtype=dtype), tensor(n, dtype=dtype)
    expected = x.double() @ weight.double().T
    assert_near(small_linear(x, weight), expected, dtype)
    assert_near(small_linear(x, weight, bias), expected + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_linear_is_split_over_threads_without_a_seam(dtype):
    weight, x = tensor(1027, 600, dtype=dtype), tensor(3, 600, dtype=dtype)  # large enough for two workers
    assert_near(small_linear(x, weight), x.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    x, weight = tensor(21, 333, dtype=dtype), tensor(77, 333, dtype=dtype)
    alone = torch.cat([small_linear(row[None], weight) for row in x])
    for rows in range(1, 22):
        assert torch.equal(small_linear(x[:rows], weight), alone[:rows])


def test_small_linear_shapes():
    weight = tensor(6, 10, dtype=torch.float32)
    x = tensor(2, 3, 10, dtype=torch.float32)
    assert_near(small_linear(x, weight), x.double() @ weight.double().T, torch.float32)
    assert_near(small_linear(x.transpose(0, 1), weight), x.transpose(0, 1).double() @ weight.double().T, torch.float32)
    assert small_linear(x[:0], weight).shape == (0, 3, 6)
    assert small_linear(x[0, 0], weight).shape == (6,)


def test_small_linear_special_values():
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [3e38, 3e38]], dtype=torch.bfloat16)
    y = small_linear(x, torch.ones(1, 2, dtype=torch.bfloat16))
    assert y[0].isnan() and y[1].isinf() and y[2].isinf()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.float16), torch.zeros(2, 4, dtype=torch.float16), "float16"),
        (torch.zeros(1, 4), torch.zeros(2, 4, dtype=torch.bfloat16), "weight_NK"),
        (torch.zeros(1, 4), torch.zeros(2, 5), "weight_NK"),
        (torch.zeros(1, 4), torch.zeros(4, 2).T, "weight_NK"),
    ],
)
def test_small_linear_refuses(x, weight, message):
    with pytest.raises(ValueError, match=message):
        small_linear(x, weight)


def random_ids(tokens, top_k, experts, generator, missing=0.2):
    """Distinct experts per token, some places empty."""
    rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    ids = torch.stack(rows) if rows else torch.zeros(0, top_k, dtype=torch.int64)
    ids[torch.rand(ids.shape, generator=generator) < missing] = -1
    return ids


@given(st.integers(0, 9), st.integers(1, 4), st.integers(4, 12), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sort_rows(tokens, top_k, experts, narrow, seed):
    ids = random_ids(tokens, top_k, experts, torch.Generator().manual_seed(seed))
    rows = sort_rows(ids.to(torch.int32) if narrow else ids, experts)
    pairs = sorted((int(e), p) for p, e in enumerate(ids.flatten()) if e >= 0)
    held = sorted({e for e, _ in pairs})
    assert rows.counts_E.tolist() == [sum(e == other for e, _ in pairs) for other in range(experts)]
    assert rows.experts_G.tolist() == held
    assert rows.starts.tolist() == [sum(e < other for e, _ in pairs) for other in held] + [len(pairs)]
    assert rows.token_R.tolist() == [p // top_k for _, p in pairs]
    position = {p: row for row, (_, p) in enumerate(pairs)}
    assert rows.position_TK.flatten().tolist() == [position.get(p, -1) for p in range(tokens * top_k)]


@given(st.integers(0, 9), st.integers(1, 4), st.integers(4, 12), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sort_rows_in_an_order(tokens, top_k, experts, narrow, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(tokens, top_k, experts, generator)
    order = torch.randperm(experts, generator=generator)[: experts - 2].tolist()
    places = torch.tensor([*(order.index(e) if e in order else -1 for e in range(experts)), -1])[ids]
    wanted = sort_rows(places, len(order))
    rows = sort_rows_in(order, ids.to(torch.int32).t().contiguous().t() if narrow else ids, experts)
    assert all(torch.equal(getattr(rows, name), tensor) for name, tensor in vars(wanted).items())


@pytest.mark.parametrize("bad", [-2, 5])
def test_sort_rows_names_an_expert_that_does_not_exist(bad):
    ids = torch.tensor([[0, 1], [bad, 2]])
    with pytest.raises(ValueError, match=f"expert {bad} "):
        sort_rows(ids, 5)
    with pytest.raises(ValueError, match=f"expert {bad} "):
        sort_rows_in([0, 1], ids, 5)


def grouped_cases(dtype):
    """Rows per group: none in the middle, one, many; experts out of order and apart."""
    starts = torch.tensor([0, 1, 4, 4, 13, 150], dtype=torch.int32)
    experts = torch.tensor([6, 0, 2, 5, 3], dtype=torch.int32)
    x = tensor(40, 37, dtype=dtype)
    index = torch.randint(0, 40, (150,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return x, starts, experts, index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gather", [False, True])
def test_grouped_linear(dtype, gather):
    x, starts, experts, index = grouped_cases(dtype)
    weight, bias = tensor(7, 71, 37, dtype=dtype), tensor(7, 71, dtype=dtype)
    rows = x[index]
    expected = torch.empty(150, 71, dtype=torch.float64)
    for g, e in enumerate(experts.tolist()):
        for r in range(starts[g], starts[g + 1]):
            expected[r] = weight[e].double() @ rows[r].double() + bias[e].double()
    source, chosen = (x, index) if gather else (rows, None)
    assert_near(grouped_linear(source, weight, starts, experts, bias, row_index_R=chosen), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gate_up_silu(dtype):
    x, starts, experts, index = grouped_cases(dtype)
    weight = tensor(7, 2 * 67, 37, dtype=dtype)
    expected = torch.empty(150, 67, dtype=torch.float64)
    for g, e in enumerate(experts.tolist()):
        for r in range(starts[g], starts[g + 1]):
            gate, up = (weight[e].double() @ x[index[r]].double()).chunk(2)
            expected[r] = torch.nn.functional.silu(gate) * up
    assert_near(grouped_gate_up_silu(x, weight, starts, experts, index), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_over_its_range(dtype):
    gate = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([0.0, -0.0, 1e-30, -300.0, 300.0])]).to(dtype)
    x, weight = gate[:, None], torch.ones(1, 2, 1, dtype=dtype)  # gate and up are both x
    starts, experts = torch.tensor([0, len(gate)], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    expected = torch.nn.functional.silu(gate.double()) * gate.double()
    torch.testing.assert_close(
        grouped_gate_up_silu(x, weight, starts, experts)[:, 0].double(),
        expected,
        rtol=2e-6 if dtype is torch.float32 else 2**-8,
        atol=1e-30,
    )


def test_grouped_nothing():
    none = torch.zeros(0, dtype=torch.int32)
    starts = torch.zeros(1, dtype=torch.int32)
    assert grouped_linear(torch.zeros(0, 4), torch.zeros(2, 3, 4), starts, none).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype):
    generator = torch.Generator().manual_seed(0)
    ids = random_ids(11, 3, 8, generator)
    ids[4] = -1
    rows = sort_rows(ids, 8)
    weights = torch.rand(11, 3, generator=generator)
    y = tensor(len(rows.token_R), 77, dtype=dtype)
    expected = torch.zeros(11, 77, dtype=torch.float64)
    for t in range(11):
        for k in range(3):
            if rows.position_TK[t, k] >= 0:
                expected[t] += weights[t, k].double() * y[rows.position_TK[t, k]].double()
    out = combine(y, rows.position_TK, weights)
    assert_near(out, expected, dtype)
    assert not out[4].any()
