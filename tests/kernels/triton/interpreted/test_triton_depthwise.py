"""Depthwise convolutions in Triton, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.triton.epilogues import EPILOGUES, check_epilogue, surrounded
from us3l_kernels import functional
from us3l_kernels.backends import backend
from us3l_kernels.triton import depthwise as kernels

CANARY = 3.0
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # largest error over largest value
CASES = {
    # name: (N, c, H, W, C full, kernel, stride, padding, dilation)
    "3x3": (3, 40, 9, 6, 48, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3/2": (2, 24, 9, 8, 24, (3, 3), (2, 2), (1, 1), (1, 1)),
    "5x5": (2, 16, 6, 7, 24, (5, 5), (1, 1), (2, 2), (1, 1)),
    "5x5/2": (1, 8, 11, 10, 16, (5, 5), (2, 2), (2, 2), (1, 1)),
    "7x7": (1, 8, 7, 7, 8, (7, 7), (1, 1), (3, 3), (1, 1)),
    "odd channels": (2, 7, 5, 6, 9, (3, 3), (1, 1), (1, 1), (1, 1)),
    "odd geometry": (1, 9, 10, 12, 10, (3, 2), (3, 2), (0, 1), (2, 3)),
    "phases that no tap reaches": (2, 8, 7, 7, 8, (1, 1), (2, 2), (0, 0), (1, 1)),
    "one pixel": (130, 8, 1, 1, 8, (3, 3), (1, 1), (1, 1), (1, 1)),
}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= TOLERANCE[dtype] * factor, f"relative error {error:.2e}"


def check(case: str, dtype: torch.dtype, weight_dtype: torch.dtype, transposed: bool) -> None:
    n, c, h, w, full, kernel, stride, padding, dilation = CASES[case]
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    weight = torch.full((full, 1, *kernel), torch.nan, dtype=weight_dtype)
    weight = weight.transpose(2, 3).contiguous().transpose(2, 3) if transposed else weight
    bias = torch.full((full,), torch.nan, dtype=weight_dtype)
    weight[:c], bias[:c] = random(c, 1, *kernel, dtype=weight_dtype), random(c, dtype=weight_dtype)
    x = surrounded(random(n, c, h, w, dtype=dtype), -(-c // 8) * 8 + 8)
    xd, wd = x.double().requires_grad_(), weight[:c].double().requires_grad_()
    expected = F.conv2d(xd, wd, bias[:c].double(), **options, groups=c)
    grad = surrounded(random(*expected.shape, dtype=dtype), -(-c // 8) * 8 + 8)
    expected.backward(grad.double())
    with backend("triton"):
        assert_close(functional.conv2d(x, weight, bias, **options, groups=full), expected, dtype)
    gradient = torch.full_like(weight, CANARY)
    arguments = (*map(list, options.values()), full, "triton")
    dx = torch.ops.us3l.conv2d_backward(grad, x, weight, gradient, None, True, *arguments)
    assert_close(dx, xd.grad, dtype)
    assert_close(gradient[:c] - CANARY, wd.grad, weight_dtype, factor=4)  # the canary costs a rounding
    gradient[:c] = CANARY
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
    """As of the convolutions with one group: each view its own, and phases without taps."""
    n, c, h, w, full, kernel, stride, padding, dilation = CASES[case]
    geometry = kernels.Geometry(kernel, stride, padding, dilation)
    weight = torch.full((full, 1, *kernel), torch.nan)
    weight[:c] = random(c, 1, *kernel, dtype=torch.float32)
    grad, x = random(n, c, *geometry.output((h, w)), dtype=dtype), random(n, c, h, w, dtype=dtype)
    expected = torch.nn.grad.conv2d_input(x.shape, weight[:c].double(), grad.double(), stride, padding, dilation, c)

    def input_gradient(added, norm):
        return kernels.input_gradient(grad, weight, x, geometry, added, norm)

    check_epilogue(EPILOGUES[epilogue], input_gradient, expected, dtype, TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
def test_depthwise(case):
    check(case, torch.float16, torch.float32, transposed=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_layouts(dtype):
    check("3x3/2", dtype, dtype, transposed=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_depthwise_float32(case):
    check(case, torch.float32, torch.float32, transposed=False)


def test_chunks_are_added(monkeypatch):
    """dW of more chunks than one block of the second stage takes."""
    from us3l_kernels.triton import depthwise

    monkeypatch.setattr(depthwise, "STAGE2", {"BLOCK_CHUNKS": 4, "BLOCK_C": 8})
    monkeypatch.setattr(depthwise, "DW_SUMS", {4: 8})
    check("3x3/2", torch.float32, torch.float32, transposed=False)


def test_what_it_does_not_take():
    with backend("triton"), pytest.raises(RuntimeError, match="one filter per channel"):
        functional.conv2d(torch.randn(1, 4, 5, 5), torch.randn(8, 1, 3, 3), groups=4)
