"""What stands between the two projections of an expert, as numbers that a kernel can be compiled for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")


@dataclass(frozen=True, kw_only=True)
class Activation:
    """h = act(gate) * (up + shift), after a clamp of gate to at most `limit` and of up to +-`limit` (0: no clamp).

    `kind` is one of `KINDS`; silu is gate * sigmoid(alpha * gate). The up projection's rows are gates, then ups, or
    with `interleaved` a gate and an up in turn; without `gated` all are gates, and h = act(gate). gpt-oss: silu with
    alpha 1.702, limit 7, shift 1, interleaved.
    """

    kind: str = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.limit < 0:
            raise ValueError(f"limit: {self.limit} is negative; 0 is none")
        if not self.gated and (self.interleaved or self.limit or self.shift):
            raise ValueError("gated: an activation without a gate has no interleaved rows, limit or shift")

    def __call__(self, x_RN: torch.Tensor) -> torch.Tensor:
        """In plain PyTorch: [R, 2I], or [R, I] where there is no gate, to [R, I]."""
        if not self.gated:
            return self._act(x_RN)
        gate, up = (x_RN[..., ::2], x_RN[..., 1::2]) if self.interleaved else x_RN.chunk(2, dim=-1)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self._act(gate) * (up + self.shift)

    def _act(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "silu":
            return x * torch.sigmoid(self.alpha * x)
        if self.kind == "gelu":
            return F.gelu(x)
        if self.kind == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        return F.relu(x) if self.kind == "relu" else F.relu(x).square()
