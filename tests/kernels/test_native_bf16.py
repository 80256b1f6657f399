"""The native matrix product of bfloat16 images against float64: accuracy, layouts, tails, threads, the choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from us3l_kernels import _native, functional
from us3l_kernels import backend as use_backend
from us3l_kernels.backends import BACKENDS, choose
from us3l_kernels.backends.native import in_pairs

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

native = BACKENDS["native"]
NAN, CANARY = float("nan"), 3.0
BF16 = 2.0**-8  # what rounding to bfloat16 changes, at most, relative to the value

GEOMETRIES: dict[str, tuple[int, list[list[int]]]] = {
    "3x3/2": (3, [[2, 2], [1, 1], [1, 1]]),
    "1x1": (1, [[1, 1], [0, 0], [1, 1]]),
    "1x1/2": (1, [[2, 2], [0, 0], [1, 1]]),
    "3x3, dilated, asymmetric": (3, [[1, 2], [2, 0], [2, 1]]),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def images(n: int, c: int, h: int, w: int, gap: int) -> Tensor:
    """The prefix of bfloat16 images with `gap` more channels, of NaN."""
    full = torch.randn(n, h, w, c + gap).to(torch.bfloat16)
    full[..., c:] = NAN
    return full.permute(0, 3, 1, 2)[:, :c]


def close(actual: Tensor, exact: Tensor, rounded: bool) -> bool:
    """Within float32 sums of the largest value, and where the result is bfloat16, within the rounding of each."""
    error = (actual.double() - exact).abs()
    return bool((error <= 5e-6 * exact.abs().max() + (BF16 * exact.abs() if rounded else 0)).all())


def check(n: int, c: int, k: int, size: tuple[int, int], geometry: str, *, gap: int = 2, groups: int = 1) -> None:
    kernel, (stride, padding, dilation) = GEOMETRIES[geometry]
    arguments: tuple[Any, ...] = (stride, padding, dilation)
    per_group = c // groups
    x = images(n, c, *size, gap)
    weight = torch.full((k + (gap if groups == 1 else 0), per_group + (gap if groups == 1 else 0), kernel, kernel), NAN)
    weight[:k, :per_group] = torch.randn(k, per_group, kernel, kernel) / (per_group * kernel**2) ** 0.5
    if gap:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.cat([torch.randn(k), torch.full((3,), NAN)])
    y = native.conv2d(x, weight, bias, k, *arguments, groups)
    grad = images(*y.shape, 0)
    grad_weight, grad_bias = torch.full_like(weight, CANARY), torch.full((k + 3,), CANARY)
    dx = native.conv2d_backward(grad, x, weight, grad_weight, grad_bias, True, *arguments, groups)
    assert dx is not None and y.dtype == dx.dtype == torch.bfloat16

    # With pairs the weight is rounded to bfloat16 as well; else it is not.
    active = weight[:k, :per_group]
    used = (active.to(torch.bfloat16) if in_pairs(x, weight, k, groups) else active).double().requires_grad_()
    exact_x = x.double().requires_grad_()
    exact = F.conv2d(exact_x, used, bias[:k].double(), *arguments, groups)
    exact.backward(grad.double())
    assert exact_x.grad is not None and used.grad is not None
    assert close(y, exact.detach(), rounded=True)
    assert close(dx, exact_x.grad, rounded=True)
    assert close(grad_weight[:k, :per_group] - CANARY, used.grad, rounded=False)
    assert close(grad_bias[:k] - CANARY, grad.double().sum((0, 2, 3)), rounded=False)
    grad_weight[:k, :per_group] = CANARY
    assert (grad_weight == CANARY).all() and (grad_bias[k:] == CANARY).all(), "written past the active channels"


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", [(2, 6), (40, 72), (3, 40), (40, 3), (48, 64)], ids=str)
def test_channels_of_every_tail(channels: tuple[int, int], geometry: str) -> None:
    check(2, *channels, (9, 7), geometry)


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_prefixes(gap: int) -> None:
    """The contiguous weight, and distances of pixels that are odd."""
    check(3, 20, 36, (8, 8), "3x3/2", gap=gap)


def test_blocks_and_tiles() -> None:
    """More points than a block has, an odd number of them, and more channels than a tile of the gradient."""
    check(3, 136, 520, (17, 15), "1x1")
    check(1, 520, 264, (5, 5), "3x3/2")


@pytest.mark.parametrize("per_group", [3, 8])
def test_groups(per_group: int) -> None:
    check(2, 4 * per_group, 24, (6, 6), "3x3/2", gap=0, groups=4)


def test_a_gradient_that_is_expanded() -> None:
    x, weight = images(2, 8, 6, 6, 0), torch.randn(16, 8, 1, 1)
    grad = torch.randn(1, 1, 6, 6).to(torch.bfloat16).expand(2, 16, 6, 6)
    arguments = ([1, 1], [0, 0], [1, 1], 1)
    dx = native.conv2d_backward(grad, x, weight, None, None, True, *arguments)
    copy = grad.contiguous(memory_format=torch.channels_last)
    assert torch.equal(dx, native.conv2d_backward(copy, x, weight, None, None, True, *arguments))


def test_same_threads_same_bits() -> None:
    x, weight, grad = images(3, 32, 9, 9, 0), torch.randn(48, 32, 3, 3), images(3, 48, 5, 5, 0)
    arguments = ([2, 2], [1, 1], [1, 1], 1)
    torch.set_num_threads(2)
    results = []
    for _ in range(2):
        grad_weight = torch.zeros_like(weight)
        dx = native.conv2d_backward(grad, x, weight, grad_weight, None, True, *arguments)
        results.append((native.conv2d(x, weight, None, 48, *arguments), dx, grad_weight))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast() -> None:
    """What a step does: bfloat16 activations, float32 weight and gradient."""
    x, weight = images(2, 16, 8, 8, 0).float(), torch.randn(32, 24, 1, 1, requires_grad=True)
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        y = functional.conv2d(x, weight, out_channels=24)
    y.backward(torch.randn_like(y))
    assert y.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and not weight.grad[24:].any()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="measured with AVX-512 only")
@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "size", "backend"),
    [
        (256, 512, 3, 2, 32, "native"),
        (64, 128, 1, 2, 32, "native"),
        (256, 1024, 1, 1, 16, "native"),
        (64, 256, 1, 1, 16, "aten"),
        (64, 128, 3, 2, 32, "aten"),
        (257, 512, 1, 1, 16, "aten"),
        (256, 512, 3, 2, 8, "aten"),
    ],
)
def test_auto_takes_what_was_measured_faster(
    channels: int, out: int, kernel: int, stride: int, size: int, backend: str
) -> None:
    x, weight = images(1, channels, size, size, 0), torch.empty(out, channels, kernel, kernel)
    padding = [kernel // 2] * 2
    chosen = choose(
        "conv2d", x, weight, out_channels=out, stride=[stride] * 2, padding=padding, dilation=[1, 1], groups=1
    )
    assert chosen == (backend if in_pairs(x, weight, out, 1) else "aten")
