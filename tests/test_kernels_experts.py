"""A whole layer of experts for few tokens, against a loop in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from moeyard.kernels.grouped_linear import FEW_ROWS, grouped_gate_up_silu, grouped_linear
from moeyard.kernels.listed_experts import listed_expert, listed_swiglu
from moeyard.kernels.many_rows import MANY_ROWS
from moeyard.kernels.small_experts import small_experts

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def layer(experts, width, inner, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(experts, 2 * inner, width, generator=generator) / width**0.5
    down = torch.randn(experts, width, inner, generator=generator) / inner**0.5
    return gate_up.to(dtype), down.to(dtype)


def routing(tokens, top_k, experts, seed=0, missing=0.0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    ids = torch.stack(rows) if rows else torch.zeros(0, top_k, dtype=torch.int64)
    ids[torch.rand(ids.shape, generator=generator) < missing] = -1
    return ids, torch.rand(tokens, top_k, generator=generator)


def oracle(x, ids, weights, gate_up, down, slots=None):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for e, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            if e >= 0:
                slot = e if slots is None else int(slots[e])
                gate, up = (gate_up[slot].double() @ x[t].double()).chunk(2)
                out[t] += weight * (down[slot].double() @ (F.silu(gate) * up))
    return out


def assert_near(actual, expected, dtype):
    assert actual.dtype is dtype and actual.shape == expected.shape
    step = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(actual.double(), expected, rtol=2 * step, atol=2 * step)


@given(
    tokens=st.integers(0, 20),
    top_k=st.integers(1, 5),
    experts=st.integers(5, 11),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    narrow=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_small_experts(tokens, top_k, experts, missing, narrow, dtype, seed):
    gate_up, down = layer(experts, 43, 29, dtype, seed)
    ids, weights = routing(tokens, top_k, experts, seed, missing)
    x = torch.randn(tokens, 43, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out, counts = small_experts(x, ids.to(torch.int32) if narrow else ids, weights, gate_up, down)
    assert_near(out, oracle(x, ids, weights, gate_up, down), dtype)
    assert counts.tolist() == [int((ids == e).sum()) for e in range(experts)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_all_tokens_to_one_expert(dtype, tokens):
    gate_up, down = layer(6, 40, 24, dtype)
    x = torch.randn(tokens, 40).to(dtype)
    ids, weights = torch.full((tokens, 1), 4), torch.rand(tokens, 1)
    out, counts = small_experts(x, ids, weights, gate_up, down)
    assert_near(out, oracle(x, ids, weights, gate_up, down), dtype)
    assert counts.tolist() == [0, 0, 0, 0, tokens, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_layer(dtype):
    """Widths over several blocks of columns and work enough for two workers."""
    gate_up, down = layer(8, 300, 212, dtype)
    ids, weights = routing(17, 3, 8)
    x = torch.randn(17, 300).to(dtype)
    assert_near(small_experts(x, ids, weights, gate_up, down)[0], oracle(x, ids, weights, gate_up, down), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_neighbours(dtype):
    gate_up, down = layer(8, 300, 212, dtype)
    ids, weights = routing(17, 3, 8)
    x = torch.randn(17, 300).to(dtype)
    together, _ = small_experts(x, ids, weights, gate_up, down)
    for t in range(17):
        alone, _ = small_experts(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], gate_up, down)
        assert torch.equal(alone[0], together[t])


def test_the_number_of_threads_changes_nothing():
    gate_up, down = layer(8, 300, 212, torch.bfloat16)
    ids, weights = routing(17, 3, 8)
    x = torch.randn(17, 300).to(torch.bfloat16)
    outs = []
    for n in (1, 2):
        torch.set_num_threads(n)
        outs.append(small_experts(x, ids, weights, gate_up, down)[0])
    assert torch.equal(*outs)


def test_experts_in_scattered_slots():
    gate_up, down = layer(9, 40, 24, torch.float32)
    slots = torch.tensor([7, 0, -1, 3, 8], dtype=torch.int32)
    ids = torch.tensor([[0, 3], [4, 1], [1, -1]])
    weights, x = torch.rand(3, 2), torch.randn(3, 40)
    out, counts = small_experts(x, ids, weights, gate_up, down, slots)
    assert_near(out, oracle(x, ids, weights, gate_up, down, slots), torch.float32)
    assert counts.tolist() == [1, 2, 0, 1, 1]
    with pytest.raises(ValueError, match="expert 2 has tokens but no slot"):
        small_experts(x, torch.tensor([[0, 3], [2, 1], [1, -1]]), weights, gate_up, down, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_anywhere_in_memory(dtype):
    gate_up, _ = layer(5, 40, 24, dtype)
    bias = torch.randn(5, 48).to(dtype)
    x, starts, experts = torch.randn(9, 40).to(dtype), [0, 3, 4, 9], [4, 0, 2]
    starts_G, experts_G = torch.tensor(starts, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32)
    alone = [gate_up[e].clone() for e in experts]
    stacked = grouped_linear(x, gate_up, starts_G, experts_G, bias)
    biases = [bias[e].clone() for e in experts]
    assert torch.equal(grouped_linear(x, alone, starts_G, None, biases), stacked)
    for g, (low, high) in enumerate(itertools.pairwise(starts)):
        assert_near(stacked[low:high], x[low:high].double() @ alone[g].double().T + biases[g].double(), dtype)
    with pytest.raises(ValueError, match="weight_ENK"):
        grouped_linear(x, [alone[0], alone[1][:, ::2], alone[2]], starts_G, None)


@pytest.mark.parametrize("way", [FEW_ROWS, MANY_ROWS], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_experts_anywhere_in_memory(dtype, way):
    gate_up, down = layer(5, 40, 24, dtype)
    x, starts, experts = torch.randn(7, 40).to(dtype), [0, 3, 4, 9], [4, 0, 2]
    index = torch.tensor([0, 6, 2, 2, 5, 1, 0, 3, 4], dtype=torch.int32)
    alone = [gate_up[e].clone() for e in experts]
    blocks = [(alone[0],), alone[1].clone().chunk(2), (alone[2][:24].clone(), alone[2][24:].clone())]
    downs = [down[e].clone() for e in experts]
    listed = [listed_expert(*weights) for weights in zip(blocks, downs, strict=True)]
    out = torch.full((9, 40), torch.nan).to(dtype)
    listed_swiglu(x, listed, starts, index, out, way)
    starts_G, experts_G = torch.tensor(starts, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32)
    h = grouped_gate_up_silu(x, gate_up, starts_G, experts_G, index, way)
    assert torch.equal(out, grouped_linear(h, down, starts_G, experts_G, way=way))
    for g, (low, high) in enumerate(itertools.pairwise(starts)):
        gates, ups = (x[index[low:high]].double() @ half.double().T for half in alone[g].chunk(2))
        assert_near(out[low:high], (torch.nn.functional.silu(gates) * ups) @ downs[g].double().T, dtype)
    listed_swiglu(x, listed[:1], [0, 0], index[:0], out[:0])


def test_gated_experts_that_do_not_fit_are_refused():
    gate_up, down = layer(2, 40, 24, torch.float32)
    good, x, index = listed_expert((gate_up[0],), down[0]), torch.randn(3, 40), torch.zeros(3, dtype=torch.int32)
    for blocks, last in [
        ((gate_up[0][:10], gate_up[0][10:]), down[0]),
        ((gate_up[0],), down[0].T),
        ((gate_up[0].bfloat16(),), down[0]),
    ]:
        with pytest.raises(ValueError, match=r"up_PIK|down_KI"):
            listed_expert(blocks, last)
    narrow = listed_expert((gate_up[1][:20].contiguous(),), down[1][:, :10].contiguous())
    for experts, starts, rows, out, name in [
        ([good, narrow], [0, 1, 3], x, x, "experts"),
        ([good], [0, 3], x.bfloat16(), x, "experts"),
        ([good], [0, 1, 3], x, x, "starts"),
        ([good], [1, 3], x, x, "starts"),
        ([good], [0, 3], x[:, :30], x, "x_TK"),
        ([good], [0, 3], x, x[:2], "out_RK"),
        ([good], [0, 2], x, x, "row_index_R"),
    ]:
        with pytest.raises(ValueError, match=name):
            listed_swiglu(rows, experts, starts, index, out.clone())


def test_rows_of_a_larger_tensor_and_weights_of_the_model_dtype():
    gate_up, down = layer(5, 40, 24, torch.bfloat16)
    ids, weights = routing(4, 2, 5)
    x = torch.randn(4, 100).to(torch.bfloat16)[:, 10:50]
    weights = weights.to(torch.bfloat16)
    assert_near(
        small_experts(x, ids, weights, gate_up, down)[0], oracle(x, ids, weights, gate_up, down), torch.bfloat16
    )


@pytest.mark.parametrize("bad", [-2, 5])
def test_an_expert_that_does_not_exist(bad):
    gate_up, down = layer(5, 40, 24, torch.float32)
    with pytest.raises(ValueError, match=f"expert {bad} is not in"):
        small_experts(torch.zeros(2, 40), torch.tensor([[0], [bad]]), torch.ones(2, 1), gate_up, down)


def test_refusals():
    gate_up, down = layer(5, 40, 24, torch.float32)
    x, ids, weights = torch.zeros(2, 40), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(ValueError, match="float16"):
        small_experts(x.half(), ids, weights, gate_up.half(), down.half())
    with pytest.raises(ValueError, match="gate_up_E2ID"):
        small_experts(x, ids, weights, gate_up.bfloat16(), down)
    with pytest.raises(ValueError, match="down_EDI"):
        small_experts(x, ids, weights, gate_up, down.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="ids_TK"):
        small_experts(x, ids[:1], weights, gate_up, down)
    with pytest.raises(ValueError, match="ids_TK"):
        small_experts(x, ids.float(), weights, gate_up, down)
