"""A linear layer for few rows: reads the weight from memory once, as fast as memory gives it."""

from array import array

import torch

from .checks import address, check_tensor
from .compiled import run, workers_for
from .grouped_linear import linear_part
from .tile import dot_block, kind_of

_EXPERT_0 = torch.zeros(1, dtype=torch.int32)


def small_linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, like torch.nn.functional.linear, for up to about 64 rows.

    x_MK may have any leading dimensions, which the result keeps. All tensors are in CPU memory and of one dtype,
    float32 or bfloat16; the weight and bias are contiguous. Sums are in float32, and a row's result does not
    depend on the other rows. More rows are correct, but torch is faster.
    """
    kind = kind_of(x_MK.dtype)
    n, k = weight_NK.shape
    check_tensor("weight_NK", weight_NK, (n, x_MK.shape[-1]), x_MK.dtype)
    if bias_N is not None:
        check_tensor("bias_N", bias_N, (n,), x_MK.dtype)
    x_MK = x_MK.contiguous()
    y = x_MK.new_empty(*x_MK.shape[:-1], n)
    rows = y.numel() // n if n else 0
    if rows:
        size = x_MK.element_size()
        starts = array("i", (0, rows))
        run(
            workers_for(n * k * size), linear_part, dot_block.address, kind, x_MK.data_ptr(), k * size, 0, 1,
            starts.buffer_info()[0], _EXPERT_0.data_ptr(), weight_NK.data_ptr(), address(bias_N), n, k, y.data_ptr(),
        )  # fmt: skip
    return y
