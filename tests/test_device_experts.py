"""Whether a layer's experts run on the Triton kernels, and why not."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from moeyard.engine import device_experts
from moeyard.engine.device_experts import compile_experts
from moeyard.kernels import triton_version


@pytest.fixture
def told(monkeypatch):
    """What was said, once each."""
    messages = []
    monkeypatch.setattr(device_experts.log, "warning", lambda text, *args: messages.append(text % args))
    device_experts._tell.cache_clear()
    yield messages
    device_experts._tell.cache_clear()


def pool(device="cuda", dtype=torch.bfloat16):
    tensor = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(4, 16, 8))
    spec = SimpleNamespace(module="model.layers.0.mlp.experts")
    return SimpleNamespace(up_SND=tensor, down_SDI=SimpleNamespace(shape=(4, 8, 8)), spec=spec)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one, and Triton."""
    monkeypatch.setattr(device_experts, "why_no_triton", lambda: "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(device_experts, "grouped_experts_of", lambda pool, gate: gate)


def test_a_gpu_has_the_kernels(gpu, told):
    assert device_experts.device_experts(pool(), "function") == ("function", "") and not told


def test_a_cpu_has_others(gpu, told):
    assert device_experts.device_experts(pool("cpu"), "function") == (None, "") and not told


@pytest.mark.parametrize(
    ("patch", "dtype", "gate", "reason"),
    [
        (
            (device_experts, "why_no_triton", lambda: "triton is not installed; pip"),
            None,
            "f",
            "triton is not installed",
        ),
        (
            (torch.cuda, "get_device_capability", lambda device: (7, 5)),
            None,
            "f",
            "compute capability is 7.5, below 8.0",
        ),
        ((torch.version, "cuda", None), None, "f", "written for CUDA devices"),
        (None, torch.float64, "f", "they do not take torch.float64"),
        (None, None, None, "the activation of model.layers.0.mlp.experts is none that they know"),
    ],
)
def test_reasons_are_told_once(gpu, told, patch, dtype, gate, reason, monkeypatch):
    if patch:
        monkeypatch.setattr(*patch)
    for _ in range(3):
        function, why = device_experts.device_experts(pool(dtype=dtype or torch.bfloat16), gate)
        assert function is None and reason in why
    assert len(told) == 1 and reason in told[0]


@pytest.fixture
def fresh():
    triton_version.why_no_triton.cache_clear()
    yield
    triton_version.why_no_triton.cache_clear()


def test_a_missing_triton_is_said_with_the_remedy(fresh, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_version.why_no_triton() == "triton is not installed; pip install 'triton>=3.6'"


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.5.1", "triton 3.5.1 is older than 3.6; pip install 'triton>=3.6'"), ("3.6.0", ""), ("3.10.0+git1", "")],
)
def test_versions(version, reason, fresh, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setitem(__import__("sys").modules, "triton", SimpleNamespace(__version__=version))
    assert triton_version.why_no_triton() == reason


def test_kernels_are_compiled_for_each_kind_of_layer_once():
    calls = []

    class Layer:
        def __init__(self, number, experts, grouped=True):
            shapes = {"up_SND": torch.zeros(experts, 6, 4), "down_SDI": torch.zeros(experts, 4, 3)}
            spec = SimpleNamespace(has_bias=False, top_k=2, module=f"layers.{number}")
            self.number, self.grouped, self.offloaded = number, grouped or None, None
            self.pool = SimpleNamespace(**shapes, spec=spec, num_slots=experts)

        def run_local(self, x, slots, weights):
            assert x.shape == (len(slots), 4) and weights.shape == slots.shape == (len(x), 2)
            assert int(slots.min()) >= 0 and int(slots.max()) < self.pool.num_slots
            calls.append((self.number, len(x)))

    compile_experts([Layer(0, 5), Layer(1, 5), Layer(2, 3), Layer(3, 4, grouped=False)], 9)
    assert calls == [(n, tokens) for n in (0, 2) for tokens in (1, 2, 4, 8)]
