"""Records the residual stream as each layer's router meets it, to fit look-ahead's ridge on.

T: tokens that are kept, L: MoE layers, D: hidden size, K: experts per token, P: places in a router's order, S: texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .base import Array
from .look_ahead import named
from .routers import Router
from .stream_ridge import unit

MOST_ROWS = 32768
"""Of a recording that are kept: more hardly change what is fitted."""


class StreamRecorder:
    """Keeps one of `every` tokens that run from now on, until `take`.

    Args:
        routers: of the MoE layers, None for those that cannot be asked; and their numbers of experts.
    """

    def __init__(self, routers: Sequence[Router | None], experts_L: Sequence[int], every: int) -> None:
        assert every >= 1 and len(routers) == len(experts_L)
        self._routers, self._experts_L = list(routers), list(experts_L)
        self._every = every
        self._seen = [0] * len(routers)
        self._unit: list[list[torch.Tensor]] = [[] for _ in routers]
        self._scale: list[list[torch.Tensor]] = [[] for _ in routers]
        self._hooks = [
            router.entry.register_forward_pre_hook(self._telling(layer), with_kwargs=True)
            for layer, router in enumerate(routers)
            if router is not None
        ]

    def take(self) -> Streams:
        """What was kept. The end of the recording."""
        for hook in self._hooks:
            hook.remove()
        kept = [layer for layer, router in enumerate(self._routers) if router is not None]
        return Streams(
            routers=self._routers,
            experts_L=self._experts_L,
            every=self._every,
            unit_TD={layer: torch.cat(self._unit[layer]) for layer in kept if self._unit[layer]},
            scale_T={layer: torch.cat(self._scale[layer]) for layer in kept if self._scale[layer]},
        )

    def _telling(self, layer: int):  # type: ignore[no-untyped-def]
        def tell(module, args, kwargs):  # type: ignore[no-untyped-def]
            stream = args[0] if args else next(iter(kwargs.values()))
            x_TD = stream.detach().reshape(-1, stream.shape[-1])
            first = -self._seen[layer] % self._every
            self._seen[layer] += len(x_TD)
            x_TD = x_TD[first :: self._every].float().cpu()
            # Of mean square 1, what is as long as a sequence's first token fits into 16 bits too.
            self._scale[layer].append(x_TD.square().mean(-1).add(1e-6).sqrt())
            self._unit[layer].append(unit(x_TD).half())

        return tell


@dataclass(frozen=True, eq=False, kw_only=True)
class Streams:
    """By MoE layer the streams [T, D] of mean square 1 and their scales [T]; row t is of token `t * every`."""

    routers: list[Router | None]
    experts_L: list[int]
    every: int
    unit_TD: dict[int, torch.Tensor]
    scale_T: dict[int, torch.Tensor]

    @property
    def rows(self) -> int:
        return min((len(scale_T) for scale_T in self.scale_T.values()), default=0)

    def router(self, layer: int) -> Router:
        router = self.routers[layer]
        assert router is not None
        return router

    def stream(self, layer: int, rows_T: Array) -> torch.Tensor:
        """[T, D] in float32."""
        rows = torch.from_numpy(rows_T)
        return self.unit_TD[layer][rows].float() * self.scale_T[layer][rows, None]

    def mean_LD(self, rows_T: Array) -> dict[int, torch.Tensor]:
        """By layer [D] the mean stream, as `LookAhead` takes it: each row by the inverse of its greatest length."""
        length_T = torch.stack([self.scale_T[layer][torch.from_numpy(rows_T)] for layer in self.unit_TD]).amax(0)
        worth_T = length_T.clamp_min(1e-6).reciprocal()
        return {layer: worth_T @ self.stream(layer, rows_T) / worth_T.sum() for layer in self.unit_TD}

    def normed(self, layer: int, stream_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] in float32: what the layer's norm makes of it."""
        router = self.router(layer)
        return router.normed(self._to_model(router, stream_TD))[0].float().cpu()

    def weight_ED(self, layer: int) -> torch.Tensor | None:
        """In float32, of a layer's router, where there is one such matrix."""
        hidden = self.unit_TD[layer].shape[1]
        weight_ED = self.router(layer).weight_ED(self.experts_L[layer], hidden)
        return None if weight_ED is None else weight_ED.float().cpu()

    def ask(self, layer: int, stream_TD: torch.Tensor) -> Array:
        """[T, P] the experts that a layer's router names for these streams, the best first."""
        router = self.router(layer)
        return named(router.ask(self._to_model(router, stream_TD)), self.experts_L[layer])

    def choose(self, layer: int, normed_TD: torch.Tensor) -> Array:
        """The same for what the norm made of streams."""
        router = self.router(layer)
        return named(router.choose(self._to_model(router, normed_TD)), self.experts_L[layer])

    @staticmethod
    def _to_model(router: Router, x_TD: torch.Tensor) -> torch.Tensor:
        parameter = next(router.asked.parameters())
        return x_TD[None].to(parameter.device, parameter.dtype)


def rights(ids_TP: Array, used_TK: Array, text_T: Array, texts_S: Array) -> Array:
    """[S, 2] of each text, the share of the used experts (-1: none) that are among the first K, and the first 2 K."""
    right_TP = (ids_TP[:, :, None] == used_TK[:, None, :]).any(-1) & (ids_TP >= 0)
    used_T = (used_TK >= 0).sum(1)
    first_T, all_T = right_TP[:, : used_TK.shape[1]].sum(1), right_TP.sum(1)
    found = []
    for text in texts_S:
        of = text_T == text
        found.append([first_T[of].sum(), all_T[of].sum()] / np.maximum(1, used_T[of].sum()))
    return np.array(found)
