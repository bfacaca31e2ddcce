"""Rows of experts that are anywhere in memory, by the CPU's kernels or the device's GEMMs.

What an expert gives for its rows does not depend, to the bit, on which others are computed in the same call.

T: tokens, D: hidden size, R: rows, in groups of one expert each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..kernels.expert_loop import expert_loop

if TYPE_CHECKING:
    from .experts import ExpertWeights
    from .moe import MoELayer


def few_rows(
    layer: MoELayer,
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    starts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    many: bool = False,
) -> torch.Tensor:
    """Rows [R, D] by the compiled kernels, for few rows per expert: starts[i] to starts[i + 1] are of the expert
    weights[i], in host memory. `layer` says what its experts compute; it has compiled kernels. With `many`, by those
    for many rows.
    """
    from ..kernels.grouped_linear import FEW_ROWS, grouped_gate_up_silu, grouped_linear
    from ..kernels.many_rows import MANY_ROWS

    way = MANY_ROWS if many else FEW_ROWS

    down_GDI, up_bias_GN, down_bias_GD = _of_each(weights)
    starts_G = torch.tensor(starts, dtype=torch.int32)
    if layer.swiglu:
        h_RI = grouped_gate_up_silu(x_TD, [w.up_PND for w in weights], starts_G, None, token_R, way)
    else:
        up_PGND = _blocks(weights)
        parts = [grouped_linear(x_TD, up_GND, starts_G, None, up_bias_GN, token_R, way) for up_GND in up_PGND]
        h_RN = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        # Expert by expert: torch computes the last elements of a tensor in another way than the first, and what
        # is last must not depend on who came together.
        h_RI = torch.cat([layer.gate(h_RN[low:high]) for low, high in itertools.pairwise(starts)])
    return grouped_linear(h_RI, down_GDI, starts_G, None, down_bias_GD, way=way)


def many_rows(
    layer: MoELayer,
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    starts: Sequence[int],
    weights: Sequence[ExpertWeights],
) -> torch.Tensor:
    """The same, one expert after the other, for many rows per expert and any device.

    The kernels that pack weights run where the layer takes them for any number of rows: what is taken must not depend
    on which experts are computed in the same call.
    """
    if layer.panels_always:
        return few_rows(layer, x_TD, token_R, starts, weights, many=True)
    down_GDI, *biases = _of_each(weights)
    counts_G = torch.tensor([high - low for low, high in itertools.pairwise(starts)])
    up_GPND = [w.up_PND for w in weights]
    return expert_loop(x_TD, token_R, counts_G, up_GPND, down_GDI, layer.gate, *biases)


_Tensors = list[torch.Tensor]


def _blocks(weights: Sequence[ExpertWeights]) -> list[_Tensors]:
    """Of several experts the first products' weights, in as many blocks of rows as that of them which has most."""
    if all(len(w.up_PND) == 1 for w in weights):
        return [[w.up_PND[0] for w in weights]]
    halves = [w.up_PND if len(w.up_PND) == 2 else w.up_PND[0].chunk(2) for w in weights]
    return [[half[0] for half in halves], [half[1] for half in halves]]


def _of_each(weights: Sequence[ExpertWeights]) -> tuple[_Tensors, _Tensors | None, _Tensors | None]:
    """Of several experts the second products' weights, and the biases if there are any."""
    up_bias_GN = [w.up_bias_N for w in weights if w.up_bias_N is not None]
    down_bias_GD = [w.down_bias_D for w in weights if w.down_bias_D is not None]
    return [w.down_DI for w in weights], up_bias_GN or None, down_bias_GD or None
