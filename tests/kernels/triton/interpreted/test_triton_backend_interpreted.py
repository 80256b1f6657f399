"""The backend `triton` where Triton interprets: what a GPU would be asked, on the CPU."""

from __future__ import annotations

import pytest
import torch

from us3l_kernels import backend, functional, gradients, tune
from us3l_kernels import nn as sliced
from us3l_kernels.backends import BACKENDS, choose, measured
from us3l_kernels.packed import PackedWeights
from us3l_kernels.width import use_width

GEOMETRY = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}


@pytest.mark.parametrize(
    "dtype,change,reason",
    [
        (torch.float16, {}, None),
        (torch.float32, {"groups": 8}, "one group"),
        (torch.float64, {}, "float64"),
        (torch.bfloat16, {}, "interpreter"),
    ],
    ids=str,
)
def test_what_it_takes(dtype, change, reason):
    x, weight = torch.empty(2, 8, 4, 4, dtype=dtype), torch.empty(8, 8, 3, 3, dtype=dtype)
    said = BACKENDS["triton"].why_not("conv2d", x, weight, out_channels=8, **{**GEOMETRY, **change})
    assert said is None if reason is None else reason in said


def test_auto_never_interprets():
    x = torch.empty(2, 8, 4, 4, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(8, 8, 3, 3, dtype=torch.float16)
    assert choose("conv2d", x, weight, out_channels=8, **GEOMETRY) != "triton"


def test_the_tuner_measures_it_beside_aten():
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    call = measured.describe("conv2d", x, torch.randn(8, 8, 1, 1), {"out_channels": 8, **GEOMETRY, "padding": [0, 0]})
    measurement = tune.measure(call, 1, True, True)
    assert measurement is not None and {"triton", "aten"} <= measurement.forward.keys()
    assert measurement.training is not None and measurement.training.keys() == measurement.forward.keys()


@pytest.mark.parametrize("attached", [False, True])
def test_float32_weights_of_a_half_precision_layer(attached):
    """Cast once for a width; the gradient goes into the slice of the float32 one."""
    torch.manual_seed(0)
    layers = [sliced.SlicedConv2d(16, 32, 3, padding=1, bias=True), sliced.SlicedLinear(32, 24)]
    model = torch.nn.ModuleList(layers).to(memory_format=torch.channels_last)
    buffer = gradients.attach(model) if attached else None
    packed = PackedWeights(buffer)
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    results = []
    for name in ("triton", "aten"):
        for p in model.parameters():
            p.grad = None
        if buffer is not None:
            buffer.zero_()
        with backend(name), use_width(model, 0.5), packed, torch.autocast("cpu", torch.float16):
            y = layers[1](layers[0](x).mean((2, 3)))
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        results.append([y, *(p.grad.clone() for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-3 * expected.abs().max().item())


def test_empty_batches():
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    with backend("triton"):
        y = functional.conv2d(x, weight, padding=1)
        rows = functional.linear(torch.zeros(0, 8), weight[:, :, 0, 0])
    assert y.shape == (0, 16, 4, 4) and rows.shape == (0, 16)
    y.backward(torch.zeros_like(y))
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))
