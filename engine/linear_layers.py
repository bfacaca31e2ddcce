"""The layers of a model that keep a state, called for each sequence's tokens instead of for the step's.

A step is one packed row of tokens [1, T, ...], which attention tells apart by its block tables. A recurrence must not
run from one sequence into the next: all sequences with a single token go through such a layer as one batch [S, 1, ...],
and each chunk of a prompt by itself, [1, n, ...], going on from the state that the chunk before it left. The step's
rows are in that order already. Projections and everything else of the layer are the model's own.

Some layers of transformers look at their state for single tokens only: a chunk of several would forget what came before
it. Which ones is watched while the engine warms up; in those, later chunks of a prompt go token by token.

T: tokens of the step, S: sequences with a single token.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .kv_cache import Chunk, StepBatch
from .states import ChunkStates, SingleStates, StateCache, StateKey, StatePool, States, StateSpec

logger = logging.getLogger(__name__)


class LinearLayers:
    """Stands between a model and its layers with states; `begin` must be called for each step.

    `cache` is what the model must be given as `past_key_values`, and `pool` holds the states.
    """

    def __init__(self, model: nn.Module, specs: tuple[StateSpec, ...], pool: StatePool) -> None:
        self.cache = StateCache()
        self.pool = pool
        self._batch: StepBatch | None = None
        self._singles: SingleStates | None = None
        self._watching = False
        self.forgetful: set[str] = set()
        """Paths of the layers that look at their state for single tokens only."""
        self._keys = {spec.module: [s.key for s in specs if s.module == spec.module] for spec in specs}
        for path in self._keys:
            module = model.get_submodule(path)
            module.forward = functools.partial(self._forward, path, module.forward)

    def watch(self) -> None:
        """The next steps are to tell, until `settle`, which layers go on from their state with several tokens. One of
        them must have a later chunk of a prompt."""
        self._watching = True

    def settle(self) -> None:
        """Says what was seen."""
        self._watching = False
        if self.forgetful:
            logger.warning(
                "%d of %d layers with states go on from them token by token only: later chunks of a prompt are slow"
                " there; a larger --max-batched-tokens makes fewer",
                len(self.forgetful),
                len(self._keys),
            )

    def begin(self, batch: StepBatch) -> None:
        self._batch = batch
        self._singles = None
        if batch.singles:
            slots = batch.state_slots[: batch.singles]
            for row in batch.first_rows:
                self.pool.clear(slots[row])
            self._singles = SingleStates(self.pool, slots, batch.input_ids_T.device)

    def _forward(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = self._batch
        assert batch is not None, "the engine begins the step before it runs the model"
        parts = []
        if self._singles is not None:
            out = self._part(forward, self._singles, slice(0, batch.singles), True, args, kwargs)
            self._singles.settle()
            parts.append(_first(out).transpose(0, 1))
        slots = batch.state_slots[batch.singles :]
        for chunk, slot in zip(batch.chunks, slots, strict=True):
            states = ChunkStates(self.pool, slot, at_start=chunk.history == 0)
            if self._watching and chunk.history:
                self._try(path, forward, states, chunk, slot, args, kwargs)
            step = 1 if chunk.history and path in self.forgetful else chunk.end - chunk.start
            for start in range(chunk.start, chunk.end, step):
                out = self._part(forward, states, slice(start, start + step), False, args, kwargs)
                parts.append(_first(out))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        # Of several results, those after the first are attention weights or the like, which nobody reads.
        return (joined, *[None] * (len(out) - 1)) if isinstance(out, tuple) else joined

    def _try(
        self,
        path: str,
        forward: Callable[..., Any],
        states: States,
        chunk: Chunk,
        slot: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Whether a chunk's result is of each state before it: with another state, it must be another."""
        before = {key: self.pool.tensors[key][slot].clone() for key in self._keys[path]}

        def run(changed: StateKey | None) -> torch.Tensor:
            for key, state in before.items():
                self.pool.tensors[key][slot].copy_(state if key != changed else 2 * state + 1)
            return _first(self._part(forward, states, slice(chunk.start, chunk.end), False, args, kwargs)).clone()

        right = run(None)
        if any(torch.equal(right, run(key)) for key in before):
            self.forgetful.add(path)
        for key, state in before.items():
            self.pool.tensors[key][slot].copy_(state)

    def _part(
        self,
        forward: Callable[..., Any],
        states: States,
        rows: slice,
        one_each: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The layer for some of the step's rows: as so many sequences of one token, or as one sequence."""
        assert self._batch is not None
        leading = (1, self._batch.num_tokens)

        def cut(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if value.shape[:2] != leading:
                    return value
                return value[:, rows].transpose(0, 1) if one_each else value[:, rows]
            if isinstance(value, tuple):
                return tuple(cut(x) for x in value)
            return value

        self.cache.states = states
        return forward(*map(cut, args), **{name: cut(value) for name, value in kwargs.items()})


def _first(out: Any) -> torch.Tensor:
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first
