"""Trains the routing-path network on recorded routing.

A batch is some short windows of consecutive tokens. What came before a window, and what is used after it, is kept for
each window and brought up to date token by token within it, so that the memory does not grow with all experts of all
tokens. In a part of the windows the network is not told the next token's id, and in another part it knows the routing
only up to the window's begin, as for a prompt.

T: tokens, B: windows, M: tokens of a window, L: layers, E: experts of a layer, K: experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..routing_history import RATE_HALF_LIVES, rate_roots
from .base import Array
from .path_network import HIDDEN, KEPT, MOST_USES, WINDOW, PathNetwork, PathShape

EPOCHS = 8
LENGTH, BATCH = 16, 16
"""Tokens of a window, windows of a batch."""
RATE, DECAY, DROPOUT, CLIP = 2e-3, 0.05, 0.2, 1.0
"""Of AdamW, of its weights, of inputs and hidden units, of the gradients' norm."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate grows; then it falls."""
UNKNOWN, STALE = 0.35, 0.15
"""Shares of the windows in which the next token's id is not told, and in which the routing is that of the begin."""
EMPTY = 0.3
"""Share of these in which there is none at all, as at the begin of a prompt."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of the network for B * M rows and what it is to say: `used` [rows, 2, L, E] by the next token, and the
    share of all possible discounted uses after it.
    """

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    used: torch.Tensor


class Windows:
    """A recording cut into windows that never cross from one sequence into another.

    Row m of a window is about its token m: the state before that token, the token's id, which experts it uses, and the
    discounted uses after it.
    """

    def __init__(self, topk_TLK: Array, start_S: Array, experts: int, token_T: Array | None = None) -> None:
        self._topk_TLK = topk_TLK
        self._token_T = np.full(len(topk_TLK), -1) if token_T is None else np.asarray(token_T, dtype=np.int64)
        tokens, layers, top_k = topk_TLK.shape
        self._even = top_k / experts
        self._keep_H11 = np.array([2.0 ** (-1 / half) for half in RATE_HALF_LIVES], dtype=np.float32)[:, None, None]
        ends_S = np.append(start_S[1:], tokens).tolist()
        spans = [
            (begin, min(begin + LENGTH, end), start, end)
            for start, end in zip(start_S.tolist(), ends_S, strict=True)
            for begin in range(start, end, LENGTH)
        ]
        self._begin_B, self._end_B, self._first_B = (np.array(part) for part in list(zip(*spans, strict=True))[:3])
        self._past_BHLE = np.zeros((len(spans), len(RATE_HALF_LIVES), layers, experts), dtype=np.float16)
        self._later_BLE = np.zeros((len(spans), layers, experts), dtype=np.float16)
        past_HLE = np.zeros(self._past_BHLE.shape[1:], dtype=np.float32)
        for i, (begin, end, start, _) in enumerate(spans):
            if begin == start:
                past_HLE[:] = 0
            self._past_BHLE[i] = past_HLE
            for ids_LK in topk_TLK[begin:end]:
                past_HLE *= self._keep_H11
                _count(past_HLE, ids_LK)
        later_LE = np.zeros((layers, experts), dtype=np.float32)
        for i, (begin, end, _, stop) in reversed(list(enumerate(spans))):
            if end == stop:
                later_LE[:] = 0
            self._later_BLE[i] = later_LE
            for ids_LK in topk_TLK[begin:end][::-1]:
                later_LE *= np.float32(KEPT)
                _count(later_LE, ids_LK)

    def __len__(self) -> int:
        return len(self._begin_B)

    def batch(self, chosen_B: Array, unknown_B: Array, stale_B: Array, empty_B: Array) -> Batch:
        """Rows of some windows, those beyond a sequence's end left out.

        Args:
            unknown_B: whether the next token's id is not told.
            stale_B, empty_B: whether the routing is known up to the window's begin only, and whether not at all.
        """
        at_BM = self._begin_B[chosen_B, None] + np.arange(LENGTH)
        valid_BM = at_BM < self._end_B[chosen_B, None]
        at_BM = np.minimum(at_BM, len(self._topk_TLK) - 1)
        place_BM = at_BM - self._first_B[chosen_B, None]
        past_BHLE = self._past_BHLE[chosen_B].astype(np.float32)
        later_BLE = self._later_BLE[chosen_B].astype(np.float32)
        used_BMLE = np.zeros((*at_BM.shape, *later_BLE.shape[1:]), dtype=np.float32)
        b_N, m_N, layer_N, k_N = np.nonzero((self._topk_TLK[at_BM] >= 0) & valid_BM[:, :, None, None])
        used_BMLE[b_N, m_N, layer_N, self._topk_TLK[at_BM[b_N, m_N], layer_N, k_N]] = 1
        past_BMHLE = np.empty((*at_BM.shape, *past_BHLE.shape[1:]), dtype=np.float32)
        target_BM2LE = np.empty((*at_BM.shape, 2, *later_BLE.shape[1:]), dtype=np.float32)
        target_BM2LE[:, :, 0] = used_BMLE
        for m in range(LENGTH):
            past_BMHLE[:, m] = past_BHLE
            past_BHLE = past_BHLE * self._keep_H11 + used_BMLE[:, m, None]
        for m in reversed(range(LENGTH)):
            target_BM2LE[:, m, 1] = later_BLE / np.float32(MOST_USES)
            later_BLE = np.where(valid_BM[:, m, None, None], later_BLE * np.float32(KEPT) + used_BMLE[:, m], later_BLE)

        past_BMHLE = np.where(stale_B[:, None, None, None, None], past_BMHLE[:, :1], past_BMHLE)
        past_BMHLE[empty_B] = 0
        known_BM = np.where(stale_B[:, None], place_BM[:, :1], place_BM)  # tokens whose routing is known
        known_BM[empty_B] = 0
        state_BM = at_BM - place_BM + known_BM  # the token after them
        tokens_BMW = np.stack(
            [np.where(place_BM >= w, self._token_T[np.maximum(at_BM - w, 0)], -1) for w in range(WINDOW)], axis=-1
        )
        tokens_BMW[:, :, 0][unknown_B] = -1
        roots_RHLE = rate_roots(past_BMHLE[valid_BM], known_BM[valid_BM], self._even)
        last_RLK, previous_RLK = (
            np.where(
                (known_BM >= back)[valid_BM][:, None, None],
                self._topk_TLK[np.maximum(state_BM - back, 0)[valid_BM]],
                -1,
            ).astype(np.int64)
            for back in (1, 2)
        )
        parts = (last_RLK, previous_RLK, roots_RHLE, tokens_BMW[valid_BM])
        last, previous, roots, tokens = (torch.from_numpy(part) for part in parts)
        return Batch((last, previous, roots, tokens), torch.from_numpy(target_BM2LE[valid_BM]))


def train(
    topk_TLK: Array,
    start_S: Array,
    experts: int,
    *,
    token_T: Array | None = None,
    vocab: int = 0,
    epochs: int = EPOCHS,
    hidden: int = HIDDEN,
    digest: str = "",
    seed: int = 0,
    progress: Callable[[int], object] = lambda tokens: None,
) -> PathNetwork:
    """A network for a model, from a recording: ids in the order of the router's weights, -1 for none.

    Without `token_T` [T] and `vocab` it goes by the routing alone. `progress` is told numbers of tokens, in all
    `epochs` times the recording's. Raises ValueError for ids that are not experts or tokens.
    """
    tokens, layers, top_k = topk_TLK.shape
    if topk_TLK.max() >= experts or topk_TLK.min() < -1:
        raise ValueError(f"topk has ids from {topk_TLK.min()} to {topk_TLK.max()}; there are {experts} experts")
    if token_T is not None and (len(token_T) != tokens or token_T.min() < 0 or token_T.max() >= vocab):
        raise ValueError(f"token_ids must be {tokens} numbers from 0 to {vocab - 1}")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1")
    windows = Windows(topk_TLK, start_S, experts, token_T)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vocab = vocab if token_T is not None else 0
        shape = PathShape(layers=layers, experts=experts, top_k=top_k, vocab=vocab)
        network = PathNetwork(shape, hidden=hidden, digest=digest).train()
        with torch.no_grad():  # begin with how often each expert is used
            share_LE = np.zeros((layers, experts), dtype=np.float32)
            for ids_LK in topk_TLK:
                _count(share_LE, ids_LK)
            network.head.bias.copy_(
                torch.from_numpy(share_LE / tokens).clamp(1e-4, 1 - 1e-4).logit().flatten().repeat(2)
            )
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
        steps = epochs * -(-len(windows) // BATCH)
        for step, chosen_B in enumerate(_shuffled(len(windows), epochs, rng)):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / (WARM_UP * steps)) * (1 - step / steps)
            unknown_B, stale_B = rng.random(len(chosen_B)) < UNKNOWN, rng.random(len(chosen_B)) < STALE
            empty_B = stale_B & (rng.random(len(chosen_B)) < EMPTY)
            batch = windows.batch(chosen_B, unknown_B, stale_B, empty_B)
            logits = network(*batch.inputs, dropout=DROPOUT)
            loss = 2 * functional.binary_cross_entropy_with_logits(logits, batch.used)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            progress(len(batch.used))
    return network.eval()


def _shuffled(count: int, epochs: int, rng: np.random.Generator) -> Iterator[Array]:
    for _ in range(epochs):
        order = rng.permutation(count)
        for first in range(0, count, BATCH):
            yield order[first : first + BATCH]


def _count(uses_LE: Array, ids_LK: Array) -> None:
    """Adds a token's experts to [..., L, E]."""
    layer_N, place_N = np.nonzero(ids_LK >= 0)
    uses_LE[..., layer_N, ids_LK[layer_N, place_N]] += 1
