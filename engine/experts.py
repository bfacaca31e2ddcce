"""Where the experts' weights are and how they get there.

S: slots, I: expert width (2I for gate and up together), D: hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..scheduler.table import EMPTY
from .expert_files import AlignedBuffer
from .weights import ExpertReader

if TYPE_CHECKING:
    from ..kernels.listed_experts import ListedExpert

UP_NAMES = ("gate_up_proj", "up_proj")
DOWN_NAME = "down_proj"


_ALIGNMENT = 64  # of each tensor in a pool's memory


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """Weights of one expert, wherever they are. `up_PND` are blocks of rows: all of them, or gate and up."""

    up_PND: tuple[torch.Tensor, ...]
    down_DI: torch.Tensor
    up_bias_N: torch.Tensor | None = None
    down_bias_D: torch.Tensor | None = None

    @functools.cached_property
    def listed(self) -> ListedExpert:
        """For the kernels that take them by address. ValueError where they are not on the CPU."""
        from ..kernels.listed_experts import listed_expert

        return listed_expert(self.up_PND, self.down_DI)


class ExpertPool:
    """Weights of one MoE layer's experts in slots, each matrix with its input dimension contiguous.

    `up_SND` is `[S, 2I, D]` for experts with a gate (the rows of gate and up in the model's own order), `[S, I, D]`
    without; `down_SDI` is `[S, D, I]`; biases or None. Whatever the checkpoint's layout, there is one copy of the
    weights. With `shared` the slots are those of another layer's pool, whose experts have the same shapes. With
    `memory` they are parts of that.
    """

    def __init__(
        self,
        reader: ExpertReader,
        num_slots: int,
        device: torch.device,
        shared: ExpertPool | None = None,
        memory: AlignedBuffer | None = None,
    ) -> None:
        spec = reader.spec
        self.spec = spec
        self.reader = reader
        self.num_slots = num_slots
        self._names = {self._up_name: "up_SND", DOWN_NAME: "down_SDI"}
        biases = {f"{self._up_name}_bias": "up_bias_SN", f"{DOWN_NAME}_bias": "down_bias_SD"}
        known = {*self._names, *(biases if spec.has_bias else ())}
        if set(spec.parameters) != known:
            raise ValueError(
                f"model: the experts {spec.module} have the parameters {', '.join(spec.parameters)}; expected"
                f" {', '.join(sorted(known))}"
            )
        self.contents = [EMPTY] * num_slots
        """The expert in each slot; -1 where there is none, or while one is being written."""
        self.memory: AlignedBuffer | None = memory if shared is None else shared.memory
        self._device, self._shared = device, shared
        self._rest_B = memory.data_B if memory is not None else None
        self.up_SND = self._empty(self._up_name)
        self.down_SDI = self._empty(DOWN_NAME)
        self.up_bias_SN: torch.Tensor | None = None
        self.down_bias_SD: torch.Tensor | None = None
        if spec.has_bias:
            self._names |= biases
            self.up_bias_SN = self._empty(f"{self._up_name}_bias")
            self.down_bias_SD = self._empty(f"{DOWN_NAME}_bias")

    @property
    def _up_name(self) -> str:
        return UP_NAMES[0] if self.spec.has_gate else UP_NAMES[1]

    def _empty(self, parameter: str) -> torch.Tensor:
        shape = self.reader.shape(parameter)
        if len(shape) == 2 and self.spec.is_transposed:
            shape = (shape[1], shape[0])
        dtype = self.reader.dtype(parameter)
        if self._shared is not None:
            tensor: torch.Tensor = getattr(self._shared, self._names[parameter])
            assert tensor.shape == (self.num_slots, *shape) and tensor.dtype == dtype
            return tensor
        if self._rest_B is not None:
            nbytes = self.num_slots * math.prod(shape) * dtype.itemsize
            part_B, self._rest_B = self._rest_B[:nbytes], self._rest_B[-(-nbytes // _ALIGNMENT) * _ALIGNMENT :]
            return part_B.view(dtype).view(self.num_slots, *shape)
        return torch.empty(self.num_slots, *shape, dtype=dtype, device=self._device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, torch.Tensor))

    def fill(self, slot: int, expert: int) -> None:
        """Reads an expert from the checkpoint into a slot."""
        self.contents[slot] = EMPTY
        views = self.views(slot)
        for parameter, tensor in self.reader.read(expert).items():
            views[parameter].copy_(tensor)
        self.contents[slot] = expert

    def views(self, slot: int) -> dict[str, torch.Tensor]:
        """A slot's tensors by parameter, in the layout of `ExpertReader.read`."""
        views = {parameter: getattr(self, name)[slot] for parameter, name in self._names.items()}
        return {p: t.t() if t.dim() == 2 and self.spec.is_transposed else t for p, t in views.items()}

    def weights(self, slot: int) -> ExpertWeights:
        """A slot's tensors."""
        return self.named({parameter: (getattr(self, name)[slot],) for parameter, name in self._names.items()})

    def named(self, blocks: Mapping[str, tuple[torch.Tensor, ...]]) -> ExpertWeights:
        """What layers compute with, of parameters by name, each in blocks of rows."""
        up_bias, down_bias = blocks.get(f"{self._up_name}_bias"), blocks.get(f"{DOWN_NAME}_bias")
        return ExpertWeights(
            up_PND=blocks[self._up_name],
            down_DI=blocks[DOWN_NAME][0],
            up_bias_N=up_bias[0] if up_bias else None,
            down_bias_D=down_bias[0] if down_bias else None,
        )

    def zero(self) -> None:
        """Writes zeros to all slots."""
        for tensor in self._tensors():
            tensor.zero_()

    def pack(self, slot: int) -> torch.Tensor:
        """A copy of a slot's tensors as one vector of bytes, for another rank or another slot."""
        return torch.cat([t[slot].reshape(-1).view(torch.uint8) for t in self._tensors()])

    def empty_pack(self) -> torch.Tensor:
        """Room for what `pack` gives."""
        size = sum(t[0].nbytes for t in self._tensors())
        return torch.empty(size, dtype=torch.uint8, device=self.up_SND.device)

    def unpack(self, slot: int, packed: torch.Tensor, expert: int) -> None:
        """Writes what `pack` gave for `expert` into a slot."""
        self.contents[slot] = EMPTY
        start = 0
        for tensor in self._tensors():
            size = tensor[slot].nbytes
            # A copy first: the part's place in the vector need not suit its type.
            part = packed[start : start + size].clone().view(tensor.dtype)
            tensor[slot].copy_(part.view(tensor[slot].shape))
            start += size
        self.contents[slot] = expert

    def grow(self, num_slots: int) -> None:
        """Adds empty slots. The tensors are new ones, one after the other, so that the peak is one tensor more."""
        assert num_slots >= self.num_slots
        for name in dict.fromkeys(self._names.values()):
            old = getattr(self, name)
            new = old.new_empty(num_slots, *old.shape[1:])
            new[: self.num_slots].copy_(old)
            setattr(self, name, new)
        self.contents += [EMPTY] * (num_slots - self.num_slots)
        self.num_slots = num_slots

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in dict.fromkeys(self._names.values())]


def pool_in(memory: AlignedBuffer, reader: ExpertReader) -> ExpertPool:
    """A pool of as many slots as are in `memory`."""
    slots = (memory.nbytes - _ALIGNMENT * len(reader.spec.parameters)) // reader.nbytes
    return ExpertPool(reader, slots, torch.device("cpu"), memory=memory)


def load_experts(pool: ExpertPool, experts: Sequence[int]) -> Iterator[int]:
    """Fills the slots with these experts, -1 for none; yields bytes as it goes."""
    for slot, expert in enumerate(experts):
        if expert != EMPTY:
            pool.fill(slot, expert)
            yield pool.reader.nbytes
