"""Linear layers by the compiled kernels: for few rows at the speed of memory, for many with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.many_rows import fits, many_linear
from ..kernels.small_linear import small_linear

if TYPE_CHECKING:
    from .moe import MoELayer

SMALL_ROWS = 32
"""Rows up to which the compiled kernel beat PyTorch's GEMM at every size measured."""


class CpuLinear(nn.Linear):
    """An `nn.Linear` on the CPU, in float32 or bfloat16, with a fast path for few rows, and with `panels` for many."""

    panels = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() <= SMALL_ROWS * self.in_features and input.dtype == self.weight.dtype:
            return small_linear(input, self.weight, self.bias)
        if self.panels and input.dtype == self.weight.dtype:
            y = many_linear(input.reshape(-1, self.in_features), self.weight, self.bias)
            return y.view(*input.shape[:-1], self.out_features)
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


def use_panels(model: nn.Module, layers: Sequence[MoELayer]) -> int:
    """Lets the linear layers pack their weights where the experts do, for any number of rows: these were timed against
    the same GEMMs of PyTorch, in the same type, and all ranks of a machine know the result. Returns how many.
    """
    if not layers or not all(layer.panels_always for layer in layers):
        return 0
    dtype = layers[0].pool.up_SND.dtype
    count = 0
    for module in model.modules():
        if isinstance(module, CpuLinear) and module.weight.dtype == dtype and fits(module.weight):
            module.panels = True
            count += 1
    return count
