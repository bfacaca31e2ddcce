"""Grouped GEMM against one product per row."""

import pytest
import torch

from moeyard.kernels.grouped_mm import grouped_mm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]])
def test_equals_one_product_per_row(counts, bias):
    torch.manual_seed(0)
    weight = torch.randn(4, 7, 5)
    bias_SN = torch.randn(4, 7) if bias else None
    rows = torch.randn(sum(counts), 5)
    out = grouped_mm(rows, weight, torch.tensor(counts), bias_SN)
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    wanted = [weight[s] @ r + (bias_SN[s] if bias_SN is not None else 0) for s, r in zip(slots, rows, strict=True)]
    torch.testing.assert_close(out, torch.stack(wanted) if wanted else rows.new_empty(0, 7))
