"""A layer's experts on a GPU, from the router's choice to the weighted sums, in Triton.

Few tokens go pair by pair; more are sorted by expert on the device, run through two grouped GEMMs and combined in
top-k order. The host waits for nothing, and every launch's size follows from the shapes, so that a CUDA graph can hold
it.

T: tokens (or rows received from other ranks), K: places of a token's top-k, D: hidden size, I: expert width, E:
experts, S: slots, N: rows of the up projection (2I with a gate, I without), R: rows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence

import torch

from .activation import Activation
from .combine_rows import combine_rows
from .grouped_gemm import INTERPRETED, grouped_gemm
from .pair_experts import MOST_TOKENS, pair_experts
from .route_few import MOST_PAIRS, route_few
from .tile_config import SHARED_BYTES, ExpertTiles, choose_tiles, expected_rows, file_name, load_tuned
from .tile_list import Tiles, count_tiles, listed_tiles, route_tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_experts(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_SND: torch.Tensor,
    down_SDI: torch.Tensor,
    activation: Activation,
    *,
    up_bias_SN: torch.Tensor | None = None,
    down_bias_SD: torch.Tensor | None = None,
    slot_E: torch.Tensor | None = None,
    deterministic: bool = False,
    tiles: ExpertTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_TD, counts_E): out[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t], and each expert's rows.

    float32, bfloat16 or float16; sums in float32, h and each expert's result rounded to the dtype (the latter not for
    up to `MOST_TOKENS` tokens). ids (int32 or int64) that are not in 0..E-1 add nothing; -1 is the one to use. Expert
    e's weights are in slot slot_E[e] (int32 or int64; -1: not here, adds nothing), without slot_E in slot e and E is S.
    Slots may be any distance apart, and be shared by experts.

    With `deterministic` a row's result depends on that row alone, not on how many or which others there are: it costs
    few tokens the tiles that fit them. `tiles` overrides the choice, for tuning. ValueError for tensors of other
    shapes, types or places, with the name of the first one.
    """
    experts = up_SND.shape[0] if slot_E is None else slot_E.shape[0]
    _check_weights(x_TD, up_SND, down_SDI, activation, up_bias_SN, down_bias_SD)
    _check_ids(x_TD, ids_TK, weights_TK, slot_E)
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    tokens, top_k = ids_TK.shape
    if not tokens or not top_k:
        return torch.zeros_like(x_TD), torch.zeros(experts, dtype=torch.int64, device=x_TD.device)
    with _device_of(x_TD):
        if tokens <= MOST_TOKENS and not deterministic and tiles is None:
            out_TD = pair_experts(
                _aligned(x_TD), ids_TK, weights_TK, up_SND, down_SDI, activation, experts=experts,
                up_bias_SN=up_bias_SN, down_bias_SD=down_bias_SD, slot_E=slot_E,
            )  # fmt: skip
            return out_TD, _count(ids_TK, experts, slot_E)
        if tiles is None:
            rows = expected_rows(tokens, top_k, experts)
            tiles = tiles_for(x_TD, experts, down_SDI.shape[2], activation.gated, rows, deterministic)
        route = route_few if ids_TK.numel() <= MOST_PAIRS else route_tiles
        routed = route(ids_TK, experts, tiles.rows, slot_E)
        y_RD = _both(
            x_TD, routed.tiles, tiles, up_SND, down_SDI, activation, up_bias_SN, down_bias_SD, ids_TK.numel(),
            routed.pair_R, top_k,
        )  # fmt: skip
        return combine_rows(y_RD, routed.position_TK, weights_TK), routed.counts_E


def expert_major(
    x_RD: torch.Tensor,
    counts_E: torch.Tensor,
    first_E: torch.Tensor,
    up_SND: torch.Tensor,
    down_SDI: torch.Tensor,
    activation: Activation,
    *,
    most_rows: int | None = None,
    up_bias_SN: torch.Tensor | None = None,
    down_bias_SD: torch.Tensor | None = None,
    slot_E: torch.Tensor | None = None,
    deterministic: bool = False,
    tiles: ExpertTiles | None = None,
) -> torch.Tensor:
    """y_RD of rows that lie by expert already: expert e has x[first[e] : first[e] + counts[e]] (int32 or int64).

    The rest as `grouped_experts` says. Rows of no expert come back undefined; nothing is weighted. `most_rows`, which
    the sum of the counts must not exceed, bounds the launch; it is R where nothing is said.
    """
    experts = up_SND.shape[0] if slot_E is None else slot_E.shape[0]
    _check_weights(x_RD, up_SND, down_SDI, activation, up_bias_SN, down_bias_SD)
    for name, tensor in (("counts_E", counts_E), ("first_E", first_E), ("slot_E", slot_E)):
        if tensor is not None:
            _check(name, tensor, (experts,), (torch.int32, torch.int64), x_RD.device)
    most_rows = x_RD.shape[0] if most_rows is None else most_rows
    if not 0 <= most_rows <= x_RD.shape[0]:
        raise ValueError(f"most_rows: {most_rows} is not in 0..{x_RD.shape[0]}, the rows of x_RD")
    with _device_of(x_RD):
        if tiles is None:
            rows = most_rows / experts
            tiles = tiles_for(x_RD, experts, down_SDI.shape[2], activation.gated, rows, deterministic)
        parts = count_tiles(counts_E, tiles.rows, most_rows, first_E=first_E, slot_E=slot_E)
        return _both(x_RD, parts, tiles, up_SND, down_SDI, activation, up_bias_SN, down_bias_SD, x_RD.shape[0])


def listed_experts(
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    starts: Sequence[int],
    slots: Sequence[int],
    up_SND: torch.Tensor,
    down_SDI: torch.Tensor,
    activation: Activation,
    *,
    up_bias_SN: torch.Tensor | None = None,
    down_bias_SD: torch.Tensor | None = None,
    deterministic: bool = False,
    tiles: ExpertTiles | None = None,
) -> torch.Tensor:
    """y_RD of groups of rows that the host knows: row r, which is x[token_R[r]] (int32), belongs to the group g with
    starts[g] <= r < starts[g + 1], and that group's weights are in slots[g].

    starts[0] is 0 and the last of them R. The rest as `grouped_experts` says; nothing is weighted.
    """
    _check_weights(x_TD, up_SND, down_SDI, activation, up_bias_SN, down_bias_SD)
    _check("token_R", token_R, (starts[-1],), (torch.int32,), x_TD.device)
    if starts[0] or len(starts) != len(slots) + 1 or any(high < low for low, high in itertools.pairwise(starts)):
        raise ValueError(f"starts: {list(starts)} do not begin at 0 and ascend to R, one for each slot and one more")
    if any(not 0 <= slot < up_SND.shape[0] for slot in slots):
        raise ValueError(f"slots: {list(slots)} are not all in 0..{up_SND.shape[0] - 1}")
    with _device_of(x_TD):
        if tiles is None:
            rows = starts[-1] / max(1, len(slots))
            tiles = tiles_for(x_TD, up_SND.shape[0], down_SDI.shape[2], activation.gated, rows, deterministic)
        parts = listed_tiles(starts, slots, tiles.rows, x_TD.device)
        return _both(x_TD, parts, tiles, up_SND, down_SDI, activation, up_bias_SN, down_bias_SD, starts[-1], token_R, 1)


def _both(
    x: torch.Tensor,
    parts: Tiles,
    tiles: ExpertTiles,
    up_SND: torch.Tensor,
    down_SDI: torch.Tensor,
    activation: Activation,
    up_bias_SN: torch.Tensor | None,
    down_bias_SD: torch.Tensor | None,
    rows: int,
    pair_R: torch.Tensor | None = None,
    top_k: int = 0,
) -> torch.Tensor:
    """The two products."""
    x = _aligned(x)
    h_RI = x.new_empty(rows, down_SDI.shape[2])
    y_RD = x.new_empty(rows, down_SDI.shape[1])
    grouped_gemm(
        x, up_SND, parts, tiles.up, h_RI, activation=activation, bias_SN=up_bias_SN, pair_R=pair_R, top_k=top_k
    )
    grouped_gemm(h_RI, down_SDI, parts, tiles.down, y_RD, bias_SN=down_bias_SD)
    return y_RD


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Rows at multiples of 16 elements, where their width allows it: Triton loads others value by value. Those that
    came from other ranks lie apart by more than their width.
    """
    if x.shape[1] % 16 == 0 and (x.stride(0) % 16 or x.data_ptr() % 16):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def tiles_for(
    x: torch.Tensor, experts: int, width: int, gated: bool, rows_per_expert: float, deterministic: bool = False
) -> ExpertTiles:
    """What the experts of these shapes use on x's device for so many rows each."""
    name, shared_bytes, wide = _device(x.device)
    file = file_name(name, str(x.dtype).removeprefix("torch."), experts, x.shape[1], width, gated)
    return choose_tiles(
        rows_per_expert,
        x.element_size(),
        gated=gated,
        wide=wide,
        tuned=load_tuned(file),
        deterministic=deterministic,
        shared_bytes=shared_bytes,
    )


@functools.cache
def _device(device: torch.device) -> tuple[str, int, bool]:
    """Its name, the shared memory that a program may have, and whether it is `wide`."""
    if device.type != "cuda":
        return "interpreter", SHARED_BYTES, True
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)
    return properties.name, shared, properties.major in (9, 10)


def _device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _count(ids_TK: torch.Tensor, experts: int, slot_E: torch.Tensor | None) -> torch.Tensor:
    """The counts of `route_tiles` alone."""
    flat_P = ids_TK.reshape(-1).long()
    inside_P = flat_P.clamp(0, experts - 1)
    there_P = inside_P == flat_P
    if slot_E is not None:
        there_P &= slot_E[inside_P] >= 0
    counts_E = torch.zeros(experts, dtype=torch.int64, device=ids_TK.device)
    return counts_E.scatter_add_(0, inside_P, there_P.long())


def _check_weights(
    x: torch.Tensor,
    up_SND: torch.Tensor,
    down_SDI: torch.Tensor,
    activation: Activation,
    up_bias_SN: torch.Tensor | None,
    down_bias_SD: torch.Tensor | None,
) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES or (x.shape[1] > 1 and x.stride(1) != 1):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"x_TD: contiguous rows of {names} are needed, not {list(x.shape)} of {x.dtype}")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"x_TD: Triton runs on CUDA devices, not on {x.device}; set TRITON_INTERPRET=1 to try it")
    if up_SND.ndim != 3 or down_SDI.ndim != 3:
        raise ValueError(f"up_SND: [S, N, D] is needed, not {list(up_SND.shape)}; down_SDI [S, D, I]")
    slots, hidden, width = down_SDI.shape
    n = 2 * width if activation.gated else width
    _check("up_SND", up_SND, (slots, n, x.shape[1]), (x.dtype,), x.device)
    _check("down_SDI", down_SDI, (slots, x.shape[1], width), (x.dtype,), x.device)
    for name, tensor in (("up_SND", up_SND), ("down_SDI", down_SDI)):
        if slots and not tensor[0].is_contiguous():
            raise ValueError(f"{name}: each slot's weight must be contiguous; strides are {list(tensor.stride())}")
    for name, bias, size in (("up_bias_SN", up_bias_SN, n), ("down_bias_SD", down_bias_SD, hidden)):
        if bias is not None:
            _check(name, bias, (slots, size), (x.dtype,), x.device)
            if not bias.is_contiguous():
                raise ValueError(f"{name}: a contiguous tensor is needed; strides are {list(bias.stride())}")


def _check_ids(x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, slot_E: torch.Tensor | None) -> None:
    if ids_TK.ndim != 2:
        raise ValueError(f"ids_TK: a matrix is needed, not {list(ids_TK.shape)}")
    _check("ids_TK", ids_TK, (x_TD.shape[0], ids_TK.shape[1]), (torch.int32, torch.int64), x_TD.device)
    _check("weights_TK", weights_TK, tuple(ids_TK.shape), DTYPES, x_TD.device)
    if slot_E is not None:
        if slot_E.ndim != 1 or not slot_E.is_contiguous():
            raise ValueError(f"slot_E: a contiguous vector is needed, not {list(slot_E.shape)}")
        _check("slot_E", slot_E, tuple(slot_E.shape), (torch.int32, torch.int64), x_TD.device)


def _check(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != device:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: {list(shape)} of {wanted} on {device} is needed, not {list(tensor.shape)} of {tensor.dtype} on"
            f" {tensor.device}"
        )
