"""Routing that is known before a step begins: layers whose routers go by the ids of the tokens alone.

Such are hash layers (arXiv 2106.04426; the first layers of DeepSeek-V4). Which modules choose by token ids is watched
while the engine warms up, and tried, not read off names: one that takes the ids, and chooses the same for other hidden
states. It is asked once about each id that comes.

T: tokens, L: MoE layers, E: experts, K: experts per token, V: ids that were asked about, D: hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model import ModelSpec
from .base import Array, Floats, Predictor, Rows

log = logging.getLogger("moeyard.predict")

ASKED_IDS = 256
"""At a time: their hidden states, all zeros, take memory."""
UNKNOWN = -2


@dataclass(eq=False, kw_only=True)
class TokenRouter:
    """A module that chooses experts by token ids: which of its arguments they are, and of its results the choice."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """As it was called, for so many tokens."""
    tokens: int
    ids_are: int | str
    """A place in `args`, or a name in `kwargs`."""
    choice_is: int | None
    """A place in what it returns; None: the only result."""

    @property
    def ids(self) -> torch.Tensor:
        """Those of the call."""
        ids: torch.Tensor = self.args[self.ids_are] if isinstance(self.ids_are, int) else self.kwargs[self.ids_are]
        return ids

    def choose(self, ids_T: torch.Tensor, hidden: Callable[..., torch.Tensor] = torch.zeros) -> torch.Tensor:
        """[T, K] the experts of some tokens, whatever their hidden states are."""

        def instead(at: int | str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            shape = list(value.shape)
            if self.tokens in shape:
                shape[shape.index(self.tokens)] = len(ids_T)
            return ids_T.reshape(shape) if at == self.ids_are else hidden(shape).to(value.device, value.dtype)

        args = [instead(place, value) for place, value in enumerate(self.args)]
        out = self.module.forward(*args, **{name: instead(name, value) for name, value in self.kwargs.items()})
        ids: torch.Tensor = out if self.choice_is is None else out[self.choice_is]
        return ids.reshape(len(ids_T), -1)


class TokenRouterWatch:
    """Sees which layers are routed by token ids, from its making to `settle`."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self._experts = {model.get_submodule(layer.module): number for number, layer in enumerate(spec.experts)}
        attention = {model.get_submodule(layer.module) for layer in spec.attention}
        self._ran: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
        self._found: dict[int, TokenRouter] = {}
        self._hooks = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._ids: torch.Tensor | None = None
        for module in model.modules():
            if module is model:
                continue
            # Attention writes keys and values, and experts take long: what contains them is not run to ask.
            if not any(inner in attention or inner in self._experts for inner in module.modules()):
                self._hooks.append(module.register_forward_hook(self._left, with_kwargs=True))
            if module in self._experts:
                self._hooks.append(module.register_forward_pre_hook(self._routed))

    def settle(self) -> dict[int, TokenRouter]:
        """The end of the watch: by layer, those that choose by the ids alone."""
        for hook in self._hooks:
            hook.remove()
        self._ran.clear()
        return {layer: router for layer, router in sorted(self._found.items()) if _by_ids_alone(router)}

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ran.clear()
        self._ids = kwargs.get("input_ids")

    def _left(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if any(self._are_ids(value) for value in (*args, *kwargs.values())):
            self._ran.append((module, args, kwargs, out))

    def _routed(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) != 3:
            return
        ids, number = args[1], self._experts[experts]
        if number in self._found and self._found[number].tokens >= ids.shape[0]:
            return  # with more tokens it is plainer which dimension is theirs
        for module, its_args, its_kwargs, out in reversed(self._ran):
            results = out if isinstance(out, tuple) else (out,)
            place = next((n for n, value in enumerate(results) if value is ids), None)
            if place is None:
                continue
            named: list[tuple[int | str, Any]] = [*enumerate(its_args), *its_kwargs.items()]
            self._found[number] = TokenRouter(
                module=module,
                args=its_args,
                kwargs=dict(its_kwargs),
                tokens=ids.shape[0],
                ids_are=next(at for at, value in named if self._are_ids(value)),
                choice_is=place if isinstance(out, tuple) else None,
            )
            return

    def _are_ids(self, value: Any) -> bool:
        if self._ids is None or not isinstance(value, torch.Tensor) or value.is_floating_point():
            return False
        return value.numel() == self._ids.numel() and torch.equal(value.reshape(-1), self._ids.reshape(-1))


def _by_ids_alone(router: TokenRouter) -> bool:
    """Tries it with other hidden states."""
    generator = torch.Generator().manual_seed(0)
    try:
        found = [
            router.choose(router.ids.reshape(-1), hidden)
            for hidden in (torch.zeros, lambda shape: torch.randn(shape, generator=generator))
        ]
    except Exception:  # the model's own code, on what it did not expect
        return False
    return torch.equal(*found)


class Exact(Predictor):
    """Knows the routing of the layers that go by token ids, of all tokens of a step, before it begins. To be made
    before the engine warms up; `settle` ends the watching of it.
    """

    name = "exact"
    exact = True

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self._watch: TokenRouterWatch | None = TokenRouterWatch(model, spec)
        self._routers: dict[int, TokenRouter] = {}
        self._experts = max((layer.num_experts for layer in spec.experts), default=0)
        self._known_VK: dict[int, Array] = {}
        """By layer the experts of each token id, -1 for none, `UNKNOWN` for all of an id that did not come yet."""
        self._vocab = spec.vocab_size
        self._chance: dict[int, Floats] = {}

    @torch.inference_mode()
    def settle(self) -> None:
        """The engine has warmed up."""
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        self._routers = watch.settle()
        for layer, router in self._routers.items():
            top_k = router.choose(router.ids.reshape(-1)).shape[1]
            self._known_VK[layer] = np.full((self._vocab, top_k), UNKNOWN, dtype=np.int16)
        if self._routers:
            log.info("MoE layers %s are routed by token ids: known before each step", ", ".join(map(str, self.layers)))

    @property
    def layers(self) -> list[int]:
        """The MoE layers that it knows."""
        return list(self._routers)

    def begin_step(self, rows: Sequence[Rows]) -> None:
        self._chance.clear()
        if not self._routers:
            return
        ids_T = np.unique(np.concatenate([np.asarray(row.token_ids, dtype=np.int64) for row in rows]))
        for layer, known_VK in self._known_VK.items():
            self._ask(layer, ids_T[known_VK[ids_T, 0] == UNKNOWN])
            ids_TK = known_VK[ids_T]
            chance_E = np.zeros(self._experts, dtype=np.float32)
            chance_E[ids_TK[ids_TK >= 0]] = 1
            self._chance[layer] = chance_E

    def routed(self, layer: int, ids_TK: Array) -> None:
        self._chance.pop(layer, None)

    def end_step(self) -> None:
        self._chance.clear()

    def upcoming(self, layer: int) -> Floats | None:
        return self._chance.get(layer)

    @torch.inference_mode()
    def _ask(self, layer: int, ids_T: Array) -> None:
        router = self._routers[layer]
        for first in range(0, len(ids_T), ASKED_IDS):
            part_T = ids_T[first : first + ASKED_IDS]
            asked_T = torch.from_numpy(part_T).to(router.ids.device, router.ids.dtype)
            self._known_VK[layer][part_T] = router.choose(asked_T).cpu().numpy()
