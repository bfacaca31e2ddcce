"""How published checkpoints store quantised weights: which tensors belong together, and what they are in memory.

A layout is known by `quantization_config` of the checkpoint's configuration. Its tensors are those of a plain
checkpoint, each stored as several: values, scales, and zero points where there are any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..kernels.quantised import FP8, INT4, MXFP4, Format, QuantisedMatrix
from .checkpoint import Entry


class Layout(ABC):
    """Of a checkpoint's quantised weights. `method` is the checkpoint's name for it."""

    method: ClassVar[str]
    endings: ClassVar[dict[str, tuple[str, str]]]
    """What names of stored tensors end with: what plain ones end with instead, and the role of the tensor."""
    types: ClassVar[dict[str, tuple[str, ...]]]
    """Of each role, as safetensors names them."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Roles that need not be there."""
    format: Format

    def split(self, name: str) -> tuple[str, str]:
        """The plain name that a stored tensor is part of, and its role; "" for one that is plain itself."""
        for ending, (plain, role) in self.endings.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + plain, role
        return name, ""

    def complete(self, parts: Mapping[str, Entry]) -> bool:
        """Whether the tensors with one plain name are all that a quantised matrix has, with the types of such."""
        return all(role in parts or role in self.optional for role in self.types) and all(
            role in self.types and parts[role].dtype in self.types[role] for role in parts
        )

    def plain(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What stored tensors stand for, in the place of a plain one, in float32. Raises ValueError as `checked`."""
        return self.checked(parts).dequantise(torch.float32)

    def checked(self, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        """`matrix`. Raises ValueError where the tensors do not fit each other."""
        matrix = self.matrix(parts)
        tensors = matrix.tensors()
        for part, (shape, _) in self.format.tensors(*matrix.shape).items():
            if tensors[part].shape != shape:
                raise ValueError(f"its {part} do not fit: expected {list(shape)}, found {list(tensors[part].shape)}")
        return matrix

    @abstractmethod
    def matrix(self, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        """[outputs, inputs] of one linear layer or expert, of its stored tensors by role."""


class Mxfp4(Layout):
    """gpt-oss as published: 32 inputs share a power of two; all experts of a layer in one tensor."""

    method = "mxfp4"
    endings: ClassVar[dict[str, tuple[str, str]]] = {"_blocks": ("", "values"), "_scales": ("", "scales")}
    types: ClassVar[dict[str, tuple[str, ...]]] = {"values": ("U8",), "scales": ("U8",)}
    format = MXFP4

    def matrix(self, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        values, scales = parts["values"], parts["scales"]
        if values.dim() == 4:  # the row of one expert
            values, scales = values[0], scales[0]
        flat = values.reshape(len(values), -1)
        return QuantisedMatrix(format=self.format, k=2 * flat.shape[1], values=flat, scales=scales)

    def plain(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[experts, inputs, outputs], as the plain model has them."""
        each = [self.checked({role: t[e : e + 1] for role, t in parts.items()}) for e in range(len(parts["values"]))]
        return torch.stack([matrix.dequantise(torch.float32).t() for matrix in each])


class BlockFp8(Layout):
    """DeepSeek-V3, Qwen3-FP8 and others: e4m3 values, and a float32 scale for each block of rows and columns."""

    method = "fp8"
    endings: ClassVar[dict[str, tuple[str, str]]] = {
        "weight_scale_inv": ("weight", "scales"),
        "weight": ("weight", "values"),
    }
    types: ClassVar[dict[str, tuple[str, ...]]] = {"values": ("F8_E4M3",), "scales": ("F32", "BF16")}

    def __init__(self, block: tuple[int, int]):
        self.block = block
        self.format = Format(name="fp8", kind=FP8, rows=block[0], columns=block[1])

    def matrix(self, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        values = parts["values"].view(torch.uint8)
        scales = parts["scales"].float()
        return QuantisedMatrix(format=self.format, k=values.shape[1], values=values, scales=scales)


class Gptq(Layout):
    """GPTQ of 4 bits: eight inputs of an output in an int32, groups of inputs; the outputs are contiguous."""

    method = "gptq"
    endings: ClassVar[dict[str, tuple[str, str]]] = {
        ".qweight": (".weight", "values"),
        ".qzeros": (".weight", "zeros"),
        ".scales": (".weight", "scales"),
        ".g_idx": (".weight", "order"),
    }
    types: ClassVar[dict[str, tuple[str, ...]]] = {
        "values": ("I32",),
        "zeros": ("I32",),
        "scales": ("F16", "BF16", "F32"),
        "order": ("I32",),
    }
    optional = ("order",)

    def __init__(self, group: int, zero_offset: int):
        self.format = Format(name="int4", kind=INT4, columns=max(group, 0), zeros=True)
        self._zero_offset = zero_offset
        """What is added to stored zero points: the first version of the format keeps one less."""

    def matrix(self, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        # [K / 8, N] int32, the lowest input in the lowest bits: transposed, each int32 is four bytes of our order.
        values = parts["values"].t().contiguous().view(torch.uint8)
        k = 2 * values.shape[1]
        order = parts.get("order")
        if order is not None:
            natural = torch.arange(k, dtype=order.dtype) // (self.format.columns or k)
            if not torch.equal(order, natural):
                raise ValueError(
                    "checkpoint: its inputs are in an order of their own (GPTQ with desc_act), which is not supported;"
                    " use a checkpoint that was made with desc_act false"
                )
        zeros = _nibbles(parts["zeros"]).t().contiguous() + self._zero_offset
        return QuantisedMatrix(
            format=self.format, k=k, values=values, scales=parts["scales"].t().float().contiguous(), zeros=zeros
        )


class Awq(Layout):
    """AWQ of 4 bits ("gemm"): eight outputs of an input in an int32, in an order of its own."""

    method = "awq"
    endings: ClassVar[dict[str, tuple[str, str]]] = {e: Gptq.endings[e] for e in (".qweight", ".qzeros", ".scales")}
    types: ClassVar[dict[str, tuple[str, ...]]] = {r: Gptq.types[r] for r in ("values", "zeros", "scales")}
    _ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
    """Where in an int32 each of eight outputs is, in units of 4 bits."""

    def __init__(self, group: int):
        self.format = Format(name="int4", kind=INT4, columns=max(group, 0), zeros=True)

    def matrix(self, parts: Mapping[str, torch.Tensor]) -> QuantisedMatrix:
        weight_KN, zeros_GN = (self._in_order(_nibbles(parts[role])) for role in ("values", "zeros"))
        weight_NK = weight_KN.t()
        values = weight_NK[:, ::2] | (weight_NK[:, 1::2] << 4)
        scales = parts["scales"].t().float().contiguous()
        return QuantisedMatrix(
            format=self.format, k=weight_NK.shape[1], values=values, scales=scales, zeros=zeros_GN.t().contiguous()
        )

    def _in_order(self, values: torch.Tensor) -> torch.Tensor:
        rows, n = values.shape
        return values.view(rows, n // 8, 8)[:, :, list(self._ORDER)].reshape(rows, n)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[rows, 8 * n] the 4-bit values of [rows, n] int32, the lowest bits first, as uint8."""
    bytes_ = packed.contiguous().view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(-2)


def layout_of(quantisation: Mapping[str, Any] | Any) -> Layout:
    """What a configuration's `quantization_config` says. Raises ValueError, naming what is not supported."""
    get = quantisation.get if isinstance(quantisation, Mapping) else lambda n, d=None: getattr(quantisation, n, d)
    method = str(get("quant_method") or "of no name")
    method = method.rpartition(".")[2].lower()
    if method == "mxfp4":
        return Mxfp4()
    if method == "fp8":
        block = get("weight_block_size")
        if not block or len(block) != 2:
            raise _refusal(method, "without weight_block_size")
        return BlockFp8((int(block[0]), int(block[1])))
    if method in ("gptq", "awq"):
        bits, group = get("bits") or get("w_bit"), get("group_size") or get("q_group_size") or -1
        if bits != 4:
            raise _refusal(method, f"of {bits} bits")
        if method == "gptq":
            version = str(get("checkpoint_format") or "gptq")
            if version not in ("gptq", "gptq_v2"):
                raise _refusal(method, f"in the format {version}")
            return Gptq(int(group), 1 if version == "gptq" else 0)
        version = str(get("version") or get("format") or "gemm").rpartition(".")[2].lower()
        if version != "gemm":
            raise _refusal(method, f"in the format {version}")
        return Awq(int(group))
    raise _refusal(method, "")


def take_layout(config: Any) -> Layout | None:
    """The layout of a checkpoint with this configuration, out of which it is taken: the model is built as a plain one.

    Raises ValueError, naming what is not supported.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    del config.quantization_config
    return layout_of(quantisation)


def _refusal(method: str, what: str) -> ValueError:
    kind = f"{method} {what}".strip()
    return ValueError(
        f"model: the checkpoint is quantised ({kind}), which is not supported; mxfp4, fp8 in blocks, and gptq and awq"
        " of 4 bits are; use one of those or a plain checkpoint"
    )
