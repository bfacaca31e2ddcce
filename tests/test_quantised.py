"""Quantised matrices: formats against loops over single values, and the compiled kernels against PyTorch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.kernels.quantised import FORMATS, FP8, MXFP4, Format, QuantisedMatrix, QuantisedStack, relative_error
from moeyard.kernels.quantised_linear import dequantise, quantised_linear

FP8_BLOCKS = Format(name="fp8 in blocks", kind=FP8, columns=128, rows=128)
ALL = {**FORMATS, "mxfp4": MXFP4, "fp8 in blocks": FP8_BLOCKS}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def value_of(form, byte, high):
    """What one stored value stands for, without scale and zero point, by the definition of its type."""
    bits = byte if form.per_byte == 1 else byte >> 4 if high else byte & 15
    if form.name == "int8":
        return bits - 256 if bits > 127 else bits
    if form.name == "int4":
        return bits
    if form.name == "mxfp4":
        return -E2M1[bits - 8] if bits > 7 else E2M1[bits]
    sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
    if bits & 127 == 127:
        return math.nan
    value = (mantissa / 8) * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def slowly(matrix):
    """A matrix value by value."""
    form, (n, k) = matrix.format, matrix.shape
    out = torch.empty(n, k, dtype=torch.float64)
    for row in range(n):
        for column in range(k):
            at = row // form.rows, column // (form.columns or k)
            scale = float(matrix.scales[at])
            scale = 2.0 ** (scale - 127) if form.exponents else scale
            zero = int(matrix.zeros[at]) if matrix.zeros is not None else 0
            value = value_of(form, int(matrix.values[row, column // form.per_byte]), column % 2)
            out[row, column] = (value - zero) * scale
    return out


def random_matrix(form, n, k, seed=0, spread=True):
    """A quantised random matrix whose rows differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    if spread:
        weight *= torch.logspace(-3, 2, n)[:, None]
    return form.quantise(weight)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 130), (130, 66)])
def test_what_a_matrix_stands_for(name, n, k):
    matrix = random_matrix(ALL[name], n, k)
    expected = slowly(matrix)
    torch.testing.assert_close(matrix.dequantise(torch.float32).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_every_byte_decodes_alike(name):
    form = ALL[name]
    values = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    k = 256 * form.per_byte
    tensors = form.tensors(3, k)
    tensors = {n: torch.randint(100, 140, shape).to(dtype) for n, (shape, dtype) in tensors.items()} | {
        "values": values
    }
    matrix = QuantisedMatrix(format=form, k=k, **tensors)
    for dtype in (torch.float32, torch.bfloat16):
        expected = matrix.dequantise(dtype)
        torch.testing.assert_close(dequantise(matrix, dtype), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(matrix.dequantise(torch.float64), slowly(matrix), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.01), ("fp8", 0.03), ("int4", 0.11), ("mxfp4", 0.14)])
def test_quantising_takes_the_nearest_value(name, most):
    form = ALL[name]
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(1))
    assert relative_error(weight, form) < most
    matrix = form.quantise(weight)
    again = form.quantise(matrix.dequantise(torch.float32))
    assert torch.equal(again.dequantise(torch.float32), matrix.dequantise(torch.float32)) or name == "int4"
    # No other value of the type is nearer; mxfp4's standard cuts off what is beyond its largest.
    width = form.columns or 256
    scales = (matrix.scales.double() - 127).exp2() if form.exponents else matrix.scales.double()
    zeros = matrix.zeros.double() if matrix.zeros is not None else torch.zeros_like(scales)
    bytes_ = range(256) if form.per_byte == 1 else range(16)
    grid = torch.tensor([value_of(form, b, False) for b in bytes_], dtype=torch.float64)
    grid = grid[~grid.isnan() & (grid != -128)]
    for row in range(0, 96, 13):
        for column in range(0, 256, 31):
            at = row, column // width
            possible = (grid - zeros[at]) * scales[at]
            found = abs(float(matrix.dequantise(torch.float64)[row, column]) - float(weight[row, column]))
            assert found <= float((possible - weight[row, column]).abs().min()) + 1e-6


def test_zeros_and_tiny_weights():
    for form in ALL.values():
        weight = torch.zeros(4, 128)
        assert torch.equal(form.quantise(weight).dequantise(torch.float32), weight)
        weight[1, 5] = 1e-30
        assert form.quantise(weight).dequantise(torch.float32).isfinite().all()


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="even number of inputs, not 7"):
        FORMATS["int4"].quantise(torch.zeros(2, 7))


def test_bytes_of_formats():
    sizes = {name: random_matrix(form, 128, 256).nbytes for name, form in ALL.items()}
    assert sizes == {
        "int8": 128 * 256 + 128 * 4,
        "fp8": 128 * 256 + 128 * 4,
        "int4": 128 * 128 + 128 * 4 * 5,
        "mxfp4": 128 * 128 + 128 * 8,
        "fp8 in blocks": 128 * 256 + 2 * 4,
    }


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_over_groups(name, dtype):
    form, generator = ALL[name], torch.Generator().manual_seed(2)
    n, k, slots = 70, 150, 4
    weights = [random_matrix(form, n, k, seed, spread=False) for seed in range(slots)]
    stack = QuantisedStack(
        format=form,
        k=k,
        values_S=torch.stack([w.values for w in weights]),
        scales_S=torch.stack([w.scales for w in weights]),
        zeros_S=torch.stack([w.zeros for w in weights]) if weights[0].zeros is not None else None,
    )
    x = torch.randn(9, k, generator=generator).to(dtype)
    bias = torch.randn(slots, n, generator=generator).to(dtype)
    experts, starts = torch.tensor([2, 0, 3], dtype=torch.int32), torch.tensor([0, 1, 8, 170], dtype=torch.int32)
    token = torch.randint(9, (170,), generator=generator, dtype=torch.int32)
    y = quantised_linear(x, stack, starts, experts, bias, token)
    listed = quantised_linear(x, [weights[e] for e in experts], starts, None, [bias[e] for e in experts], token)
    assert torch.equal(y, listed)
    for g, expert in enumerate(experts.tolist()):
        low, high = int(starts[g]), int(starts[g + 1])
        rows = x[token[low:high].long()].double()
        expected = rows @ weights[expert].dequantise(dtype).double().t() + bias[expert].double()
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(y[low:high].double(), expected, rtol=tolerance, atol=tolerance * 10)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 140), st.sampled_from(sorted(ALL)))
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_the_others(rows, n, half, name):
    weight = random_matrix(ALL[name], n, 2 * half)
    x = torch.randn(rows, 2 * half, generator=torch.Generator().manual_seed(rows))
    together = quantised_linear(x, [weight], torch.tensor([0, rows], dtype=torch.int32), None)
    for row in range(rows):
        alone = quantised_linear(x[row : row + 1], [weight], torch.tensor([0, 1], dtype=torch.int32), None)
        assert torch.equal(alone[0], together[row])


def test_wide_weights_are_for_dequantising():
    weight = random_matrix(FORMATS["int8"], 8, 20000)
    with pytest.raises(ValueError, match="at most 16384 inputs, not 20000"):
        quantised_linear(torch.zeros(1, 20000), [weight], torch.tensor([0, 1], dtype=torch.int32), None)
    assert torch.equal(dequantise(weight, torch.float32), weight.dequantise(torch.float32))
