"""Linear layers that read their weight once, at memory speed, when a step has few rows."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.small_linear import small_linear

SMALL_ROWS = 32
"""Rows up to which the compiled kernel beat PyTorch's GEMM at every size measured."""


class CpuLinear(nn.Linear):
    """An `nn.Linear` on the CPU, in float32 or bfloat16, with a fast path for few rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() <= SMALL_ROWS * self.in_features and input.dtype == self.weight.dtype:
            return small_linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


def use_small_row_kernels(model: nn.Module) -> int:
    """Gives the model's plain linear layers the fast path; returns how many."""
    count = 0
    for module in model.modules():
        # Subclasses may compute something else, so only the class itself is changed.
        if type(module) is nn.Linear and module.weight.dtype in (torch.float32, torch.bfloat16):
            module.__class__ = CpuLinear
            count += 1
    return count
