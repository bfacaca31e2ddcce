"""Recorded routing through a residency policy, compiled: what `replay` counts, some ten times as fast, for the policies
whose values are simple enough.

T: steps, L: layers, K: experts per token, E: experts of a layer, H: half-lives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from .filling import add_uses, fill
from .oracles import Belady
from .policies import LRU, DecayedFrequency
from .replay import Tally
from .slots import Policy

Array = npt.NDArray[Any]

_RECENT, _FREQUENT, _FUTURE = range(3)
_KINDS: dict[type[Policy], int] = {LRU: _RECENT, DecayedFrequency: _FREQUENT, Belady: _FUTURE}
"""Of these alone: what is made of them may do something else."""


def replay_compiled(policy: Policy, topk_TLK: Array, warm_up: int = 0) -> Tally | None:
    """As `replay.replay` of a policy that has seen nothing yet, which is left as it is; None for one that only Python
    can run. Raises ValueError for a trace of other layers or experts than the policy's budget.
    """
    kind = _KINDS.get(type(policy))
    if kind is None:
        return None
    budget, none = policy.budget, np.zeros(0)
    if topk_TLK.shape[1] != budget.layers:
        raise ValueError(f"the trace has {topk_TLK.shape[1]} layers; the budget has {budget.layers}")
    if topk_TLK.size and topk_TLK.max() >= budget.experts:
        raise ValueError(f"experts are 0 to {topk_TLK.max()}; the budget has 0 to {budget.experts - 1}")
    decay_H = np.array(policy._decay_H) if isinstance(policy, DecayedFrequency) else none
    weight_H = policy._weights_H if isinstance(policy, DecayedFrequency) else none
    next_TLK = policy._future._next_TLK if isinstance(policy, Belady) else np.zeros((0, 0, 0), dtype=np.int64)
    hits, misses, copies, used = _replay(
        topk_TLK.astype(np.int64),
        next_TLK,
        kind,
        (budget.experts, budget.slots, budget.floor),
        budget.shared,
        float(policy._margin),
        decay_H,
        weight_H,
        warm_up,
    )
    return Tally(steps=len(topk_TLK) - warm_up, hits=hits, misses=misses, copies=copies, used=used)


@njit(cache=True)
def _replay(
    topk_TLK: Array,
    next_TLK: Array,
    kind: int,
    budget: tuple[int, int, int],
    shared: bool,
    margin: float,
    decay_H: Array,
    weight_H: Array,
    warm_up: int,
) -> tuple[int, int, int, int]:
    """Hits, misses, copies and used copies. What is done, and in which order, is `Policy.step`'s."""
    experts, slots, floor = budget
    steps, layers, top_k = topk_TLK.shape
    resident_LE = np.zeros((layers, experts), dtype=np.bool_)
    keep_LE = np.zeros((layers, experts), dtype=np.bool_)
    fresh_LE = np.zeros((layers, experts), dtype=np.bool_)
    count_L = np.zeros(layers, dtype=np.int64)
    decayed_HLE = np.zeros((len(decay_H), layers, experts))
    values_LE = np.full((layers, experts), -1.0 if kind == _RECENT else 0.0)
    if kind == _FUTURE:
        values_LE[:] = -float(np.iinfo(np.int64).max // 4)
    need_K = np.empty(top_k, dtype=np.int64)
    missed_K = np.empty(top_k, dtype=np.int64)
    layer_K = np.empty(top_k, dtype=np.int64)
    hits = misses = copies = used = events = 0
    for step in range(steps):
        if step == warm_up:
            hits = misses = copies = used = 0
            fresh_LE[:] = False
        if step:
            for h in range(len(decay_H)):
                for layer in range(layers):
                    for e in range(experts):
                        decayed_HLE[h, layer, e] *= decay_H[h]
        for layer in range(layers):
            needed = 0
            for k in range(top_k):  # in ascending order, each once
                expert = topk_TLK[step, layer, k]
                at = needed
                while at > 0 and need_K[at - 1] > expert:
                    at -= 1
                if expert < 0 or (at > 0 and need_K[at - 1] == expert):
                    continue
                for later in range(needed, at, -1):
                    need_K[later] = need_K[later - 1]
                need_K[at] = expert
                needed += 1
            if not needed:
                continue
            missed = 0
            for k in range(needed):
                expert = need_K[k]
                if resident_LE[layer, expert]:
                    hits += 1
                    used += fresh_LE[layer, expert]
                    fresh_LE[layer, expert] = False
                else:
                    missed_K[missed] = expert
                    layer_K[missed] = layer
                    missed += 1
            misses += missed
            events += 1
            if kind == _RECENT:
                for k in range(needed):
                    values_LE[layer, need_K[k]] = events
            elif kind == _FREQUENT:
                add_uses(decayed_HLE, layer, need_K[:needed], weight_H)
            else:
                for k in range(top_k):
                    expert = topk_TLK[step, layer, k]
                    if expert >= 0:
                        values_LE[layer, expert] = -float(next_TLK[step, layer, k])
            if not missed or not slots:
                continue
            first, end = (0, layers) if shared else (layer, layer + 1)
            if kind == _FREQUENT:
                for at in range(first, end):
                    for e in range(experts):
                        value = decayed_HLE[0, at, e]
                        for h in range(1, len(decay_H)):
                            value += decayed_HLE[h, at, e]
                        values_LE[at, e] = value
            for k in range(needed):
                keep_LE[layer, need_K[k]] = True
            changes = fill(
                values_LE[first:end],
                first,
                resident_LE,
                keep_LE,
                count_L,
                slots,
                floor,
                margin,
                layer_K[:missed],
                missed_K[:missed],
            )
            for k in range(needed):
                keep_LE[layer, need_K[k]] = False
            for m in range(len(changes)):
                if changes[m, 2] >= 0:
                    fresh_LE[changes[m, 2], changes[m, 3]] = False
            for m in range(len(changes)):
                fresh_LE[changes[m, 0], changes[m, 1]] = True
            copies += len(changes)
    return hits, misses, copies, used
