"""The experts of a layer on a GPU: by the Triton kernels where they can, and why not where they cannot.

T: tokens, K: experts per token, D: hidden size, S: slots, R: rows sorted by expert.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.activation import Activation
from ..kernels.triton_version import why_no_triton
from .activations import find_activation

if TYPE_CHECKING:
    from .experts import ExpertPool
    from .moe import MoELayer

log = logging.getLogger("moeyard.device_experts")


class GroupedExperts:
    """The kernels on the slots of a pool whose experts have this activation."""

    def __init__(self, pool: ExpertPool, activation: Activation) -> None:
        from ..kernels import grouped_experts

        self._kernels = grouped_experts
        self._pool, self._activation = pool, activation

    def __call__(
        self, x_TD: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sums_TD, counts_S) over the slots that each token names; -1 adds nothing."""
        weights, biases = self._experts()
        return self._kernels.grouped_experts(x_TD, slots_TK, weights_TK, *weights, **biases)

    def listed(
        self, x_TD: torch.Tensor, token_R: torch.Tensor, starts: Sequence[int], slots: Sequence[int]
    ) -> torch.Tensor:
        """y_RD of rows starts[g] to starts[g + 1] by the expert in slots[g]. A row's result does not depend on the
        others.
        """
        weights, biases = self._experts()
        return self._kernels.listed_experts(x_TD, token_R, starts, slots, *weights, **biases, deterministic=True)

    def _experts(self) -> tuple[Any, dict[str, Any]]:
        """As the pool has them now: a pool that grows has other tensors."""
        pool = self._pool
        biases: dict[str, Any] = {"up_bias_SN": pool.up_bias_SN, "down_bias_SD": pool.down_bias_SD}
        return (pool.up_SND, pool.down_SDI, self._activation), biases


def device_experts(pool: ExpertPool, gate: Any) -> tuple[GroupedExperts | None, str]:
    """The kernels for a layer on a GPU and "", or None and the reason, which is logged once.

    On a CPU None and "": it has kernels of its own.
    """
    if pool.up_SND.device.type != "cuda":
        return None, ""
    reason = why_no_triton() or _why_no_device(pool.up_SND.device, pool.up_SND.dtype)
    if not reason:
        kernels = grouped_experts_of(pool, gate)
        if kernels is not None:
            return kernels, ""
        reason = f"the activation of {pool.spec.module} is none that they know"
    _tell(reason)
    return None, reason


def grouped_experts_of(pool: ExpertPool, gate: Any) -> GroupedExperts | None:
    """The kernels on a pool's slots; None for an activation that they do not know."""
    activation = find_activation(gate, pool.up_SND.shape[1], pool.down_SDI.shape[2])
    return GroupedExperts(pool, activation) if activation is not None else None


def compile_experts(layers: Sequence[MoELayer], most_tokens: int) -> None:
    """Runs each kind of layer that has the kernels with 1, 2, 4, ... `most_tokens` tokens, so that no request waits for
    the compiler. Tiles follow from the mean rows of an expert, in steps that doubling does not skip.
    """
    seen: set[tuple[Any, ...]] = set()
    for layer in layers:
        pool, top_k = layer.pool, layer.pool.spec.top_k
        kind = (pool.up_SND.shape, pool.down_SDI.shape, pool.spec.has_bias, top_k)
        if layer.grouped is None or layer.offloaded is not None or kind in seen:
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
