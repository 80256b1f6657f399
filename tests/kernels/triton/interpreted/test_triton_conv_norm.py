"""A convolution and the batch norm behind it as one operation, interpreted: against the modules in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from us3l.models.layers import Layers
from us3l.models.mobilenet_v2 import InvertedResidual
from us3l.models.resnet import BasicBlock, Bottleneck
from us3l_kernels import backend, fused, gradients, set_width, tune, views
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, calibrating, conv_norm
from us3l_kernels.triton import batch_norm

CANARY = 3.0
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}  # norm of the error over norm


class Pair(nn.Module):
    def __init__(self, c: int, k: int, kernel: int, stride: int, activation: str | None, affine: bool = True) -> None:
        super().__init__()
        self.conv = SlicedConv2d(c, k, kernel, stride, kernel // 2, bias=False)
        self.norm = SlicedBatchNorm2d(k, track_running_stats=False, activation=activation, affine=affine)
        if affine:
            nn.init.normal_(self.norm.weight, 1.0, 0.3)
            nn.init.normal_(self.norm.bias, 0.0, 0.3)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv_norm(x, self.conv, self.norm, residual)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the operations that ran as one."""
    counted = Mock(wraps=fused.pair_chain)
    monkeypatch.setattr(fused, "pair_chain", counted)
    return counted


def images(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def run(pair: Pair, x: Tensor, residual: Tensor | None, upstream: Tensor, n_views: int) -> list[Tensor]:
    """y and all gradients."""
    x, residual = (None if t is None else t.detach().clone().requires_grad_() for t in (x, residual))
    with views(n_views):
        y = pair(x, residual)
    y.backward(upstream.to(y.dtype))
    inputs = [t.grad for t in (x, residual) if t is not None]
    return [y.detach(), *inputs, *(p.grad for p in pair.parameters())]


def exact(pair: Pair, *args: Any) -> list[Tensor]:
    wide = copy.deepcopy(pair).double()
    set_width(wide, pair.conv.active_width)
    return run(wide, *[t.double() if isinstance(t, Tensor) else t for t in args])


@torch.no_grad()
def errors(given: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [((g.double() - e).norm() / e.norm()).item() for g, e in zip(given, expected, strict=True)]


CASES = {
    # name: (c, k, kernel, stride, activation, residual) of the full layer, (batch, height, width, views, active width)
    "3x3": ((24, 40, 3, 1, "relu", True), (6, 5, 3, 3, 1.0)),
    "1x1": ((80, 64, 1, 1, "relu6", False), (3, 9, 8, 1, 0.5)),
    "3x3/2": ((16, 24, 3, 2, None, True), (4, 6, 7, 2, 0.6)),
    "odd channels": ((7, 13, 3, 1, "relu6", True), (2, 5, 6, 2, 1.0)),
    "no activation": ((8, 16, 1, 1, None, False), (4, 4, 4, 2, 1.0)),
    "no parameters": ((8, 8, 3, 1, "relu", False, False), (4, 4, 3, 2, 1.0)),
}


@pytest.mark.parametrize(
    "case,dtype", [*((case, torch.float32) for case in CASES), ("3x3", torch.float16), ("1x1", torch.float16)], ids=str
)
def test_against_float64(case: str, dtype: torch.dtype, calls: Mock) -> None:
    (c, k, kernel, stride, activation, added, *affine), (n, h, w, n_views, width) = CASES[case]
    pair = Pair(c, k, kernel, stride, activation, *affine).to(memory_format=torch.channels_last)
    set_width(pair, width)
    x = images(n, pair.conv.in_channels_at(width), h, w).to(dtype)
    shape = (n, pair.conv.active_out_channels, -(-h // stride), -(-w // stride))
    residual, upstream = images(*shape).to(dtype) if added else None, images(*shape)
    expected = exact(pair, x, residual, upstream, n_views)
    results = {}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for spec in ("triton", "triton,batch_norm=aten"):
            with backend(spec):
                results[spec] = errors(run(copy.deepcopy(pair), x, residual, upstream, n_views), expected)
    assert calls.call_count == 1
    together, apart = results.values()
    assert all(a <= max(TOLERANCE[dtype], 1.5 * b) for a, b in zip(together, apart, strict=True)), results


def test_many_tiles_and_a_large_mean(monkeypatch: pytest.MonkeyPatch, calls: Mock) -> None:
    """Several tiles of rows, the last of a view not full, several rounds of the second stage; each view its own."""
    monkeypatch.setattr(batch_norm, "STATISTICS", {"BLOCK_CHUNKS": 2, "BLOCK_C": 8})
    pair = Pair(16, 24, 3, 1, None, affine=False)
    x = images(4, 16, 9, 7) + 1000 * torch.rand(4, 1, 1, 1)
    with backend("triton"), views(2), torch.no_grad():
        y = pair(x)
    c = nn.functional.conv2d(x.double(), pair.conv.weight.double(), padding=1)
    moments = [(part.mean((0, 2, 3), True), part.var((0, 2, 3), correction=0, keepdim=True)) for part in c.chunk(2)]
    expected = [(part - m) / (v + 1e-5).sqrt() for part, (m, v) in zip(c.chunk(2), moments, strict=True)]
    assert calls.call_count == 1 and errors([y], [torch.cat(expected)])[0] < 1e-4


@pytest.mark.parametrize("channels", [8, 24, 40])
@pytest.mark.parametrize("attached", [False, True])
def test_nothing_outside_of_the_slice(channels: int, attached: bool, calls: Mock) -> None:
    pair = Pair(80, 80, 3, 1, "relu").to(memory_format=torch.channels_last)
    set_width(pair, channels / 80)
    active = {p: p[:channels, :channels] if p.dim() == 4 else p[:channels] for p in pair.parameters()}
    with torch.no_grad():
        for parameter, prefix in active.items():
            values = prefix.clone()
            parameter.fill_(torch.nan)
            prefix.copy_(values)
    if attached:
        gradients.attach(pair).flat.fill_(CANARY)
    x, residual, upstream = (images(4, channels, 5, 6) for _ in range(3))
    with backend("triton"):
        y, dx, dresidual, *_ = run(pair, x, residual, upstream, 2)
    assert calls.call_count == 1
    assert all(t.isfinite().all() for t in (y, dx, dresidual))
    for parameter, prefix in active.items():
        grad, inside = parameter.grad, tuple(slice(n) for n in prefix.shape)
        assert grad is not None and grad[inside].isfinite().all()
        outside = torch.ones_like(grad, dtype=torch.bool)
        outside[inside] = False
        assert (grad[outside] == (CANARY if attached else 0.0)).all()
        assert (grad[inside] != (CANARY if attached else 0.0)).any()


def _hook(pair: Pair) -> None:
    pair.conv.register_forward_hook(lambda *_: None)


def _evaluate(pair: Pair) -> None:
    with calibrating(pair), torch.no_grad():
        pair(images(4, 16, 6, 6))
    pair.eval()


def _running_statistics(pair: Pair) -> None:
    pair.norm = SlicedBatchNorm2d(16)


def _bias(pair: Pair) -> None:
    pair.conv.bias = nn.Parameter(torch.zeros(16))


def _compile(pair: Pair) -> None:
    pair.forward = torch.compile(pair.forward, backend="eager", fullgraph=True)


class Weight(nn.Parameter):
    """A subclass of Tensor: it may have its own idea of an operation."""


def _subclass(pair: Pair) -> None:
    pair.conv.weight = Weight(pair.conv.weight.detach())


@pytest.mark.parametrize("change", [_hook, _evaluate, _running_statistics, _bias, _compile, _subclass])
def test_the_modules_are_called_when_more_is_asked_of_them(change: Callable[[Pair], None], calls: Mock) -> None:
    pair = Pair(16, 16, 3, 1, None).to(memory_format=torch.channels_last)
    with backend("triton"):
        change(pair)
        calls.reset_mock()
        before = pair.norm.num_batches_tracked
        assert pair(images(4, 16, 6, 6)).isfinite().all()
        assert not calls.called
    assert before is None or pair.norm.num_batches_tracked == 1


@pytest.mark.parametrize("spec", ["conv2d=aten", "conv2d=triton,batch_norm=reference", "auto"])
def test_other_backends_call_the_modules(spec: str, calls: Mock) -> None:
    with backend(spec):
        Pair(16, 16, 3, 1, "relu")(images(4, 16, 6, 6))
    assert not calls.called


def test_bad_input_is_refused_by_the_modules(calls: Mock) -> None:
    pair = Pair(16, 16, 3, 1, "relu")
    with backend("triton"):
        with pytest.raises(ValueError, match="at most 16 channels"):
            pair(images(2, 24, 6, 6))
        with pytest.raises(ValueError, match="2 stacked views"), views(2):
            pair(images(3, 16, 6, 6))
        with pytest.raises(ValueError, match="residual: expected"):
            pair(images(2, 16, 6, 6), images(2, 16, 5, 6))
        with pytest.raises(ValueError, match="more than 1 value"):
            pair(images(1, 16, 1, 1))
    assert not calls.called


def test_no_gradients_and_frozen_parameters(calls: Mock) -> None:
    pair, x, ones = Pair(16, 16, 3, 1, "relu"), images(4, 16, 6, 6), torch.ones(4, 16, 6, 6)
    with backend("triton"):
        with torch.no_grad():
            alone = pair(x)
        assert torch.equal(alone, pair(x)) and calls.call_count == 2
        pair.conv.weight.requires_grad_(False)
        y = pair(x)
        y.backward(ones)
    assert pair.conv.weight.grad is None
    wide = copy.deepcopy(pair).double()
    wide.zero_grad()
    wide(x.double()).backward(ones.double())
    given, expected = ([p.grad for p in each.norm.parameters()] for each in (pair, wide))
    assert max(errors(given, expected)) < TOLERANCE[torch.float32]


def test_twice_differentiating_says_so() -> None:
    x = images(4, 16, 6, 6).requires_grad_()
    with backend("triton"):
        y = Pair(16, 16, 3, 1, "relu")(x)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="conv_norm has first derivatives only"):
        gradient.sum().backward()


def test_the_tuner_sees_both_operations(calls: Mock) -> None:
    with backend("linear=aten"):  # `auto` for both
        seen = {call[0] for call, _ in tune.record(Pair(16, 16, 3, 1, "relu"), images(4, 16, 6, 6))}
    assert seen == {"conv2d", "batch_norm"} and not calls.called


@pytest.mark.parametrize(
    "block",
    [Bottleneck(8, 8, 2, Layers()), BasicBlock(8, 8, 1, Layers()), InvertedResidual(8, 8, 1, 2, Layers())],
    ids=lambda block: type(block).__name__,
)
def test_our_blocks_run_it(block: nn.Module, calls: Mock) -> None:
    """As one operation, and another for the shortcut."""
    x = images(4, 8, 4, 4)
    expected = copy.deepcopy(block).double()(x.double())
    with backend("triton"), torch.no_grad():
        assert errors([block(x)], [expected])[0] < TOLERANCE[torch.float32]
    assert calls.call_count == 1 + isinstance(getattr(block, "downsample", None), nn.Module)
