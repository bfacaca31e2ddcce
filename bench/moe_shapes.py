"""MoE layers of known models, and what their work costs on GPUs of the H100 class."""

from __future__ import annotations

from dataclasses import dataclass

from ..scheduler.balance.problem import Rates

HBM = 3.35e12
"""Bytes per second that one GPU reads from its memory: H100 SXM; TEMPO's testbed has the same (44.0 MB in 13.1 us)."""
NEAR = 450e9
"""Bytes per second and direction between two GPUs of a node: NVLink 4."""
FAR = 8 * 50e9
"""Bytes per second and direction of a node's bundle of links to other nodes: a 400 Gb/s adapter for each of 8 GPUs."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The MoE layer of a model: `experts` of three matrices `hidden` x `width`, `top_k` of them for a token."""

    name: str
    experts: int
    top_k: int
    hidden: int
    width: int
    weight_bytes: int
    """Per parameter; rows are sent to an expert in the same type, and come back in bfloat16."""
    row_ps: int
    """One row's arithmetic."""

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.width * self.weight_bytes

    @property
    def rates(self) -> Rates:
        return Rates(
            base_ns=5_000,  # the launch of the grouped kernels
            expert_ps=round(self.expert_bytes / HBM * 1e12),
            row_ps=self.row_ps,
            wire_ps=round(self.hidden * (self.weight_bytes + 2) / NEAR * 1e12),
            near_alpha_ns=5_000,  # a copy between GPUs, from launch to its flag
            near_fs_per_byte=round(1e15 / NEAR),
            far_alpha_ns=10_000,  # the same through the adapters
            far_fs_per_byte=round(1e15 / FAR),
            guest_ns=2_000,  # a kernel launch
        )


SHAPES = {
    shape.name: shape
    for shape in (
        # Sizes: each model's config.json. Arithmetic: bfloat16 at 642e12, fp8 at 931e12 operations per second, which
        # are TEMPO's fits for grouped kernels (94.5 ns a row of DeepSeek-V3 in fp8); Kimi-K2 has experts of that size.
        Shape(name="gpt-oss-120b", experts=128, top_k=4, hidden=2880, width=2880, weight_bytes=2, row_ps=77_500),
        Shape(name="DeepSeek-V3", experts=256, top_k=8, hidden=7168, width=2048, weight_bytes=1, row_ps=94_600),
        Shape(name="Kimi-K2", experts=384, top_k=8, hidden=7168, width=2048, weight_bytes=1, row_ps=94_600),
        Shape(name="Qwen3-235B", experts=128, top_k=8, hidden=4096, width=1536, weight_bytes=1, row_ps=40_500),
    )
}
