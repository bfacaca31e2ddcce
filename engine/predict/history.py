"""Predictors that need no training: decayed counts, and which experts go together from layer to layer.

S: sequences that are followed, R: those of the step, T: tokens, L: layers, E: experts of a layer, K: experts per token,
H: half-lives, D: layers ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Array, Floats, Predictor, Rows
from .counting import any_of, count_layer, count_pairs, joined, rates
from .followed import Followed

SEQUENCES = 128
"""That are followed at most."""
HALF_LIVES, WEIGHTS = (4.0, 32.0), (1.0, 0.3)
"""In tokens, and what a use counts with each: as in the residency policy that goes by counts (`default_policy`)."""
PRIOR_TOKENS = 4.0
"""A sequence's rates are drawn to those of all text as if it had had so many tokens of it, which count 1."""
FUTURE_HALF_LIFE = 3.0
"""Of discounted uses, in tokens, as in `NextUse`."""
MEMORY_TOKENS = 8192
"""Counts of all text are halved whenever they are of so many."""
DEPTH = 4
"""Layers from which co-activation looks ahead."""
PAIR_PRIOR = 8.0
"""Uses of an expert as if those with it in other layers had been even."""


class DecayedCounts(Predictor):
    """How often a sequence has used each expert of late: counts that halve after half-lives, over as many tokens.

    A sequence that begins has the rates of all text so far. Keeps (4 * H + 4) * L * E bytes for each of at most
    `sequences` and 4 * L * E: 1.2 MB with 128 sequences for 24 layers of 32 experts, 9.4 MB for 48 of 128.
    """

    name = "counts"

    def __init__(self, layers: int, experts: int, sequences: int = SEQUENCES) -> None:
        for name, value in (("layers", layers), ("experts", experts)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.layers, self.experts = layers, experts
        self._followed = Followed(sequences)
        self._decay_H = 2.0 ** (-1.0 / np.array(HALF_LIVES))
        self._weight_H = np.array(WEIGHTS, dtype=np.float32)
        self._decayed_SLHE = np.zeros((sequences, layers, len(HALF_LIVES), experts), dtype=np.float32)
        self._tokens_SLH = np.zeros((sequences, layers, len(HALF_LIVES)))
        self._rate_SLE = np.zeros((sequences, layers, experts), dtype=np.float32)
        self._total_LE = np.zeros((layers, experts), dtype=np.float32)
        self._others_LE = np.zeros_like(self._total_LE)
        """Of sequences that are followed and not in the step."""
        self._used_LE = np.zeros((layers, experts), dtype=np.float32)
        """By all sequences."""
        self._tokens_L = np.zeros(layers)
        self._counts = (self._decayed_SLHE, self._tokens_SLH, self._used_LE, self._tokens_L)
        self._waiting: set[int] = set()
        """Layers of the running step that have not been routed."""

    def begin_step(self, rows: Sequence[Rows]) -> None:
        self._followed.begin(rows)
        place_R, new_R = self._followed.place_R, self._followed.new_R
        if new_R.any():
            for kept in (self._decayed_SLHE, self._tokens_SLH, self._rate_SLE):
                kept[place_R[new_R]] = 0
        self._sum()
        self._waiting = set(range(self.layers))

    def routed(self, layer: int, ids_TK: Array) -> None:
        if layer not in self._waiting or not len(self._followed):
            return
        self._waiting.remove(layer)
        self._count(layer, self._followed.checked(ids_TK))

    def _count(self, layer: int, ids_TK: Array) -> None:
        """`ids_TK` have all the step's rows."""
        count_layer(layer, ids_TK, self._followed.row_R3, self._decay_H, *self._counts)
        rate_RE = self._rates(layer)
        self._rate_SLE[self._followed.place_R, layer] = rate_RE
        self._total_LE[layer] = rate_RE.sum(0)

    def end_step(self) -> None:
        if self._tokens_L.max() > MEMORY_TOKENS:
            self._age()

    def _age(self) -> None:
        self._used_LE /= 2
        self._tokens_L /= 2

    def _rates(self, layer: int) -> Floats:
        """[R, E] uses per token."""
        return rates(layer, self._followed.row_R3, self._weight_H, PRIOR_TOKENS, *self._counts)

    def _sum(self) -> None:
        self._total_LE[:] = self._rate_SLE[self._followed.place_R].sum(0)
        self._others_LE[:] = self._rate_SLE[self._followed.others].sum(0)

    def forget(self, request_id: str) -> None:
        if self._followed.forget(request_id):
            self._sum()

    def upcoming(self, layer: int) -> Floats | None:
        """None for a layer that has been routed, while no sequence is followed, and before any routing."""
        if layer not in self._waiting or not len(self._followed) or not self._tokens_L[layer]:
            return None
        return any_of(self._rates(layer), self._followed.row_R3)

    def future(self) -> Floats | None:
        """As if the rates would stay, also of those that wait for their turn. None while no sequence of the step is
        followed.
        """
        if not len(self._followed):
            return None
        return (self._total_LE + self._others_LE) / np.float32(1 - 2.0 ** (-1.0 / FUTURE_HALF_LIFE))

    def next_of(self, request_id: str) -> Floats | None:
        """Its rates after its last token. None for a sequence that is not followed."""
        place = self._followed.place_of(request_id)
        return None if place is None else self._rate_SLE[place].copy()


class Coactivation(DecayedCounts):
    """Which experts of a layer go with those of the layers before it, counted while it runs.

    The odds of a sequence's own rates are multiplied by what each expert that its token has chosen, in the nearest
    layer before, made of the odds in all text so far. The K experts of a layer tell much of the same: each
    factor counts to the power of 1 / sqrt(K).

    Beside what `DecayedCounts` keeps, 4 * D * L * E * E bytes: 393 KB for 24 layers of 32 experts, 12.6 MB for 48 of
    128.
    """

    name = "coactivation"

    def __init__(self, layers: int, experts: int, sequences: int = SEQUENCES) -> None:
        super().__init__(layers, experts, sequences)
        self._together_LDEE = np.zeros((layers, DEPTH, experts, experts), dtype=np.float32)
        """Tokens that used an expert in the layer (last), and one so many layers before it."""
        self._ids: dict[int, Array] = {}
        """Of the step's last layers, all its rows."""

    def begin_step(self, rows: Sequence[Rows]) -> None:
        super().begin_step(rows)
        self._ids.clear()

    def _count(self, layer: int, ids_TK: Array) -> None:
        for before, before_TK in self._ids.items():
            if 0 < layer - before <= DEPTH:
                together_EE = self._together_LDEE[layer, layer - before - 1]
                count_pairs(self._followed.row_R3, before_TK, ids_TK, together_EE)
        self._ids[layer] = ids_TK
        self._ids.pop(layer - DEPTH, None)
        super()._count(layer, ids_TK)

    def _age(self) -> None:
        super()._age()
        self._together_LDEE /= 2

    def upcoming(self, layer: int) -> Floats | None:
        """As `DecayedCounts`, and None while no layer of the step's last ones has been routed."""
        near = max((before for before in self._ids if before < layer), default=-DEPTH - 1)
        ahead = layer - near
        if layer not in self._waiting or ahead > DEPTH or not self._tokens_L[layer] or not len(self._followed):
            return None
        of_all_E = self._used_LE[layer] / self._tokens_L[layer]
        together_EE, row_R3 = self._together_LDEE[layer, ahead - 1], self._followed.row_R3
        chance_RE = joined(
            self._rates(layer), row_R3, self._ids[near], self._used_LE[near], together_EE, of_all_E, PAIR_PRIOR
        )
        return any_of(chance_RE, row_R3)
