"""From a checkpoint's tensors to the model's: names and layouts through transformers' own conversion mapping.

`WeightMap` decides, from names and shapes alone, which stored tensors make which parameter, and refuses what is
missing, extra or wrongly shaped. `dense_weights.load_dense` fills everything but the experts;
`expert_reader.ExpertReader` reads one expert at a time, from per-expert tensors or from slices of fused ones, so that a
rank or an offload store reads only what it owns.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .checkpoint import QUANTISED_TYPES, Checkpoint, Entry
from .model import ExpertsSpec
from .quantised_layouts import Layout

if TYPE_CHECKING:
    from .expert_reader import ExpertReader

T = TypeVar("T")
_INTEGERS = {"I64", *QUANTISED_TYPES}


@dataclass
class Recipe:
    """How one parameter (or, for one-to-many conversions, several) is made: stored names per source pattern, in
    order.
    """

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def convert(self, tensors: dict[str, list[torch.Tensor]], config: Any) -> dict[str, torch.Tensor]:
        """Applies the conversion to tensors in the place of the sources: full parameter names to tensors."""
        if self.converter is None:
            ((only,),) = tensors.values()
            return {self.target: only}
        made: dict[str, Any] = dict(tensors)
        for operation in self.converter.operations:
            made = operation.convert(
                made,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.target,
                model=None,
                config=config,
                missing_keys=None,
            )
        first = self.converter.target_patterns[0]
        return {
            self.target.replace(first, pattern): value[0] if isinstance(value, list) else value
            for pattern, value in made.items()
        }

    @property
    def targets(self) -> list[str]:
        if self.converter is None:
            return [self.target]
        first = self.converter.target_patterns[0]
        return [self.target.replace(first, pattern) for pattern in self.converter.target_patterns]


class WeightMap:
    """Which stored tensors make which parameters of `model`. Raises ValueError naming tensor, file, expected and
    found. `make_reader` makes what reads a layer's experts, where they are not kept plain. `layout` is of a quantised
    checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        experts: tuple[ExpertsSpec, ...],
        make_reader: Callable[[WeightMap, ExpertsSpec], ExpertReader] | None = None,
        layout: Layout | None = None,
    ):
        self.model = model
        self.checkpoint = checkpoint
        self.expected = dict(model.state_dict())
        self.experts = {f"{spec.module}.{name}": spec for spec in experts for name in spec.parameters}
        self.recipes: dict[str, Recipe] = {}
        self._make_reader = make_reader
        self.layout = layout
        self.quantised: dict[str, dict[str, Entry]] = {}
        """Of each tensor that is stored quantised, by the name that a plain one would have: its parts by role."""
        self.entries = self._plain_entries()
        """The stored tensors by the names that plain ones would have."""
        self._collect()
        self._refuse_missing()

    def _collect(self) -> None:
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        ignored = [re.compile(p) for p in getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or []]
        prefix = self.model.base_model_prefix
        extra = []
        for name in sorted(self.entries, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.expected)
            if target not in self.expected and name in self.expected:
                target, pattern = name, None
            if target not in self.expected:
                if not any(p.search(name) for p in ignored):
                    extra.append(name)
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            recipe = self.recipes.setdefault(target, Recipe(target=target, converter=converter))
            if recipe.converter is not converter or (converter is None and recipe.names):
                raise ValueError(
                    f"checkpoint: {name} and {recipe.names[0]} both stand for {target}; expected one of them"
                )
            recipe.sources[pattern or name].append(name)
        if extra:
            name = extra[0]
            raise ValueError(
                f"checkpoint: unexpected tensor {name} in {self._where(name)}: the model has no parameter for it;"
                f" expected none, found {len(extra)} such tensors"
            )

    def _refuse_missing(self) -> None:
        made = {target for recipe in self.recipes.values() for target in recipe.targets}
        tied = self.model.all_tied_weights_keys
        for target, tensor in self.expected.items():
            if target in made or (target in tied and (tied[target] in made or tied[target] in tied)):
                continue
            raise ValueError(
                f"checkpoint: tensor {target} is missing from {self.checkpoint.path}: expected shape"
                f" {list(tensor.shape)}, found none"
            )
        for recipe in self.recipes.values():
            self._check_sources(recipe)

    def _check_sources(self, recipe: Recipe) -> None:
        """Counts and shapes of a recipe's sources, so far as they can be known before converting."""
        entries = self.entries
        kept_as = self.expected[recipe.target].dtype
        for name in recipe.names:
            integers = entries[name].dtype in _INTEGERS
            if name not in self.quantised and integers == kept_as.is_floating_point:
                raise ValueError(
                    f"checkpoint: tensor {name} in {self._where(name)} has type {entries[name].dtype}; expected one to"
                    f" be kept as {kept_as}, and config.json says nothing of quantised weights that this is a part of"
                )
        if recipe.converter is None:
            if recipe.names[0] in self.quantised:  # checked when it has been read
                return
            wanted, found = tuple(self.expected[recipe.target].shape), entries[recipe.names[0]].shape
            if wanted != found:
                self._wrong_shape(recipe.names[0], wanted)
            return
        stacks = stacks_first(recipe.converter)
        count = self.expected[recipe.target].shape[0] if stacks else 1
        for pattern in recipe.converter.source_patterns:
            names = recipe.sources.get(pattern, [])
            if stacks and len(names) != count:
                raise ValueError(
                    f"checkpoint: {_missing_of(names, count) or pattern} is missing for {recipe.target}: expected"
                    f" {count} tensors like {pattern}, found {len(names)}"
                    + (f" in {self._where(names[0])}" if names else "")
                )
            if not names:
                raise ValueError(f"checkpoint: no tensor like {pattern} for {recipe.target}: expected {count}, found 0")
            usual = Counter(entries[name].shape for name in names).most_common(1)[0][0]
            for name in names:
                if entries[name].shape != usual:
                    self._wrong_shape(name, usual)

    def _wrong_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        found = list(self.entries[name].shape)
        raise ValueError(
            f"checkpoint: tensor {name} in {self._where(name)}: expected shape {list(wanted)}, found {found}"
        )

    def check_made(self, recipe: Recipe, target: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        """Raises ValueError when a conversion made another shape than the model has."""
        if shape != wanted:
            name = recipe.names[0]
            raise ValueError(
                f"checkpoint: tensor {name} in {self._where(name)} (shape {list(self.entries[name].shape)})"
                f" makes {target}: expected shape {list(wanted)}, found {list(shape)}"
            )

    def _where(self, name: str) -> str:
        return self.entries[name].file.name

    def _plain_entries(self) -> dict[str, Entry]:
        """The tensors by the names that plain ones would have; of quantised ones that with the values. Raises
        ValueError for one that lacks a part.
        """
        layout, entries = self.layout, self.checkpoint.entries
        if layout is None:
            return entries
        stored: dict[str, dict[str, Entry]] = {}
        for name, entry in entries.items():
            plain, role = layout.split(name)
            stored.setdefault(plain, {})[role] = entry
        found: dict[str, Entry] = {}
        for plain, parts in stored.items():
            if not layout.complete(parts):
                found |= {entry.name: entry for entry in parts.values()}  # of plain tensors with such names
                continue
            self.quantised[plain] = parts
            found[plain] = parts["values"]
        return found

    def roles_of(self, part: Entry) -> dict[str, Entry]:
        """The parts of a quantised tensor, of the same row as `part` is of its values; of a plain one itself, as ""."""
        plain, _ = self.layout.split(part.name) if self.layout is not None else (part.name, "")
        if plain not in self.quantised:
            return {"": part}
        roles = self.quantised[plain]
        values = roles["values"]
        if part == values:
            return roles
        row = (part.begin - values.begin) // part.nbytes
        return {role: entry.row(row) for role, entry in roles.items()}

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor, or what a quantised one stands for, in float32."""
        roles = self.quantised.get(name)
        if roles is None:
            return self.checkpoint.read(name)
        assert self.layout is not None
        parts = {role: self.checkpoint.read_part(entry) for role, entry in roles.items()}
        try:
            return self.layout.plain(parts)
        except ValueError as error:
            raise ValueError(f"checkpoint: tensor {name} in {self._where(name)}: {error}") from error

    def fitting(self, recipe: Recipe, make: Callable[[Mapping[str, torch.Tensor]], T], parts: Any) -> T:
        """What `make` makes of a quantised tensor's parts; its ValueError says for which parameter that is."""
        try:
            return make(parts)
        except ValueError as error:
            if str(error).startswith("checkpoint"):
                raise
            raise ValueError(f"checkpoint: {recipe.target} in {self._where(recipe.names[0])}: {error}") from error

    def nbytes_of(self, name: str) -> int:
        """Of a tensor as stored, with all its parts."""
        return sum(entry.nbytes for entry in self.quantised.get(name, {"": self.entries[name]}).values())

    @property
    def dense(self) -> list[Recipe]:
        """Recipes of everything but experts, in file order."""
        recipes = [r for target, r in self.recipes.items() if target not in self.experts]
        return sorted(recipes, key=lambda r: (str(self.entries[r.names[0]].file), r.names[0]))

    def reader(self, spec: ExpertsSpec) -> ExpertReader:
        from .expert_reader import ExpertReader

        return (self._make_reader or ExpertReader)(self, spec)

    def dtype_of(self, target: str) -> torch.dtype:
        """The type a parameter is kept in: the model's, or float32 where the architecture asks for it."""
        dtype = self.expected[target].dtype
        model = self.model
        keep = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
        if dtype == torch.float16:
            keep += list(getattr(model, "_keep_in_fp32_modules", None) or [])
        if dtype in (torch.float16, torch.bfloat16) and any(re.search(k.replace("*", ".*"), target) for k in keep):
            return torch.float32
        return dtype


def stacks_first(converter: WeightConverter) -> bool:
    """Whether the first operation stacks one tensor per expert."""
    first = converter.operations[0]
    return isinstance(first, MergeModulelist) and first.dim == 0


def _missing_of(names: list[str], count: int) -> str:
    """The first of `count` numbered names that is not in `names`, worked out from those that are."""
    if not names:
        return ""
    pieces = [re.split(r"(\d+)", name) for name in names]
    for position in range(1, len(pieces[0]), 2):
        numbers = {int(p[position]) for p in pieces}
        if len(numbers) == len(names) and len(names) > 1:
            absent = min(set(range(count)) - numbers, default=None)
            if absent is not None:
                return "".join([*pieces[0][:position], str(absent), *pieces[0][position + 1 :]])
    return ""
