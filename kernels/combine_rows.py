"""Weighted sums of each token's rows on a GPU, in the order of its top-k: no atomics, so the same sum every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 1024


@triton.jit
def combine_rows_kernel(y, position, weights, out, D: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """One token's COLUMNS columns per program."""
    t = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in range(TOP_K):
        row = tl.load(position + t * TOP_K + j).to(tl.int64)
        if row >= 0:
            weight = tl.load(weights + t * TOP_K + j).to(tl.float32)
            total += weight * tl.load(y + row * D + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * D + c, total.to(out.dtype.element_ty), mask=c < D)


def combine_rows(y_RD: torch.Tensor, position_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """out_TD[t] = sum over k, in that order, of weights[t, k] * y[position[t, k]], skipping positions of -1.

    The sum is in float32; out has y's dtype. position_TK is int32, as `route_tiles` gives it; all are contiguous.
    """
    tokens, top_k = position_TK.shape
    width = y_RD.shape[1]
    out_TD = y_RD.new_empty(tokens, width)
    if tokens:
        columns = min(_COLUMNS, triton.next_power_of_2(width))
        combine_rows_kernel[(tokens, triton.cdiv(width, columns))](
            y_RD, position_TK, weights_TK, out_TD, D=width, TOP_K=top_k, COLUMNS=columns
        )
    return out_TD
