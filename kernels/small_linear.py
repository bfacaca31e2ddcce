"""A linear layer for few rows: reads the weight from memory once, as fast as memory gives it."""

import torch

from .compiled import address, workers_for
from .grouped_linear import check_tensor, run_grouped
from .tile import kind_of


def small_linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, like torch.nn.functional.linear, for up to about 32 rows.

    x_MK may have any leading dimensions, which the result keeps. All tensors are in CPU memory and of one dtype,
    float32 or bfloat16; the weight and bias are contiguous. Sums are in float32, and a row's result does not
    depend on the other rows. More rows are correct, but torch is faster.
    """
    kind = kind_of(x_MK.dtype)
    n, k = weight_NK.shape
    check_tensor("weight_NK", weight_NK, (n, x_MK.shape[-1]), x_MK.dtype)
    if bias_N is not None:
        check_tensor("bias_N", bias_N, (n,), x_MK.dtype)
    if not x_MK.is_contiguous():
        x_MK = x_MK.contiguous()
    y = x_MK.new_empty(*x_MK.shape[:-1], n)
    rows = y.numel() // n if n else 0
    if rows:
        size = x_MK.element_size()
        run_grouped(
            workers_for(n * k * size), kind, 0, rows, x_MK.data_ptr(), k * size, 0, 1, 0, 0, weight_NK.data_ptr(),
            address(bias_N), n, k, y.data_ptr(),
        )  # fmt: skip
    return y
