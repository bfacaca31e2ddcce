"""Gated experts that are anywhere in memory, by the addresses of their weights: both products of each one's rows.

What `grouped_gate_up_silu` and `grouped_linear` do for lists of tensors, for callers to whom an expert comes many
times: its tensors are looked at once.

G: groups, one for each expert, K: hidden size, I: width of an expert, R: rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import address, check_rows, check_tensor
from .compiled import run, workers_for
from .grouped_linear import FEW_ROWS, Way
from .tile import kind_of


@dataclass(frozen=True, slots=True)
class ListedExpert:
    """Where an expert's gate and up ([I, K] each) and its down ([K, I]) begin. Who has it keeps them alive."""

    gate: int
    up: int
    down: int
    hidden: int
    width: int
    dtype: torch.dtype


def listed_expert(up_PIK: Sequence[torch.Tensor], down_KI: torch.Tensor) -> ListedExpert:
    """Of contiguous tensors on the CPU: gate and up apart or one after the other, and down. ValueError for others."""
    hidden, width = down_KI.shape
    dtype = down_KI.dtype
    for block in up_PIK:
        check_tensor("up_PIK", block, (2 * width // len(up_PIK), hidden), dtype)
    check_tensor("down_KI", down_KI, (hidden, width), dtype)
    gate = up_PIK[0].data_ptr()
    up = up_PIK[1].data_ptr() if len(up_PIK) > 1 else gate + width * hidden * dtype.itemsize
    return ListedExpert(gate, up, down_KI.data_ptr(), hidden, width, dtype)


def listed_swiglu(
    x_TK: torch.Tensor,
    experts: Sequence[ListedExpert],
    starts: Sequence[int],
    row_index_R: torch.Tensor,
    out_RK: torch.Tensor,
    way: Way = FEW_ROWS,
) -> None:
    """Writes rows starts[g] to starts[g + 1], which are x[row_index] through expert g: (silu(gate x) * up x) down.

    float32 or bfloat16 on the CPU, accumulated in float32; `row_index_R` is int32, `out_RK` contiguous. `way` is as in
    `grouped_linear`. ValueError for what does not fit together.
    """
    first, rows, groups = experts[0], starts[-1], len(experts)
    n, k, dtype = first.width, first.hidden, x_TK.dtype
    if any((e.width, e.hidden, e.dtype) != (n, k, dtype) for e in experts):
        raise ValueError(f"experts: all must be of {n} by {k} in {dtype}, as the rows are")
    if len(starts) != groups + 1 or starts[0]:
        raise ValueError(f"starts: {groups + 1} numbers from 0 are needed for {groups} experts, not {list(starts)}")
    check_rows("x_TK", x_TK, (x_TK.shape[0], k), dtype)
    check_tensor("row_index_R", row_index_R, (rows,), torch.int32)
    check_tensor("out_RK", out_RK, (rows, k), dtype)
    if not rows:
        return
    h_RI = x_TK.new_empty(rows, n)
    size = dtype.itemsize
    begins, ups, downs = array("i", starts), array("q"), array("q")
    for e in experts:
        ups.extend((e.gate, e.up))
        downs.append(e.down)
    for columns in (n, k):
        if columns * size % way.unit:
            raise ValueError(f"experts: {columns} columns of {dtype} are not a whole number of {way.unit} bytes")
    kind, at, product = kind_of(dtype), begins.buffer_info()[0], way.product.address
    workers = workers_for(2 * n * k * size * groups)
    room = torch.empty(workers * way.room + 63, dtype=torch.uint8) if way.room else None
    run(
        workers, way.gate_up, product, kind, x_TK.data_ptr(), x_TK.stride(0) * size, row_index_R.data_ptr(),
        groups, at, 0, ups.buffer_info()[0], 0, n, k, h_RI.data_ptr(), address(room),
    )  # fmt: skip
    run(
        min(workers, workers_for(n * k * size * groups)), way.linear, product, kind, h_RI.data_ptr(), n * size, 0,
        groups, at, 0, downs.buffer_info()[0], 0, k, n, out_RK.data_ptr(), address(room),
    )  # fmt: skip
