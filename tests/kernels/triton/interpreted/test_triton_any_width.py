"""Kernels that read from memory how many channels are active, interpreted: against float64, width by width.

All memory that is not initialised is NaN: what lies behind the active channels must be neither read nor written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from us3l_kernels import functional
from us3l_kernels.backends import backend
from us3l_kernels.library import below_autograd
from us3l_kernels.triton import Active, Sizes
from us3l_kernels.triton import conv2d as kernels

CANARY = 3.0
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3}  # largest error over largest value


@pytest.fixture(autouse=True)
def _nan_in_new_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def read(counts: list[int] | None, full: int) -> Active | None:
    """Where kernels find them; a row of a longer table."""
    if counts is None:
        return None
    unit = 8 if all(count % 8 == 0 for count in (*counts, full)) else 1
    return Active(torch.tensor([*counts, 999], dtype=torch.int32)[: len(counts)], unit)


def stacked(parts: list[Tensor], full: int) -> Tensor:
    """Batches of [n, c, ...] behind each other, NaN behind their channels."""
    shape = (sum(map(len, parts)), full, *parts[0].shape[2:])
    x = torch.full(shape, torch.nan, dtype=parts[0].dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    for of_width, part in zip(x.chunk(len(parts)), parts, strict=True):
        of_width[:, : part.size(1)] = part
    return x


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= TOLERANCE[dtype] * factor, f"relative error {error:.2e}"


def check(got: Tensor, parts: list[Tensor], dtype: torch.dtype, factor: float = 1.0) -> None:
    """`got` is the parts, width by width, and was not written behind them."""
    for of_width, expected in zip(got.chunk(len(parts)), parts, strict=True):
        assert_close(of_width[:, : expected.size(1)], expected, dtype, factor)
        assert of_width[:, expected.size(1) :].isnan().all()


def check_added(gradient: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """A prefix was added to a gradient full of canaries, and nothing else was written."""
    inside = tuple(map(slice, expected.shape))
    assert_close(gradient[inside] - CANARY, expected, dtype, factor=8)  # the canary costs a rounding
    gradient[inside] = CANARY
    assert torch.equal(gradient, torch.full_like(gradient, CANARY))


def sum_of_prefixes(parts: list[Tensor]) -> Tensor:
    """The sum of tensors of different sizes, of the largest of them."""
    total = parts[0].new_zeros([max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)])
    for part in parts:
        total[tuple(map(slice, part.shape))] += part
    return total


CASES: dict[str, tuple[Any, ...]] = {
    # name: (channels of x full, of y full, active ones of x and of y by width (None: all), views, geometry, dtype)
    "3x3": (24, 40, [24, 8], [16, 40], 2, ((3, 3), (1, 1), (1, 1), (1, 1)), torch.float32),
    "3x3/2": (16, 24, [8, 16, 8], [8, 24, 16], 1, ((3, 3), (2, 2), (1, 1), (1, 1)), torch.float32),
    "1x1": (80, 136, [40], [72], 2, ((1, 1), (1, 1), (0, 0), (1, 1)), torch.float16),
    "1x1 of two widths": (72, 136, [72, 40], [40, 136], 1, ((1, 1), (1, 1), (0, 0), (1, 1)), torch.float16),
    "stem": (3, 24, None, [24, 8], 1, ((7, 7), (2, 2), (3, 3), (1, 1)), torch.float32),
    "all outputs": (24, 16, [8, 24], None, 1, ((1, 1), (1, 1), (0, 0), (1, 1)), torch.float32),
    "odd channels": (11, 19, [7, 10], [13, 5], 1, ((3, 2), (1, 2), (2, 1), (2, 1)), torch.float32),
}


FAST = ("3x3 False", "3x3/2 True", "1x1 False", "1x1 of two widths True", "stem False", "odd channels True")


@pytest.mark.parametrize(
    "case,pieces",
    [
        pytest.param(case, pieces, marks=[] if f"{case} {pieces}" in FAST else pytest.mark.slow)
        for case in CASES
        for pieces in (False, True)
    ],
)
def test_convolution(case: str, pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """pieces: many of them for dW."""
    c_full, k_full, c_active, k_active, views, settings, dtype = CASES[case]
    if pieces:
        monkeypatch.setattr(kernels, "LEAST_ROWS_OF_A_PIECE", 1)
        monkeypatch.setattr(kernels, "BLOCKS_PER_MULTIPROCESSOR", 8)
    geometry = kernels.Geometry(*settings)
    widths = len(c_active or k_active)
    sizes = Sizes(read(c_active, c_full), read(k_active, k_full))
    channels = list(zip(c_active or [c_full] * widths, k_active or [k_full] * widths, strict=True))
    most_c, most_k = (max(numbers) for numbers in zip(*channels, strict=True))
    weight = torch.full((k_full, c_full, *geometry.kernel), torch.nan, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    weight[:most_k, :most_c] = random(most_k, most_c, *geometry.kernel, dtype=dtype) / most_c**0.5
    xs, ys, grads, dxs, dws = [], [], [], [], []
    for c, k in channels:
        x, w = random(2 * views, c, 7, 6, dtype=dtype), weight[:k, :c].double().requires_grad_()
        exact = x.double().requires_grad_()
        y = F.conv2d(exact, w, None, geometry.stride, geometry.padding, geometry.dilation)
        grad = random(*y.shape, dtype=dtype)
        y.backward(grad.double())
        xs, ys, grads = [*xs, x], [*ys, y.detach()], [*grads, grad]
        dxs, dws = [*dxs, exact.grad], [*dws, w.grad]
    x, grad = stacked(xs, c_full), stacked(grads, k_full)
    options = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
    check(functional.conv2d(x, weight, sizes=sizes, **options), ys, dtype)
    gradient = torch.full_like(weight, CANARY, dtype=torch.float32)
    arguments = (*map(list, options.values()), 1, sizes)
    dx = below_autograd["conv2d_backward"](grad, x, weight, gradient, None, True, *arguments)
    check(dx, dxs, dtype)
    check_added(gradient, sum_of_prefixes(dws), dtype)

    y, moments = kernels.conv2d_moments(
        x, weight, k_full, geometry, "half" if dtype == torch.float16 else "ieee", widths * views, sizes
    )
    check(y, ys, dtype)
    of_views = moments.partials.chunk(widths)
    for of_width, found, (_, k) in zip(y.chunk(widths), of_views, channels, strict=True):
        expected = of_width[:, :k].double().unflatten(0, (views, -1)).movedim(2, -1).flatten(1, -2)
        for view, partials in zip(expected, found.double(), strict=True):
            for rows, (mean, squares) in zip(view.split(moments.rows), partials, strict=True):
                torch.testing.assert_close(mean[:k], rows.mean(0), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(squares[:k], rows.var(0, correction=0) * len(rows), rtol=1e-4, atol=1e-6)
                assert mean[k:].isnan().all() and squares[k:].isnan().all()


@pytest.mark.parametrize(
    "full,counts,dtype,stride", [(40, [40, 8, 16], torch.float16, 1), (9, [7, 5], torch.float32, 2)]
)
def test_depthwise(full: int, counts: list[int], dtype: torch.dtype, stride: int) -> None:
    sizes = Sizes(*[read(counts, full)] * 2)
    weight = torch.full((full, 1, 3, 3), torch.nan, dtype=dtype)
    weight[: max(counts)] = random(max(counts), 1, 3, 3, dtype=dtype)
    bias = torch.full((full,), torch.nan, dtype=dtype)
    bias[: max(counts)] = random(max(counts), dtype=dtype)
    xs, ys, grads, dxs, dws, dbs = [], [], [], [], [], []
    for c in counts:
        x = random(3, c, 7, 6, dtype=dtype)
        exact, w, b = (t.double().requires_grad_() for t in (x, weight[:c], bias[:c]))
        y = F.conv2d(exact, w, b, stride, 1, groups=c)
        grad = random(*y.shape, dtype=dtype)
        y.backward(grad.double())
        xs, ys, grads = [*xs, x], [*ys, y.detach()], [*grads, grad]
        dxs, dws, dbs = [*dxs, exact.grad], [*dws, w.grad], [*dbs, b.grad]
    x, grad = stacked(xs, full), stacked(grads, full)
    check(functional.conv2d(x, weight, bias, stride=stride, padding=1, groups=full, sizes=sizes), ys, dtype)
    into = [torch.full_like(t, CANARY, dtype=torch.float32) for t in (weight, bias)]
    arguments = ([stride] * 2, [1, 1], [1, 1], full, sizes)
    check(below_autograd["conv2d_backward"](grad, x, weight, *into, True, *arguments), dxs, dtype)
    check_added(into[0], sum_of_prefixes(dws))
    check_added(into[1], sum_of_prefixes(dbs), dtype)


@pytest.mark.parametrize("outputs", [None, [40, 24, 8]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear(outputs: list[int] | None, dtype: torch.dtype) -> None:
    inputs, c_full, k_full = [16, 24, 8], 24, 40
    sizes = Sizes(read(inputs, c_full), read(outputs, k_full))
    weight, bias = random(k_full, c_full, dtype=dtype), random(k_full, dtype=dtype)
    xs, ys, grads, dxs, dws, dbs = [], [], [], [], [], []
    for c, k in zip(inputs, outputs or [k_full] * 3, strict=True):
        x = random(5, c, dtype=dtype)
        exact, w, b = (t.double().requires_grad_() for t in (x, weight[:k, :c], bias[:k]))
        y = F.linear(exact, w, b)
        grad = random(*y.shape, dtype=dtype)
        y.backward(grad.double())
        xs, ys, grads = [*xs, x], [*ys, y.detach()], [*grads, grad]
        dxs, dws, dbs = [*dxs, exact.grad], [*dws, w.grad], [*dbs, b.grad]
    x, grad = stacked(xs, c_full), stacked(grads, k_full)
    check(functional.linear(x, weight, bias, sizes=sizes), ys, dtype)
    into = [torch.full_like(t, CANARY, dtype=torch.float32) for t in (weight, bias)]
    check(below_autograd["linear_backward"](grad, x, weight, *into, True, c_full, sizes), dxs, dtype)
    check_added(into[0], sum_of_prefixes(dws), dtype)
    check_added(into[1], sum_of_prefixes(dbs), dtype)


@pytest.mark.parametrize(
    "full,counts,views,activation,residual,dtype",
    [
        (80, [72, 8, 80], 2, "relu", True, torch.float32),
        (24, [16], 2, "relu6", False, torch.float16),
        (13, [5, 11], 1, None, True, torch.float32),
        (16, [8, 16], 1, None, False, torch.float32),
    ],
)
def test_batch_norm(
    full: int, counts: list[int], views: int, activation: str | None, residual: bool, dtype: torch.dtype
) -> None:
    weight, bias = (torch.full((full,), torch.nan) for _ in range(2))
    weight[: max(counts)], bias[: max(counts)] = random(max(counts)) + 1, random(max(counts))
    options = {"training": True, "activation": activation}
    given: list[list[Tensor]] = [[] for _ in range(3)]
    expected: list[list[Tensor]] = [[] for _ in range(5)]
    for c in counts:
        x, added, grad = (random(2 * views, c, 3, 5, dtype=dtype) for _ in range(3))
        for held, t in zip(given, (x, added, grad), strict=True):
            held.append(t)
        leaves = [t.double().requires_grad_() for t in (x, added, weight[:c], bias[:c])]
        exact, of_residual, w, b = leaves
        with backend("reference"):
            y = functional.batch_norm(exact, w, b, views=views, residual=of_residual if residual else None, **options)
        y.backward(grad.double())
        for held, t in zip(expected, (y.detach(), *(leaf.grad for leaf in leaves)), strict=True):
            held.append(t)
    x, added, grad = (stacked(parts, full) for parts in given)
    parameters = [p.clone().requires_grad_() for p in (weight, bias)]
    leaves = [x.requires_grad_(), added.requires_grad_()]
    sizes = Sizes(*[read(counts, full)] * 2)
    y = functional.batch_norm(
        x, *parameters, views=len(counts) * views, residual=added if residual else None, sizes=sizes, **options
    )
    y.backward(grad)
    for got, parts in zip((y.detach(), *(leaf.grad for leaf in leaves[: 1 + residual])), expected, strict=False):
        check(got, parts, dtype, factor=4)
    for p, parts in zip(parameters, expected[3:], strict=True):
        total = sum_of_prefixes(parts)
        assert_close(p.grad[: len(total)], total, dtype, factor=8)
        assert not p.grad[len(total) :].any()
