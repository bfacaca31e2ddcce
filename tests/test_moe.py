"""The MoE layer against the model's own experts, on both of its paths."""

import copy

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from moeyard.engine import moe
from moeyard.engine.config import EngineConfig
from moeyard.engine.loader import draw, load


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "mixtral"])
def layers(request, tmp_path_factory):
    """The engine's first MoE layer and transformers' experts module of the same weights."""
    path = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu"), path)
    (layer, *_) = load(blueprint, progress=False).layers
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    return layer, model.get_submodule(layer.pool.spec.module)


@pytest.mark.parametrize("tokens", [0, 1, 5, 33, 300])
@pytest.mark.parametrize("few_rows", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("panel_rows", [0, moe.NO_LIMIT])
def test_equals_the_models_own_experts(layers, tokens, few_rows, compiled, panel_rows, monkeypatch):
    layer, module = layers
    layer = copy.copy(layer)
    layer._compiled, layer.few_rows, layer.panel_rows = compiled, 16, panel_rows
    taken = []
    path = layer._few_rows
    layer._few_rows = (lambda *args: taken.append(1) or path(*args)) if few_rows else None
    torch.manual_seed(tokens)
    spec = layer.pool.spec
    x = torch.randn(tokens, layer.pool.down_SDI.shape[1])
    ids = torch.rand(tokens, spec.num_experts).topk(spec.top_k).indices
    weights = torch.rand(tokens, spec.top_k)
    before = layer.counts_E.clone()
    out = layer(x, ids, weights)
    with torch.no_grad():
        wanted = module(x, ids, weights)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    counted = torch.bincount(ids.flatten(), minlength=spec.num_experts)
    assert torch.equal(layer.counts_E - before, counted)
    few = 0 < tokens * spec.top_k <= layer.few_rows * spec.num_experts
    assert bool(taken) == (few_rows and few)


def test_plain_swiglu_is_found_by_trying():
    def swiglu(x):
        a, b = x.chunk(2, -1)
        return torch.nn.functional.silu(a) * b

    def geglu(x):
        a, b = x.chunk(2, -1)
        return torch.nn.functional.gelu(a) * b

    def interleaved(x):
        return torch.nn.functional.silu(x[..., ::2]) * x[..., 1::2]

    def clamped(x):
        return swiglu(x.clamp(-7, 7))

    def clamped_far(x):
        return swiglu(x.clamp(-2000, 2000))

    assert moe._is_swiglu(swiglu, 20)
    assert not any(moe._is_swiglu(gate, 20) for gate in (geglu, interleaved, clamped, clamped_far))


def test_the_faster_way_is_found_by_timing(layers, monkeypatch):
    layer = copy.copy(layers[0])
    clock = iter(range(10**6))
    win, lose = [1, 9] * 3, [9, 1] * 3
    slow = iter([*win, *lose, *win, *lose, *lose])  # once may be a busy moment
    now = 0

    def tick():
        nonlocal now
        if next(clock) % 2:
            now += next(slow)
        return now

    monkeypatch.setattr(moe.time, "perf_counter", tick)
    assert layer.measure_few_rows() == moe.ROW_COUNTS[2]
    slow = iter([*win, *lose, *win, *lose])
    monkeypatch.setattr(moe, "_TRIAL_S", 1000.0)
    assert layer.measure_panel_rows() == moe.PANEL_ROW_COUNTS[2]
    slow = iter([*lose, *lose, *lose, *win])
    assert layer.measure_panel_rows() == moe.NO_LIMIT
    monkeypatch.setattr(moe, "_TRIAL_S", 0.0)  # more rows would take too long
    slow = iter(win)
    assert layer.measure_panel_rows() == moe.NO_LIMIT
    slow = iter(lose)
    assert layer.measure_panel_rows() == 0
    layer._few_rows = layer._panel_rows = None
    assert layer.measure_few_rows() == layer.measure_panel_rows() == 0


def test_each_number_of_rows_takes_its_way(layers):
    layer = copy.copy(layers[0])
    layer.few_rows, layer.panel_rows = 2, 4
    taken = []

    def way(name, run):
        return lambda *args: taken.append(name) or run(*args)

    layer._few_rows, layer._panel_rows = way("few", layer._few_rows), way("panels", layer._panel_rows)
    layer._many_rows = way("plain", layer._many_rows)
    experts, top_k = layer.pool.num_slots, layer.pool.spec.top_k
    for rows, name in ((1, "few"), (2, "few"), (3, "panels"), (4, "panels"), (5, "plain")):
        tokens = rows * experts // top_k
        x = torch.randn(tokens, layer.pool.down_SDI.shape[1])
        ids = torch.rand(tokens, experts).topk(top_k).indices
        layer.run_local(x, ids, torch.rand(tokens, top_k), rows * experts)
        assert taken.pop() == name and not taken


def test_layers_of_one_shape_are_measured_once(layers, monkeypatch, tmp_path):
    """And at the next start, with their file, not at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(moe.MoELayer, "measure_few_rows", lambda self: measured.append(self) or 64)
    for _ in range(2):
        pair = [copy.copy(layers[0]), copy.copy(layers[0])]
        moe.calibrate(pair)
        assert [layer.few_rows for layer in pair] == [64, 64]
    assert len(measured) == 1
