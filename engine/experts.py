"""Where the experts' weights are and how they get there.

S: slots, I: expert width (2I for gate and up together), D: hidden size.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..kernels.quantised import Format, QuantisedMatrix, QuantisedStack
from ..scheduler.table import EMPTY
from .expert_files import AlignedBuffer
from .expert_reader import ExpertReader

if TYPE_CHECKING:
    from ..kernels.listed_experts import ListedExpert

UP_NAMES = ("gate_up_proj", "up_proj")
DOWN_NAME = "down_proj"


_ALIGNMENT = 64  # of each tensor in a pool's memory


Matrix = torch.Tensor | QuantisedMatrix
"""[outputs, inputs]"""


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """Weights of one expert, wherever they are. `up_PND` are blocks of rows: all of them, or gate and up."""

    up_PND: tuple[Matrix, ...]
    down_DI: Matrix
    up_bias_N: torch.Tensor | None = None
    down_bias_D: torch.Tensor | None = None

    @functools.cached_property
    def listed(self) -> ListedExpert:
        """For the kernels that take them by address. ValueError where they are not on the CPU."""
        from ..kernels.listed_experts import listed_expert

        up_PND = [block for block in self.up_PND if isinstance(block, torch.Tensor)]
        assert isinstance(self.down_DI, torch.Tensor) and len(up_PND) == len(self.up_PND), "quantised"
        return listed_expert(up_PND, self.down_DI)


class ExpertPool:
    """Weights of one MoE layer's experts in slots, each matrix with its input dimension contiguous.

    `up_SND` is `[S, 2I, D]` for experts with a gate (the rows of gate and up in the model's own order), `[S, I, D]`
    without; `down_SDI` is `[S, D, I]`; biases or None. Whatever the checkpoint's layout, there is one copy of the
    weights. With `shared` the slots are those of another layer's pool, whose experts have the same shapes. With
    `memory` they are parts of that.

    Quantised matrices are several tensors: up_SND and down_SDI are the bytes of their values, others have the scales
    and zero points, and `up` and `down` put them together. All that moves or stores experts takes the tensors as they
    are.
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
        of_quantised = {p: self._attribute(p) for p in reader.parameters if p not in spec.parameters}
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
        self.up_scales_S: torch.Tensor | None = None
        self.down_scales_S: torch.Tensor | None = None
        self.up_zeros_S: torch.Tensor | None = None
        self.down_zeros_S: torch.Tensor | None = None
        self._names |= of_quantised
        for parameter, name in of_quantised.items():
            setattr(self, name, self._empty(parameter))

    @property
    def format(self) -> Format | None:
        """Of the matrices; None for plain ones."""
        return self.reader.format

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.reader.activation_dtype

    @property
    def hidden(self) -> int:
        return self.down_SDI.shape[1]

    @property
    def width(self) -> int:
        """Of an expert's intermediate vector."""
        return self.reader.matrix(DOWN_NAME)[1]

    @property
    def up(self) -> torch.Tensor | QuantisedStack:
        """The first products' weights by slot, [outputs, inputs] each."""
        if self.format is None:
            return self.up_SND
        assert self.up_scales_S is not None
        return QuantisedStack(
            format=self.format,
            k=self.hidden,
            values_S=self.up_SND,
            scales_S=self.up_scales_S,
            zeros_S=self.up_zeros_S,
        )

    @property
    def down(self) -> torch.Tensor | QuantisedStack:
        """The second products' weights by slot."""
        if self.format is None:
            return self.down_SDI
        assert self.down_scales_S is not None
        return QuantisedStack(
            format=self.format,
            k=self.width,
            values_S=self.down_SDI,
            scales_S=self.down_scales_S,
            zeros_S=self.down_zeros_S,
        )

    def _attribute(self, parameter: str) -> str:
        """Where the scales or zero points of a matrix are kept."""
        matrix, _, part = parameter.rpartition("_")
        return f"{'up' if matrix == self._up_name else 'down'}_{part}_S"

    @property
    def _up_name(self) -> str:
        return UP_NAMES[0] if self.spec.has_gate else UP_NAMES[1]

    def _empty(self, parameter: str) -> torch.Tensor:
        shape = self.reader.shape(parameter)
        if len(shape) == 2 and self.reader.transposed:
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
        return {p: t.t() if t.dim() == 2 and self.reader.transposed else t for p, t in views.items()}

    def weights(self, slot: int) -> ExpertWeights:
        """A slot's tensors."""
        if self.format is not None:
            return self.weights_in(self.tensors(slot))
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

    def tensors(self, slot: int) -> list[torch.Tensor]:
        """All of a slot, always in the same order."""
        return [tensor[slot] for tensor in self._tensors()]

    def weights_in(self, tensors: Sequence[torch.Tensor]) -> ExpertWeights:
        """What quantised tensors are together, in the order of `tensors`, wherever they are."""
        assert self.format is not None
        have = dict(zip(dict.fromkeys(self._names.values()), tensors, strict=True))

        def matrix(name: str, values: str, k: int) -> QuantisedMatrix:
            assert self.format is not None
            scales, zeros = have[f"{name}_scales_S"], have.get(f"{name}_zeros_S")
            return QuantisedMatrix(format=self.format, k=k, values=have[values], scales=scales, zeros=zeros)

        return ExpertWeights(
            up_PND=(matrix("up", "up_SND", self.hidden),),
            down_DI=matrix("down", "down_SDI", self.width),
            up_bias_N=have.get("up_bias_SN"),
            down_bias_D=have.get("down_bias_SD"),
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

    def part(self, first: int, count: int) -> ExpertPool:
        """These slots alone, of the same memory."""
        part = copy.copy(self)
        for name in dict.fromkeys(self._names.values()):
            setattr(part, name, getattr(self, name)[first : first + count])
        part.contents, part.num_slots = self.contents[first : first + count], count
        return part

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in dict.fromkeys(self._names.values())]


def pool_in(memory: AlignedBuffer, reader: ExpertReader) -> ExpertPool:
    """A pool of as many slots as are in `memory`."""
    slots = (memory.nbytes - _ALIGNMENT * len(reader.parameters)) // reader.nbytes
    return ExpertPool(reader, slots, torch.device("cpu"), memory=memory)


def load_experts(pool: ExpertPool, experts: Sequence[int]) -> Iterator[int]:
    """Fills the slots with these experts, -1 for none; yields bytes as it goes."""
    for slot, expert in enumerate(experts):
        if expert != EMPTY:
            pool.fill(slot, expert)
            yield pool.reader.nbytes
