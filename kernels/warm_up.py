"""Compiling the CPU kernels before they are needed."""

import torch

from .grouped_linear import combine, grouped_gate_up_silu, grouped_linear
from .many_rows import MANY_ROWS, many_linear
from .paged_attention import paged_decode_attention
from .quantised import FORMATS
from .quantised_linear import dequantise, quantised_linear
from .small_experts import small_experts
from .sort_rows import sort_rows_in
from .write_kv import write_kv


def warm_up(*, quantised: bool = False) -> None:
    """Compile every CPU kernel, or load it from the cache, so that no request waits for it; those of quantised weights
    only where they are asked for.

    About ten seconds of one core the first time, a third of a second from the cache. One call serves both dtypes.
    """
    x = torch.zeros(1, 8)
    rows = sort_rows_in([0], torch.zeros(1, 1, dtype=torch.int64), 1)
    y = grouped_linear(x, torch.zeros(1, 8, 8), rows.starts, rows.experts_G)  # also small_linear's kernel
    combine(y, rows.position_TK, torch.ones(1, 1))
    many_linear(x, torch.zeros(8, 8), None)
    grouped_gate_up_silu(x, torch.zeros(1, 16, 8), rows.starts, rows.experts_G, way=MANY_ROWS)
    small_experts(x, rows.position_TK, torch.ones(1, 1), torch.zeros(1, 16, 8), torch.zeros(1, 8, 8))
    cache = torch.zeros(1, 1, 1, 8)
    one, none = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    write_kv(x[None], x[None], cache, cache, torch.zeros(1, dtype=torch.int64))
    paged_decode_attention(x[None], cache, cache, none, one, 1.0)
    if quantised:
        weight = FORMATS["int8"].quantise(torch.zeros(8, 8))  # one call serves all formats
        quantised_linear(x, [weight], rows.starts, None)
        dequantise(weight, torch.float32)
