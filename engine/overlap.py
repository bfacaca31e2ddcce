"""Shared experts computed while routed tokens travel.

Many MoE blocks end with `routed + shared_experts(block's input)`. Their shared experts need nothing of the routed ones,
so that they can run as soon as the dispatch is under way. Some blocks call them first and use the result last: they get
a tensor that is filled while tokens travel. Which blocks are like that is watched while the engine warms up; any other
stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Overlap:
    """Runs a block's shared experts beside its routed ones, once `watch` has seen that this changes nothing."""

    def __init__(self, block: nn.Module, shared: nn.Module) -> None:
        self.enabled = False
        self.deferred = False
        """Whether the block calls its shared experts before the routing: they wait."""
        self.early_runs = 0
        """How often they ran beside the routed ones."""
        self.row: tuple[int, torch.dtype] | None = None
        """Width and type of a token's vector on its way in and out; None where they differ, or nothing was watched."""
        self.weights = sum(parameter.numel() for parameter in shared.parameters())
        """How many numbers the shared experts are: their kind, for what is measured of them."""
        self._original = shared.forward
        self._input: torch.Tensor | None = None
        self._early: torch.Tensor | None = None
        self._promised: torch.Tensor | None = None
        """What a block got that called them first, until it is filled."""
        self._routed = False
        self._waits: _Waiting | None = None
        self._watched: list[str] = []
        """For each call when it could have been: "early", "deferred" or "" for neither."""
        self._rows: set[tuple[int, torch.dtype]] = set()
        self._shared = shared
        self._hooks = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave),
        ]
        shared.forward = self._shared_forward  # type: ignore[method-assign]

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        self._input = tensors[0] if tensors and not self.deferred else None
        self._early = self._promised = None
        self._routed = False

    def _leave(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        assert self._promised is None, "the shared experts waited for a routing that did not come"
        self._decide()

    def run(self) -> None:
        """Called when the layer's tokens are on their way: computes the shared experts now, if that is right."""
        self._routed = True
        self._decide()
        if self.enabled and (x := self.take()) is not None:
            self.give(self._original(x))

    def take(self) -> torch.Tensor | None:
        """The shared experts' input, once, for whoever computes them instead of `run`; None for a layer that is called
        alone, in a step without tokens.
        """
        x, self._input = self._input, None
        return x

    def give(self, out: torch.Tensor) -> None:
        """What the shared experts made of all of their input."""
        self.early_runs += 1
        if self._promised is None:
            self._early = out
        else:
            self._promised.copy_(out)
            self._promised = None

    @property
    def compute(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The shared experts themselves."""
        return self._original

    def settle(self) -> None:
        """The end of the watch: enabled when every call came after the routing and had the block's input, or when for
        every call nobody would have noticed had it come later.
        """
        self._decide()
        kinds = set(self._watched)
        self.row = next(iter(self._rows)) if len(self._rows) == 1 else None
        self.deferred = kinds == {"deferred"} and self.row is not None
        self.enabled = kinds == {"early"} or self.deferred
        self._input = None
        if not self.enabled:  # leave the block as it was: its input need not be kept, nor compared
            for hook in self._hooks:
                hook.remove()
            self._shared.forward = self._original  # type: ignore[method-assign]

    def _shared_forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self._watch(x)
        if self.deferred:
            self._input, self._promised = x, torch.empty_like(x)
            return self._promised
        early, self._early = self._early, None
        return self._original(x) if early is None else early

    # The watch

    def _watch(self, x: torch.Tensor) -> torch.Tensor:
        second = self._waits is not None
        self._decide()
        out: torch.Tensor = self._original(x)
        self._rows |= {(x.shape[-1], x.dtype), (out.shape[-1], out.dtype)}
        if self._routed:
            same = self._input is not None and x.shape == self._input.shape and torch.equal(x, self._input)
            self._watched.append("early" if same else "")
        elif second or x.shape != out.shape:
            self._watched.append("")
        else:
            self._waits = _Waiting(x, out)
        return out

    def _decide(self) -> None:
        """Ends the watch over what a block got that called the shared experts first."""
        if self._waits is not None:
            waits, self._waits = self._waits, None
            self._watched.append("deferred" if waits.end() and self._routed else "")


class _Waiting(TorchFunctionMode):
    """From its making to its `end`: whether the result could be computed at the end as well."""

    def __init__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        super().__init__()
        self._x, self._copy, self._out = x, x.clone(), out
        self._used = False
        self.__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._used = self._used or any(it is self._out for it in _flat((*args, *kwargs.values())))
        return func(*args, **kwargs)

    def end(self) -> bool:
        """Whether nobody has looked at the result since, nor changed what it is made of."""
        self.__exit__(None, None, None)
        return not self._used and torch.equal(self._x, self._copy)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def find_overlap(model: nn.Module, experts_module: str) -> Overlap | None:
    """The overlap of the block around an experts module; None when it has no shared experts beside them."""
    block = model.get_submodule(experts_module.rpartition(".")[0])
    for name, child in block.named_children():
        if name in ("shared_experts", "shared_expert", "shared_mlp"):
            return Overlap(block, child)
    return None
