"""Paged decode attention and the writing of its cache, against loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.kernels.paged_attention import paged_decode_attention
from moeyard.kernels.write_kv import write_kv

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def case(lengths, heads, key_heads, width, value_width, block_size, dtype, seed=0):
    """Caches whose unused places hold NaN, so that reading one shows; blocks in random order."""
    generator = torch.Generator().manual_seed(seed)
    per_sequence = [-(-length // block_size) for length in lengths]
    blocks = sum(per_sequence) + 3
    order = torch.randperm(blocks, generator=generator).tolist()
    table = torch.full((len(lengths), max([*per_sequence, 1]) + 1), -1, dtype=torch.int32)
    keys = torch.full((blocks, block_size, key_heads, width), torch.nan)
    values = torch.full((blocks, block_size, key_heads, value_width), torch.nan)
    for s, length in enumerate(lengths):
        for b in range(per_sequence[s]):
            block = order.pop()
            table[s, b] = block
            rows = min(block_size, length - b * block_size)
            keys[block, :rows] = torch.randn(rows, key_heads, width, generator=generator)
            values[block, :rows] = torch.randn(rows, key_heads, value_width, generator=generator)
    q = torch.randn(len(lengths), heads, width, generator=generator)
    return q.to(dtype), keys.to(dtype), values.to(dtype), table, torch.tensor(lengths, dtype=torch.int32)


def oracle(q, keys, values, table, lengths, scale, window=0, sinks=None, softcap=0.0):
    sequences, heads, _ = q.shape
    block_size, group = keys.shape[1], heads // keys.shape[2]
    out = torch.zeros(sequences, heads, values.shape[3], dtype=torch.float64)
    for s, length in enumerate(lengths.tolist()):
        first = max(0, length - window) if window else 0
        for h in range(heads):
            scores, rows = [], []
            for position in range(first, length):
                block, offset = int(table[s, position // block_size]), position % block_size
                score = scale * (q[s, h].double() @ keys[block, offset, h // group].double())
                scores.append(softcap * torch.tanh(score / softcap) if softcap else score)
                rows.append(values[block, offset, h // group].double())
            if rows:
                logits = torch.stack(scores if sinks is None else [*scores, sinks[h].double()])
                out[s, h] = torch.softmax(logits, 0)[: len(rows)] @ torch.stack(rows)
    return out


def assert_near(actual, expected, dtype):
    assert actual.dtype is dtype
    step = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(actual.double(), expected, rtol=step, atol=0.2 * step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "value_width"),
    [(4, 4, 64, 64), (8, 2, 128, 128), (6, 2, 33, 17), (16, 1, 24, 40), (3, 3, 192, 128), (7, 1, 16, 8)],
)
def test_heads_and_widths(dtype, heads, key_heads, width, value_width):
    inputs = case([1, 0, 17, 40], heads, key_heads, width, value_width, 16, dtype)
    out = paged_decode_attention(*inputs, scale=width**-0.5)
    assert_near(out, oracle(*inputs, width**-0.5), dtype)
    assert not out[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [15, 16, 17, 255, 256, 257, 511, 512, 513])
def test_block_and_chunk_boundaries(dtype, length):
    inputs = case([length, 3], 4, 2, 32, 32, 16, dtype)
    assert_near(paged_decode_attention(*inputs, scale=0.2), oracle(*inputs, 0.2), dtype)


@pytest.mark.parametrize("block_size", [1, 5, 64, 300])
def test_block_sizes(block_size):
    inputs = case([301, 77], 2, 1, 20, 20, block_size, torch.float32)
    assert_near(paged_decode_attention(*inputs, scale=0.2), oracle(*inputs, 0.2), torch.float32)


@given(
    lengths=st.lists(st.integers(0, 330), min_size=1, max_size=4),
    shape=st.sampled_from([(4, 2, 16, 16), (5, 5, 7, 9), (8, 1, 32, 16)]),
    block_size=st.sampled_from([4, 16, 33]),
    window=st.sampled_from([0, 1, 16, 100, 1000]),
    sinks=st.booleans(),
    softcap=st.sampled_from([0.0, 0.7, 30.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_options(lengths, shape, block_size, window, sinks, softcap, dtype, seed):
    inputs = case(lengths, *shape, block_size, dtype, seed)
    options = {
        "window": window,
        "sinks": torch.randn(shape[0], generator=torch.Generator().manual_seed(seed)) * 3 if sinks else None,
        "softcap": softcap,
    }
    out = paged_decode_attention(*inputs, scale=0.3, window=window, sinks_H=options["sinks"], softcap=softcap)
    assert_near(out, oracle(*inputs, 0.3, **options), dtype)


def test_blocks_behind_the_window_may_be_gone():
    q, keys, values, table, lengths = case([300], 2, 1, 16, 16, 16, torch.float32)
    whole = paged_decode_attention(q, keys, values, table, lengths, 0.3, window=20)
    table[0, : 280 // 16] = -1
    assert torch.equal(paged_decode_attention(q, keys, values, table, lengths, 0.3, window=20), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_its_neighbours_or_threads(dtype):
    q, keys, values, table, lengths = case([700, 3, 260, 1], 8, 4, 64, 64, 16, dtype)
    together = paged_decode_attention(q, keys, values, table, lengths, 0.1)
    torch.set_num_threads(3 - torch.get_num_threads())
    for s in range(4):
        one = slice(s, s + 1)
        assert torch.equal(paged_decode_attention(q[one], keys, values, table[one], lengths[one], 0.1), together[one])


def test_large_scores_do_not_overflow():
    q, keys, values, table, lengths = case([300], 2, 1, 16, 16, 16, torch.float32)
    assert_near(
        paged_decode_attention(q, keys, values, table, lengths, 1e3),
        oracle(q, keys, values, table, lengths, 1e3),
        torch.float32,
    )


def test_strided_inputs():
    """The layouts models give: heads before tokens, caches that are views of a larger one."""
    q, keys, values, table, lengths = case([50, 20], 4, 2, 32, 32, 16, torch.float32)
    both = torch.cat([keys, values], dim=3)
    out = paged_decode_attention(
        q.transpose(0, 1).contiguous().transpose(0, 1), both[..., :32], both[..., 32:], table, lengths, 0.2
    )
    assert torch.equal(out, paged_decode_attention(q, keys, values, table, lengths, 0.2))


def test_refusals():
    q, keys, values, table, lengths = case([50, 20], 4, 2, 32, 32, 16, torch.float32)
    with pytest.raises(ValueError, match="sequence 1 of 999 tokens"):
        paged_decode_attention(q, keys, values, table, torch.tensor([5, 999], dtype=torch.int32), 1.0)
    for bad in (-1, len(keys)):
        wrong = table.clone()
        wrong[0, 2] = bad
        with pytest.raises(ValueError, match="sequence 0 of 50 tokens"):
            paged_decode_attention(q, keys, values, wrong, lengths, 1.0)
    with pytest.raises(ValueError, match="float16"):
        paged_decode_attention(q.half(), keys.half(), values.half(), table, lengths, 1.0)
    with pytest.raises(ValueError, match="key_cache"):
        paged_decode_attention(q, keys.bfloat16(), values, table, lengths, 1.0)
    with pytest.raises(ValueError, match="3 query heads"):
        paged_decode_attention(q[:, :3], keys, values, table, lengths, 1.0)
    with pytest.raises(ValueError, match="seq_lens"):
        paged_decode_attention(q, keys, values, table, lengths.long(), 1.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_write_kv(dtype):
    generator = torch.Generator().manual_seed(0)
    key_cache, value_cache = torch.zeros(5, 4, 3, 8, dtype=dtype), torch.zeros(5, 4, 3, 6, dtype=dtype)
    slots = torch.tensor([7, -1, 0, 19])
    keys = torch.randn(3, 4, 8, generator=generator).to(dtype).transpose(0, 1)
    values = torch.randn(4, 3, 6, generator=generator).to(dtype)
    expected = key_cache.clone(), value_cache.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot // 4, slot % 4] = keys[t]
            expected[1][slot // 4, slot % 4] = values[t]
    write_kv(keys, values, key_cache, value_cache, slots)
    assert torch.equal(key_cache, expected[0]) and torch.equal(value_cache, expected[1])


def test_write_kv_refuses():
    cache, new = torch.zeros(5, 4, 3, 8), torch.zeros(2, 3, 8)
    for bad in (-2, 20):
        with pytest.raises(ValueError, match=f"slot {bad} "):
            write_kv(new, new, cache, cache, torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="value"):
        write_kv(new, new.bfloat16(), cache, cache, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="slot_T"):
        write_kv(new, new, cache, cache, torch.tensor([0, 1], dtype=torch.int32))
