"""Rows of many experts times their weights in one launch, on a GPU: a Triton kernel driven by a list of tiles.

The up projection gathers its rows and applies the activation before it writes; the down projection is the same kernel
without both. Weights stay in the checkpoint's layout, wherever their slots are.

R: rows sorted by expert, S: slots, K: inputs, N: rows of a weight, I: columns of the result (N / 2 with a gate).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import Activation
from .tile_config import TileShape
from .tile_list import Tiles

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bfloat16 as if it were an integer: kernels make it float32 before."""


@triton.jit
def activate(gate, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """The activation of float32 values, as `Activation.kind` names it."""
    if KIND == "silu":
        return gate * tl.sigmoid(ALPHA * gate)
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # tanh(z) is 2 * sigmoid(2 * z) - 1
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif KIND == "relu":
        return tl.maximum(gate, 0.0)
    else:
        positive = tl.maximum(gate, 0.0)
        return positive * positive


@triton.jit
def activate_gated(gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """act(gate) * (up + shift) with the clamp of `Activation`."""
    if LIMIT > 0.0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if SHIFT != 0.0:
        up += SHIFT
    return activate(gate, KIND, ALPHA) * up


# Lists of small integers may begin anywhere: it is not worth another kernel.
@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["pair", "slots", "firsts", "counts"])
def grouped_gemm_kernel(
    x,
    pair,
    w,
    bias,
    slots,
    firsts,
    counts,
    out,
    x_stride,
    w_stride,
    tiles,
    K: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of rows by COLUMNS rows of its expert's weight per program.

    TOP_K > 0: row r is computed from x[pair[r] // TOP_K], else from x[r]. KIND "" is no activation. GROUP tiles of rows
    share each block of columns before the next one: 1 where a weight is read by one tile anyway.
    """
    BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    first_tile = program // (GROUP * BLOCKS) * GROUP
    in_group = min(tiles - first_tile, GROUP)
    tile = first_tile + program % (GROUP * BLOCKS) % in_group
    block = program % (GROUP * BLOCKS) // in_group

    count = tl.load(counts + tile)
    if count == 0:
        return
    slot = tl.load(slots + tile).to(tl.int64)
    m = tl.arange(0, ROWS)
    live = m < count
    # Rows behind the tile's last compute what its first does, and are not stored.
    row = tl.load(firsts + tile) + tl.where(live, m, 0)
    source = row
    if TOP_K > 0:
        source = tl.load(pair + row) // TOP_K
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    # A gate and its up side by side whatever the layout, so that one dot gives both to the same thread.
    w_row = c
    if GATED and not INTERLEAVED:
        w_row = c // 2 + c % 2 * (N // 2)
    w_row = tl.where(c < N, w_row, 0)
    k = tl.arange(0, DEPTH)
    x_place = x + source.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_place = w + slot * w_stride + w_row[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, K, DEPTH):
        if K % DEPTH == 0:
            a = tl.load(x_place)
            b = tl.load(w_place)
        else:
            inside = k < K - done
            a = tl.load(x_place, mask=inside[None, :], other=0.0)
            b = tl.load(w_place, mask=inside[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_place += DEPTH
        w_place += DEPTH
    if HAS_BIAS:
        total += tl.load(bias + slot * N + w_row).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(total, (ROWS, COLUMNS // 2, 2)))
        y = activate_gated(gate, up, KIND, ALPHA, LIMIT, SHIFT)
        column = block * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        width = N // 2
    else:
        y = total
        if KIND != "":
            y = activate(total, KIND, ALPHA)
        column = c
        width = N
    place = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=live[:, None] & (column < width)[None, :])


def grouped_gemm(
    x_RK: torch.Tensor,
    weight_SNK: torch.Tensor,
    tiles: Tiles,
    shape: TileShape,
    out_RI: torch.Tensor,
    *,
    activation: Activation | None = None,
    bias_SN: torch.Tensor | None = None,
    pair_R: torch.Tensor | None = None,
    top_k: int = 0,
) -> None:
    """Writes the rows of `tiles` of out_RI: act(x @ weight[slot].T + bias[slot]), summed in float32.

    With pair_R and top_k row r is computed from x[pair_R[r] // top_k], else from x[r]. float32, bfloat16 or float16,
    all tensors alike; x's rows and each slot's weight are contiguous. `shape.rows` is that of the tiles. What the
    tensors must be is checked by `grouped_experts`.
    """
    assert shape.rows == tiles.rows, (shape, tiles.rows)
    n, k = weight_SNK.shape[1:]
    act = activation or Activation(gated=False)
    programs = tiles.length * -(-n // shape.columns)
    if not programs:
        return
    grouped_gemm_kernel[(programs,)](
        x_RK, pair_R, weight_SNK, bias_SN, tiles.slot_M, tiles.first_M, tiles.count_M, out_RI,
        x_RK.stride(0), weight_SNK.stride(0), tiles.length,
        K=k, N=n, TOP_K=top_k if pair_R is not None else 0, HAS_BIAS=bias_SN is not None,
        KIND=act.kind if activation is not None else "", GATED=act.gated, INTERLEAVED=act.interleaved,
        ALPHA=act.alpha, LIMIT=act.limit, SHIFT=act.shift,
        ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth, GROUP=shape.group,
        UPCAST=INTERPRETED, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
