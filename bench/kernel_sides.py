"""What `moeyard bench kernels` compares, all in one process: `python -m moeyard.bench.kernel_sides NAME`.

All compute the same layer from the same weights (`kernel_shapes.LayerShape`), one call each in turn, so that a change
in the machine's speed meets all. Each call takes the next copy of the layer, so that no weights are found in a cache.

T: tokens, K: experts per token, D: hidden size, I: width, N: rows of gate and up (2I), S: experts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from .kernel_shapes import LayerShape

OURS = "moeyard"
THEIRS = ("eager", "grouped_mm", "batched_mm")
"""transformers' implementations."""
TORCH = "torch"
"""Sorting, `torch.nn.functional.grouped_mm` and a weighted sum."""
_RANDOM_BYTES = 2**26
_MOST_CALLS = 50
_HOPELESS = 4.0
"""A side whose first calls take so many times those of the fastest of `THEIRS` is called no more."""


@dataclass(kw_only=True)
class Copy:
    """One copy of the layer, for us and as transformers' module."""

    layer: Any
    module: Any


@dataclass(kw_only=True)
class KernelSides:
    """Answers `turns.Side.call`."""

    shape: LayerShape | None = None
    copies: list[Copy] = field(default_factory=list)
    _calls: int = 0

    def start(self, device: str, threads: int) -> dict[str, Any]:
        """Compiles our kernels."""
        self._device = device
        if device == "cpu":
            from ..kernels.threads import set_threads
            from ..kernels.warm_up import warm_up

            set_threads(threads)
            warm_up()
        return {}

    def layer(self, shape: dict[str, Any], dtype: str, copies: int, seed: int) -> dict[str, Any]:
        """Makes the layer's weights; returns up to how many rows per expert our kernels are for here."""
        import torch

        self.copies.clear()
        gc.collect()
        self.shape = LayerShape(**shape)
        self._dtype = getattr(torch, dtype)
        torch.manual_seed(seed)
        with torch.inference_mode():
            self.copies = [_make_copy(self.shape, self._dtype, self._device) for _ in range(copies)]
            if self._device == "cuda":
                return {}
            layers = [copy.layer for copy in self.copies]
            layers[0].panel_rows = layers[0].measure_panel_rows()
            layers[0].few_rows = layers[0].measure_few_rows()
        for layer in layers[1:]:
            layer.few_rows, layer.panel_rows = layers[0].few_rows, layers[0].panel_rows
        return {"few_rows": layers[0].few_rows, "panel_rows": layers[0].panel_rows}

    def cell(self, tokens: int, repeats: int, least_s: float, most_s: float, gather_limit: int) -> dict[str, Any]:
        """`seconds` per call of each side with so many tokens, `skipped` sides with the reason, and `experts`: distinct
        ones per routing, on average.

        Calls go on until there are `repeats` and `least_s` is over, or `most_s`.
        """
        import torch

        assert self.shape is not None
        shape = self.shape
        sides: dict[str, Callable[..., Any]] = {OURS: _ours, TORCH: _torch} | {name: _theirs(name) for name in THEIRS}
        skipped: dict[str, str] = {}
        gathered = tokens * shape.top_k * shape.expert_params * self._dtype.itemsize
        if gathered > gather_limit:
            skipped["batched_mm"] = f"would copy {gathered / 2**30:.1f} GiB of weights"
        seconds: dict[str, list[float]] = {name: [] for name in sides if name not in skipped}
        distinct: list[int] = []
        wanted: Any = None
        start = time.perf_counter()
        with torch.inference_mode():
            while True:
                turn = len(distinct)
                x_TD = torch.randn(tokens, shape.hidden, device=self._device).to(self._dtype)
                scores_TS = torch.rand(tokens, shape.experts, device=self._device)
                ids_TK = scores_TS.topk(shape.top_k).indices
                weights_TK = torch.softmax(torch.randn(tokens, shape.top_k, device=self._device), 1)
                weights_TK = weights_TK.to(self._dtype)
                distinct.append(int(ids_TK.unique().numel()))
                names = list(seconds)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    # The first turn warms up, and checks: all with the same copy.
                    copy = self.copies[self._calls % len(self.copies)] if turn else self.copies[0]
                    self._calls += 1
                    try:
                        took, out = self._timed(sides[name], copy, x_TD, ids_TK, weights_TK)
                    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
                        if name == OURS:
                            raise
                        skipped[name] = f"{type(error).__name__}: {error}"
                        del seconds[name]
                        continue
                    seconds[name].append(took)
                    if not turn:
                        wanted = self._same(name, out, wanted)
                if turn == 1:
                    start = time.perf_counter()
                    # What the second calls took: the first ones compile, or make primitives.
                    fastest = min((times[1] for name, times in seconds.items() if name in THEIRS), default=0.0)
                    for name, times in list(seconds.items()):
                        if name != OURS and fastest and min(times) > _HOPELESS * fastest:
                            skipped[name] = f"{min(times) / fastest:.0f} times as slow as the fastest of them"
                            del seconds[name]
                over = time.perf_counter() - start
                if turn and ((turn >= repeats and over > least_s) or over > most_s or turn >= _MOST_CALLS):
                    break
        kept = {name: times[1:] for name, times in seconds.items()}
        return {"seconds": kept, "skipped": skipped, "experts": sum(distinct[1:]) / len(distinct[1:])}

    def _timed(self, side: Callable[..., Any], copy: Copy, *args: Any) -> tuple[float, Any]:
        import torch

        sync = torch.cuda.synchronize if self._device == "cuda" else _nothing
        sync()
        start = time.perf_counter()
        out = side(copy, *args)
        sync()
        return time.perf_counter() - start, out

    def _same(self, name: str, out: Any, wanted: Any) -> Any:
        """The first side's result, which the others must be near to. Raises RuntimeError with the side's name."""
        if wanted is None:
            return out.float()
        error = float((out.float() - wanted).norm() / wanted.norm())
        if not error < (1e-4 if self._dtype.itemsize == 4 else 3e-2):
            raise AssertionError(f"{name} gives another result: relative difference {error:.2g}")
        return wanted


def _nothing() -> None:
    pass


def _ours(copy: Copy, x_TD: Any, ids_TK: Any, weights_TK: Any) -> Any:
    return copy.layer.run_local(x_TD, ids_TK, weights_TK)[0]


def _theirs(implementation: str) -> Callable[..., Any]:
    def call(copy: Copy, x_TD: Any, ids_TK: Any, weights_TK: Any) -> Any:
        copy.module.config._experts_implementation = implementation
        return copy.module(x_TD, ids_TK, weights_TK)

    return call


def _torch(copy: Copy, x_TD: Any, ids_TK: Any, weights_TK: Any) -> Any:
    import torch
    from torch.nn import functional as F

    module, (tokens, top_k) = copy.module, ids_TK.shape
    sorted_R, order_R = ids_TK.reshape(-1).sort()
    ends_S = torch.bincount(sorted_R, minlength=module.num_experts).cumsum(0).to(torch.int32)
    turned = (lambda w: w) if module.is_transposed else (lambda w: w.transpose(1, 2))
    h_RN = F.grouped_mm(x_TD.index_select(0, order_R // top_k), turned(module.gate_up_proj), offs=ends_S)
    if module.has_bias:
        h_RN += module.gate_up_proj_bias[sorted_R]
    y_RD = F.grouped_mm(module._apply_gate(h_RN), turned(module.down_proj), offs=ends_S)
    if module.has_bias:
        y_RD += module.down_proj_bias[sorted_R]
    back_R = torch.empty_like(order_R)
    back_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return torch.bmm(weights_TK[:, None], y_RD.index_select(0, back_R).view(tokens, top_k, -1))[:, 0]


def _make_copy(shape: LayerShape, dtype: Any, device: str) -> Copy:
    """Random weights of the scale that keeps activations near 1."""
    import torch
    from torch import nn
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from ..engine.moe import MoELayer

    sizes: dict[str, Any] = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.top_k}
    with torch.device("meta"):
        if shape.clamped:
            oss = GptOssConfig(num_local_experts=shape.experts, intermediate_size=shape.width, **sizes)
            module: Any = GptOssExperts(oss)
        else:
            qwen = Qwen3MoeConfig(num_experts=shape.experts, moe_intermediate_size=shape.width, **sizes)
            module = Qwen3MoeExperts(qwen)

    def made(rows: int, columns: int) -> Any:
        weight = torch.empty(shape.experts, rows, columns, dtype=dtype, device=device)
        _fill(weight, columns**-0.5)
        return weight

    up_SND, down_SDI = made(2 * shape.width, shape.hidden), made(shape.hidden, shape.width)
    pool = SimpleNamespace(
        up_SND=up_SND,
        down_SDI=down_SDI,
        up=up_SND,
        down=down_SDI,
        format=None,
        dtype=dtype,
        hidden=shape.hidden,
        width=shape.width,
        up_bias_SN=None,
        down_bias_SD=None,
        num_slots=shape.experts,
        spec=SimpleNamespace(
            module=shape.name, num_experts=shape.experts, top_k=shape.top_k, has_gate=True, has_bias=shape.clamped
        ),
    )
    theirs = {"gate_up_proj": up_SND, "down_proj": down_SDI}
    if shape.clamped:
        theirs = {name: weight.transpose(1, 2).contiguous() for name, weight in theirs.items()}
        for name, columns in (("up_bias_SN", 2 * shape.width), ("down_bias_SD", shape.hidden)):
            setattr(pool, name, torch.randn(shape.experts, columns, device=device).to(dtype))
        theirs |= {"gate_up_proj_bias": pool.up_bias_SN, "down_proj_bias": pool.down_bias_SD}
    for name, weight in theirs.items():
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return Copy(layer=MoELayer(module, cast(Any, pool)), module=module)


def _fill(weight: Any, scale: float) -> None:
    """Random numbers, the same ones again after 64 MiB: to draw them all would take longer than to measure."""
    import torch

    flat = weight.view(-1)
    size = min(flat.numel(), _RANDOM_BYTES // flat.itemsize)
    flat[:size] = (torch.randn(size, device=flat.device) * scale).to(flat.dtype)
    for start in range(size, flat.numel(), size):
        flat[start : start + size] = flat[: min(size, flat.numel() - start)]


def main() -> None:
    from .sides import serve

    serve(KernelSides())


if __name__ == "__main__":
    main()
