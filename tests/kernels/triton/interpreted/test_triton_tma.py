"""Products whose tiles the tensor memory accelerator moves, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from us3l_kernels import functional, triton
from us3l_kernels.backends import BACKENDS, backend, choose
from us3l_kernels.triton import tma

CANARY = 3.0
TOLERANCE = 3e-3  # largest error over largest value
CASES = {
    # name: (N, c, H, W, C full, k active, K full)
    "edges of tiles": (3, 72, 5, 7, 88, 40, 48),
    "full": (2, 64, 4, 4, 64, 64, 64),
    "one unit": (2, 8, 3, 3, 16, 8, 24),
    "one pixel": (1, 16, 1, 1, 24, 72, 80),
    "two tiles": (2, 16, 9, 8, 16, 136, 144),
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).half()


def surrounded(x: Tensor, dim: int, more: int) -> Tensor:
    """x as a prefix of a tensor with `more` channels, which are NaN, innermost."""
    nan = torch.full_like(x.narrow(dim, 0, 1).expand(*x.shape[:dim], more, *x.shape[dim + 1 :]), torch.nan)
    wide = torch.cat([x, nan], dim).movedim(dim, -1).contiguous().movedim(-1, dim)
    return wide.narrow(dim, 0, x.size(dim))


def poisoned(active: Tensor, outputs: int, inputs: int) -> Tensor:
    """A full parameter that is NaN outside the active prefix."""
    parameter = active.new_full((outputs, inputs, *active.shape[2:]), torch.nan)
    parameter[: active.size(0), : active.size(1)] = active
    return parameter


def assert_close(got: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= TOLERANCE * factor, f"relative error {error:.2e}"


def check(op: str, x: Tensor, grad: Tensor, active: Tensor, full: tuple[int, int]) -> None:
    """y, dX, and the gradients of weight and bias, of which nothing outside the slice is read or written."""
    outputs = active.size(0)
    weight, bias = poisoned(active, *full), torch.full((full[0],), torch.nan, dtype=x.dtype)
    bias[:outputs] = random(outputs)
    xd, wd = x.double().requires_grad_(), active.double().requires_grad_()
    forward = F.conv2d if op == "conv2d" else F.linear
    expected = forward(xd, wd, bias[:outputs].double())
    expected.backward(grad.double())
    with backend(f"{op}=triton_tma"):
        if op == "conv2d":
            y = functional.conv2d(x, weight, bias, out_channels=outputs)
        else:
            y = functional.linear(x, weight, bias, out_features=outputs, in_features=active.size(1))
    assert_close(y, expected)
    gradient, of_bias = torch.full_like(weight, CANARY, dtype=torch.float32), torch.full((full[0],), CANARY)
    more = ([1, 1], [0, 0], [1, 1], 1) if op == "conv2d" else (active.size(1),)
    call = getattr(torch.ops.us3l, f"{op}_backward")
    dx = call(grad, x, weight, gradient, of_bias, True, *more, "triton_tma")
    assert_close(dx, xd.grad)
    inside = tuple(slice(n) for n in active.shape[:2])
    assert_close(gradient[inside] - CANARY, wd.grad, factor=4)  # the canary costs a rounding
    gradient[inside] = CANARY
    assert torch.equal(gradient, torch.full_like(gradient, CANARY))
    assert_close(of_bias[:outputs] - CANARY, grad.double().sum((0, 2, 3) if op == "conv2d" else (0,)), factor=4)
    assert torch.equal(of_bias[outputs:], torch.full_like(of_bias[outputs:], CANARY))


@pytest.mark.parametrize("case", CASES)
def test_convolution(case):
    n, c, h, w, full_in, out, full_out = CASES[case]
    x, grad = surrounded(random(n, c, h, w), 1, 16), surrounded(random(n, out, h, w), 1, 8)
    check("conv2d", x, grad, random(out, c, 1, 1) / c**0.5, (full_out, full_in))


@pytest.mark.parametrize("shape,out", [((37, 24), 72), ((5, 80), 8)], ids=str)
def test_linear(shape, out):
    x, grad = surrounded(random(*shape), 1, 8), random(shape[0], out)
    check("linear", x, grad, random(out, shape[1]) / shape[1] ** 0.5, (out + 8, shape[1] + 8))


def test_what_no_descriptor_can_have_is_copied():
    """Rows at an odd distance, at an odd address, at none, across, and weights whose channels are not innermost."""
    x, weight = random(2, 16, 3, 3), random(24, 16, 1, 1)
    shifted = torch.empty(2 * 16 * 9 + 1, dtype=x.dtype)[1:].view(2, 3, 3, 16).permute(0, 3, 1, 2)
    for images in (surrounded(x, 1, 5), shifted.copy_(x), random(2, 16, 1, 1).expand(2, 16, 3, 3), x.contiguous()):
        check("conv2d", images, random(2, 24, 1, 1).expand(2, 24, 3, 3), weight, (32, 24))
    across = weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(tma.conv2d(x, across, None, 24), F.conv2d(x.double(), weight.double()))


@pytest.mark.parametrize("channels", [16, 136, 200])
def test_large_tiles(channels, monkeypatch):
    """Those that a GPU takes for enough pixels, and several of them by one block: here it has one multiprocessor."""
    monkeypatch.setattr(triton, "_gpu", lambda index: triton.Gpu(90, 1, 227 << 10))
    c = random(2, channels, 12, 13)
    check("conv2d", c, random(2, channels, 12, 13), random(channels, channels, 1, 1) / channels**0.5, (channels,) * 2)


@pytest.mark.parametrize(
    "dtype,channels,change,reason",
    [
        (torch.float16, 8, {}, None),
        (torch.float32, 8, {}, "half precision"),
        (torch.bfloat16, 8, {}, "interpreter"),
        (torch.float16, 12, {}, "multiples of 8"),
        (torch.float16, 8, {"out_channels": 12}, "multiples of 8"),
        (torch.float16, 8, {"stride": [2, 1]}, "stride 1"),
        (torch.float16, 8, {"padding": [0, 1]}, "no padding"),
    ],
    ids=str,
)
def test_what_it_takes(dtype, channels, change, reason):
    x, weight = torch.empty(2, channels, 4, 4, dtype=dtype), torch.empty(16, 16, 1, 1, dtype=dtype)
    given = {"out_channels": 16, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, **change}
    said = BACKENDS["triton_tma"].why_not("conv2d", x, weight, **given)
    assert said is None if reason is None else reason in said
    assert "1x1" in BACKENDS["triton_tma"].why_not("conv2d", x.half(), torch.empty(8, 8, 3, 3).half(), **given)


def test_auto_does_not_take_what_was_not_measured():
    x, weight = random(2, 8), random(16, 8)
    assert choose("linear", x, weight, out_features=16, in_features=8) == "aten"
    assert "not measured" in BACKENDS["triton_tma"].why_slower("linear", x, weight)
