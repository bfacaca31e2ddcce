"""The attention function that transformers' models call in the place of their own.

It owns the KV cache: it stores the step's keys and values, and attends each sequence's queries to that sequence's own
history and nothing else. Which tokens belong to whom is in the step's `StepBatch`, set by the engine before the model
runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from typing import Any

import torch
from torch import nn

from ..kernels.chunk_attention import chunk_attention, gathered_attention
from ..kernels.gathered_decode import gathered_decode_attention
from .kv_cache import KVCache, StepBatch
from .model import AttentionSpec

logger = logging.getLogger(__name__)


class PagedAttention:
    """Called by the model as an attention function; `batch` must be set for each step."""

    def __init__(self, layers: tuple[AttentionSpec, ...], cache: KVCache):
        self.cache = cache
        self.layers = {spec.layer: spec for spec in layers}
        self.batch: StepBatch | None = None
        self._single = _single_tokens_function(cache, layers)
        self._varlen = _varlen_function(cache, layers)

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, H, T, D], key [1, Hk, T, D], value [1, Hk, T, Dv] -> [1, T, H, Dv]."""
        batch = self.batch
        assert batch is not None, "the engine sets the batch before it runs the model"
        spec = self.layers[module.layer_idx]  # type: ignore[index]
        q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
        scale = scaling if scaling is not None else spec.head_dim**-0.5
        self.cache.write(spec.layer, batch.slots_T, k_THD, v_THD)
        options: dict[str, Any] = {"scale": scale, "window": spec.window, "softcap": spec.softcap}
        sinks_H = kwargs.get("s_aux")
        if self._varlen is not None:
            return self._varlen(batch, spec, q_THD, scale)[None], None

        parts = []
        if batch.singles:
            parts.append(self._single(batch, spec, q_THD[: batch.singles], sinks_H=sinks_H, **options))
        key_cache, value_cache = self.cache.keys[spec.layer], self.cache.values[spec.layer]
        for chunk in batch.chunks:
            rows = slice(chunk.start, chunk.end)
            parts.append(
                chunk_attention(
                    q_THD[rows],
                    k_THD[rows],
                    v_THD[rows],
                    key_cache,
                    value_cache,
                    chunk.blocks,
                    history=chunk.history,
                    sinks_H=sinks_H,
                    **options,
                )
            )
        out_THD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out_THD[None], None


def _single_tokens_function(cache: KVCache, layers: tuple[AttentionSpec, ...]) -> Any:
    """Attention of sequences with one new token: a compiled kernel that reads the cache in place on CPUs, where it
    knows the type, else by gathering.
    """
    some = cache.keys[layers[0].layer]
    if some.device.type == "cpu" and some.dtype not in (torch.float32, torch.bfloat16):
        return lambda batch, spec, q_SHD, **options: _chunk_singles(cache, batch, spec, q_SHD, **options)
    kernel: Any = gathered_decode_attention
    if some.device.type == "cpu":
        from ..kernels.paged_attention import paged_decode_attention

        kernel = paged_decode_attention

    def attend(batch: StepBatch, spec: AttentionSpec, q_SHD: torch.Tensor, **options: Any) -> torch.Tensor:
        return kernel(
            q_SHD,
            cache.keys[spec.layer],
            cache.values[spec.layer],
            batch.block_table_SB[: batch.singles],
            batch.lengths_S[: batch.singles],
            **options,
        )

    return attend


def _chunk_singles(
    cache: KVCache, batch: StepBatch, spec: AttentionSpec, q_SHD: torch.Tensor, **options: Any
) -> torch.Tensor:
    """For types without a compiled kernel: each sequence as a chunk of one, its history read in place."""
    keys, values = cache.keys[spec.layer], cache.values[spec.layer]
    out = []
    for index, length in enumerate(batch.lengths_S[: batch.singles].tolist()):
        blocks = batch.block_table_SB[index].tolist()
        slot = int(batch.slots_T[index])
        k_new, v_new = (x.flatten(0, 1)[slot : slot + 1] for x in (keys, values))
        q = q_SHD[index : index + 1]
        out.append(chunk_attention(q, k_new, v_new, keys, values, blocks, history=length - 1, **options))
    return torch.cat(out)


def _varlen_function(cache: KVCache, layers: tuple[AttentionSpec, ...]) -> Any:
    """PyTorch's variable-length flash attention over a block table, on GPUs where it gives the right answer; else None.

    Whether it does is tried on a small example rather than read off version numbers; the reason for not using it is
    logged.
    """
    some = cache.keys[layers[0].layer]
    if some.device.type != "cuda":
        return None
    # One trial for each kind of layer: sizes and windows decide which kernel runs.
    kinds = {dataclasses.replace(spec, layer=0): spec for spec in layers}.values()
    obstacles = (why for spec in layers for why in _varlen_obstacles(spec, some.dtype))
    trials = (why for spec in kinds if (why := _try_varlen(spec, cache.block_size, some)) is not None)
    reason = next(obstacles, None) or next(trials, None)
    if reason is not None:
        logger.warning("attention gathers the KV history of each sequence: %s", reason)
        return None
    from torch.nn.attention.varlen import varlen_attn

    # One step's sequence offsets serve all layers.
    steps: dict[str, Any] = {}

    def attend(batch: StepBatch, spec: AttentionSpec, q_THD: torch.Tensor, scale: float) -> torch.Tensor:
        if steps.get("batch") is not batch:
            starts = [*range(batch.singles), *(c.start for c in batch.chunks), batch.num_tokens]
            lengths = [1] * bool(batch.singles) + [c.end - c.start for c in batch.chunks]
            steps.update(
                batch=batch,
                starts=torch.tensor(starts, dtype=torch.int32, device=q_THD.device),
                longest=max(lengths),
            )
        out = varlen_attn(
            q_THD.contiguous(),
            cache.keys[spec.layer],
            cache.values[spec.layer],
            steps["starts"],
            None,
            steps["longest"],
            batch.block_table_SB.shape[1] * cache.block_size,
            scale=scale,
            window_size=(spec.window - 1 if spec.window else -1, 0),
            enable_gqa=spec.heads != spec.kv_heads,
            seqused_k=batch.lengths_S,
            block_table=batch.block_table_SB,
        )
        assert isinstance(out, torch.Tensor)
        return out

    return attend


def _varlen_obstacles(spec: AttentionSpec, dtype: torch.dtype) -> list[str]:
    """Reasons why a layer cannot use flash attention over a block table."""
    why = []
    if dtype not in (torch.float16, torch.bfloat16):
        why.append(f"flash attention needs float16 or bfloat16, not {dtype}")
    if spec.sinks or spec.softcap:
        why.append("flash attention has no attention sinks or logit cap here")
    if spec.head_dim != spec.value_dim or spec.head_dim > 256 or spec.head_dim % 8:
        why.append(f"flash attention has no head dimensions {spec.head_dim} and {spec.value_dim}")
    return why


def _try_varlen(spec: AttentionSpec, block_size: int, like: torch.Tensor) -> str | None:
    """Runs a small paged example; None when it equals gathered attention, else what went wrong."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        if "block_table" not in inspect.signature(varlen_attn).parameters:
            return "this torch has no block table in torch.nn.attention.varlen"
        k, v = (torch.randn(4, block_size, spec.kv_heads, spec.head_dim).to(like) for _ in range(2))
        q = torch.randn(3, spec.heads, spec.head_dim).to(like)
        length = block_size + 2
        window = min(spec.window, length // 2)
        out = varlen_attn(
            q,
            k,
            v,
            torch.tensor([0, 3], dtype=torch.int32, device=like.device),
            None,
            3,
            2 * block_size,
            scale=0.5,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=spec.heads != spec.kv_heads,
            seqused_k=torch.tensor([length], dtype=torch.int32, device=like.device),
            block_table=torch.tensor([[2, 1]], dtype=torch.int32, device=like.device),
        )
        keys, values = (x[[2, 1]].flatten(0, 1)[:length] for x in (k, v))
        wanted = gathered_attention(q, keys, values, scale=0.5, window=window)
        if not torch.allclose(torch.as_tensor(out).float(), wanted.float(), atol=2e-2, rtol=2e-2):
            return "torch.nn.attention.varlen with a block table gives another result here"
    except Exception as error:
        return f"torch.nn.attention.varlen does not run here ({str(error).splitlines()[0] if str(error) else error!r})"
    return None
