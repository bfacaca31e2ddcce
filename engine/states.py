"""What layers remember of a whole sequence instead of its keys and values: the states of linear attention, state spaces
and convolutions.

The models read and write them through transformers' cache interface; `StateCache` is the object that they get, and
`States` what stands behind it at the moment: one sequence's chunk, all sequences with a single token, or a probe.

N: slots, S: sequences with a single token, C: channels, K: length of the convolution, T: tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F
from transformers import Cache


class StateKey(NamedTuple):
    """Which state: `kind` is conv or recurrent; a layer may have several of a kind."""

    layer: int
    kind: str
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """One state of one layer, for one sequence; `module` is the path in the model of what reads and writes it."""

    key: StateKey
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class States(Protocol):
    """The states of the sequences that a layer computes now; batch first, as the model sees them."""

    def read(self, key: StateKey) -> torch.Tensor | None:
        """What was written last, which may be changed in place; None at the start of a sequence."""
        ...

    def write(self, key: StateKey, state: torch.Tensor) -> None: ...


class StateCache(Cache):
    """A cache as transformers' models know it, for the states alone: keys and values are with the attention function.

    `states` must be set before a layer runs that has some.
    """

    def __init__(self, states: States | None = None) -> None:
        super().__init__(layers=[])
        self.states = states

    def _of(self, layer: int, kind: str, index: int) -> tuple[States, StateKey]:
        assert self.states is not None, f"layer {layer} has a state that it had not when the model was probed"
        return self.states, StateKey(layer, kind, index)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        states, key = self._of(layer_idx, "conv", state_idx)
        return states.read(key)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """New inputs [S, C, T] of a convolution; returned with the last ones before them, as transformers does: zeros
        at the start of a sequence, and no more of them than make up the convolution's length."""
        states, key = self._of(layer_idx, "conv", state_idx)
        if conv_kernel_size is None:
            raise ValueError(f"layer {layer_idx} does not say how many inputs its convolution needs")
        last_SCK = states.read(key)
        if last_SCK is None:
            full = F.pad(conv_states, (max(conv_kernel_size - conv_states.shape[-1], 0), 0))
        else:
            full = torch.cat([last_SCK, conv_states], dim=-1)
        states.write(key, full[..., -conv_kernel_size:])
        return full

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        states, key = self._of(layer_idx, "recurrent", state_idx)
        return states.read(key)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        states, key = self._of(layer_idx, "recurrent", state_idx)
        states.write(key, recurrent_states)
        return recurrent_states

    # Lightning attention (minimax) has names of its own for the same.

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)

    # What the layers with keys and values ask of a cache

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return key_states, value_states

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class StatePool:
    """`num_slots` slots for every state of the model: tensors [N, ...]. What a slot holds at first is anything.

    Memory is only reserved here; on a CPU the operating system provides it as slots are first written.
    """

    def __init__(self, specs: Sequence[StateSpec], num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.tensors = {
            spec.key: torch.empty(num_slots, *spec.shape, dtype=spec.dtype, device=device) for spec in specs
        }

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def clear(self, slot: int) -> None:
        """The states at the start of a sequence: zeros."""
        for tensor in self.tensors.values():
            tensor[slot].zero_()


class ChunkStates:
    """One sequence's states, in place. At the start of the sequence there are none to read."""

    def __init__(self, pool: StatePool, slot: int, at_start: bool) -> None:
        self._pool = pool
        self._rows = slice(slot, slot + 1)
        self._at_start = at_start

    def read(self, key: StateKey) -> torch.Tensor | None:
        return None if self._at_start else self._pool.tensors[key][self._rows]

    def write(self, key: StateKey, state: torch.Tensor) -> None:
        self._pool.tensors[key][self._rows].copy_(state)


class SingleStates:
    """The states of sequences with a single token each, as one batch: in place where their slots follow each other,
    else gathered, and put back by `settle`."""

    def __init__(self, pool: StatePool, slots: Sequence[int], device: torch.device) -> None:
        self._pool = pool
        first = slots[0]
        self._run = slice(first, first + len(slots)) if list(slots) == [*range(first, first + len(slots))] else None
        self._slots_S = torch.tensor(slots, device=device) if self._run is None else None
        self._lent: dict[StateKey, torch.Tensor] = {}

    def read(self, key: StateKey) -> torch.Tensor:
        pool_N = self._pool.tensors[key]
        if self._run is not None:
            return pool_N[self._run]
        if key not in self._lent:
            assert self._slots_S is not None
            self._lent[key] = pool_N.index_select(0, self._slots_S)
        return self._lent[key]

    def write(self, key: StateKey, state: torch.Tensor) -> None:
        pool_N = self._pool.tensors[key]
        if self._run is not None:
            pool_N[self._run].copy_(state)
        else:
            self._lent[key] = state

    def settle(self) -> None:
        """The layer has run: what it changed goes back."""
        for key, state in self._lent.items():
            assert self._slots_S is not None
            pool_N = self._pool.tensors[key]
            pool_N.index_copy_(0, self._slots_S, state.to(pool_N.dtype))
        self._lent.clear()
