"""Sliced convolutions and matrix products in Triton, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.triton.epilogues import EPILOGUES, check_epilogue, surrounded
from us3l_kernels import functional, triton
from us3l_kernels.backends import backend
from us3l_kernels.triton import Norm
from us3l_kernels.triton import conv2d as kernels

CANARY = 3.0
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3}  # largest error over largest value
CASES = {
    # name: (N, c, H, W, K full, k active, C full, kernel, stride, padding, dilation)
    "3x3": (2, 40, 7, 5, 48, 24, 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3/2": (3, 16, 8, 7, 32, 24, 24, (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": (2, 72, 5, 6, 96, 72, 80, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1/2": (2, 16, 7, 8, 32, 16, 24, (1, 1), (2, 2), (0, 0), (1, 1)),
    "stem": (2, 3, 12, 11, 24, 16, 3, (7, 7), (2, 2), (3, 3), (1, 1)),
    "odd channels": (2, 7, 6, 5, 19, 13, 11, (3, 3), (1, 1), (1, 1), (1, 1)),
    "odd geometry": (2, 9, 10, 9, 10, 5, 9, (4, 2), (3, 2), (2, 1), (2, 3)),
    "stride and dilation share a divisor": (1, 8, 9, 11, 16, 8, 8, (3, 3), (2, 4), (2, 2), (2, 6)),
    "one channel": (2, 1, 5, 5, 3, 1, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    "two tiles of channels": (1, 72, 4, 4, 80, 72, 72, (1, 3), (1, 1), (0, 1), (1, 1)),
}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def poisoned(full: tuple[int, ...], active: Tensor) -> Tensor:
    """A full channels_last parameter that is NaN outside the active prefix."""
    parameter = torch.full(full, torch.nan, dtype=active.dtype)
    parameter = parameter.contiguous(memory_format=torch.channels_last) if len(full) == 4 else parameter
    parameter[tuple(slice(n) for n in active.shape)] = active
    return parameter


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= TOLERANCE[dtype] * factor, f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolution(case, dtype):
    n, c, h, w, full_out, out, full_in, kernel, stride, padding, dilation = CASES[case]
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    inner = random(out, c, *kernel, dtype=dtype) / (c * kernel[0] * kernel[1]) ** 0.5
    weight = poisoned((full_out, full_in, *kernel), inner)
    x = surrounded(random(n, c, h, w, dtype=dtype), -(-c // 8) * 8 + 8)
    xd, wd = x.double().requires_grad_(), inner.double().requires_grad_()
    expected = F.conv2d(xd, wd, **options)
    grad = surrounded(random(*expected.shape, dtype=dtype), -(-out // 8) * 8 + 8)
    expected.backward(grad.double())
    with backend("triton"):
        assert_close(functional.conv2d(x, weight, out_channels=out, **options), expected, dtype)
    gradient = torch.full_like(weight, CANARY, dtype=torch.float32)
    arguments = (*map(list, options.values()), 1, "triton")
    dx = torch.ops.us3l.conv2d_backward(grad, x, weight, gradient, None, True, *arguments)
    assert_close(dx, xd.grad, dtype)
    assert_close(gradient[:out, :c] - CANARY, wd.grad, dtype, factor=4)  # the canary costs a rounding
    gradient[:out, :c] = CANARY
    assert torch.equal(gradient, torch.full_like(gradient, CANARY))


@pytest.mark.parametrize("channels", [16, 136, 200])
def test_large_tiles(channels, monkeypatch):
    """Those that a GPU takes for enough pixels: here it has one multiprocessor, which any number keeps busy."""
    monkeypatch.setattr(triton, "_gpu", lambda index: triton.Gpu(90, 1, 227 << 10))
    dtype, geometry = torch.float16, kernels.Geometry((1, 2), (1, 1), (0, 1), (1, 1))
    x, weight = random(2, channels, 5, 4, dtype=dtype), random(channels, channels, 1, 2, dtype=dtype) / channels**0.5
    xd, wd = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.conv2d(xd, wd, padding=(0, 1))
    grad = random(*expected.shape, dtype=dtype)
    expected.backward(grad.double())
    assert_close(kernels.conv2d(x, weight, None, channels, geometry, "half"), expected, dtype)
    dx, dw = torch.empty_like(x, memory_format=torch.channels_last), torch.zeros_like(weight, dtype=torch.float32)
    kernels.input_gradient(grad, weight, dx, geometry, "half")
    kernels.weight_gradient(grad, x, dw, geometry, "half")
    assert_close(dx, xd.grad, dtype)
    assert_close(dw, wd.grad, dtype)


def test_sum_of_pieces_is_added_in_any_layout(monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_ROWS_OF_A_PIECE", 1)
    x, grad = random(3, 16, 6, 7, dtype=torch.float32), random(3, 24, 6, 7, dtype=torch.float32)
    geometry = kernels.Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    expected = torch.nn.grad.conv2d_weight(x.double(), (24, 16, 3, 3), grad.double(), padding=1)
    for gradient in (
        torch.full((32, 24, 3, 3), CANARY),
        torch.full((32, 24, 3, 3), CANARY).contiguous(memory_format=torch.channels_last),
        torch.full((3, 24, 32, 3), CANARY).transpose(0, 2),
    ):
        kernels.weight_gradient(grad, x, gradient, geometry, "ieee")
        assert_close(gradient[:24, :16] - CANARY, expected, torch.float32, factor=4)
        gradient[:24, :16] = CANARY
        assert torch.equal(gradient, torch.full_like(gradient, CANARY))


@pytest.mark.parametrize(
    "case,epilogue,dtype",
    [
        *(("3x3/2", epilogue, torch.float32) for epilogue in EPILOGUES),
        *((case, "added, relu6", torch.float16) for case in CASES),
    ],
    ids=str,
)
def test_epilogue_of_dx(case, epilogue, dtype):
    """Another gradient added, and the sums for the norm in front: each view its own, and phases without taps."""
    n, c, h, w, full_out, out, full_in, kernel, stride, padding, dilation = CASES[case]
    geometry = kernels.Geometry(kernel, stride, padding, dilation)
    inner = random(out, c, *kernel, dtype=dtype) / (c * kernel[0] * kernel[1]) ** 0.5
    weight = poisoned((full_out, full_in, *kernel), inner)
    grad = random(n, out, *geometry.output((h, w)), dtype=dtype)

    def input_gradient(added, norm):
        dx = surrounded(torch.zeros(n, c, h, w, dtype=dtype), -(-c // 8) * 8 + 8)
        precision = "half" if dtype == torch.float16 else "ieee"
        return dx, kernels.input_gradient(grad, weight, dx, geometry, precision, added, norm)

    shape = (n, c, h, w)
    expected = torch.nn.grad.conv2d_input(shape, inner.double(), grad.double(), stride, padding, dilation)
    check_epilogue(EPILOGUES[epilogue], input_gradient, expected, dtype, TOLERANCE[dtype])


def test_epilogue_of_large_tiles(monkeypatch):
    """As on a GPU with pixels enough."""
    monkeypatch.setattr(triton, "_gpu", lambda index: triton.Gpu(90, 1, 227 << 10))
    dtype, geometry = torch.float16, kernels.Geometry((1, 2), (1, 1), (0, 1), (1, 1))
    weight = random(40, 200, 1, 2, dtype=dtype)
    x, dx, other = (random(2, 200, 9, 8, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(3))
    grad = random(2, 40, 9, 9, dtype=dtype)
    norm = Norm(x, None, None, None, torch.zeros(1, 200), torch.ones(1, 200), None)
    sums = kernels.input_gradient(grad, weight, dx, geometry, "half", other, norm)
    expected = torch.nn.grad.conv2d_input(dx.shape, weight.double(), grad.double(), padding=(0, 1)) + other.double()
    assert_close(dx, expected, dtype)
    assert sums.shape == (1, 2, 2, 200)  # of 144 pixels
    assert_close(sums.double().sum((0, 1))[0], dx.double().sum((0, 2, 3)), torch.float32)
    assert_close(sums.double().sum((0, 1))[1], (dx.double() * x.double()).sum((0, 2, 3)), torch.float32)


@pytest.mark.parametrize("views", [1, 2])
def test_moments_of_the_result(views):
    """Of every tile of every view, also where the mean is a thousand times the deviation."""
    x = random(4, 16, 7, 5, dtype=torch.float32) + 3000
    weight = random(24, 16, 3, 3, dtype=torch.float32) / 12
    geometry = kernels.Geometry((3, 3), (1, 1), (0, 0), (1, 1))
    y, moments = kernels.conv2d_moments(x, weight, 16, geometry, "ieee", views)
    assert_close(y, F.conv2d(x.double(), weight[:16].double()), torch.float32)
    by_view = y.double().unflatten(0, (views, -1)).movedim(2, -1).flatten(1, -2)
    assert moments.partials.shape == (views, -(-by_view.size(1) // moments.rows), 2, 16)
    for view, partials in zip(by_view, moments.partials.double(), strict=True):
        for rows, (mean, squares) in zip(view.split(moments.rows), partials, strict=True):
            torch.testing.assert_close(mean, rows.mean(0), rtol=1e-6, atol=0)
            torch.testing.assert_close(squares, rows.var(0, correction=0) * len(rows), rtol=1e-4, atol=0)
