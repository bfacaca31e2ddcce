"""Gate look-ahead: the next layers' own routers, asked now about what the residual stream will be like there.

The stream changes slowly from layer to layer, so that a later layer's norm and router, run on what it is now plus the
mean of what the layers between add to it, name most of the experts that they will choose. Such gates ahead of time are
in many systems (Pre-gated MoE, arXiv 2308.12066; Fate, arXiv 2502.12224). Where a `StreamRidge` was fitted for the
model, what it makes of the stream is asked about instead. How often each place in a router's order is right is counted
as the model runs, and is the probability that is given.

T: tokens of a step, L: MoE layers, E: experts, K: experts per token, D: hidden size, A: layers ahead, P: places in the
order in which a router names experts, twice as many as a token has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..model import ModelSpec
from .base import Array, Floats, Predictor, Rows
from .routers import Choice, Router, RouterWatch
from .stream_ridge import DEPTH, StreamRidge

MEMORY = 4096
"""Tokens over which means are taken: what is older fades."""
PRIOR = 16.0
"""A layer's places are drawn to those of all layers as if they had been seen on so many tokens."""
COUNTED_STEPS = 16
"""The first steps, and then one of so many, after which the places' probabilities are computed again."""
SAMPLE = 64
"""Most rows of a step that the means are made of."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Asked:
    """What was said of a layer: experts [T, P] in their order, -1 for none, and probabilities [E]."""

    ids_TP: Array
    p_E: Floats


class LookAhead(Predictor):
    """Asks up to `depth` layers ahead. To be made before the engine warms up; `settle` ends the watching of it.

    It asks when it is asked, so that what nobody wants costs nothing but a glance at each layer's residual stream.
    """

    name = "look_ahead"
    reach = 2

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        depth: int = DEPTH,
        *,
        mean: bool = True,
        ridge: StreamRidge | None = None,
    ) -> None:
        """`mean` adds what the layers between add in the mean. Without it the figures show what that is worth. `ridge`
        says what a router will see, of the layers and depths that it knows.
        """
        if depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1 layer")
        self.depth = depth
        self.asks = 0
        """How often a router was asked."""
        self.ridge_asks = 0
        """How often of these about what the ridge said."""
        self._mean = mean
        self._ridge = ridge
        self._watch: RouterWatch | None = RouterWatch(model, spec)
        self._routers: list[Router | None] = [None] * len(spec.experts)
        self._experts = max((layer.num_experts for layer in spec.experts), default=0)
        self._of_layer = [layer.num_experts for layer in spec.experts]
        self._top_k = [layer.top_k for layer in spec.experts]
        places = 2 * max(self._top_k, default=0)
        self._right_LAP = np.zeros((len(spec.experts), depth, places))
        self._seen_LA = np.zeros((len(spec.experts), depth))
        self._places: dict[tuple[int, int], npt.NDArray[np.float64]] = {}
        """Places' probabilities as they were counted some steps ago."""
        self._steps = 0
        self._mean_LD: torch.Tensor | None = None
        self._mean_of: dict[int, int] = {}
        """Layers' rows of the means."""
        self._worth = 0.0
        self._tokens = 0
        self._newest = -1
        self._stream_1TD: torch.Tensor | None = None
        self._samples: dict[int, torch.Tensor] = {}
        self._asked: dict[tuple[int, int], _Asked] = {}

    def settle(self) -> None:
        """The engine has warmed up."""
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        self._routers = watch.settle()
        self._mean_of = {layer: row for row, layer in enumerate(self.layers)}
        if self._ridge is not None and self.layers:
            asked = next(router for router in self._routers if router is not None).asked
            self._ridge = self._ridge.to(next(asked.parameters()).device)
        for layer, router in enumerate(self._routers):
            if router is not None:
                router.entry.register_forward_pre_hook(_telling(self, layer), with_kwargs=True)

    @property
    def layers(self) -> list[int]:
        """The MoE layers whose routers can be asked."""
        return [layer for layer, router in enumerate(self._routers) if router is not None]

    # What a predictor is told

    def begin_step(self, rows: Sequence[Rows]) -> None:
        self._tokens = sum(len(row.token_ids) for row in rows)
        self._forget_step()

    def routed(self, layer: int, ids_TK: Array) -> None:
        for ahead in range(1, self.depth + 1):
            asked = self._asked.pop((layer, ahead), None)
            if asked is not None and len(asked.ids_TP) == len(ids_TK):
                right_TP = (asked.ids_TP[:, :, None] == ids_TK[:, None, :]).any(-1) & (asked.ids_TP >= 0)
                fade = max(0.0, 1 - len(ids_TK) / MEMORY)
                self._right_LAP[layer, ahead - 1] *= fade
                self._right_LAP[layer, ahead - 1, : right_TP.shape[1]] += right_TP.sum(0)
                self._seen_LA[layer, ahead - 1] = self._seen_LA[layer, ahead - 1] * fade + len(ids_TK)

    def end_step(self) -> None:
        if self._samples and len(self._samples) == len(self._mean_of):
            self._learn(torch.stack([self._samples[layer] for layer in self._mean_of]).float())
        self._steps += 1
        if self._steps < COUNTED_STEPS or self._steps % COUNTED_STEPS == 0:
            self._places.clear()
        self._forget_step()
        self._tokens = 0

    # What it says

    @torch.inference_mode()
    def upcoming(self, layer: int) -> Floats | None:
        ahead = layer - self._newest
        router = self._routers[layer]
        if router is None or self._stream_1TD is None or not 1 <= ahead <= self.depth:
            return None
        if (layer, ahead) not in self._asked:
            self.asks += 1
            ids_TP = named(self._choice(router, layer, ahead, self._stream_1TD), self._of_layer[layer])
            if (layer, ahead) not in self._places:
                self._places[layer, ahead] = self.places(layer, ahead)
            p_E = any_of(ids_TP, self._places[layer, ahead], self._top_k[layer], self._of_layer[layer])
            if len(p_E) < self._experts:
                p_E = np.pad(p_E, (0, self._experts - len(p_E)))
            self._asked[layer, ahead] = _Asked(ids_TP=ids_TP, p_E=p_E)
        return self._asked[layer, ahead].p_E

    def places(self, layer: int, ahead: int) -> npt.NDArray[np.float64]:
        """[P] how probable it is that a router which was asked `ahead` layers before is right, by place."""
        top_k, experts = self._top_k[layer], self._of_layer[layer]
        right_P = self._right_LAP[:, ahead - 1].sum(0)
        places_P = np.arange(len(right_P))
        # Before anything is known: right one time in two, and by chance beyond the places of a token
        guess_P = np.where(places_P < top_k, 0.5, top_k / experts)
        all_P = (right_P + PRIOR * guess_P) / (self._seen_LA[:, ahead - 1].sum() + PRIOR)
        right_P, seen = self._right_LAP[layer, ahead - 1], self._seen_LA[layer, ahead - 1]
        of_layer_P: npt.NDArray[np.float64] = (right_P + PRIOR * all_P) / (seen + PRIOR)
        return of_layer_P

    def _choice(self, router: Router, layer: int, ahead: int, stream_1TD: torch.Tensor) -> Choice:
        if self._ridge is not None and (normed_1TD := self._ridge.normed(layer, ahead, stream_1TD)) is not None:
            self.ridge_asks += 1
            return router.choose(normed_1TD)
        if self._mean_LD is not None:
            here, there = self._mean_of[self._newest], self._mean_of[layer]
            stream_1TD = stream_1TD + (self._mean_LD[there] - self._mean_LD[here]).to(stream_1TD.dtype)
        return router.ask(stream_1TD)

    # The residual stream

    def _see(self, layer: int, stream: torch.Tensor) -> None:
        """A layer runs, with this residual stream of the step's tokens."""
        if not self._tokens or stream.numel() != self._tokens * stream.shape[-1]:
            return  # another step than the one that was announced: the engine warms up
        self._newest, self._stream_1TD = layer, stream.reshape(1, -1, stream.shape[-1])
        if self._mean:
            self._samples[layer] = self._stream_1TD[0, -SAMPLE:].clone()

    def _learn(self, streams_LTD: torch.Tensor) -> None:
        """Takes some rows into the mean of each layer's stream.

        A row counts by the inverse of its length: the stream of a sequence's first token is often a thousand times
        longer than others' and would be all of the mean.
        """
        worth_T = streams_LTD.norm(dim=-1).amax(0).clamp_min(1e-6).reciprocal()
        total_LD = torch.einsum("ltd,t->ld", streams_LTD, worth_T)
        worth = float(worth_T.sum())
        if self._mean_LD is None:
            self._mean_LD = torch.zeros_like(total_LD)
        self._worth = self._worth * max(0.0, 1 - streams_LTD.shape[1] / MEMORY) + worth
        self._mean_LD += (total_LD - self._mean_LD * worth) / self._worth

    def _forget_step(self) -> None:
        self._newest, self._stream_1TD = -1, None
        self._samples.clear()
        self._asked.clear()


def named(choice: Choice, experts: int) -> Array:
    """[T, P] the experts that a router names, the best first: its choice, then those with the next best scores."""
    # In numpy, which is several times faster for few rows
    ids_TK, worth_TK = choice.ids_TK.cpu().numpy(), choice.weights_TK.float().cpu().numpy()
    worth_TK = np.where(ids_TK < 0, -np.inf, worth_TK)
    row_T1 = np.arange(len(ids_TK))[:, None]
    ids_TK = ids_TK[row_T1, np.argsort(-worth_TK, axis=1, kind="stable")]
    more = min(ids_TK.shape[1], experts - ids_TK.shape[1])
    if choice.scores_TE is None or more < 1:
        return ids_TK
    rest_TE = choice.scores_TE.float().cpu().numpy().copy()
    rest_TE[row_T1, ids_TK] = -np.inf
    return np.concatenate([ids_TK, np.argsort(-rest_TE, axis=1, kind="stable")[:, :more]], axis=1)


def _telling(look_ahead: LookAhead, layer: int):  # type: ignore[no-untyped-def]
    def tell(module, args, kwargs):  # type: ignore[no-untyped-def]
        look_ahead._see(layer, args[0] if args else next(iter(kwargs.values())))

    return tell


def any_of(ids_TP: Array, places_P: npt.NDArray[np.float64], top_k: int, experts: int) -> Floats:
    """[E] how probable it is that any of some tokens uses each expert, when each names some, -1 for none, that it uses
    with a probability by place, and all others, together as often as its `top_k` demand, alike. Tokens are taken as
    independent.
    """
    tokens, places = ids_TP.shape
    p_P = places_P[:places].clip(0, 1 - 1e-6)
    others = max(0.0, top_k - p_P.sum()) / max(1, experts - places)
    unused_P = np.log1p(-p_P)
    unused = np.log1p(-min(others, 1 - 1e-6))
    named_TP = ids_TP >= 0
    change_TP = np.where(named_TP, unused_P - unused, 0.0)
    change_E = np.bincount(ids_TP.clip(0).ravel(), weights=change_TP.ravel(), minlength=experts)
    p_E: Floats = (-np.expm1(tokens * unused + change_E)).clip(0, 1).astype(np.float32)
    return p_E
