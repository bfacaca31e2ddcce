"""Next use, predicted while a step runs: the fitted model of `engine/next_use.py`, kept up to date layer by layer.

S: sequences that are followed, R: those of the step, T: tokens, L: layers, E: experts of a layer, K: experts per token,
N: L * E, H: half-lives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..next_token import POINTS
from ..next_use import NextUse
from ..routing_history import PRIOR_TOKENS, RATE_HALF_LIVES, rank_weights
from .base import Array, Floats, Predictor, Rows
from .compiled import chances, next_chances, route, score_all, score_layer
from .followed import Followed

SEQUENCES = 32
"""That are followed at most. Each has L * L * E numbers, and a step's time grows with those it follows."""


class LiveNextUse(Predictor):
    """Discounted uses of each expert, by a fitted model, within the step.

    Before a layer has been routed its row is the prediction after the token before. From then on its row is exact in
    the rates of its own layer and in all that layers up to it say; for the layers after it stand the experts of the
    last token that is known there. After the step all rows are exact: `NextUse.scores`, summed over the sequences
    of the step and those that have been in an earlier one and not ended. Rows of a chunk count like tokens one by one.

    With a model that has a `next_token` it also knows how probable the step's experts are, from the scores after the
    token before and from the layers that the token has been through.

    Args:
        model: fitted on the model's routing.
        sequences: so many are followed at most (see `Followed`).
    """

    name = "next_use"
    ordered = True

    def __init__(self, model: NextUse, sequences: int = SEQUENCES) -> None:
        self._followed = Followed(sequences)
        self.model = model
        layers, experts, halves = model.layers, model.experts, len(RATE_HALF_LIVES)
        self._decay_H = 2.0 ** (-1.0 / np.array(RATE_HALF_LIVES))
        # Zeros take memory only from when a sequence is there
        self._part_SLN = np.zeros((sequences, layers, layers * experts), dtype=np.float32)
        self._before_SN = np.zeros((sequences, layers * experts), dtype=np.float32)
        self._coming_SN = np.zeros_like(self._before_SN)
        self._last_SLE = np.full((sequences, layers, experts), -1, dtype=np.int16)
        self._decayed_SLHE = np.zeros((sequences, layers, halves, experts), dtype=np.float32)
        self._tokens_SH = np.zeros((sequences, halves))
        self._own_SLE = np.zeros((sequences, layers, experts), dtype=np.float32)
        self._scores_SLE = np.zeros_like(self._own_SLE)
        self._total_LE = np.zeros((layers, experts), dtype=np.float32)
        self._others_LE = np.zeros_like(self._total_LE)
        """Of sequences that are followed and not in the step."""
        self._future_LE = np.zeros_like(self._total_LE)
        """The sum of both."""
        self._rank_K = rank_weights(1)
        self._waiting: set[int] = set()
        """Layers of the running step that have not been routed."""
        self._routed = -1
        """The last layer of the step that has been, -1 before."""

    def begin_step(self, rows: Sequence[Rows]) -> None:
        if self._waiting:
            self.end_step()
        self._followed.begin(rows)
        row_R3 = self._followed.row_R3
        if self._followed.new_R.any():
            new_N = self._followed.place_R[self._followed.new_R]
            for kept in (self._part_SLN, self._coming_SN, self._decayed_SLHE, self._tokens_SH, self._scores_SLE):
                kept[new_N] = 0
            self._last_SLE[new_N] = -1
        place_R, tokens_R1 = row_R3[:, 0], (row_R3[:, 2] - row_R3[:, 1])[:, None]
        faded_RH = self._decay_H**tokens_R1
        self._tokens_SH[place_R] = self._tokens_SH[place_R] * faded_RH + (1 - faded_RH) / (1 - self._decay_H)
        self._before_SN[place_R] = self._coming_SN[place_R]
        self._coming_SN[place_R] = 0
        self._sum()
        self._waiting = set(range(self.model.layers))
        self._routed = -1

    def routed(self, layer: int, ids_TK: Array) -> None:
        if layer not in self._waiting:
            return
        self._waiting.remove(layer)
        self._routed = layer
        if not len(self._followed):
            return
        ids_TK, row_R3 = self._followed.checked(ids_TK), self._followed.row_R3
        if ids_TK.shape[1] != len(self._rank_K):
            self._rank_K = rank_weights(ids_TK.shape[1])
        route(
            layer,
            ids_TK,
            self._rank_K,
            row_R3,
            self.model.now_NN,
            self.model.rank_NN,
            self.model.before_NN,
            self._part_SLN,
            self._before_SN,
            self._coming_SN,
            self._last_SLE,
            self._decayed_SLHE,
            self._decay_H,
        )
        score_layer(
            layer,
            row_R3,
            PRIOR_TOKENS * self.model.even,
            PRIOR_TOKENS,
            self._tokens_SH,
            self._decayed_SLHE,
            self.model.own_LFE,
            self.model.bias_LE,
            self._part_SLN,
            self._before_SN,
            self._own_SLE,
            self._scores_SLE,
            self._total_LE,
        )
        np.add(self._total_LE[layer], self._others_LE[layer], out=self._future_LE[layer])

    def end_step(self) -> None:
        for layer in sorted(self._waiting):  # that no router has chosen for: nothing was chosen there
            self.routed(layer, np.full((0, len(self._rank_K)), -1))
        score_all(
            self._followed.row_R3, self._part_SLN, self._before_SN, self._own_SLE, self._scores_SLE, self._total_LE
        )
        np.add(self._total_LE, self._others_LE, out=self._future_LE)

    def forget(self, request_id: str) -> None:
        if self._followed.forget(request_id):
            self._sum()

    def _sum(self) -> None:
        self._total_LE[:] = self._scores_SLE[self._followed.place_R].sum(0)
        self._others_LE[:] = self._scores_SLE[self._followed.others].sum(0)
        np.add(self._total_LE, self._others_LE, out=self._future_LE)

    def future(self) -> Floats | None:
        """Also of those that wait for their turn. None while no sequence of the step is followed."""
        return self._future_LE if len(self._followed) else None

    def upcoming(self, layer: int) -> Floats | None:
        """None for a layer that has been routed, while no sequence is followed, and without a `next_token`."""
        found = self.model.next_token
        if found is None or layer not in self._waiting or not len(self._followed):
            return None
        ahead = layer - self._routed
        if self._routed < 0 or not 0 < ahead <= found.depth:
            ahead = 0
        near, far = (layer - ahead, layer - ahead - 1) if ahead else (layer, -1)
        return chances(
            layer,
            near,
            far,
            self._followed.row_R3,
            self._followed.new_R,
            self._rank_K,
            found.mean_LE[layer],
            self._scores_SLE,
            self._last_SLE,
            found.weight_DLFE[ahead, layer],
            found.bias_DLE[ahead, layer],
            POINTS,
            found.chance_DB[ahead],
        )

    def next_of(self, request_id: str) -> Floats | None:
        """None for a sequence that is not followed, and without a `next_token`."""
        found, place = self.model.next_token, self._followed.place_of(request_id)
        if found is None or place is None:
            return None
        return next_chances(
            place,
            self._rank_K,
            found.mean_LE,
            self._scores_SLE,
            self._last_SLE,
            found.weight_DLFE[0],
            found.bias_DLE[0],
            POINTS,
            found.chance_DB[0],
        )
