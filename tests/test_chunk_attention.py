"""Chunk attention against a loop over queries and keys, at sizes that divide nothing."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.kernels import chunk_attention as module
from moeyard.kernels.chunk_attention import block_runs, chunk_attention, gathered_attention


def brute_force(q, k, v, scale, window=0, sinks=None, softcap=0.0):
    tokens, heads, _ = q.shape
    keys, kv_heads, _ = k.shape
    out = torch.zeros(tokens, heads, v.shape[2], dtype=torch.float64)
    for t in range(tokens):
        here = keys - tokens + t
        seen = [s for s in range(keys) if s <= here and (not window or here - s < window)]
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = torch.stack([q[t, h].double() @ k[s, kv].double() * scale for s in seen])
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (sinks[h].double().exp() if sinks is not None else 0)
            out[t, h] = (weights[:, None] * v[seen][:, kv].double()).sum(0) / total
    return out


@st.composite
def cases(draw):
    kv_heads = draw(st.integers(1, 3))
    return {
        "tokens": draw(st.integers(1, 9)),
        "history": draw(st.integers(0, 21)),
        "kv_heads": kv_heads,
        "groups": draw(st.integers(1, 3)),
        "dim": draw(st.sampled_from([3, 8])),
        "value_dim": draw(st.sampled_from([3, 5, 8])),
        "window": draw(st.sampled_from([0, 1, 4, 11, 40])),
        "sinks": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_loop_over_queries_and_keys(case):
    torch.manual_seed(case["seed"])
    block_size, total = 4, case["history"] + case["tokens"]
    heads = case["kv_heads"] * case["groups"]
    q = torch.randn(case["tokens"], heads, case["dim"])
    k = torch.randn(total, case["kv_heads"], case["dim"])
    v = torch.randn(total, case["kv_heads"], case["value_dim"])
    sinks = torch.randn(heads) if case["sinks"] else None
    blocks = torch.randperm(12)[: -(-total // block_size)].tolist()
    if case["seed"] % 2:
        blocks = sorted(blocks)
    key_cache = torch.full((12, block_size, *k.shape[1:]), float("nan"))
    value_cache = torch.full((12, block_size, *v.shape[1:]), float("nan"))
    for position in range(total):
        key_cache[blocks[position // block_size], position % block_size] = k[position]
        value_cache[blocks[position // block_size], position % block_size] = v[position]
    options = {"scale": 0.7, "window": case["window"], "softcap": case["softcap"]}
    wanted = brute_force(q, k, v, **options, sinks=sinks)
    new = case["history"]
    # Small limits, so that slices and tiles come into play.
    with mock.patch.multiple(module, _TILE=3, _MAX_SCORES=heads * total * 2):
        gathered = gathered_attention(q, k, v, **options, sinks_H=sinks)
        paged = chunk_attention(
            q, k[new:], v[new:], key_cache, value_cache, blocks, history=case["history"], **options, sinks_H=sinks
        )
    torch.testing.assert_close(gathered.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(paged.double(), wanted, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    q, k, v = torch.randn(40, 8, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    empty = torch.empty(1, 16, 2, 16, dtype=torch.bfloat16)
    half = chunk_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), empty, empty, [], history=0, scale=0.25)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), gathered_attention(q, k, v, scale=0.25), atol=0.05, rtol=0.05)


def test_history_is_read_in_place(monkeypatch):
    """With consecutive blocks the history is one view of the cache: no copy is made of it."""
    seen = []
    flash = module.FLASH
    monkeypatch.setattr(
        module, "FLASH", lambda q, k, v, *a, **kw: seen.append(k.data_ptr()) or flash(q, k, v, *a, **kw)
    )
    cache = torch.randn(6, 4, 2, 8)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    chunk_attention(q, k, k, cache, cache, [2, 3, 4], history=9, scale=1.0)
    assert seen[0] == cache[2].data_ptr()
    assert len(seen) == 2


def test_without_the_private_kernel_the_history_is_gathered(monkeypatch):
    torch.manual_seed(0)
    cache_k, cache_v = torch.randn(4, 4, 1, 8), torch.randn(4, 4, 1, 8)
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    wanted = chunk_attention(q, k, v, cache_k, cache_v, [3, 1], history=6, scale=1.0)
    monkeypatch.setattr(module, "FLASH", None)
    torch.testing.assert_close(chunk_attention(q, k, v, cache_k, cache_v, [3, 1], history=6, scale=1.0), wanted)


@pytest.mark.parametrize(
    ("blocks", "first", "end", "runs"),
    [
        ([5, 6, 9], 0, 12, [(20, 8), (36, 4)]),
        ([5, 6, 9], 2, 9, [(22, 6), (36, 1)]),
        ([5], 0, 0, []),
        ([1, 2, 3], 0, 8, [(4, 8)]),
    ],
)
def test_runs_of_consecutive_blocks(blocks, first, end, runs):
    assert block_runs(blocks, first, end, 4) == runs
