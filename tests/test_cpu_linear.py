"""The model's linear layers on a CPU: each number of rows takes its kernel, and the results are PyTorch's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moeyard.engine import cpu_linear
from moeyard.engine.cpu_linear import SMALL_ROWS, CpuLinear, use_panels, use_small_row_kernels


def layer(always=True, dtype=torch.float32):
    return SimpleNamespace(panels_always=always, pool=SimpleNamespace(up_SND=torch.zeros(1, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_each_number_of_rows_takes_its_kernel(bias, dtype, monkeypatch):
    model = nn.Sequential(nn.Linear(26, 9, bias=bias)).to(dtype)
    assert use_small_row_kernels(model) == 1
    taken = []
    for name in ("small_linear", "many_linear"):
        kernel = getattr(cpu_linear, name)
        monkeypatch.setattr(cpu_linear, name, lambda *args, n=name, k=kernel: taken.append(n) or k(*args))
    x = torch.randn(2, SMALL_ROWS, 26).to(dtype)
    with torch.inference_mode():
        for panels, wanted in ((False, []), (True, ["many_linear"])):
            if panels:
                assert use_panels(model, [layer(dtype=dtype)]) == 1
            y = model(x)
            assert taken == wanted and y.shape == (2, SMALL_ROWS, 9)
            torch.testing.assert_close(y, F.linear(x, model[0].weight, model[0].bias), rtol=2e-2, atol=2e-2)
        taken.clear()
        model(x[:1])
    assert taken == ["small_linear"]


def test_linear_layers_follow_the_experts():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(5, 4).to(torch.bfloat16))
    use_small_row_kernels(model)
    assert use_panels(model, []) == 0
    assert use_panels(model, [layer(), layer(always=False)]) == 0
    assert use_panels(model, [layer(dtype=torch.bfloat16)]) == 1  # of the same type, and no odd number of bfloat16
    assert [isinstance(m, CpuLinear) and m.panels for m in model] == [False, True, False]
