"""The routers of a model's MoE layers, asked about a state of the model that is not their own.

How a layer comes from the residual stream to its router is watched while the engine warms up, not read off names: which
module makes the MoE block's input of the stream (a norm), and what of the block runs before its experts are called. To
ask, these run as they are, up to the call of the experts, whose arguments are the answer.

T: tokens, K: experts per token, D: hidden size, E: experts.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..model import ExpertsSpec, ModelSpec

log = logging.getLogger("moeyard.predict")

TRIAL_ROWS = 8
"""Rows of noise with which is tried what the routing depends on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """What a router chose: ids [T, K] and their weights, and scores [T, E] of all experts before any bias that only
    the choice sees; None where the router does not show them.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    scores_TE: torch.Tensor | None


class _Spoke(Exception):
    """The experts were called: the router has spoken."""

    def __init__(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        self.choice = ids_TK, weights_TK


def _speak(x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    raise _Spoke(ids_TK, weights_TK)


@dataclass(eq=False, kw_only=True)
class Router:
    """A layer's way from the residual stream to its experts."""

    entry: nn.Module
    """Takes the residual stream: the norm, or the block itself where there is none."""
    norm: nn.Module | None
    asked: nn.Module
    """Runs to ask: the block, or the router where that is a module of its own and the block is more than routing."""
    flat: bool
    """Whether what is asked takes [T, D] rather than [1, T, D]."""
    experts: nn.Module
    answer: tuple[int, int] | None
    """Where ids and weights are in what the router returns; None for a block, which calls its experts."""
    scorer: tuple[nn.Module, int | None] | None = None
    """The module that gives scores [T, E], and which of its results they are (None: the only one)."""
    silent: list[nn.Module] = field(default_factory=list)
    """What runs before the routing without being needed for it, such as shared experts: nothing in its place."""

    def ask(self, stream_1TD: torch.Tensor) -> Choice:
        """What this layer would choose for tokens with this residual stream [1, T, D]."""
        return self.choose(self.normed(stream_1TD))

    def normed(self, stream_1TD: torch.Tensor) -> torch.Tensor:
        """What the norm, if there is one, makes of the residual stream [1, T, D]."""
        normed_1TD: torch.Tensor = stream_1TD if self.norm is None else self.norm.forward(stream_1TD)
        return normed_1TD

    def weight_ED(self, experts: int, hidden: int) -> torch.Tensor | None:
        """Of the linear map from what is normed to the experts' scores; None where there is not just one that can be
        it.
        """
        own = {id(parameter) for parameter in self.experts.parameters()}
        found = [p for p in self.asked.parameters() if p.shape == (experts, hidden) and id(p) not in own]
        return found[0].detach() if len(found) == 1 else None

    def choose(self, normed_1TD: torch.Tensor) -> Choice:
        """What this layer would choose for tokens of which the norm made this [1, T, D]."""
        x = normed_1TD.reshape(-1, normed_1TD.shape[-1]) if self.flat else normed_1TD
        scores: list[torch.Tensor] = []
        forwards: dict[nn.Module, Callable[..., Any]] = {self.experts: _speak}
        forwards |= dict.fromkeys(self.silent, torch.zeros_like)
        if self.scorer is not None:
            forwards[self.scorer[0]] = _overheard(self.scorer[0].forward, self.scorer[1], scores)
        with _instead(forwards):
            try:
                out = self.asked.forward(x)
            except _Spoke as spoke:
                ids_TK, weights_TK = spoke.choice
            else:
                assert self.answer is not None, "the block did not call its experts"
                ids_TK, weights_TK = out[self.answer[0]], out[self.answer[1]]
        scores_TE = scores[0].reshape(ids_TK.shape[0], -1) if scores else None
        return Choice(ids_TK=ids_TK, weights_TK=weights_TK, scores_TE=scores_TE)


def _overheard(forward: Callable[..., Any], place: int | None, scores: list[torch.Tensor]) -> Callable[..., Any]:
    def told(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        scores.append(out if place is None else out[place])
        return out

    return told


@contextmanager
def _instead(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """These functions in the place of the modules' own, which may have been replaced before."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


@dataclass(eq=False, kw_only=True)
class _Call:
    """A block that runs: what it got, and what has run in it."""

    block: nn.Module
    x: torch.Tensor | None
    """Its input, if that is one tensor and nothing else."""
    depth: int
    direct: list[nn.Module] = field(default_factory=list)
    """Modules that the block itself has called."""
    inner: list[tuple[nn.Module, torch.Tensor | None, Any]] = field(default_factory=list)
    """All that have returned, with their only input and their result."""


class RouterWatch:
    """Sees how a model's layers are routed, from its making to `settle`."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self._specs = specs = spec.experts
        self._attention = {model.get_submodule(attention.module) for attention in spec.attention}
        self._experts = {model.get_submodule(spec.module): number for number, spec in enumerate(specs)}
        self._blocks = {model.get_submodule(spec.module.rpartition(".")[0]) for spec in specs}
        self._hidden: dict[int, int] = {}
        self._found: dict[int, Router] = {}
        self._why = dict.fromkeys(range(len(specs)), "it did not run")
        self._running = 0
        self._calls: list[_Call] = []
        # What modules made that take one tensor and give one of the same shape
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], nn.Module]] = {}
        self._hooks = [model.register_forward_pre_hook(self._begin)]
        for module in model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))

    @torch.inference_mode()
    def settle(self) -> list[Router | None]:
        """The end of the watch: the layers' routers, None for one that cannot be asked, which is logged."""
        for hook in self._hooks:
            hook.remove()
        self._calls, self._made = [], {}
        entries = [router.entry for router in self._found.values()]
        routers: list[Router | None] = []
        for number, spec in enumerate(self._specs):
            router = self._found.get(number)
            if router is not None and entries.count(router.entry) > 1:
                router, self._why[number] = None, "its norm is another layer's too"
            if router is not None:
                self._try(router, spec, self._hidden[number])
            else:
                log.info("%s cannot be asked ahead: %s", spec.module, self._why[number])
            routers.append(router)
        return routers

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._running, self._calls, self._made = 0, [], {}

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls and self._running == self._calls[-1].depth:
            self._calls[-1].direct.append(module)
        if module in self._experts and self._calls:
            self._routed(self._calls.pop(), module, args)
        self._running += 1
        if module in self._blocks:
            self._calls.append(_Call(block=module, x=_only_tensor(args, kwargs), depth=self._running))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self._running -= 1
        if self._calls and self._calls[-1].block is module:
            self._calls.pop()  # it has not called its experts
        x = _only_tensor(args, kwargs)
        if self._calls:
            self._calls[-1].inner.append((module, x, out))
        leaf = next(module.children(), None) is None
        if leaf and x is not None and isinstance(out, torch.Tensor) and x.shape == out.shape and out is not x:
            self._made[id(out)] = weakref.ref(out), module

    def _routed(self, call: _Call, experts: nn.Module, args: tuple[Any, ...]) -> None:
        number = self._experts[experts]
        spec = self._specs[number]
        self._found.pop(number, None)
        if len(args) != 3:
            self._why[number] = "its experts are called with names"
            return
        ids, weights = args[1], args[2]
        self._hidden[number] = args[0].shape[-1]
        x, asked, answer, inner = call.x, call.block, None, call.inner
        # Attention writes keys and values: what contains it cannot be run to ask.
        if x is None or any(module in self._attention for module, _, _ in inner):
            chooser = next(((n, *it) for n, it in enumerate(inner) if _places(it[2], ids, weights)), None)
            if chooser is None or chooser[2] is None:
                self._why[number] = "its routing cannot be told from the rest of its layer"
                return
            last, asked, x, out = chooser
            answer, inner = _places(out, ids, weights), inner[: last + 1]
        assert x is not None
        made = self._made.get(id(x))
        norm = made[1] if made is not None and made[0]() is x else None
        scorer = None
        if spec.num_experts != args[0].shape[-1]:  # else scores and hidden states look alike
            scorer = next(
                ((module, place) for module, _, out in inner for place in _scores(out, ids.shape[0], spec.num_experts)),
                None,
            )
        self._found[number] = Router(
            entry=asked if norm is None else norm,
            norm=norm,
            asked=asked,
            flat=x.dim() == 2,
            experts=experts,
            answer=answer,
            scorer=scorer,
            silent=list(dict.fromkeys(module for module in call.direct if module is not experts)) if not answer else [],
        )

    def _try(self, router: Router, spec: ExpertsSpec, hidden: int) -> None:
        """Leaves in `silent` only what the routing does not depend on."""
        candidates, router.silent = router.silent, []
        parameter = next(router.asked.parameters())
        noise = torch.randn(1, TRIAL_ROWS, hidden, generator=torch.Generator().manual_seed(0))
        noise = noise.to(parameter.device, parameter.dtype)
        expected = router.ask(noise)
        for module in candidates:
            router.silent.append(module)
            try:
                choice = router.ask(noise)
                same = torch.equal(choice.ids_TK, expected.ids_TK)
                same = same and torch.equal(choice.weights_TK, expected.weights_TK)
            except Exception:  # the model's own code, on what it did not expect
                same = False
            if not same or (router.scorer is not None and router.scorer[0] is module):
                router.silent.remove(module)


def _only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The argument, if there is no other."""
    values = [value for value in (*args, *kwargs.values()) if value is not None]
    return values[0] if len(values) == 1 and isinstance(values[0], torch.Tensor) else None


def _places(out: Any, ids: torch.Tensor, weights: torch.Tensor) -> tuple[int, int] | None:
    """Where these are in what a module returned."""
    if not isinstance(out, tuple):
        return None
    found = [next((n for n, value in enumerate(out) if value is wanted), None) for wanted in (ids, weights)]
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def _scores(out: Any, tokens: int, experts: int) -> list[int | None]:
    """Where in what a module returned scores of all experts are."""
    if isinstance(out, torch.Tensor):
        return [None] if out.is_floating_point() and out.shape[-1:] == (experts,) else []
    if not isinstance(out, tuple):
        return []
    return [n for n, value in enumerate(out) if isinstance(value, torch.Tensor) and _scores(value, tokens, experts)]
