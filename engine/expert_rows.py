"""Rows of experts that are at some places of a pool, on the CPU's kernels or the device's GEMMs.

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
    from .experts import ExpertPool
    from .moe import MoELayer


def few_rows(
    layer: MoELayer,
    pool: ExpertPool,
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    starts: Sequence[int],
    places: Sequence[int],
) -> torch.Tensor:
    """Rows [R, D] by the compiled kernels, for few rows per expert: starts[i] to starts[i + 1] are of the expert at
    places[i]. `layer` says what its experts compute; it has compiled kernels, and `pool` is in host memory.
    """
    from ..kernels.grouped_linear import grouped_gate_up_silu, grouped_linear

    groups = torch.tensor(starts, dtype=torch.int32), torch.tensor(places, dtype=torch.int32)
    if layer.swiglu:
        h_RI = grouped_gate_up_silu(x_TD, pool.up_SND, *groups, token_R)
    else:
        h_RN = grouped_linear(x_TD, pool.up_SND, *groups, pool.up_bias_SN, token_R)
        # Expert by expert: torch computes the last elements of a tensor in another way than the first, and what
        # is last must not depend on who came together.
        h_RI = torch.cat([layer.gate(h_RN[low:high]) for low, high in itertools.pairwise(starts)])
    return grouped_linear(h_RI, pool.down_SDI, *groups, pool.down_bias_SD)


def many_rows(
    layer: MoELayer,
    pool: ExpertPool,
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    starts: Sequence[int],
    places: Sequence[int],
) -> torch.Tensor:
    """The same, one expert after the other, for many rows per expert and any device."""

    def of(tensor: torch.Tensor | None) -> list[torch.Tensor] | None:
        return None if tensor is None else [tensor[place] for place in places]

    up_GND, down_GDI = of(pool.up_SND), of(pool.down_SDI)
    assert up_GND is not None and down_GDI is not None
    counts_G = torch.tensor([high - low for low, high in itertools.pairwise(starts)])
    biases = of(pool.up_bias_SN), of(pool.down_bias_SD)
    return expert_loop(x_TD, token_R, counts_G, up_GND, down_GDI, layer.gate, *biases)
