"""Attention of a chunk of new tokens of one sequence over its paged history and itself.

T: tokens of the chunk, H: query heads, Hk: KV heads, G: query heads per KV head, D: head dimension of keys, Dv: of
values, S: keys.

`gathered_attention` is the specification: it copies the history, does the plain formula and knows every feature.
`chunk_attention` reads the history in place, run of consecutive blocks by run, with the flash kernel of PyTorch on
the CPU, and merges the parts by their log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""PyTorch's CPU flash kernel with its log-sum-exp; private, so it may go away."""


_MAX_SCORES = 2**26
"""Most scores (float32) that `gathered_attention` holds at once: 256 MiB."""

_TILE = 256
"""Queries of a windowed chunk that are attended together, at least: the keys outside their windows are not touched."""


def gathered_attention(
    q_THD: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of the last T of S positions, `[T, H, Dv]`; scores and softmax in float32.

    `window`: keys a query sees, itself included (0: all). `sinks_H`: one more logit per head in the softmax's
    denominator. `softcap`: scores become `softcap * tanh(score / softcap)`.
    """
    tokens, heads, _ = q_THD.shape
    keys, kv_heads, _ = k_SHD.shape
    most = max(1, _MAX_SCORES // (heads * keys))
    if tokens > most:  # in slices, so that the scores' memory is bounded however long the history
        parts = []
        for start in range(0, tokens, most):
            end = min(start + most, tokens)
            seen = keys - tokens + end
            options: dict[str, Any] = {"scale": scale, "window": window, "sinks_H": sinks_H, "softcap": softcap}
            parts.append(gathered_attention(q_THD[start:end], k_SHD[:seen], v_SHD[:seen], **options))
        return torch.cat(parts)
    groups = heads // kv_heads
    q = q_THD.float().view(tokens, kv_heads, groups, -1)
    scores = torch.einsum("tkgd,skd->kgts", q, k_SHD.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    age = _age(tokens, keys, q_THD.device)
    hidden = (age < 0) if not window else (age < 0) | (age >= window)
    scores.masked_fill_(hidden, float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.float().view(kv_heads, groups, 1, 1).expand(-1, -1, tokens, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    out = torch.einsum("kgts,skd->tkgd", weights, v_SHD.float())
    return out.reshape(tokens, heads, -1).to(q_THD.dtype)


def block_runs(blocks: list[int], first: int, end: int, block_size: int) -> list[tuple[int, int]]:
    """Positions `first` to `end` of a sequence as runs `(first row, rows)` of the flattened cache `[blocks *
    block_size]`.
    """
    runs: list[tuple[int, int]] = []
    position = first
    while position < end:
        index = position // block_size
        start = blocks[index] * block_size + position % block_size
        while (index + 1) * block_size < end and blocks[index + 1] == blocks[index] + 1:
            index += 1
        stop = min(end, (index + 1) * block_size)
        runs.append((start, stop - position))
        position = stop
    return runs


def chunk_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: list[int],
    *,
    history: int,
    scale: float,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """`gathered_attention` of a chunk whose own keys and values are given and whose `history` earlier ones are in the
    cache.

    q_THD [T, H, D], k_THD [T, Hk, D], v_THD [T, Hk, Dv]; caches [blocks, block_size, Hk, D or Dv], which hold
    the chunk's own keys and values too; `blocks`: the sequence's block ids. Returns [T, H, Dv]. On the CPU nothing of
    the history is copied; with a logit cap, on other devices, or without PyTorch's CPU flash kernel the history is
    gathered first.
    """
    tokens = q_THD.shape[0]
    block_size = key_cache.shape[1]
    tile = max(window, _TILE)
    if window and tokens > tile:
        options: dict[str, Any] = {"scale": scale, "window": window, "sinks_H": sinks_H, "softcap": softcap}
        cuts = [slice(start, min(start + tile, tokens)) for start in range(0, tokens, tile)]
        caches = (key_cache, value_cache, blocks)
        return torch.cat(
            [chunk_attention(q_THD[c], k_THD[c], v_THD[c], *caches, history=history + c.start, **options) for c in cuts]
        )
    first = 0 if not window else max(0, history - window + 1)
    runs = block_runs(blocks, first, history, block_size)
    flat_k, flat_v = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    if softcap or FLASH is None or q_THD.device.type != "cpu":
        keys = torch.cat([*(flat_k[s : s + n] for s, n in runs), k_THD])
        values = torch.cat([*(flat_v[s : s + n] for s, n in runs), v_THD])
        return gathered_attention(q_THD, keys, values, scale=scale, window=window, sinks_H=sinks_H, softcap=softcap)

    out, lse = None, None
    position = first
    for start, rows in runs:
        # The window moves past the run's beginning for later queries, and past all of it for the last ones.
        whole = not window or position > history + tokens - 1 - window
        seeing = tokens if whole else min(tokens, window + position + rows - 1 - history)
        mask = None if whole else _window_mask(seeing, history - position, rows, window, q_THD)
        part = _flash(q_THD[:seeing], flat_k[start : start + rows], flat_v[start : start + rows], scale, mask=mask)
        part = _blind_after(seeing, tokens, *part)
        out, lse = part if out is None or lse is None else _merge(out, lse, *part)
        position += rows
    mask = _window_mask(tokens, 0, tokens, window, q_THD) if window and tokens > window else None
    part = _flash(q_THD, k_THD, v_THD, scale, mask=mask, causal=mask is None)
    out, lse = part if out is None or lse is None else _merge(out, lse, *part)
    if sinks_H is not None:
        out = out * torch.sigmoid(lse - sinks_H.float())[..., None]
    return out.to(q_THD.dtype)


def _flash(
    q_THD: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    scale: float,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output [T, H, Dv] and log-sum-exp [T, H] of one part, without copying keys for the groups."""
    tokens, heads, _ = q_THD.shape
    kv_heads, value_dim = k_SHD.shape[1], v_SHD.shape[2]
    groups = heads // kv_heads
    width = max(k_SHD.shape[2], value_dim)
    # KV heads take the place of the batch, so that a group's query heads share keys through a stride of zero.
    q = _widen(q_THD, width).view(tokens, kv_heads, groups, width).permute(1, 2, 0, 3)
    k = _widen(k_SHD, width).permute(1, 0, 2)[:, None].expand(-1, groups, -1, -1)
    v = _widen(v_SHD, width).permute(1, 0, 2)[:, None].expand(-1, groups, -1, -1)
    assert FLASH is not None
    out, lse = FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    out_THD = out.permute(2, 0, 1, 3).reshape(tokens, heads, width)[..., :value_dim]
    return out_THD, lse.reshape(kv_heads, groups, tokens).permute(2, 0, 1).reshape(tokens, heads)


def _merge(
    a_THD: torch.Tensor, a_TH: torch.Tensor, b_THD: torch.Tensor, b_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two partial attentions over disjoint keys as one; a row that saw nothing has a log-sum-exp far below all
    others.
    """
    lse = torch.logaddexp(a_TH.float(), b_TH.float())
    a = a_THD.float() * torch.exp(a_TH - lse)[..., None]
    return a + b_THD.float() * torch.exp(b_TH - lse)[..., None], lse


def _blind_after(
    seeing: int, tokens: int, out_THD: torch.Tensor, lse_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds rows for the queries from `seeing` on, which saw nothing."""
    if seeing == tokens:
        return out_THD, lse_TH
    return F.pad(out_THD, (0, 0, 0, 0, 0, tokens - seeing)), F.pad(lse_TH, (0, 0, 0, tokens - seeing), value=-1e30)


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _age(tokens: int, keys: int, device: torch.device) -> torch.Tensor:
    """Position of each query minus position of each key, [T, S], when the queries are the last of the keys."""
    queries = torch.arange(keys - tokens, keys, device=device)
    return queries[:, None] - torch.arange(keys, device=device)[None]


def _window_mask(tokens: int, distance: int, keys: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask [T, S] for keys that begin `distance` positions before the first query."""
    queries = torch.arange(distance, distance + tokens)
    age = queries[:, None] - torch.arange(keys)[None]
    mask = torch.zeros(tokens, keys, dtype=like.dtype)
    return mask.masked_fill_((age < 0) | (age >= window), float("-inf"))
