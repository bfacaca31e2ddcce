"""What the CPU kernels ask of their tensors; ValueError with the tensor's name otherwise."""

import torch


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A contiguous CPU tensor of this shape and dtype."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{name}: a contiguous CPU tensor {list(shape)} of {dtype} is needed, not {_describe(tensor)}")


def check_rows(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A CPU tensor of this shape and dtype whose last dimension is contiguous."""
    loose = tensor.stride(-1) != 1 and shape[-1] > 1 if tensor.ndim else True
    if tensor.shape != shape or tensor.dtype is not dtype or loose or not tensor.is_cpu:
        raise ValueError(
            f"{name}: a CPU tensor {list(shape)} of {dtype} with a contiguous last dimension is needed, not "
            f"{_describe(tensor)}"
        )


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} with strides {list(tensor.stride())}, {tensor.dtype} on {tensor.device}"


def address(tensor: torch.Tensor | None) -> int:
    """Address of the first element, 0 for None. The caller keeps the tensor alive."""
    return 0 if tensor is None else tensor.data_ptr()
