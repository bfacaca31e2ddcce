"""Shared experts computed while routed tokens travel.

Many MoE blocks end with `routed + shared_experts(block's input)`. Their shared experts need nothing of the routed ones,
so that they can run as soon as the dispatch is under way. Which blocks are like that is watched while the engine warms
up; a block that computes its shared experts before its router has chosen has nothing to overlap and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Overlap:
    """Runs a block's shared experts early, once `watch` has seen that this changes nothing."""

    def __init__(self, block: nn.Module, shared: nn.Module) -> None:
        self.enabled = False
        self.early_runs = 0
        self.row: tuple[int, torch.dtype] | None = None
        """Width and type of a token's vector on its way in and out; None where they differ, or nothing was watched."""
        self.weights = sum(parameter.numel() for parameter in shared.parameters())
        """How many numbers the shared experts are: their kind, for what is measured of them."""
        self._original = shared.forward
        self._input: torch.Tensor | None = None
        self._early: torch.Tensor | None = None
        self._routed = False
        self._watched: list[bool] = []
        self._rows: set[tuple[int, torch.dtype]] = set()
        self._shared = shared
        self._hook = block.register_forward_pre_hook(self._enter, with_kwargs=True)
        shared.forward = self._shared_forward  # type: ignore[method-assign]

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        self._input = tensors[0] if tensors else None
        self._early = None
        self._routed = False

    def run(self) -> None:
        """Called when the layer's tokens are on their way: computes the shared experts now, if that is right."""
        self._routed = True
        if self.enabled and (x := self.take()) is not None:
            self.give(self._original(x))

    def take(self) -> torch.Tensor | None:
        """The block's input, once, for whoever computes the shared experts instead of `run`; None for a layer that is
        called alone, in a step without tokens.
        """
        x, self._input = self._input, None
        return x

    def give(self, out: torch.Tensor) -> None:
        """What the shared experts made of all of the block's input."""
        self._early = out
        self.early_runs += 1

    @property
    def compute(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The shared experts themselves."""
        return self._original

    def settle(self) -> None:
        """The end of the watch: enabled when every call came after the routing and had the block's input."""
        self.enabled = bool(self._watched) and all(self._watched)
        self.row = next(iter(self._rows)) if len(self._rows) == 1 else None
        self._input = None
        if not self.enabled:  # leave the block as it was: its input need not be kept, nor compared
            self._hook.remove()
            self._shared.forward = self._original  # type: ignore[method-assign]

    def _shared_forward(self, x: torch.Tensor) -> torch.Tensor:
        early, self._early = self._early, None
        if early is not None:
            return early
        if not self.enabled:
            same = self._input is not None and x.shape == self._input.shape and torch.equal(x, self._input)
            self._watched.append(self._routed and same)
        out: torch.Tensor = self._original(x)
        if not self.enabled:
            self._rows |= {(x.shape[-1], x.dtype), (out.shape[-1], out.dtype)}
        return out


def find_overlap(model: nn.Module, experts_module: str) -> Overlap | None:
    """The overlap of the block around an experts module; None when it has no shared experts beside them."""
    block = model.get_submodule(experts_module.rpartition(".")[0])
    for name, child in block.named_children():
        if name in ("shared_experts", "shared_expert", "shared_mlp"):
            return Overlap(block, child)
    return None
