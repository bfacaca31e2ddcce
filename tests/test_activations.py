"""Gates are recognised by the numbers they give."""

import pytest
import torch
from torch.nn import functional as F

from moeyard.engine.activations import find_activation
from moeyard.kernels.activation import Activation

WIDTH = 11


def halves(act, *, limit=0.0):
    def gate(x):
        a, b = x.chunk(2, dim=-1)
        if limit:
            a, b = a.clamp(max=limit), b.clamp(-limit, limit)
        return act(a) * b

    return gate


def gpt_oss(x):
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


FOUND = [
    (halves(F.silu), Activation()),
    (halves(F.silu, limit=10.0), Activation(limit=10.0)),
    (halves(F.gelu), Activation(kind="gelu")),
    (halves(lambda x: F.gelu(x, approximate="tanh")), Activation(kind="gelu_tanh")),
    (halves(F.relu), Activation(kind="relu")),
    (halves(lambda x: x * torch.sigmoid(1.702 * x)), Activation(alpha=1.702)),
    (lambda x: halves(F.silu)(torch.cat([x[..., ::2], x[..., 1::2]], -1)), Activation(interleaved=True)),
    (lambda x: halves(F.silu)(x.float()).to(x.dtype), Activation()),
    (gpt_oss, Activation(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)),
]
PLAIN = [
    (F.silu, Activation(gated=False)),
    (F.gelu, Activation(kind="gelu", gated=False)),
    (lambda x: F.relu(x).square(), Activation(kind="relu_squared", gated=False)),
]


@pytest.mark.parametrize(("gate", "activation"), FOUND)
def test_gates(gate, activation):
    assert find_activation(gate, 2 * WIDTH, WIDTH) == activation


@pytest.mark.parametrize(("gate", "activation"), PLAIN)
def test_activations_without_a_gate(gate, activation):
    assert find_activation(gate, WIDTH, WIDTH) == activation


@pytest.mark.parametrize(
    "gate",
    [
        halves(lambda x: F.silu(x).clamp(max=7.0)),  # a clamp after the activation
        halves(torch.tanh),
        lambda x: F.silu(x[..., :WIDTH]),
        lambda x: halves(F.silu)(x.flip(-1)),
        lambda x: F.silu(x).chunk(2, dim=-1)[0] * 0,
    ],
)
def test_others_are_not_taken_for_one(gate):
    assert find_activation(gate, 2 * WIDTH, WIDTH) is None
    assert find_activation(torch.tanh, WIDTH, WIDTH) is None


def test_refusals():
    with pytest.raises(ValueError, match="kind: 'swish'"):
        Activation(kind="swish")
    with pytest.raises(ValueError, match="limit: -1"):
        Activation(limit=-1.0)
    with pytest.raises(ValueError, match="gated"):
        Activation(gated=False, shift=1.0)
