"""Experts one after the other on a CPU, for many rows per expert: two GEMMs each, on rows gathered just before.

D: hidden size, I: expert width, S: slots, R: rows sorted by slot, T: tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .quantised import QuantisedMatrix, QuantisedStack

_Matrix = torch.Tensor | QuantisedMatrix

_ROWS_STEP = 16
"""oneDNN makes and keeps a primitive for each distinct number of rows (about a megabyte and a millisecond each), so
that rows are padded to a multiple of this; MKL, which takes float32, does not.
"""
_LEAST_ROWS = 2
"""MKL multiplies a single row in an order that depends on where the weight is in memory."""


def expert_loop(
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    counts_S: torch.Tensor,
    up_SND: torch.Tensor | QuantisedStack | Sequence[_Matrix | Sequence[_Matrix]],
    down_SDI: torch.Tensor | QuantisedStack | Sequence[_Matrix],
    gate: Callable[[torch.Tensor], torch.Tensor],
    up_bias_SN: torch.Tensor | Sequence[torch.Tensor] | None = None,
    down_bias_SD: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    panels: bool = False,
) -> torch.Tensor:
    """Rows y_RD = down(gate(up(x[token]))), where `counts_S[s]` consecutive rows belong to slot s.

    `gate` maps [rows, N] to [rows, I]. Weights are one tensor over slots, or one for each slot, whose I may differ. The
    first of a slot may also be blocks of rows, without biases.
    Only one expert's rows are in memory between the two products, and of quantised weights one plain matrix. With
    `panels` these are `many_linear`'s, for whole tensors of up that it `fits`, and token_R is int32.
    """
    if panels:
        return _panel_loop(x_TD, token_R, counts_S, up_SND, down_SDI, gate, up_bias_SN, down_bias_SD)
    step = 1 if x_TD.dtype == torch.float32 else _ROWS_STEP
    # A padded expert writes past its rows; the next one, or nobody, overwrites that.
    y_RD = x_TD.new_empty(token_R.shape[0] + max(step, _LEAST_ROWS) - 1, down_SDI[0].shape[0])
    start = 0
    for slot, count in enumerate(counts_S.tolist()):
        if not count:
            continue
        padded = max(-(-count // step) * step, _LEAST_ROWS)
        tokens = token_R[start : start + padded]
        if tokens.shape[0] < padded:
            tokens = F.pad(tokens, (0, padded - tokens.shape[0]))
        up_bias = up_bias_SN[slot] if up_bias_SN is not None else None
        h = gate(_up(x_TD.index_select(0, tokens), up_SND[slot], up_bias))
        out = y_RD[start : start + padded]
        if down_bias_SD is None:
            torch.mm(h, plain(down_SDI[slot], h.dtype).t(), out=out)
        else:
            torch.addmm(down_bias_SD[slot], h, plain(down_SDI[slot], h.dtype).t(), out=out)
        start += count
    return y_RD[: token_R.shape[0]]


def _up(x_RD: torch.Tensor, up: _Matrix | Sequence[_Matrix], bias_N: torch.Tensor | None) -> torch.Tensor:
    blocks = [up] if isinstance(up, _Matrix) else up
    if len(blocks) == 1:
        return F.linear(x_RD, plain(blocks[0], x_RD.dtype), bias_N)
    assert bias_N is None
    return torch.cat([F.linear(x_RD, plain(block_ND, x_RD.dtype)) for block_ND in blocks], 1)


def plain(weight: _Matrix, dtype: torch.dtype) -> torch.Tensor:
    """A weight as a tensor of `dtype`, which plain ones are already."""
    if isinstance(weight, torch.Tensor):
        return weight
    from .quantised_linear import dequantise

    return dequantise(weight, dtype)


def _panel_loop(
    x_TD: torch.Tensor, token_R: torch.Tensor, counts_S: torch.Tensor, up: Any, down: Any, gate: Any, *biases: Any
) -> torch.Tensor:
    from .many_rows import many_linear

    y_RD = x_TD.new_empty(token_R.shape[0], down[0].shape[0])
    start = 0
    for slot, count in enumerate(counts_S.tolist()):
        if count:
            up_bias, down_bias = (bias[slot] if bias is not None else None for bias in biases)
            h = gate(many_linear(x_TD, up[slot], up_bias, token_R[start : start + count])).contiguous()
            y_RD[start : start + count] = many_linear(h, down[slot], down_bias)
            start += count
    return y_RD
