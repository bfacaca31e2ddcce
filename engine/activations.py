"""What a model's gate computes, found by asking it for numbers rather than by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from ..kernels.activation import KINDS, Activation

_FAR = 1e6
"""A value that every clamp in use cuts off."""


def find_activation(gate: Callable[[torch.Tensor], torch.Tensor], rows: int, width: int) -> Activation | None:
    """The `Activation` that equals a gate from [R, rows] to [R, width] on a sample; None where none does."""
    assert rows in (width, 2 * width), (rows, width)
    generator = torch.Generator().manual_seed(0)
    # A clamp shows on large numbers only, and a kind on small ones.
    scales = torch.tensor([0.3, 1.0, 4.0, 30.0, 1000.0], dtype=torch.float64)[:, None]
    sample = torch.randn(5, rows, generator=generator, dtype=torch.float64) * scales
    wanted = gate(sample)
    for candidate in _candidates(gate, rows, width):
        # Float32 somewhere inside is fine, and a kernel computes no better.
        if torch.allclose(candidate(sample), wanted.double(), rtol=1e-5, atol=1e-6):
            return candidate
    return None


def _candidates(gate: Callable[[torch.Tensor], torch.Tensor], rows: int, width: int) -> Iterator[Activation]:
    """Activations whose numbers are such that a gate of their form gives what this one does at single points."""
    gated = rows == 2 * width
    for interleaved in (False, True) if gated else (False,):

        def ask(g: float, u: float, interleaved: bool = interleaved) -> float:
            x = torch.full((1, rows), g, dtype=torch.float64)
            if gated and interleaved:
                x[:, 1::2] = u
            elif gated:
                x[:, width:] = u
            return float(gate(x)[0, 0])

        shift = limit = 0.0
        if gated:
            slope = ask(_FAR, 1.0) - ask(_FAR, 0.0)  # the activation alone, at its limit
            if not slope or not math.isfinite(slope):
                continue
            shift = _round(ask(_FAR, 0.0) / slope)
            limit = _round(ask(_FAR, _FAR) / slope - shift)
            limit = limit if 0 < limit < _FAR * 0.99 else 0.0
        # silu(1) / 1 is sigmoid(alpha)
        share = ask(1.0, 1.0) / (1.0 + shift) if shift != -1.0 else 0.0
        alpha = _round(math.log(share / (1.0 - share))) if 0.0 < share < 1.0 else 0.0
        for kind in KINDS:
            yield Activation(
                kind=kind,
                gated=gated,
                interleaved=interleaved,
                alpha=alpha if kind == "silu" else 1.0,
                limit=limit,
                shift=shift,
            )


def _round(value: float) -> float:
    """Without the last digits, which are of the way it was found."""
    return float(f"{value:.6g}")
