"""The Triton kernels compile for each kind of GPU, fit it, and use its tensor cores. `test_triton` runs this file."""

import pytest
import torch
from compiled import ARCHITECTURES, compile_for, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "the compiler is there")
if not why_not():
    from moeyard.kernels.combine_rows import combine_rows_kernel
    from moeyard.kernels.grouped_gemm import grouped_gemm_kernel
    from moeyard.kernels.pair_experts import DEPTH, ROWS, pair_down_kernel, pair_up_kernel
    from moeyard.kernels.route_few import route_few_kernel
    from moeyard.kernels.tile_config import SHARED_BYTES, all_tiles

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
SWIGLU = {"KIND": "silu", "GATED": True, "INTERLEAVED": False, "ALPHA": 1.0, "LIMIT": 0.0, "SHIFT": 0.0}
GPT_OSS = {"KIND": "silu", "GATED": True, "INTERLEAVED": True, "ALPHA": 1.702, "LIMIT": 7.0, "SHIFT": 1.0}
GELU = {"KIND": "gelu", "GATED": False, "INTERLEAVED": False, "ALPHA": 1.0, "LIMIT": 0.0, "SHIFT": 0.0}
NONE = GELU | {"KIND": ""}
MODELS = {"qwen3": (2048, 768, SWIGLU, False), "gpt_oss": (2880, 2880, GPT_OSS, True), "gelu": (1000, 600, GELU, True)}
"""Hidden size, expert width, activation, biases."""


def grouped(architecture, dtype, part, shape, model):
    hidden, width, activation, bias = MODELS[model]
    up = part == "up"
    k, n = (hidden, width * (2 if activation["GATED"] else 1)) if up else (width, hidden)
    return compile_for(
        architecture,
        grouped_gemm_kernel,
        {
            "x": dtype,
            "pair": "i32" if up else "",
            "w": dtype,
            "bias": dtype if bias else "",
            "slots": "i32",
            "firsts": "i32",
            "counts": "i32",
            "out": dtype,
        },
        {"x_stride": k, "w_stride": n * k, "tiles": 7},
        {
            "K": k, "N": n, "TOP_K": 8 if up else 0, "HAS_BIAS": bias, **(activation if up else NONE),
            "ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth, "GROUP": shape.group, "UPCAST": False,
        },
        warps=shape.warps,
        stages=shape.stages,
    )  # fmt: skip


def check(architecture, dtype, part, tiles, model):
    shape = getattr(tiles.within(SHARED[architecture], SIZES[dtype]), part)
    facts = grouped(architecture, dtype, part, shape, model)
    where = f"sm_{architecture} {dtype} {model} {part} {shape}: {facts}"
    print(where)
    assert facts.shared <= min(SHARED[architecture], SHARED_BYTES), where
    assert facts.spilled == 0, where
    if dtype != "fp32":
        assert facts.tensor, where
        if architecture == 90 and shape.rows >= 64:
            assert facts.tensor == ("HGMMA",), where


@pytest.mark.parametrize("part", ["up", "down"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("which", [0, -1])
def test_the_smallest_and_the_largest_tiles(which, architecture, part):
    check(
        architecture,
        "bf16",
        part,
        sorted(all_tiles(2, wide=architecture >= 90), key=lambda t: (t.rows, t.up.columns))[which],
        "qwen3",
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_tiles(architecture, dtype, model):
    """Those of the rule, and those of every tuned file."""
    for tiles in all_tiles(SIZES[dtype], MODELS[model][2]["GATED"], architecture >= 90):
        for part in ("up", "down"):
            check(architecture, dtype, part, tiles, model)


def others(architecture):
    yield compile_for(
        architecture,
        combine_rows_kernel,
        {"y": "bf16", "position": "i32", "weights": "fp32", "out": "bf16"},
        {},
        {"D": 2048, "TOP_K": 8, "COLUMNS": 1024},
    )
    shared = {"ids": "i64", "slots": "i32", "w": "bf16", "bias": "bf16"}
    constants = {"K": 2880, "N": 5760, "TOP_K": 4, "HAS_SLOTS": True, "HAS_BIAS": True, "ROWS": ROWS, "DEPTH": DEPTH}
    yield compile_for(
        architecture,
        pair_up_kernel,
        {**shared, "x": "bf16", "h": "bf16"},
        {"x_stride": 2880, "w_stride": 5760 * 2880, "experts": 128},
        {**constants, **GPT_OSS},
    )
    yield compile_for(
        architecture,
        pair_down_kernel,
        {**shared, "h": "bf16", "weights": "fp32", "out": "bf16"},
        {"w_stride": 2880 * 2880, "experts": 128},
        {**constants, "N": 2880},
    )
    outputs = ("counts_out", "pair_out", "position_out", "slot_out", "first_out", "count_out")
    yield compile_for(
        architecture,
        route_few_kernel,
        {"ids": "i64", "slots": "i32", **dict.fromkeys(outputs, "i32"), "counts_out": "i64"},
        {"pairs": 1024, "experts": 128, "tiles": 300},
        {"HAS_SLOTS": True, "PAIRS": 1024, "EXPERTS": 256, "TILES": 512, "ROWS": 16},
        warps=8,
    )


@pytest.mark.parametrize("architecture", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 100))])
def test_the_kernels_without_a_product(architecture):
    for facts in others(architecture):
        print(facts)
        assert facts.spilled == 0 and facts.shared <= 49_152, facts


def test_they_refuse_the_cpu():
    from moeyard.kernels.activation import Activation
    from moeyard.kernels.grouped_experts import grouped_experts

    x, ids = torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="x_TD: Triton runs on CUDA devices, not on cpu"):
        grouped_experts(x, ids, ids.float(), torch.zeros(1, 8, 4), torch.zeros(1, 4, 4), Activation())
