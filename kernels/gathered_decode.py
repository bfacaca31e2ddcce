"""Attention of one new token per sequence over its paged history, in plain PyTorch: for devices without a kernel of
ours.

S: sequences, H: query heads, Hk: KV heads, D: key width, Dv: value width, B: blocks per sequence, L: B * block_size
keys.
"""

from __future__ import annotations

import torch

_MAX_GATHERED = 2**27
"""Most values of keys or values gathered at once (256 MiB in 16 bits); more sequences go in slices."""


def gathered_decode_attention(
    q_SHD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table_SB: torch.Tensor,
    lengths_S: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention [S, H, Dv] of the token at position `lengths_S[s] - 1` over its own keys; scores in float32.

    Caches are [blocks, block_size, Hk, D or Dv]. Nothing waits for the device: the table's width bounds the work.
    """
    sequences, heads, width = q_SHD.shape
    _, block_size, kv_heads, value_width = value_cache.shape
    keys = block_table_SB.shape[1] * block_size
    step = max(1, _MAX_GATHERED // (keys * kv_heads * max(width, value_width)))
    position_L = torch.arange(keys, device=q_SHD.device)
    out = []
    for start in range(0, sequences, step):
        rows = slice(start, start + step)
        q = q_SHD[rows].view(-1, kv_heads, heads // kv_heads, width)
        count = q.shape[0]
        blocks = block_table_SB[rows].reshape(-1).long()
        k, v = (c.index_select(0, blocks).view(count, keys, kv_heads, -1) for c in (key_cache, value_cache))
        scores = torch.einsum("skgd,slkd->skgl", q.float(), k.float()) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        length = lengths_S[rows, None]
        hidden = position_L >= length
        if window:
            hidden = hidden | (position_L < length - window)
        scores.masked_fill_(hidden[:, None, None], float("-inf"))
        if sinks_H is not None:
            sink = sinks_H.float().view(1, kv_heads, -1, 1).expand(count, -1, -1, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :keys]
        # Blocks beyond a sequence's end may hold anything, NaN included, which a weight of 0 does not remove.
        v = v.float().masked_fill(hidden[:, :, None, None], 0.0)
        out.append(torch.einsum("skgl,slkd->skgd", weights, v).reshape(count, heads, value_width))
    return torch.cat(out).to(q_SHD.dtype)
