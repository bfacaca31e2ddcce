"""A layer's experts for a handful of tokens on a GPU: each pair of a token and an expert on its own, without sorting.

So few rows do not fill a tile of the grouped GEMM, and two launches are all there is. Weights are read once for each
pair, not once for each expert.

T: tokens, K: places of a token's top-k, D: hidden size, I: expert width, S: slots, N: rows of the up projection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import Activation
from .grouped_gemm import activate, activate_gated

MOST_TOKENS = 4
"""Up to which `grouped_experts` comes here."""
ROWS, DEPTH = 8, 512
"""Rows of a weight that a program takes, and how much of each at a time: many programs, and each with several loads on
their way. Not tuned.
"""


@triton.jit
def _slot_of(ids, slots, pair, experts, HAS_SLOTS: tl.constexpr):
    """The slot of a pair's expert, -1 for none."""
    expert = tl.load(ids + pair)
    slot = tl.where((expert >= 0) & (expert < experts), expert, -1).to(tl.int32)
    if HAS_SLOTS:
        slot = tl.load(slots + tl.maximum(slot, 0), mask=slot >= 0, other=-1).to(tl.int32)
    return slot


@triton.jit
def _products(x, w, rows, K: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Dot products in float32 of the vector at x with these rows of K values at w."""
    k = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for done in range(0, K, DEPTH):
        inside = k < K - done
        a = tl.load(x + done + k, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(w + rows[:, None] * K + done + k[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        total += a[None, :] * b
    return tl.sum(total, 1)


@triton.jit
def pair_up_kernel(
    x,
    ids,
    slots,
    w,
    bias,
    h,
    x_stride,
    w_stride,
    experts,
    K: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """ROWS values of one pair's h per program."""
    pair = tl.program_id(0)
    slot = _slot_of(ids, slots, pair, experts, HAS_SLOTS).to(tl.int64)
    if slot < 0:
        return
    x += (pair // TOP_K).to(tl.int64) * x_stride
    w += slot * w_stride
    if HAS_BIAS:
        bias += slot * N
    WIDTH: tl.constexpr = N // 2 if GATED else N
    c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = c < WIDTH
    c = tl.where(live, c, 0)
    if GATED:
        gate_row = c * 2 if INTERLEAVED else c
        up_row = c * 2 + 1 if INTERLEAVED else c + WIDTH
        gate = _products(x, w, gate_row, K, ROWS, DEPTH)
        up = _products(x, w, up_row, K, ROWS, DEPTH)
        if HAS_BIAS:
            gate += tl.load(bias + gate_row).to(tl.float32)
            up += tl.load(bias + up_row).to(tl.float32)
        y = activate_gated(gate, up, KIND, ALPHA, LIMIT, SHIFT)
    else:
        gate = _products(x, w, c, K, ROWS, DEPTH)
        if HAS_BIAS:
            gate += tl.load(bias + c).to(tl.float32)
        y = activate(gate, KIND, ALPHA)
    tl.store(h + pair.to(tl.int64) * WIDTH + c, y.to(h.dtype.element_ty), mask=live)


@triton.jit
def pair_down_kernel(
    h,
    ids,
    slots,
    weights,
    w,
    bias,
    out,
    w_stride,
    experts,
    K: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """ROWS columns of one token's weighted sum over its experts, in top-k order, per program."""
    t = tl.program_id(0)
    c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = c < N
    c = tl.where(live, c, 0)
    total = tl.zeros((ROWS,), tl.float32)
    for j in range(TOP_K):
        pair = t * TOP_K + j
        slot = _slot_of(ids, slots, pair, experts, HAS_SLOTS).to(tl.int64)
        if slot >= 0:
            y = _products(h + pair.to(tl.int64) * K, w + slot * w_stride, c, K, ROWS, DEPTH)
            if HAS_BIAS:
                y += tl.load(bias + slot * N + c).to(tl.float32)
            total += tl.load(weights + pair).to(tl.float32) * y
    tl.store(out + t.to(tl.int64) * N + c, total.to(out.dtype.element_ty), mask=live)


def pair_experts(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_SND: torch.Tensor,
    down_SDI: torch.Tensor,
    activation: Activation,
    *,
    experts: int,
    up_bias_SN: torch.Tensor | None = None,
    down_bias_SD: torch.Tensor | None = None,
    slot_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """out_TD as of `grouped_experts`, which checks the tensors; any number of tokens, meant for few."""
    (tokens, top_k), hidden, width = ids_TK.shape, down_SDI.shape[1], down_SDI.shape[2]
    out_TD = x_TD.new_empty(tokens, hidden)
    if not tokens:
        return out_TD
    h_PI = x_TD.new_empty(tokens * top_k, width)
    act = activation
    pair_up_kernel[(tokens * top_k, triton.cdiv(width, ROWS))](
        x_TD, ids_TK, slot_E, up_SND, up_bias_SN, h_PI, x_TD.stride(0), up_SND.stride(0), experts,
        K=hidden, N=up_SND.shape[1], TOP_K=top_k, HAS_SLOTS=slot_E is not None, HAS_BIAS=up_bias_SN is not None,
        KIND=act.kind, GATED=act.gated, INTERLEAVED=act.interleaved, ALPHA=act.alpha, LIMIT=act.limit, SHIFT=act.shift,
        ROWS=ROWS, DEPTH=DEPTH,
    )  # fmt: skip
    pair_down_kernel[(tokens, triton.cdiv(hidden, ROWS))](
        h_PI, ids_TK, slot_E, weights_TK, down_SDI, down_bias_SD, out_TD, down_SDI.stride(0), experts,
        K=width, N=hidden, TOP_K=top_k, HAS_SLOTS=slot_E is not None, HAS_BIAS=down_bias_SD is not None,
        ROWS=ROWS, DEPTH=DEPTH,
    )  # fmt: skip
    return out_TD
