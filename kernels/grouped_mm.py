"""Grouped matrix product of rows sorted by expert, for many rows per expert: PyTorch's own GEMMs.

S: slots, R: rows, K: input width, N: output width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def grouped_mm(
    rows_RK: torch.Tensor,
    weight_SNK: torch.Tensor,
    counts_S: torch.Tensor,
    bias_SN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows [R, N]: row r times the weight (plus bias) of its slot; `counts_S[s]` consecutive rows belong to slot s.

    Rows beyond the sum of the counts come back undefined. On a CPU one GEMM per slot with rows; on a GPU one launch,
    without waiting for the counts on the host, where PyTorch has a grouped GEMM for the type.
    """
    if rows_RK.device.type == "cuda" and _has_grouped_mm(rows_RK):
        ends_S = counts_S.cumsum(0, dtype=torch.int32)
        out = F.grouped_mm(rows_RK, weight_SNK.transpose(-2, -1), offs=ends_S)
        if bias_SN is not None:
            slots_R = torch.searchsorted(ends_S, torch.arange(rows_RK.shape[0], device=rows_RK.device), right=True)
            out += bias_SN[slots_R.clamp_(max=bias_SN.shape[0] - 1)]
        return out
    out = rows_RK.new_empty(rows_RK.shape[0], weight_SNK.shape[1])
    start = 0
    for slot, count in enumerate(counts_S.tolist()):
        if count:
            end = start + count
            bias = bias_SN[slot] if bias_SN is not None else None
            if bias is None:
                torch.mm(rows_RK[start:end], weight_SNK[slot].t(), out=out[start:end])
            else:
                torch.addmm(bias, rows_RK[start:end], weight_SNK[slot].t(), out=out[start:end])
            start = end
    return out


def _has_grouped_mm(rows: torch.Tensor) -> bool:
    """PyTorch's grouped GEMM: bfloat16, from compute capability 8.0 on."""
    return (
        hasattr(F, "grouped_mm")
        and rows.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    )
