"""How good predictors of routing are on documents that they were not trained on: recall before the step, and what they
avoid of the misses when they choose which experts stay.

T: tokens, L: layers, E: experts of a layer, K: experts per token, S: sequences, D: documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..engine.next_use import NextUse
from ..engine.predict.path_network import KEPT, MOST_USES, PathNetwork
from ..engine.predict.path_training import BATCH, Windows
from ..scheduler.residency.compiled_replay import replay_compiled
from ..scheduler.residency.oracles import Belady
from ..scheduler.residency.policies import LRU, PredictedUse, default_policy
from ..scheduler.residency.replay import Tally, excess_closed, replay
from ..scheduler.residency.slots import Budget, Policy
from .replay import MARGIN
from .token_trace import TokenTrace

Array = npt.NDArray[Any]
HALF_LIVES, WEIGHTS = (4.0, 32.0), (1.0, 0.3)
"""Of the decayed counts: those of the default residency policy."""
SURE = 2.0
"""Standard errors of the difference between documents by which a recall must be better to count as better."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores:
    """What a predictor says. Row t of `before_TLE` is about token t, from what is known before its step; row t of
    `after_TLE` is what is worth keeping after it.
    """

    before_TLE: Array
    after_TLE: Array


@dataclass(frozen=True, eq=False, kw_only=True)
class Standing:
    """A predictor on the held-out documents. Recalls are those of each document."""

    name: str
    recall_D: Array
    """Share of the used experts that are among the K with the highest scores, before the step."""
    recall_double_D: Array
    """Among the 2 K."""
    misses: float
    """Per token, with a part of the experts resident."""
    copies: float
    excess: float
    """Share of LRU's misses over the least possible ones that are avoided."""

    @property
    def cost(self) -> float:
        """Misses per token, with a copy in the background for what it costs."""
        return self.misses + MARGIN * self.copies

    def beats(self, other: Standing) -> bool:
        """In recall, beyond what differs between documents by chance, and in cost."""
        gain_D = self.recall_D - other.recall_D
        error = float(gain_D.std(ddof=1)) / math.sqrt(len(gain_D)) if len(gain_D) > 1 else math.inf
        return float(gain_D.mean()) > SURE * error and self.cost < other.cost


# Scores


def decayed_scores(trace: TokenTrace) -> Scores:
    """Decayed counts of a sequence's own uses."""
    topk_TLK, experts = trace.topk_TLK, trace.experts
    keep_H11 = np.array([2 ** (-1 / half_life) for half_life in HALF_LIVES], dtype=np.float32)[:, None, None]
    weight_H11 = np.array(WEIGHTS, dtype=np.float32)[:, None, None]
    after_TLE = np.empty((len(topk_TLK), trace.layers, experts), dtype=np.float32)
    starts = set(trace.start_S.tolist())
    counts_HLE = np.zeros((len(HALF_LIVES), trace.layers, experts), dtype=np.float32)
    for t, ids_LK in enumerate(topk_TLK):
        counts_HLE *= 0 if t in starts else keep_H11
        layer_N, place_N = np.nonzero(ids_LK >= 0)
        counts_HLE[:, layer_N, ids_LK[layer_N, place_N]] += 1
        after_TLE[t] = (weight_H11 * counts_HLE).sum(0)
    return Scores(before_TLE=_shifted(after_TLE, trace), after_TLE=after_TLE)


def ridge_scores(next_use: NextUse, trace: TokenTrace) -> Scores:
    """Before a step the probabilities of its `next_token`, where it has one."""
    after_TLE = next_use.scores(trace.topk_TLK, trace.start_S)
    before_TLE = _shifted(after_TLE, trace)
    if next_use.next_token is not None:
        now_T = np.setdiff1d(np.arange(len(after_TLE)), trace.start_S)
        for layer in range(trace.layers):
            found_TE = next_use.next_token.chances(layer, 0, trace.topk_TLK, after_TLE, now_T)
            before_TLE[now_T, layer] = found_TE
    return Scores(before_TLE=before_TLE, after_TLE=after_TLE)


def path_scores(
    network: PathNetwork,
    trace: TokenTrace,
    token_T: Array | None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Scores:
    """Before a step with the token's id, if the network knows tokens; after it without the next one's."""
    windows = Windows(trace.topk_TLK, trace.start_S, trace.experts, token_T)
    next_TLE, unknown_TLE, later_TLE, rest_TLE = ([] for _ in range(4))
    for first in range(0, len(windows), BATCH):
        chosen_B = np.arange(first, min(first + BATCH, len(windows)))
        no_B = np.zeros(len(chosen_B), dtype=bool)
        known, unknown = (windows.batch(chosen_B, not_told_B, no_B, no_B) for not_told_B in (no_B, ~no_B))
        with torch.inference_mode():
            known_B2LE, unknown_B2LE = (torch.sigmoid(network(*b.inputs)).numpy() for b in (known, unknown))
        next_TLE.append(known_B2LE[:, 0])
        rest_TLE.append(known_B2LE[:, 1] * MOST_USES)
        unknown_TLE.append(unknown_B2LE[:, 0])
        later_TLE.append(unknown_B2LE[:, 1] * MOST_USES)
        progress(len(known_B2LE))
    after_TLE = np.empty((len(trace.topk_TLK), trace.layers, trace.experts), dtype=np.float32)
    after_TLE[:-1] = (np.concatenate(unknown_TLE) + np.float32(KEPT) * np.concatenate(later_TLE))[1:]
    last_S = trace.end_S - 1  # the next row is of another sequence
    after_TLE[last_S] = np.concatenate(rest_TLE)[last_S]
    return Scores(before_TLE=np.concatenate(next_TLE), after_TLE=after_TLE)


def _shifted(after_TLE: Array, trace: TokenTrace) -> Array:
    """What was said after the token before; nothing of a sequence's first one."""
    before_TLE = np.roll(after_TLE, 1, axis=0)
    before_TLE[trace.start_S] = 0
    return before_TLE


# Standings


def recalls(before_TLE: Array, trace: TokenTrace, document_S: Array, wide: int) -> Array:
    """[D] of each document: the share of the used experts that are among the `wide` * K best. A sequence's first
    token does not count, for nothing is known before it.
    """
    counted_T = np.ones(len(trace.topk_TLK), dtype=bool)
    counted_T[trace.start_S] = False
    wanted = min(wide * trace.topk_TLK.shape[2], trace.experts)
    best_TLW = np.argpartition(-before_TLE, wanted - 1, axis=-1)[..., :wanted]
    chosen_TLE = np.zeros(before_TLE.shape, dtype=bool)
    np.put_along_axis(chosen_TLE, best_TLW, True, axis=-1)
    ids_TLK = trace.topk_TLK.astype(np.int64)
    used_TLK = ids_TLK >= 0
    found_TLK = np.take_along_axis(chosen_TLE, np.maximum(ids_TLK, 0), axis=-1) & used_TLK
    document_T = np.repeat(document_S, trace.end_S - trace.start_S)
    found_T, used_T = found_TLK.sum((1, 2)) * counted_T, used_TLK.sum((1, 2)) * counted_T
    documents = np.unique(document_S)
    return np.array([found_T[document_T == d].sum() / max(1, used_T[document_T == d].sum()) for d in documents])


class Judge:
    """The held-out documents, with the replays that all predictors are compared to."""

    def __init__(
        self, trace: TokenTrace, document_S: Array, resident: float, progress: Callable[[int], object]
    ) -> None:
        self._trace, self._document_S, self._progress = trace, document_S, progress
        top_k, slots = trace.topk_TLK.shape[2], max(1, round(resident * trace.layers * trace.experts))
        self._budget = Budget(
            layers=trace.layers, experts=trace.experts, slots=slots, floor=min(top_k, slots // trace.layers)
        )
        self._lru = self._replayed(LRU(self._budget))
        self._least = self._replayed(Belady(self._budget, trace.topk_TLK, bypass=True))

    def decayed(self) -> Standing:
        """The baseline that every engine has: decayed counts, and the policy that goes by them."""
        tally = self._replayed(default_policy(self._budget))
        return self._standing("decayed counts", decayed_scores(self._trace), tally)

    def _replayed(self, policy: Policy) -> Tally:
        tally = replay_compiled(policy, self._trace.topk_TLK)
        if tally is None:
            return replay(policy, self._trace.topk_TLK, progress=self._progress)
        self._progress(tally.steps)
        return tally

    def standing(self, name: str, scores: Scores) -> Standing:
        policy = PredictedUse(self._budget, MARGIN)
        tally = replay(policy, self._trace.topk_TLK, lambda step: scores.after_TLE[step], progress=self._progress)
        return self._standing(name, scores, tally)

    def _standing(self, name: str, scores: Scores, tally: Tally) -> Standing:
        return Standing(
            name=name,
            recall_D=recalls(scores.before_TLE, self._trace, self._document_S, 1),
            recall_double_D=recalls(scores.before_TLE, self._trace, self._document_S, 2),
            misses=tally.misses / tally.steps,
            copies=tally.copies / tally.steps,
            excess=excess_closed(tally.misses, self._lru.misses, self._least.misses),
        )
