"""Single experts of a checkpoint, in the model's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from ..kernels.quantised import Format
from .checkpoint import Entry
from .model import ExpertsSpec
from .weights import Recipe, WeightMap, stacks_first


class ExpertReader:
    """Reads the experts of one MoE layer one by one, in the model's layout."""

    def __init__(self, weights: WeightMap, spec: ExpertsSpec):
        self.spec = spec
        self.checkpoint = weights.checkpoint
        self._weights = weights
        self._recipes = {name: weights.recipes[f"{spec.module}.{name}"] for name in spec.parameters}

    @property
    def format(self) -> Format | None:
        """What the matrices are kept in; None for plain ones."""
        return None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors that are kept of an expert."""
        return self.spec.parameters

    @property
    def transposed(self) -> bool:
        """Whether matrices are read with their outputs contiguous, not their inputs."""
        return self.spec.is_transposed

    @property
    def activation_dtype(self) -> torch.dtype:
        """What is computed in."""
        return self._weights.dtype_of(f"{self.spec.module}.down_proj")

    @property
    def kept_as(self) -> str:
        """The type of the matrices, by name."""
        return self.format.name if self.format else str(self.activation_dtype).removeprefix("torch.")

    def matrix(self, parameter: str) -> tuple[int, int]:
        """Outputs and inputs of one of an expert's matrices."""
        rows, columns = self._weights.expected[f"{self.spec.module}.{parameter}"].shape[1:]
        return (columns, rows) if self.spec.is_transposed else (rows, columns)

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of what is kept of an expert under this name."""
        return self._plain_shape(parameter)

    def _plain_shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of one expert's part of a stacked parameter."""
        return tuple(self._weights.expected[f"{self.spec.module}.{parameter}"].shape[1:])

    def dtype(self, parameter: str) -> torch.dtype:
        return self._weights.dtype_of(f"{self.spec.module}.{parameter}")

    @property
    def nbytes(self) -> int:
        """Bytes of one expert as kept in memory."""
        return sum(self.dtype(p).itemsize * _size(self.shape(p)) for p in self.parameters)

    def read(self, expert: int) -> dict[str, torch.Tensor]:
        """Parameters of one expert, each of `shape(parameter)`, in the checkpoint's type; copy what is kept."""
        return self.tensors(
            {
                name: {pattern: self.checkpoint.read_part(part) for pattern, part in parts.items()}
                for name, parts in self.parts(expert).items()
            }
        )

    def tensors(self, stored: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What `read` gives, of the tensors that `parts` tells of."""
        return {name: self.assemble(name, parts) for name, parts in stored.items()}

    def copies(
        self, stored: Mapping[str, Mapping[str, torch.Tensor]], into: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (part of `into`, tensor) that, copied, put there what `tensors` gives."""
        for name, parts in stored.items():
            yield from self.places(name, parts, into[name])

    def parts(self, expert: int) -> dict[str, dict[str, Entry]]:
        """Where one expert is stored: for each parameter, what stands for each of the conversion's source patterns."""
        return {name: self._parts(recipe, expert) for name, recipe in self._recipes.items()}

    def assemble(self, parameter: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A parameter of one expert, made of the tensors that `parts` tells of."""
        weights, recipe = self._weights, self._recipes[parameter]
        made = recipe.convert({p: [tensor] for p, tensor in stored.items()}, weights.model.config)[recipe.target]
        weights.check_made(recipe, recipe.target, tuple(made.shape), (1, *self._plain_shape(parameter)))
        return made[0]

    def places(
        self, parameter: str, stored: Mapping[str, torch.Tensor], into: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (part of `into`, tensor) that, copied, put there what `assemble` gives: without a copy in between
        where the conversion does no more than to put tensors side by side.
        """
        converter = self._recipes[parameter].converter
        joins = [] if converter is None else [o for o in converter.operations if not isinstance(o, MergeModulelist)]
        if converter is not None and len(joins) == 1 and isinstance(joins[0], Concatenate) and joins[0].dim > 0:
            dim = joins[0].dim - 1  # the experts' is the first
            parts = [stored[p] for p in converter.source_patterns]
            parts = [part[0] if part.dim() > into.dim() else part for part in parts]
            rooms = _side_by_side(into, dim, parts)
            if rooms is not None:
                return list(zip(rooms, parts, strict=True))
        return [(into, self.assemble(parameter, stored))]

    def as_stored(self, expert: int) -> dict[str, list[Entry]] | None:
        """Where each parameter of an expert stands in files just as it is kept in memory, but that blocks of a matrix's
        rows, such as those of gate and up, need not follow each other; None if one does not.
        """
        found = {name: self._as_stored(name, self._parts(recipe, expert)) for name, recipe in self._recipes.items()}
        kept = {name: entries for name, entries in found.items() if entries is not None}
        return kept if len(kept) == len(found) and not self.spec.is_transposed else None

    def _as_stored(self, parameter: str, stored: Mapping[str, Entry]) -> list[Entry] | None:
        converter = self._recipes[parameter].converter
        joins = [] if converter is None else [o for o in converter.operations if not isinstance(o, MergeModulelist)]
        if joins and not (len(joins) == 1 and isinstance(joins[0], Concatenate) and joins[0].dim == 1):
            return None
        parts = [stored[p] for p in converter.source_patterns] if converter is not None else list(stored.values())
        shape, dtype = self.shape(parameter), self.dtype(parameter)
        rows = [part.nbytes // dtype.itemsize // _size(shape[1:]) for part in parts]
        blocks = [replace(part, shape=(n, *shape[1:])) for part, n in zip(parts, rows, strict=True)]
        if sum(rows) != shape[0] or any(part.torch_dtype != dtype or part.shape[-1] != shape[-1] for part in parts):
            return None
        joined = blocks[:1]
        for block in blocks[1:]:
            last = joined[-1]
            if (block.file, block.begin) == (last.file, last.begin + last.nbytes):
                joined[-1] = replace(
                    last, shape=(last.shape[0] + block.shape[0], *shape[1:]), nbytes=last.nbytes + block.nbytes
                )
            else:
                joined.append(block)
        return joined if len(shape) > 1 or len(joined) == 1 else None

    def _parts(self, recipe: Recipe, expert: int) -> dict[str, Entry]:
        entries = self._weights.entries
        if recipe.converter is None or _slicewise(recipe.converter):
            return {p: entries[names[0]].row(expert) for p, names in recipe.sources.items()}
        if _stacks(recipe.converter):
            return {p: entries[recipe.sources[p][expert]] for p in recipe.converter.source_patterns}
        raise ValueError(
            f"checkpoint: {recipe.target} is made by {recipe.converter.operations}, which mixes experts; expected"
            " one tensor per expert or a tensor whose first dimension is the experts"
        )


def joins_rows(recipe: Recipe) -> bool:
    """Whether an expert's matrix is one stored matrix, or several of them one below the other."""
    if recipe.converter is None:
        return True
    joins = [o for o in recipe.converter.operations if not isinstance(o, MergeModulelist)]
    below = len(joins) == 1 and isinstance(joins[0], Concatenate) and joins[0].dim == 1
    return stacks_first(recipe.converter) and (not joins or below)


def _stacks(converter: WeightConverter) -> bool:
    """Whether an expert is made of its own tensors alone."""
    return stacks_first(converter) and _slicewise_operations(converter.operations[1:])


def _slicewise(converter: WeightConverter) -> bool:
    return not any(isinstance(o, MergeModulelist) for o in converter.operations) and _slicewise_operations(
        converter.operations
    )


def _slicewise_operations(operations: list[Any]) -> bool:
    """Whether each operation says that it works along other dimensions than the experts'."""
    for operation in operations:
        dims = [v for k, v in vars(operation).items() if k.startswith("dim") and isinstance(v, int)]
        if not dims or any(d == 0 for d in dims):
            return False
    return True


def _side_by_side(into: torch.Tensor, dim: int, parts: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """`into` divided along `dim` among tensors of the shapes of `parts`; None if they do not fill it exactly."""
    widths = [part.shape[dim] for part in parts]
    if sum(widths) != into.shape[dim]:
        return None
    rooms = list(into.split(widths, dim))
    return rooms if all(room.shape == part.shape for room, part in zip(rooms, parts, strict=True)) else None


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
