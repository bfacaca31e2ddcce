"""Gathered decode attention against the specification, one sequence at a time."""

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.kernels import gathered_decode
from moeyard.kernels.chunk_attention import gathered_attention
from moeyard.kernels.gathered_decode import gathered_decode_attention


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 21), min_size=1, max_size=5),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    value_dim=st.sampled_from([3, 8]),
    window=st.sampled_from([0, 1, 5, 40]),
    sinks=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_specification(lengths, kv_heads, groups, value_dim, window, sinks, softcap, seed):
    torch.manual_seed(seed)
    block_size, heads = 4, kv_heads * groups
    keys = torch.full((40, block_size, kv_heads, 8), float("nan"))
    values = torch.full((40, block_size, kv_heads, value_dim), float("nan"))
    table = torch.zeros(len(lengths), 6, dtype=torch.int32)
    free = torch.randperm(39).add(1).tolist()
    q = torch.randn(len(lengths), heads, 8)
    sinks_H = torch.randn(heads) if sinks else None
    options = {"scale": 0.6, "window": window, "sinks_H": sinks_H, "softcap": softcap}
    wanted = []
    for s, length in enumerate(lengths):
        k, v = torch.randn(length, kv_heads, 8), torch.randn(length, kv_heads, value_dim)
        for position in range(length):
            if position % block_size == 0:
                table[s, position // block_size] = free.pop()
            block = int(table[s, position // block_size])
            keys[block, position % block_size], values[block, position % block_size] = k[position], v[position]
        wanted.append(gathered_attention(q[s : s + 1], k, v, **options))
    with mock.patch.object(gathered_decode, "_MAX_GATHERED", 24 * kv_heads * 8 * 2):  # two sequences at a time
        out = gathered_decode_attention(q, keys, values, table, torch.tensor(lengths, dtype=torch.int32), **options)
    torch.testing.assert_close(out, torch.cat(wanted), rtol=1e-5, atol=1e-5)
