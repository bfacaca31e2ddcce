"""The expert loop against one token and expert at a time, at counts that divide nothing."""

import pytest
import torch
from torch.nn import functional as F

from moeyard.kernels.expert_loop import expert_loop


def gate(x):
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 21, 1], [0, 0, 17, 0], [16, 16, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5]])
def test_equals_one_row_at_a_time(counts, bias, dtype):
    torch.manual_seed(0)
    slots, dim, width = 4, 24, 10
    x = torch.randn(7, dim).to(dtype)
    up, down = torch.randn(slots, 2 * width, dim).to(dtype), torch.randn(slots, dim, width).to(dtype)
    biases = [torch.randn(slots, n).to(dtype) for n in (2 * width, dim)] if bias else [None, None]
    tokens = torch.randint(7, (sum(counts),))
    out = expert_loop(x, tokens, torch.tensor(counts), up, down, gate, *biases)
    assert out.shape == (sum(counts), dim)
    slot_of_row = [s for s, count in enumerate(counts) for _ in range(count)]
    for row, (token, slot) in enumerate(zip(tokens.tolist(), slot_of_row, strict=True)):
        h = up[slot].double() @ x[token].double() + (biases[0][slot].double() if bias else 0)
        y = down[slot].double() @ gate(h[None])[0] + (biases[1][slot].double() if bias else 0)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(out[row].double(), y, rtol=tolerance, atol=tolerance * y.abs().max().item())
