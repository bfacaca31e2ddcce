"""Quantised matrices: how a format stores one, and how one is made and read back, by PyTorch's operators.

Legend: N outputs (rows), K inputs (columns), B bytes of a row, G groups of inputs that share a scale.

A format stores every value in 8 or 4 bits, and a scale for each group of a row's inputs, or for a block of several rows
and inputs. What it stands for is `scale * value`, or `scale * (value - zero)` where there are zero points. Two 4-bit
values share a byte, the one of the lower input in the lower half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

INT8, FP8, INT4, FP4 = 0, 1, 2, 3
"""Kinds of values: integers of -127..127; e4m3 (of the variant without infinities); integers of 0..15; e2m1."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST = {INT8: 127.0, FP8: 448.0, INT4: 15.0, FP4: 6.0}
_GRAIN = 2**15
"""Elements that PyTorch works on with the calling thread alone: several threads read experts at a time."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a matrix is stored. `columns` inputs share a scale (0: a whole row), and so do `rows` outputs."""

    name: str
    kind: int
    columns: int = 0
    rows: int = 1
    zeros: bool = False
    exponents: bool = False
    """Scales are powers of two, one byte each (e8m0), instead of float32."""

    @property
    def per_byte(self) -> int:
        """Values in a byte."""
        return 2 if self.kind in (INT4, FP4) else 1

    def groups(self, k: int) -> int:
        return -(-k // self.columns) if self.columns else 1

    def tensors(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of the tensors of a matrix [n, k]: `values`, `scales`, and `zeros` where there are any.

        Raises ValueError for one that cannot be stored so.
        """
        if k % self.per_byte:
            raise ValueError(f"{self.name} needs an even number of inputs, not {k}")
        grid = (-(-n // self.rows), self.groups(k))
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "values": ((n, k // self.per_byte), torch.uint8),
            "scales": (grid, torch.uint8 if self.exponents else torch.float32),
        }
        return found | ({"zeros": (grid, torch.uint8)} if self.zeros else {})

    def quantise(self, weight_NK: torch.Tensor) -> QuantisedMatrix:
        """The nearest matrix of this format. Works on a few rows at a time."""
        assert not (self.rows > 1 and self.zeros)
        n, k = weight_NK.shape
        made = {name: weight_NK.new_empty(s, dtype=d) for name, (s, d) in self.tensors(n, k).items()}
        width = self.columns or k
        step = self.rows * max(_GRAIN // max(k * self.rows, 1), 1)
        for low in range(0, n, step):
            part = weight_NK[low : low + step].float()
            blocks = _blocks(part, self.rows, width)  # [n / rows, rows, groups, width], padded with 0
            zeros = None
            if self.zeros:
                least = blocks.amin((1, 3)).clamp_max(0)
                scales = (blocks.amax((1, 3)).clamp_min(0) - least) / _LARGEST[self.kind]
                scales = torch.where(scales > 0, scales, 1.0)
                zeros = (-least / scales).round()
            else:
                most = blocks.abs().amax((1, 3))
                scales = torch.where(most > 0, most / _LARGEST[self.kind], 1.0)
                if self.exponents:
                    # As the format's standard has it: the largest value's exponent less that of the type's largest.
                    exponent = (torch.where(most > 0, most, 1.0).log2().floor() - 2).clamp(-127, 127)
                    scales = exponent.exp2()
            spread = _spread(scales, self.rows, width, part.shape)
            shift = _spread(zeros, self.rows, width, part.shape) if zeros is not None else None
            values = _encode(self.kind, part, spread, shift)
            rows = slice(low // self.rows, low // self.rows + len(scales))
            made["values"][low : low + step] = values
            made["scales"][rows] = (scales.log2() + 127).to(torch.uint8) if self.exponents else scales
            if zeros is not None:
                made["zeros"][rows] = zeros.to(torch.uint8)
        return QuantisedMatrix(format=self, k=k, **made)


FORMATS = {
    "int8": Format(name="int8", kind=INT8),
    "fp8": Format(name="fp8", kind=FP8),
    "int4": Format(name="int4", kind=INT4, columns=64, zeros=True),
}
"""What plain weights can be made into."""
MXFP4 = Format(name="mxfp4", kind=FP4, columns=32, exponents=True)


@dataclass(frozen=True, kw_only=True)
class QuantisedMatrix:
    """A matrix [N, k]: values [N, B], scales [N / rows, G] and zero points [N / rows, G] or None."""

    format: Format
    k: int
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.k

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"values": self.values, "scales": self.scales}
        return found | ({"zeros": self.zeros} if self.zeros is not None else {})

    def rows(self, low: int, high: int) -> QuantisedMatrix:
        """A block of its rows, which begins and ends with a block of scales."""
        rows = self.format.rows
        assert low % rows == 0 and (high % rows == 0 or high == self.shape[0])
        part = slice(low // rows, -(-high // rows))
        zeros = self.zeros[part] if self.zeros is not None else None
        return replace(self, values=self.values[low:high], scales=self.scales[part], zeros=zeros)

    def with_a_row_of_scales_each(self) -> QuantisedMatrix:
        """The same, where several rows have shared scales."""
        form, n = self.format, self.shape[0]
        scales = self.scales.repeat_interleave(form.rows, 0)[:n]
        zeros = self.zeros.repeat_interleave(form.rows, 0)[:n] if self.zeros is not None else None
        return replace(self, scales=scales, zeros=zeros, format=replace(form, rows=1))

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, k] what it stands for, worked out in float32; on any device."""
        form = self.format
        scales = (self.scales.float() - 127).exp2() if form.exponents else self.scales
        width = form.columns or self.k
        weight = _decode(form.kind, self.values)
        if self.zeros is not None:
            weight = weight - _spread(self.zeros.float(), form.rows, width, weight.shape)
        return (weight * _spread(scales, form.rows, width, weight.shape)).to(dtype)


def joined(blocks: Sequence[QuantisedMatrix]) -> QuantisedMatrix:
    """Matrices of one format, one below the other; all but the last end with a block of scales."""
    if len(blocks) == 1:
        return blocks[0]
    form = blocks[0].format
    assert form.rows == 1 or all(block.shape[0] % form.rows == 0 for block in blocks[:-1])
    tensors = {name: torch.cat([block.tensors()[name] for block in blocks]) for name in blocks[0].tensors()}
    return QuantisedMatrix(format=form, k=blocks[0].k, **tensors)


@dataclass(frozen=True, kw_only=True)
class QuantisedStack:
    """Matrices of one format and shape in slots: their tensors, stacked."""

    format: Format
    k: int
    values_S: torch.Tensor
    scales_S: torch.Tensor
    zeros_S: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.values_S)

    def __getitem__(self, slot: int) -> QuantisedMatrix:
        zeros = self.zeros_S[slot] if self.zeros_S is not None else None
        return QuantisedMatrix(
            format=self.format, k=self.k, values=self.values_S[slot], scales=self.scales_S[slot], zeros=zeros
        )


def relative_error(weight_NK: torch.Tensor, form: Format) -> float:
    """Of what a format makes of a matrix: the root of the mean square of the differences, as a share of that of the
    matrix.
    """
    weight = weight_NK.float()
    off = form.quantise(weight_NK).dequantise(torch.float32) - weight
    return float(off.norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _blocks(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    return padded.view(-1, rows, padded.shape[1] // columns, columns)


def _spread(grid: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """[N, K] of one number for each block."""
    if columns >= shape[1] and rows == 1:
        return grid.expand(shape)
    wide = grid.repeat_interleave(rows, 0)[: shape[0]] if rows > 1 else grid
    return wide.repeat_interleave(columns, 1)[:, : shape[1]]


def _encode(kind: int, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    scaled = weight / scales
    if kind == INT8:
        return scaled.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    if kind == FP8:
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if kind == INT4:
        assert zeros is not None
        return _pack((scaled.round() + zeros).clamp(0, 15).to(torch.uint8))
    # Halfway between two values: to the one with an even last bit.
    borders = scaled.new_tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    up = scaled.abs().contiguous()
    number = torch.bucketize(up, borders)  # how many borders are below
    number = number + ((number % 2 == 1) & (up == borders[number.clamp_max(6)])).long()
    return _pack((number + 8 * torch.signbit(weight)).to(torch.uint8))


def _pack(values: torch.Tensor) -> torch.Tensor:
    return values[:, ::2] | (values[:, 1::2] << 4)


def _unpack(values: torch.Tensor) -> torch.Tensor:
    return torch.stack((values & 15, values >> 4), -1).flatten(-2)


def _decode(kind: int, values: torch.Tensor) -> torch.Tensor:
    decoders: dict[int, Callable[[], torch.Tensor]] = {
        INT8: lambda: values.view(torch.int8).float(),
        FP8: lambda: values.view(torch.float8_e4m3fn).float(),
        INT4: lambda: _unpack(values).float(),
        FP4: lambda: torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=values.device)[_unpack(values).int()],
    }
    return decoders[kind]()
