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
from .compiled import chances, route, score_all, score_layer

SEQUENCES = 32
"""That are followed at most. Each has L * L * E numbers, and a step's time grows with those it follows."""


class LiveNextUse(Predictor):
    """Discounted uses of each expert, by a fitted model, within the step.

    Before a layer has been routed its row is the prediction after the token before. From then on its row is exact in
    the rates of its own layer and in all that layers up to it say; for the layers after it stand the experts of the
    last token that is known there. After the step all rows are exact: `NextUse.scores`, summed over the sequences of
    the step. Rows of a chunk count like tokens one by one.

    With a model that has a `next_token` it also knows how probable the step's experts are, from the scores after the
    token before and from the layers that the token has been through.

    Args:
        model: fitted on the model's routing.
        sequences: so many are followed. In a step of more, those of the last rows are left out. When a new sequence
            finds no place, it takes that of one that is not in the step, the one that has waited longest.
    """

    name = "next_use"

    def __init__(self, model: NextUse, sequences: int = SEQUENCES) -> None:
        if sequences < 1:
            raise ValueError(f"sequences is {sequences}; it must be at least 1")
        self.model = model
        layers, experts, halves = model.layers, model.experts, len(RATE_HALF_LIVES)
        self._decay_H = 2.0 ** (-1.0 / np.array(RATE_HALF_LIVES))
        self._place: dict[str, int] = {}
        """Of each sequence that is followed, in the order in which they were last seen."""
        self._free = list(range(sequences))
        self._length_S = [0] * sequences
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
        self._row_R3 = np.zeros((0, 3), dtype=np.int64)
        self._new_R = np.zeros(0, dtype=bool)
        """Of them those without a token before the step."""
        self._end = 0
        """Of the rows of `ids_TK` that are looked at."""
        self._rank_K = rank_weights(1)
        self._waiting: set[int] = set()
        """Layers of the running step that have not been routed."""
        self._routed = -1
        """The last layer of the step that has been, -1 before."""

    def begin_step(self, rows: Sequence[Rows]) -> None:
        if self._waiting:
            self.end_step()
        here = [row for row in rows if len(row.token_ids)]
        here = list({row.request_id: row for row in reversed(here)}.values())[::-1][: len(self._length_S)]
        now = {row.request_id for row in here}
        found, new = [], []
        for row in here:
            place, goes_on = self._seat(row, now)
            new.append(not goes_on)
            self._length_S[place] = row.start + len(row.token_ids)
            found.append((place, row.first, row.first + len(row.token_ids)))
        self._row_R3 = np.array(found, dtype=np.int64).reshape(-1, 3)
        self._new_R = np.array(new, dtype=bool)
        self._end = max((end for _, _, end in found), default=0)
        place_R, tokens_R1 = self._row_R3[:, 0], (self._row_R3[:, 2] - self._row_R3[:, 1])[:, None]
        faded_RH = self._decay_H**tokens_R1
        self._tokens_SH[place_R] = self._tokens_SH[place_R] * faded_RH + (1 - faded_RH) / (1 - self._decay_H)
        self._before_SN[place_R] = self._coming_SN[place_R]
        self._coming_SN[place_R] = 0
        self._total_LE[:] = self._scores_SLE[place_R].sum(0)
        self._waiting = set(range(self.model.layers))
        self._routed = -1

    def routed(self, layer: int, ids_TK: Array) -> None:
        if layer not in self._waiting:
            return
        self._waiting.remove(layer)
        self._routed = layer
        if len(self._row_R3):
            self._route(layer, ids_TK)

    def _route(self, layer: int, ids_TK: Array) -> None:
        ids_TK = np.ascontiguousarray(ids_TK, dtype=np.int64)
        if len(ids_TK) < self._end:  # the compiled loop would read beyond its end
            ids_TK = np.concatenate([ids_TK, np.full((self._end - len(ids_TK), ids_TK.shape[1]), -1)])
        if ids_TK.shape[1] != len(self._rank_K):
            self._rank_K = rank_weights(ids_TK.shape[1])
        route(
            layer,
            ids_TK,
            self._rank_K,
            self._row_R3,
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
            self._row_R3,
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

    def end_step(self) -> None:
        if not len(self._row_R3):
            self._waiting.clear()
            return
        for layer in sorted(self._waiting):  # that no router has chosen for: nothing was chosen there
            self._route(layer, np.full((self._end, len(self._rank_K)), -1))
        self._waiting.clear()
        score_all(self._row_R3, self._part_SLN, self._before_SN, self._own_SLE, self._scores_SLE, self._total_LE)

    def forget(self, request_id: str) -> None:
        place = self._place.pop(request_id, None)
        if place is None:
            return
        self._free.append(place)
        stays_R = self._row_R3[:, 0] != place
        self._row_R3, self._new_R = self._row_R3[stays_R], self._new_R[stays_R]
        self._total_LE[:] = self._scores_SLE[self._row_R3[:, 0]].sum(0)

    def future(self) -> Floats | None:
        """None while no sequence is followed."""
        return self._total_LE.copy() if len(self._row_R3) else None

    def upcoming(self, layer: int) -> Floats | None:
        """None for a layer that has been routed, while no sequence is followed, and without a `next_token`."""
        found = self.model.next_token
        if found is None or layer not in self._waiting or not len(self._row_R3):
            return None
        ahead = layer - self._routed
        if self._routed < 0 or not 0 < ahead <= found.depth:
            ahead = 0
        near, far = (layer - ahead, layer - ahead - 1) if ahead else (layer, -1)
        return chances(
            layer,
            near,
            far,
            self._row_R3,
            self._new_R,
            self._rank_K,
            found.mean_LE[layer],
            self._scores_SLE,
            self._last_SLE,
            found.weight_DLFE[ahead, layer],
            found.bias_DLE[ahead, layer],
            POINTS,
            found.chance_DB[ahead],
        )

    def _seat(self, row: Rows, now: set[str]) -> tuple[int, bool]:
        """Where the sequence is kept, and whether it goes on: one that begins or goes back has nothing there."""
        place = self._place.pop(row.request_id, None)
        goes_on = place is not None and 0 < self._length_S[place] <= row.start
        if place is None:
            if not self._free:
                longest = next(request for request in self._place if request not in now)
                self._free.append(self._place.pop(longest))
            place = self._free.pop()
        self._place[row.request_id] = place
        if not goes_on:
            for kept in (
                self._part_SLN,
                self._coming_SN,
                self._decayed_SLHE,
                self._tokens_SH,
                self._scores_SLE,
            ):
                kept[place] = 0
            self._last_SLE[place] = -1
        return place, goes_on
