"""The expert layers that `moeyard bench kernels` measures, and how much of one fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .shapes import BenchShape


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """An MoE layer: `experts` of gate and up [width, hidden] and down [hidden, width], `top_k` of them for a token."""

    name: str
    experts: int
    top_k: int
    hidden: int
    width: int
    clamped: bool = False
    """gpt-oss's experts: biases, interleaved gate and up, a clamped activation; its weights are stored [in, out]."""
    ranks: int = 1
    """Of how many ranks, with the experts dealt out evenly, this is one's part. All have as many tokens, so that
    a part has as many rows as the whole layer, and fewer experts."""

    @property
    def expert_params(self) -> int:
        return 3 * self.hidden * self.width

    @property
    def params(self) -> int:
        return self.experts * self.expert_params

    @property
    def title(self) -> str:
        return self.name if self.ranks == 1 else f"{self.name} /{self.ranks}"


_BENCH = BenchShape()
SHAPES = {
    shape.name: shape
    for shape in (
        # Each model's config.json.
        LayerShape(name="Mixtral-8x7B", experts=8, top_k=2, hidden=4096, width=14336),
        LayerShape(name="Qwen3-30B-A3B", experts=128, top_k=8, hidden=2048, width=768),
        LayerShape(name="OLMoE", experts=64, top_k=8, hidden=2048, width=1024),
        LayerShape(name="gpt-oss-120b", experts=128, top_k=4, hidden=2880, width=2880, clamped=True),
        LayerShape(name="DeepSeek-V3", experts=256, top_k=8, hidden=7168, width=2048),
        LayerShape(
            name="bench", experts=_BENCH.experts, top_k=_BENCH.top_k, hidden=_BENCH.hidden, width=_BENCH.expert_width
        ),
    )
}


def part_that_fits(shape: LayerShape, itemsize: int, memory: int) -> LayerShape:
    """The layer, or the part of one of the fewest ranks whose weights are at most `memory` bytes.

    Raises ValueError where not even top-k experts fit.
    """
    copies = 2 if shape.clamped else 1  # theirs are stored the other way round
    part = shape
    while part.params * itemsize * copies > memory:
        if part.experts % 2 or part.experts // 2 < part.top_k:
            raise ValueError(
                f"--memory: {part.experts} experts of {shape.name} take {part.params * itemsize * copies} bytes;"
                " give more, or other --shapes"
            )
        part = replace(part, experts=part.experts // 2, ranks=part.ranks * 2)
    return part
