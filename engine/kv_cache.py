"""The paged KV cache, and one step's tokens as tensors that point into it.

T: tokens of the step, S: sequences of the step, B: blocks per sequence (of the longest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.write_kv import write_kv
from .model import AttentionSpec


class KVCache:
    """Keys and values of all layers: per layer `[blocks, block_size, Hk, D]` and `[..., Dv]`.

    Memory is only reserved here; on a CPU the operating system provides it as blocks are first written.
    """

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for spec in layers:
            shape = (num_blocks, block_size, spec.kv_heads)
            self.keys[spec.layer] = torch.empty(*shape, spec.head_dim, dtype=dtype, device=device)
            self.values[spec.layer] = torch.empty(*shape, spec.value_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys.values(), *self.values.values()))

    def write(self, layer: int, slots_T: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor) -> None:
        """Stores keys [T, Hk, D] and values [T, Hk, Dv] of new tokens at `slots_T` (block * block_size + offset)."""
        if k_THD.is_cpu:
            write_kv(k_THD, v_THD, self.keys[layer], self.values[layer], slots_T)
        else:
            self.keys[layer].flatten(0, 1).index_copy_(0, slots_T, k_THD)
            self.values[layer].flatten(0, 1).index_copy_(0, slots_T, v_THD)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Several new tokens of one sequence: rows `start` to `end` of the step, after `history` tokens in the cache."""

    start: int
    end: int
    history: int
    blocks: list[int]


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One step on the device. The first `singles` rows are sequences with one token each; chunks follow.

    `lengths_S` counts the keys of each sequence after this step; `sample_rows` holds the row whose logits are wanted,
    of each sequence that samples, in the step's order. `state_slots` are where the sequences' states are, in a model
    whose layers keep such, and `first_rows` those single tokens that are their sequence's first.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    singles: int
    chunks: tuple[Chunk, ...]
    lengths_S: torch.Tensor
    block_table_SB: torch.Tensor
    sample_rows: torch.Tensor
    state_slots: tuple[int, ...] = ()
    first_rows: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.shape[0]


@dataclass(frozen=True, kw_only=True)
class Span:
    """New tokens of one sequence in a step: `tokens` from position `start` on, with its block table and its slot among
    the states."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    samples: bool
    state_slot: int = -1


def make_batch(spans: Sequence[Span], block_size: int, device: torch.device) -> StepBatch:
    """Lays spans out as one packed step; spans of one token must come first."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    chunks: list[Chunk] = []
    sample_rows: list[int] = []
    singles = 0
    width = max(len(span.blocks) for span in spans)
    table = torch.zeros(len(spans), width, dtype=torch.int32)
    table_rows = table.numpy()
    for index, span in enumerate(spans):
        count, end = len(span.tokens), span.start + len(span.tokens)
        table_rows[index, : len(span.blocks)] = span.blocks
        if count == 1:
            assert not chunks, "single tokens come first"
            singles += 1
            slots.append(span.blocks[span.start // block_size] * block_size + span.start % block_size)
        else:
            row = len(ids)
            chunks.append(Chunk(start=row, end=row + count, history=span.start, blocks=list(span.blocks)))
            slots += [span.blocks[p // block_size] * block_size + p % block_size for p in range(span.start, end)]
        ids += span.tokens
        positions += range(span.start, end)
        if span.samples:
            sample_rows.append(len(ids) - 1)
    lengths = torch.tensor([span.start + len(span.tokens) for span in spans], dtype=torch.int32)

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

    return StepBatch(
        input_ids_T=on_device(ids),
        positions_T=on_device(positions),
        slots_T=on_device(slots),
        singles=singles,
        chunks=tuple(chunks),
        lengths_S=lengths.to(device, non_blocking=True),
        block_table_SB=table.to(device, non_blocking=True),
        sample_rows=on_device(sample_rows),
        state_slots=tuple(span.state_slot for span in spans),
        first_rows=tuple(i for i, span in enumerate(spans[:singles]) if span.start == 0),
    )
