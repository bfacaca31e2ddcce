"""Rows of experts that are anywhere in memory, by the CPU's kernels or the device's GEMMs.

What an expert gives for its rows does not depend, to the bit, on which others are computed in the same call.

T: tokens, D: hidden size, R: rows, in groups of one expert each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.expert_loop import expert_loop

if TYPE_CHECKING:
    from .experts import ExpertWeights, Matrix
    from .moe import MoELayer


def few_rows(
    layer: MoELayer,
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    starts: Sequence[int],
    weights: Sequence[ExpertWeights],
    out_RD: torch.Tensor,
    *,
    many: bool = False,
) -> None:
    """Writes rows [R, D] by the compiled kernels, for few rows per expert: starts[i] to starts[i + 1] are of the expert
    weights[i], in host memory. `layer` says what its experts compute; it has compiled kernels. With `many`, by those
    for many rows.
    """
    from ..kernels.grouped_linear import FEW_ROWS, grouped_linear
    from ..kernels.many_rows import MANY_ROWS

    way = MANY_ROWS if many else FEW_ROWS
    if layer.swiglu:
        from ..kernels.listed_experts import listed_swiglu

        listed_swiglu(x_TD, [w.listed for w in weights], starts, token_R, out_RD, way)
        return
    down_GDI, up_bias_GN, down_bias_GD = _of_each(weights)
    starts_G = torch.tensor(starts, dtype=torch.int32)
    if layer.pool.format is not None:
        from ..kernels.quantised_linear import quantised_linear

        assert not many
        up_GND: Any = [w.up_PND[0] for w in weights]
        h_RN = quantised_linear(x_TD, up_GND, starts_G, None, up_bias_GN, token_R)
        h_RI = torch.cat([layer.gate(h_RN[low:high]) for low, high in itertools.pairwise(starts)])
        out_RD.copy_(quantised_linear(h_RI, down_GDI, starts_G, None, down_bias_GD))
        return
    up_PGND = _blocks(weights)
    parts = [grouped_linear(x_TD, up_GND, starts_G, None, up_bias_GN, token_R, way) for up_GND in up_PGND]
    h_RN = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    # Expert by expert: torch computes the last elements of a tensor in another way than the first, and what is last
    # must not depend on who came together.
    h_RI = torch.cat([layer.gate(h_RN[low:high]) for low, high in itertools.pairwise(starts)])
    out_RD.copy_(grouped_linear(h_RI, down_GDI, starts_G, None, down_bias_GD, way=way))


def many_rows(
    layer: MoELayer,
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    starts: Sequence[int],
    weights: Sequence[ExpertWeights],
    out_RD: torch.Tensor,
) -> None:
    """The same, one expert after the other, for many rows per expert and any device.

    The kernels that pack weights run where the layer takes them for any number of rows: what is taken must not depend
    on which experts are computed in the same call.
    """
    if layer.panels_always:
        few_rows(layer, x_TD, token_R, starts, weights, out_RD, many=True)
        return
    down_GDI, *biases = _of_each(weights)
    counts_G = torch.tensor([high - low for low, high in itertools.pairwise(starts)])
    up_GPND = [w.up_PND for w in weights]
    out_RD.copy_(expert_loop(x_TD, token_R, counts_G, up_GPND, down_GDI, layer.gate, *biases))


def _plain(weight: Matrix) -> torch.Tensor:
    assert isinstance(weight, torch.Tensor)
    return weight


_Tensors = list[torch.Tensor]
_Matrices = list[Any]


def _blocks(weights: Sequence[ExpertWeights]) -> list[_Matrices]:
    """Of several experts the first products' weights, in as many blocks of rows as that of them which has most."""
    if all(len(w.up_PND) == 1 for w in weights):
        return [[w.up_PND[0] for w in weights]]
    halves: list[Any] = [w.up_PND if len(w.up_PND) == 2 else _plain(w.up_PND[0]).chunk(2) for w in weights]
    return [[half[0] for half in halves], [half[1] for half in halves]]


def _of_each(weights: Sequence[ExpertWeights]) -> tuple[_Matrices, _Tensors | None, _Tensors | None]:
    """Of several experts the second products' weights, and the biases if there are any."""
    up_bias_GN = [w.up_bias_N for w in weights if w.up_bias_N is not None]
    down_bias_GD = [w.down_bias_D for w in weights if w.down_bias_D is not None]
    return [w.down_DI for w in weights], up_bias_GN or None, down_bias_GD or None
