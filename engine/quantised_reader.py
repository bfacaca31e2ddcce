"""Experts that are kept quantised: made so as they are read from plain ones, or stored so in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch

from ..kernels.quantised import FORMATS, Format, QuantisedMatrix, joined
from .checkpoint import Entry
from .expert_reader import ExpertReader, joins_rows
from .model import ExpertsSpec, ModelSpec
from .quantised_layouts import Layout
from .weights import WeightMap


class QuantisedReader(ExpertReader):
    """Reads plain experts of one MoE layer and makes their matrices quantised ones, in memory.

    What is read are the checkpoint's own bytes; what is kept, moved and computed with are values, scales and zero
    points. A matrix is read as `NAME` (its values), `NAME_scales` and `NAME_zeros`, always with its inputs contiguous.
    """

    def __init__(self, weights: WeightMap, spec: ExpertsSpec, form: Format):
        super().__init__(weights, spec)
        self._format = form
        self._matrices = tuple(name for name in spec.parameters if not name.endswith("_bias"))

    @property
    def format(self) -> Format | None:
        return self._format

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.spec.parameters, *(name for name in self._kept if name not in self.spec.parameters))

    @property
    def transposed(self) -> bool:
        return False

    @cached_property
    def _kept(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what the matrices are kept in."""
        return {
            _part(name, part): kept
            for name in self._matrices
            for part, kept in self._format.tensors(*self.matrix(name)).items()
        }

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self._kept[parameter][0] if parameter in self._kept else super().shape(parameter)

    def dtype(self, parameter: str) -> torch.dtype:
        return self._kept[parameter][1] if parameter in self._kept else super().dtype(parameter)

    def tensors(self, stored: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, parts in stored.items():
            if name in self._matrices:
                matrix = self._quantised(name, parts)
                found |= {_part(name, part): tensor for part, tensor in matrix.tensors().items()}
            else:
                found[name] = self.assemble(name, parts)
        return found

    def _quantised(self, name: str, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        plain = self.assemble(name, parts)
        return self._format.quantise(plain.t() if self.spec.is_transposed else plain)

    def copies(
        self, stored: Mapping[str, Mapping[str, torch.Tensor]], into: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name, tensor in self.tensors(stored).items():
            yield into[name], tensor

    def as_stored(self, expert: int) -> dict[str, list[Entry]] | None:
        return None


class StoredReader(QuantisedReader):
    """Reads experts of one MoE layer that the checkpoint has quantised, without making anything else of them."""

    def __init__(self, weights: WeightMap, spec: ExpertsSpec, layout: Layout):
        super().__init__(weights, spec, layout.format)
        self._layout = layout
        for name in self._matrices:
            recipe = self._recipes[name]
            if not all(plain in weights.quantised for plain in recipe.names):
                raise ValueError(
                    f"checkpoint: {recipe.names[0]} is not quantised, and config.json says {layout.method}; use"
                    " --expert-dtype plain"
                )
            if not joins_rows(recipe):
                raise ValueError(
                    f"checkpoint: {recipe.target} is made by {recipe.converter and recipe.converter.operations}, which"
                    " does more than to put quantised matrices one below the other; use --expert-dtype plain"
                )
            several = len(recipe.sources) > 1
            if several and any(weights.entries[plain].shape[0] % self._format.rows for plain in recipe.names):
                self._format = replace(self._format, rows=1)  # gate and up would share a scale in between

    def parts(self, expert: int) -> dict[str, dict[str, Entry]]:
        return _by_roles(self._weights, super().parts(expert))

    def _quantised(self, name: str, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        of_pattern, recipe = _by_pattern(parts), self._recipes[name]
        order = recipe.converter.source_patterns if recipe.converter is not None else list(of_pattern)
        blocks = [self._weights.fitting(recipe, self._layout.checked, of_pattern[pattern]) for pattern in order]
        if self._format.rows != self._layout.format.rows:
            blocks = [block.with_a_row_of_scales_each() for block in blocks]
        matrix = joined(blocks)
        for part, (shape, _) in self._format.tensors(*self.matrix(name)).items():
            self._weights.check_made(recipe, f"{recipe.target} ({part})", tuple(matrix.tensors()[part].shape), shape)
        return matrix


class DequantisingReader(ExpertReader):
    """Reads experts that the checkpoint has quantised as plain ones."""

    def __init__(self, weights: WeightMap, spec: ExpertsSpec, layout: Layout):
        super().__init__(weights, spec)
        self._layout = layout

    def parts(self, expert: int) -> dict[str, dict[str, Entry]]:
        return _by_roles(self._weights, super().parts(expert))

    def tensors(self, stored: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        found = {}
        for name, parts in stored.items():
            recipe = self._recipes[name]
            plain = {
                pattern: of[""] if "" in of else self._weights.fitting(recipe, self._layout.plain, of)
                for pattern, of in _by_pattern(parts).items()
            }
            found[name] = self.assemble(name, plain)
        return found

    def copies(
        self, stored: Mapping[str, Mapping[str, torch.Tensor]], into: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name, tensor in self.tensors(stored).items():
            yield into[name], tensor

    def as_stored(self, expert: int) -> dict[str, list[Entry]] | None:
        return None


def _by_roles(weights: WeightMap, plain: Mapping[str, Mapping[str, Entry]]) -> dict[str, dict[str, Entry]]:
    """Each pattern's values, scales and zero points under names of their own."""
    return {
        name: {
            f"{pattern}|{role}" if role else pattern: entry
            for pattern, part in parts.items()
            for role, entry in weights.roles_of(part).items()
        }
        for name, parts in plain.items()
    }


def _by_pattern(parts: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The other way round: of each pattern its tensors by role."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in parts.items():
        pattern, _, role = key.partition("|")
        found.setdefault(pattern, {})[role] = tensor
    return found


def reader_for(expert_dtype: str, layout: Layout | None) -> Callable[[WeightMap, ExpertsSpec], ExpertReader]:
    """What reads experts for `--expert-dtype`, from a checkpoint that is plain or quantised.

    Raises ValueError for what cannot be.
    """
    if layout is None:
        if expert_dtype in ("auto", "plain"):
            return ExpertReader
        return lambda weights, spec: QuantisedReader(weights, spec, FORMATS[expert_dtype])
    if expert_dtype == "plain":
        return lambda weights, spec: DequantisingReader(weights, spec, layout)
    if expert_dtype != "auto":
        raise ValueError(
            f"expert_dtype is {expert_dtype}, and the checkpoint's experts are quantised already ({layout.method});"
            " leave it out to keep them so, or use plain"
        )
    return lambda weights, spec: StoredReader(weights, spec, layout)


def check_quantised(expert_dtype: str, weights: WeightMap, spec: ModelSpec, device: torch.device) -> None:
    """Raises ValueError where experts cannot be kept as `--expert-dtype` or the checkpoint says."""
    if expert_dtype not in ("auto", "plain") and not spec.experts:
        raise ValueError(f"expert_dtype is {expert_dtype}, and this model has no experts; leave it out")
    for layer in spec.experts:
        try:
            form = weights.reader(layer).format
            weights.reader(layer).nbytes  # noqa: B018
        except ValueError as error:
            if str(error).startswith("checkpoint"):
                raise
            raise ValueError(f"expert_dtype: {error}; choose fp8 or int8, or leave it out") from error
        if form is not None and device.type != "cpu":
            what = f"expert_dtype is {expert_dtype}" if expert_dtype != "auto" else f"the experts are {form.name}"
            raise ValueError(
                f"expert_dtype: {what}, and only the CPU's kernels compute with quantised experts so far; use --device"
                " cpu, or --expert-dtype plain"
            )


def _part(name: str, part: str) -> str:
    return name if part == "values" else f"{name}_{part}"
