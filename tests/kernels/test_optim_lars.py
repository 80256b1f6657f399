"""LARS: its formula written out, which parameters take part, and torch's contracts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from us3l_kernels import gradients
from us3l_kernels.nn import SlicedConv2d
from us3l_kernels.optim import LARS
from us3l_kernels.width import set_width

SHAPES = [(20, 3, 3, 3), (16,), (10, 7), (3,), (5, 8, 1, 1), ()]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def expected_step(p: Tensor, grad: Tensor, buffer: Tensor, wd: float, alpha: float, groups: int) -> Tensor:
    if p.ndim > 1:
        factors = torch.ones(len(p), dtype=p.dtype)
        if p.ndim == 4:
            for row in range(len(p)):
                factors[row] = 1 - alpha * min(groups - 1, row // max(1, len(p) // groups))
        d = grad + wd * factors.view(-1, *[1] * (p.ndim - 1)) * p
        grad = d * 1e-2 * p.norm() / d.norm() if p.norm() > 0 and d.norm() > 0 else d
    buffer.mul_(0.9).add_(grad)
    return p - 0.5 * buffer


@pytest.mark.parametrize(("weight_decay", "alpha"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.2)])
def test_formula(weight_decay: float, alpha: float) -> None:
    ours = parameters()
    expected = [p.detach().clone() for p in ours]
    buffers = [torch.zeros_like(p) for p in ours]
    optimizer = LARS(ours, 0.5, 0.9, weight_decay, trust=1e-2, alpha=alpha, groups=4)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in ours]
        for p, grad in zip(ours, given, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        rows = zip(expected, given, buffers, strict=True)
        expected = [expected_step(p, grad, buffer, weight_decay, alpha, 4) for p, grad, buffer in rows]
        for p, grad, value in zip(ours, given, expected, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-13)
            assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_without_a_norm_it_is_sgd(zero: str) -> None:
    p = nn.Parameter(torch.zeros(3, 2) if zero == "weight" else torch.ones(3, 2))
    p.grad = torch.ones(3, 2) if zero == "weight" else torch.zeros(3, 2)
    before = p.detach().clone()
    LARS([p], lr=0.5).step()
    assert torch.equal(p.detach(), before - 0.5 * p.grad)


def test_gradients_accumulated_in_place_and_untouched_ones() -> None:
    model = nn.ModuleList([SlicedConv2d(4, 8, 3), SlicedConv2d(4, 8, 3)]).double()
    gradients.attach(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = LARS(model.parameters(), 0.1, weight_decay=0.1)
    set_width(model, 1.0)
    y = model[0](torch.randn(2, 4, 5, 5, dtype=torch.float64))
    y.backward(torch.randn_like(y))
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "0.bias"}


def test_state_round_trip() -> None:
    ours = parameters()
    optimizer = LARS(ours, 0.5)
    for p in ours:
        p.grad = torch.randn_like(p)
    optimizer.step()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    other = LARS(theirs, 0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("options", "message"), [({"trust": -1.0}, "trust"), ({"momentum": 1.0}, "momentum")])
def test_bad_values_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(parameters(), lr=0.1, **options)
