"""What every module owes torch: checkpoints both ways, copies, pickles, conversions, full-graph compiling."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from us3l_kernels import set_width, use_width, views
from us3l_kernels.nn import (
    SlicedBatchNorm1d,
    SlicedBatchNorm2d,
    SlicedConv2d,
    SlicedLayerNorm,
    SlicedLinear,
    SwitchableBatchNorm2d,
    calibrating,
    statistics,
)

PAIRS = [
    (SlicedConv2d, nn.Conv2d, (8, 16, 3)),
    (SlicedLinear, nn.Linear, (8, 16)),
    (SlicedBatchNorm1d, nn.BatchNorm1d, (8,)),
    (SlicedBatchNorm2d, nn.BatchNorm2d, (8,)),
    (SlicedLayerNorm, nn.LayerNorm, (8,)),
]


class Net(nn.Module):
    """Every layer once, with a residual sum inside a norm."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.conv1 = SlicedConv2d(3, 16, 3, padding=1, **kwargs)
        self.norm1 = SlicedBatchNorm2d(16, activation="relu", **kwargs)
        self.conv2 = SlicedConv2d(16, 16, 3, padding="same", groups=16, **kwargs)
        self.norm2 = SlicedBatchNorm2d(16, activation="relu6", track_running_stats=False, **kwargs)
        self.hidden = SlicedLinear(16, 32, **kwargs)
        self.norm3 = SlicedBatchNorm1d(32, affine=False, **kwargs)
        self.norm4 = SlicedLayerNorm(32, **kwargs)
        self.fc = SlicedLinear(32, 5, slice_out=False, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x), x)
        return self.fc(self.norm4(self.norm3(self.hidden(x.mean((2, 3))))))


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS)
def test_is_its_torch_namesake(ours, theirs, arguments):
    layer, namesake = ours(*arguments), theirs(*arguments)
    assert isinstance(layer, theirs)
    set_width(layer, 0.5)
    namesake.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(namesake.state_dict(), strict=True)
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (layer, namesake)]
    assert shapes[0] == shapes[1]
    assert repr(layer).startswith(ours.__name__)


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS)
def test_device_and_dtype_arguments(ours, theirs, arguments):
    layer = ours(*arguments, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_keep_width_and_statistics_and_are_independent(copied):
    model = Net().eval()
    x = torch.randn(6, 3, 4, 4)
    set_width(model, 0.5)
    with torch.no_grad(), calibrating(model):
        model(x)
    clone = copied(model)
    assert torch.equal(clone(x), model(x))
    set_width(clone, 1.0)
    assert model.conv1.active_out_channels == 8
    clone.train()(x)
    assert statistics(model) and not statistics(clone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = Net().to(dtype)
    for width in (1.0, 0.5):
        with use_width(model, width), views(2):
            x = torch.randn(4, 3, 4, 4, dtype=dtype, requires_grad=True)
            y = model(x)
            assert y.dtype == dtype and y.isfinite().all()
            y.backward(torch.randn_like(y))
            assert x.grad is not None and x.grad.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_channels_last_gives_the_same_and_stays_channels_last():
    model = Net().double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    for width in (1.0, 0.5):
        with use_width(model, width), use_width(other, width):
            torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), model(x))
            maps = other.norm1(other.conv1(x.contiguous(memory_format=torch.channels_last)))
            assert maps.is_contiguous(memory_format=torch.channels_last)


def run(model: nn.Module, module: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_full_graph_compilation_in_training(width):
    torch.compiler.reset()
    model = Net().double()
    set_width(model, width)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    with views(2):
        for _ in range(2):
            x, upstream = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 5).double()
            torch.testing.assert_close(run(other, compiled, x, upstream), run(model, model, x, upstream))


def test_full_graph_compilation_follows_the_width_and_evaluates_calibrated():
    torch.compiler.reset()
    model = Net().double().eval()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for width in (1.0, 0.5):
        set_width(model, width)
        with torch.no_grad(), calibrating(model):
            model(x)
        torch.testing.assert_close(compiled(x), model(x))


def test_full_graph_compilation_of_a_switchable_norm():
    torch.compiler.reset()
    norm = SwitchableBatchNorm2d(16, [1.0, 0.5], activation="relu")
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for width, channels in ((1.0, 16), (0.5, 8)):
        set_width(norm, width)
        x = torch.randn(4, channels, 3, 3)
        expected = copy.deepcopy(norm)
        torch.testing.assert_close(compiled(x, x), expected(x, x))
        torch.testing.assert_close(norm.state_dict(), expected.state_dict())


def test_widths_accumulate_gradients_in_one_buffer():
    """Sandwich training: the gradients of all widths add up in the full parameters."""
    model = Net().double()
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    upstream = torch.randn(4, 5, dtype=torch.float64)
    separate = []
    for width in (1.0, 0.5):
        with use_width(model, width):
            model.zero_grad()
            model(x).backward(upstream)
            separate.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for width in (1.0, 0.5):
        with use_width(model, width):
            model(x).backward(upstream)
    together = [p.grad for p in model.parameters()]
    torch.testing.assert_close(together, [a + b for a, b in zip(*separate, strict=True)])
