"""The body of a residual block as one operation: against the same modules called one by one in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import us3l_kernels
from us3l_kernels import _native, fused, gradients, set_width, views
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, calibrating, residual_block

if _native.load() is None:
    pytest.skip(f"no native library: {_native.why}", allow_module_level=True)

CANARY = 3.0


class Block(nn.Module):
    """A basic block; with `stride` its first convolution is not one that can be part of the operation."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = SlicedConv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = SlicedBatchNorm2d(channels, track_running_stats=False, activation="relu")
        self.conv2 = SlicedConv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = SlicedBatchNorm2d(channels, track_running_stats=False, activation="relu")
        for norm in (self.bn1, self.bn2):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return residual_block(x, x if residual is None else residual, self.conv1, self.bn1, self.conv2, self.bn2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sizes of the fused operations that ran."""
    seen: list[Any] = []

    def counted(*args: Any) -> Tensor:
        seen.append(args[-1])
        return original(*args)

    original = fused.basic_block
    monkeypatch.setattr(fused, "basic_block", counted)
    return seen


def images(n: int, c: int, h: int, w: int) -> Tensor:
    return torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)


def run(block: Block, x: Tensor, residual: Tensor | None, upstream: Tensor, n_views: int) -> list[Tensor]:
    """Output and all gradients."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    residual = None if residual is None else residual.detach().clone().requires_grad_()
    with views(n_views):
        y = block(x, residual)
    y.backward(upstream.to(y.dtype))
    parameters = [p.grad for p in block.parameters()]
    return [t for t in (y.detach(), x.grad, None if residual is None else residual.grad, *parameters) if t is not None]


def exact(block: Block, *args: Any) -> list[Tensor]:
    wide = copy.deepcopy(block).double()
    set_width(wide, block.conv1.active_width)
    inputs = [t.double() if isinstance(t, Tensor) else t for t in args]
    return run(wide, *inputs)


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - e).abs().max() / e.abs().max()
        assert error <= tolerance, f"tensor {i}: {error:.1e}"


CASES = [
    # in_channels, channels, stride, batch, height, width, views, network width
    (24, 24, 1, 4, 8, 8, 2, 1.0),
    (40, 40, 1, 4, 9, 7, 1, 0.6),
    (17, 33, 2, 6, 11, 5, 3, 1.0),
    (64, 64, 1, 2, 32, 32, 2, 0.25),
    (200, 200, 1, 4, 4, 4, 2, 1.0),  # few tiles, many channels: the products are shared out by position
    (16, 24, 1, 3, 13, 6, 3, 1.0),
    (16, 16, 2, 8, 2, 2, 2, 1.0),  # one pixel to an image: strides say nothing then
    (24, 24, 1, 2, 1, 40, 1, 1.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_shapes_against_float64(case: tuple[Any, ...], threads: int, calls: list[Any]) -> None:
    in_channels, channels, stride, n, h, w, n_views, width = case
    block = Block(in_channels, channels, stride).to(memory_format=torch.channels_last)
    set_width(block, width)
    x = images(n, block.conv1.in_channels_at(width), h, w)
    shape = (n, block.conv2.active_out_channels, -(-h // stride), -(-w // stride))
    residual = None if x.shape == shape else images(*shape)
    upstream = images(*shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with us3l_kernels.backend("native"):
            first, second = (run(copy.deepcopy(block), x, residual, upstream, n_views) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(first, exact(block, x, residual, upstream, n_views), 1e-5)


def test_bfloat16_is_as_good_as_the_modules(calls: list[Any]) -> None:
    block = Block(32, 32).to(memory_format=torch.channels_last)
    x, upstream = images(8, 32, 12, 12).bfloat16(), images(8, 32, 12, 12)
    expected = exact(block, x, None, upstream, 2)

    def errors() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            given = run(copy.deepcopy(block), x, None, upstream, 2)
        return [float((g.double() - e).norm() / e.norm()) for g, e in zip(given, expected, strict=True)]

    whole = errors()
    assert len(calls) == 1
    block.bn2.register_forward_hook(lambda *_: None)
    apart = errors()
    assert len(calls) == 1
    assert all(w <= max(1.1 * a, 1e-6) for w, a in zip(whole, apart, strict=True)), (whole, apart)


def test_nothing_outside_of_the_slice(calls: list[Any]) -> None:
    block = Block(48, 48).to(memory_format=torch.channels_last)
    set_width(block, 0.5)
    with torch.no_grad():
        for parameter in block.parameters():
            active = parameter[:24, :24] if parameter.dim() == 4 else parameter[:24]
            values = active.clone()
            parameter.fill_(float("nan"))
            active.copy_(values)
    buffer = gradients.attach(block)
    buffer.flat.fill_(CANARY)
    x, upstream = images(4, 24, 8, 8).requires_grad_(), images(4, 24, 8, 8)
    with views(2):
        y = block(x)
    y.backward(upstream)
    assert calls and x.grad is not None
    assert y.isfinite().all() and x.grad.isfinite().all()
    for parameter in block.parameters():
        grad = parameter.grad
        assert grad is not None
        outside = torch.ones_like(grad, dtype=torch.bool)
        (outside[:24, :24] if grad.dim() == 4 else outside[:24]).fill_(False)
        assert (grad[outside] == CANARY).all()
        assert grad[~outside].isfinite().all() and (grad[~outside] != CANARY).any()


def _hook(block: Block) -> None:
    block.conv2.register_forward_hook(lambda *_: None)


def _evaluate(block: Block) -> None:
    with calibrating(block), torch.no_grad():
        block(images(4, 16, 6, 6))
    block.eval()


def _running_statistics(block: Block) -> None:
    block.bn1 = SlicedBatchNorm2d(16, activation="relu")


def _no_activation(block: Block) -> None:
    block.bn1.activation = None


def _double(block: Block) -> None:
    block.double()


@pytest.mark.parametrize("change", [_hook, _evaluate, _running_statistics, _no_activation, _double])
def test_the_modules_are_called_when_more_is_asked_of_them(change: Callable[[Block], None], calls: list[Any]) -> None:
    block = Block(16, 16).to(memory_format=torch.channels_last)
    change(block)
    calls.clear()
    y = block(images(4, 16, 6, 6).to(block.conv1.weight.dtype))
    assert not calls and y.isfinite().all()


def test_another_backend_calls_the_modules(calls: list[Any]) -> None:
    block = Block(16, 16).to(memory_format=torch.channels_last)
    for spec in ("aten", "conv2d=aten", "batch_norm=reference"):
        with us3l_kernels.backend(spec):
            block(images(4, 16, 6, 6))
    assert not calls


def test_no_gradients_and_frozen_parameters(calls: list[Any]) -> None:
    block = Block(16, 16).to(memory_format=torch.channels_last)
    x = images(4, 16, 6, 6)
    with torch.no_grad():
        alone = block(x)
    y = block(x)
    assert torch.equal(alone, y) and len(calls) == 2
    block.conv1.weight.requires_grad_(False)
    expected = exact(block, x, None, torch.ones(4, 16, 6, 6), 1)
    given = run(block, x, None, torch.ones(4, 16, 6, 6), 1)
    assert block.conv1.weight.grad is None
    assert_close(given, expected, 1e-5)


def test_twice_differentiating_says_so() -> None:
    block = Block(16, 16).to(memory_format=torch.channels_last)
    x = images(4, 16, 6, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(block(x), x, images(4, 16, 6, 6), create_graph=True)
    with pytest.raises(RuntimeError, match="basic_block has first derivatives only"):
        gradient.sum().backward()


def test_data_parallel_is_refused_when_attached() -> None:
    block = Block(16, 16).to(memory_format=torch.channels_last)
    gradients.attach(block)
    wrapper = object()
    active = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module
    torch.nn.parallel.DistributedDataParallel._get_active_ddp_module = classmethod(lambda cls: wrapper)
    try:
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            block(images(4, 16, 6, 6))
    finally:
        torch.nn.parallel.DistributedDataParallel._get_active_ddp_module = active
