"""The experts of a layer on a GPU: by the Triton kernels where they can, and why not where they cannot.

T: tokens, K: experts per token, D: hidden size, S: slots.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.triton_version import why_no_triton
from .activations import find_activation

if TYPE_CHECKING:
    from .experts import ExpertPool
    from .moe import MoELayer

GroupedExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of (x_TD, slots_TK, weights_TK), where a slot of -1 adds nothing: (sums_TD, counts_S)."""

log = logging.getLogger("moeyard.device_experts")


def device_experts(pool: ExpertPool, gate: Any) -> tuple[GroupedExperts | None, str]:
    """The kernels' function for a layer on a GPU and "", or None and the reason, which is logged once.

    On a CPU None and "": it has kernels of its own.
    """
    if pool.up_SND.device.type != "cuda":
        return None, ""
    reason = why_no_triton() or _why_no_device(pool.up_SND.device, pool.up_SND.dtype)
    if not reason:
        function = grouped_function(pool, gate)
        if function is not None:
            return function, ""
        reason = f"the activation of {pool.spec.module} is none that they know"
    _tell(reason)
    return None, reason


def grouped_function(pool: ExpertPool, gate: Any) -> GroupedExperts | None:
    """`grouped_experts` on a pool's slots; None for an activation that the kernels do not know."""
    from ..kernels.grouped_experts import grouped_experts

    activation = find_activation(gate, pool.up_SND.shape[1], pool.down_SDI.shape[2])
    if activation is None:
        return None

    def run(x_TD: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grouped_experts(
            x_TD,
            slots_TK,
            weights_TK,
            pool.up_SND,
            pool.down_SDI,
            activation,
            up_bias_SN=pool.up_bias_SN,
            down_bias_SD=pool.down_bias_SD,
        )

    return run


def compile_experts(layers: Sequence[MoELayer], most_tokens: int) -> None:
    """Runs each kind of layer that has the kernels with 1, 2, 4, ... `most_tokens` tokens, so that no request waits for
    the compiler. Tiles follow from the mean rows of an expert, in steps that doubling does not skip.
    """
    seen: set[tuple[Any, ...]] = set()
    for layer in layers:
        pool, top_k = layer.pool, layer.pool.spec.top_k
        kind = (pool.up_SND.shape, pool.down_SDI.shape, pool.spec.has_bias, top_k)
        if not layer.grouped or layer.offloaded is not None or kind in seen:
            continue
        seen.add(kind)
        log.info("compiling the Triton kernels for experts like those of %s, or loading them", pool.spec.module)
        tokens = 1
        while tokens <= most_tokens:
            x_TD = torch.zeros(tokens, pool.down_SDI.shape[1], dtype=pool.up_SND.dtype, device=pool.up_SND.device)
            slots_TK = torch.arange(tokens * top_k, device=x_TD.device).view(tokens, top_k) % pool.num_slots
            layer.run_local(x_TD, slots_TK, x_TD.new_zeros(tokens, top_k))
            tokens *= 2


def _why_no_device(device: torch.device, dtype: torch.dtype) -> str:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None:
        return "they were written for CUDA devices"
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"they do not take {dtype}"
    return ""


@functools.cache
def _tell(reason: str) -> None:
    """Once, not for every layer."""
    log.warning("experts run on PyTorch's GEMMs, not on the Triton kernels: %s", reason)
