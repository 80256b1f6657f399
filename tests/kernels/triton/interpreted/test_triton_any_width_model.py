"""Networks that read their width from memory, interpreted: against the ordinary passes of each width.

All memory that is not initialised is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import us3l_kernels
from us3l.models.layers import ConvNorm, Layers
from us3l.models.mobilenet_v2 import InvertedResidual
from us3l.models.resnet import BasicBlock, Bottleneck, ResNet
from us3l_kernels import any_width, gradients, use_width, views
from us3l_kernels.any_width import AnyWidth
from us3l_kernels.errors import BackendError
from us3l_kernels.nn import SlicedBatchNorm1d, SlicedBatchNorm2d, SlicedConv2d, SlicedLayerNorm, SlicedLinear, SlicedQKV
from us3l_kernels.nn.compat import SlimmableConv2d
from us3l_kernels.packed import PackedWeights
from us3l_kernels.width import current_views

LAYERS = Layers()


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    with us3l_kernels.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


class Mobile(nn.Sequential):
    """As MobileNetV2: its last convolution keeps all of its channels."""

    def __init__(self) -> None:
        super().__init__(
            ConvNorm(LAYERS.conv(3, 16, 3, 2), LAYERS.norm(16, "relu6")),
            InvertedResidual(16, 16, 1, 2, LAYERS),
            ConvNorm(LAYERS.conv(16, 32, 1, slice_out=False), LAYERS.norm(32, "relu6")),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            SlicedLinear(32, 5, slice_out=False),
        )


class Plain(nn.Module):
    """Layers that are called one by one: a convolution with bias, torch's functions, a norm behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = SlicedConv2d(3, 24, 3, padding=1)
        self.pool = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        self.norm1 = SlicedBatchNorm2d(24, track_running_stats=False)
        self.conv2 = SlicedConv2d(24, 24, 3, padding=1, groups=24)
        self.hidden = SlicedLinear(24, 40, bias=False)
        self.norm2 = SlicedBatchNorm1d(40, track_running_stats=False, activation="relu", affine=False)
        self.head = SlicedLinear(40, 5, slice_out=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(self.norm1(self.pool(self.conv1(x)))))
        return self.head(self.norm2(self.hidden(x.mean((2, 3)))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: ResNet(BasicBlock, [1, 1], LAYERS, stem="imagenet", num_classes=5, base_channels=16),
    "one block": lambda: ResNet(BasicBlock, [1], LAYERS, stem="imagenet", num_classes=5, base_channels=16),
    "bottleneck": lambda: ResNet(Bottleneck, [1], LAYERS, stem="small", num_classes=5, base_channels=16),
    "mobile": Mobile,
    "plain": Plain,
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().to(memory_format=torch.channels_last).train()


def images(n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 9, 10, generator=generator).to(memory_format=torch.channels_last)


def passed(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The result of a pass, and all gradients: of a loss that weighs every result differently."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), views(2):
        y = model(x).float()
    (y * torch.linspace(-1, 1, 5)).cos().sum().backward()
    return [y.detach(), x.grad, *[p.grad.clone() for p in model.parameters()]]


def assert_alike(given: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(given, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm().clamp_min(1e-3), (a - b).norm() / b.norm()


def fast(*names: str) -> list[Any]:
    """All networks, the others as slow tests: the interpreter takes a second for each layer."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]


def check_width(name: str, width: float, spec: str, tolerance: float) -> None:
    model, x = network(name), images(4)
    table = AnyWidth(model)
    with use_width(model, width), us3l_kernels.backend(spec):
        expected = passed(model, x)
    table.set(width)
    with table:
        assert_alike(passed(model, x), expected, tolerance)


@pytest.mark.parametrize("name", fast("one block", "bottleneck", "mobile", "plain"))
def test_passes_are_those_of_the_width(name: str) -> None:
    check_width(name, 0.5, "aten", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("width", [0.25, 0.7, 1.0])
def test_passes_are_those_of_other_widths(name: str, width: float) -> None:
    """Of the same kernels, but for their tiles."""
    check_width(name, width, "triton", 1e-5)


@pytest.mark.parametrize("name", fast("plain"))
def test_several_widths_in_one_pass(name: str) -> None:
    check_widths(name, (1.0, 0.3), torch.float32, "aten", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_several_widths_in_half_precision(name: str) -> None:
    check_widths(name, (1.0, 0.3, 0.6), torch.float16, "triton", 1e-2)


def check_widths(name: str, widths: tuple[float, ...], dtype: torch.dtype, spec: str, tolerance: float) -> None:
    """With packed weights, into attached gradients: they are the sums of those of the passes."""
    model = network(name)
    x = images(4 * len(widths))
    parts, sums = [], []
    for width, part in zip(widths, x.chunk(len(widths)), strict=True):
        with use_width(model, width), us3l_kernels.backend(spec):
            y, dx, *found = passed(model, part, dtype)
        parts.append((y, dx))
        sums.append(found)
    expected = [torch.cat([y for y, _ in parts]), torch.cat([dx for _, dx in parts])]
    expected += [torch.stack(each).sum(0) for each in zip(*sums, strict=True)]
    table = AnyWidth(model, widths=len(widths))
    table.set(*widths)
    with PackedWeights(gradients.attach(model)), table:
        given = passed(model, x, dtype)
    given[2:] = [p.grad for p in model.parameters()]
    assert_alike(given, expected, tolerance)


def test_a_plan_of_widths() -> None:
    model, x = network("one block"), images(4)
    table, plan = AnyWidth(model), {"": 0.5, "layer1.0.conv1": 1.0}
    with use_width(model, plan), torch.no_grad():
        expected = model(x)
    table.set(plan)
    with table, torch.no_grad():
        assert_alike([model(x)], [expected], 1e-5)
    with pytest.raises(ValueError, match="breaks a residual sum"):
        table.set({"layer1.0.conv2": 0.5})
    del model.residual_sums  # it was seen in the pass
    with pytest.raises(ValueError, match=r"a sum of conv1 \(\[16\] channels\) and layer1.0.conv2 \(\[8\] channels\)"):
        table.set({"layer1.0.conv2": 0.5})


def test_features_that_are_sliced() -> None:
    model = network("one block")
    model.fc = nn.Identity()
    with use_width(model, 0.5), torch.no_grad():
        expected = model(images(4))
    table = AnyWidth(model)
    table.set(0.5)
    with table, torch.no_grad():
        features = model(images(4))
        assert features.shape == (4, 16)
        (given,) = table.active_prefix(features)
    assert_alike([given], [expected], 1e-5)
    assert expected.shape == (4, 8)


def test_functions_that_would_see_more_raise() -> None:
    conv = SlicedConv2d(3, 16, 1)
    table = AnyWidth(conv)
    table.set(0.5)
    with table:
        y = conv(images(2))
        functions = (y.sum, y.mean, lambda: torch.cat([y, y]), lambda: y + y, lambda: y.mean((0, 2)), lambda: y[0])
        for function in functions:
            with pytest.raises(ValueError, match=r"would see what lies behind the active channels of \(2, 16, 9, 10\)"):
                function()
        with pytest.raises(ValueError, match="is not of the model whose widths are read"):
            SlicedConv2d(16, 8, 1)(y)
        with pytest.raises(ValueError, match="would see what lies behind"):
            nn.Conv2d(16, 8, 1)(y)
        assert torch.cat([images(2)] * 2).sum().isfinite()
        for pooled in (torch.mean(input=y, dim=(2, 3)), y.mean((2, 3), keepdim=True)):
            assert table.active_prefix(pooled)[0].size(1) == 8
        with pytest.raises(ValueError, match="torch's 'mean' would see"):
            torch.mean(input=y)
    with pytest.raises(ValueError, match="of the full width"), AnyWidth(pair := Plain()):
        pair.norm1(pair.conv1(images(2)), torch.zeros(2, 24, 9, 10))


@pytest.mark.parametrize(
    "layer,error",
    [
        (SlicedBatchNorm2d(16), "running statistics are of one width"),
        (SlicedBatchNorm2d(16, track_running_stats=False, sync=True), "its statistics are synchronised"),
        (SlicedLayerNorm(16), "SlicedLayerNorm takes them from the host"),
        (Layers(widths=(1.0, 0.5)).norm(16), "SwitchableBatchNorm2d takes them from the host"),
        (SlicedConv2d(16, 16, 1, groups=4), "groups are taken from the host"),
        (SlicedLinear(16, 16, slice_in=True), "slice_in takes them from the host"),
        (SlicedQKV(16, 2), "SlicedQKV takes them from the host"),
    ],
)
def test_layers_that_cannot_are_named(layer: nn.Module, error: str) -> None:
    with pytest.raises(ValueError, match=f"any width: '1' cannot read its channels from the device: .*{error}"):
        AnyWidth(nn.Sequential(SlicedConv2d(3, 16, 1), layer))


@pytest.mark.parametrize(
    "change,error",
    [
        (lambda model: model.norm1.register_forward_hook(lambda *_: None), "'norm1' .*: it has hooks"),
        (lambda model: model.eval(), "'norm1' .*: evaluation and calibration"),
        (lambda model: model.double(), "'conv1' .*: it is of float64"),
    ],
)
def test_what_they_become_is_seen_by_the_next_pass(change: Callable[[Any], Any], error: str) -> None:
    model = network("plain")
    table = AnyWidth(model)
    change(model)
    with pytest.raises(ValueError, match=error), table:
        pass
    with pytest.raises(ValueError, match=error):
        AnyWidth(model)


def test_bad_use_is_refused() -> None:
    model = network("plain")
    with us3l_kernels.backend("batch_norm=aten"), pytest.raises(BackendError, match="batch_norm on backend 'triton'"):
        AnyWidth(model)
    with pytest.raises(ValueError, match="has none"):
        AnyWidth(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="widths: expected an integer >= 1, got 0"):
        AnyWidth(model, widths=0)
    table = AnyWidth(model, widths=2)
    with pytest.raises(ValueError, match="widths: expected 2, got 1"):
        table.set(0.5)
    with pytest.raises(ValueError, match=r"a number in \(0, 1\], got 2"):
        table.set(0.5, 2)
    with table, pytest.raises(ValueError, match="'conv1' expects a batch of 2 widths, got 3 samples"):
        model(images(3))
    with table, torch.no_grad():
        y = model(images(4))
    assert y.isfinite().all()


def test_widths_must_not_change_before_the_backward() -> None:
    for conv in (SlicedConv2d(3, 16, 1), ConvNorm(LAYERS.conv(3, 16, 1), LAYERS.norm(16))):
        table = AnyWidth(conv)
        with table:
            y = conv(images(4)).mean((2, 3))
        table.set(0.5)
        with pytest.raises(RuntimeError, match="set anew between a forward and its backward"):
            y.sum().backward()


def test_features_of_tokens_are_refused() -> None:
    """Their channels are the last dimension, and those of what pools them would be another."""
    with pytest.raises(ValueError, match=r"x: SlicedLinear.* expects \[N, C\], got shape \(2, 5, 8\)"):
        linear = SlicedLinear(8, 16)
        with AnyWidth(linear):
            linear(torch.ones(2, 5, 8))


def test_results_of_linear_layers_may_be_written_to() -> None:
    model = nn.Sequential(SlicedLinear(8, 16), nn.ReLU(inplace=True), SlicedLinear(16, 5, slice_out=False))
    x = torch.linspace(-1, 1, 32).view(4, 8)
    with use_width(model, 0.5):
        expected = passed(model, x)
    table = AnyWidth(model)
    table.set(0.5)
    with table:
        assert_alike(passed(model, x), expected, 1e-5)


def test_contexts_of_one_table_nest() -> None:
    table = AnyWidth(SlicedConv2d(3, 16, 1), widths=2)
    with table:
        with table:
            assert current_views() == 2
        assert current_views() == 2
    assert any_width.current() is None and current_views() == 1


def test_tensors_of_other_tables_are_refused() -> None:
    models = [nn.Sequential(SlicedConv2d(3, 16, 1), SlicedBatchNorm2d(16, track_running_stats=False)) for _ in range(2)]
    table, other = map(AnyWidth, models)
    with other:
        y = models[1](images(2))
    with table, pytest.raises(ValueError, match="whose active channels another AnyWidth has"):
        models[0][1](y)
    with table, pytest.raises(ValueError, match="whose active channels another AnyWidth has"):
        models[0][1](models[0][0](images(2)), y)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("from_", [0, 1])
def test_checkpoints_are_refused(reentrant: bool, from_: int) -> None:
    """They would run layers again in a backward, where tensors have lost what is known of their channels."""
    model = nn.Sequential(SlicedConv2d(3, 16, 1), SlicedConv2d(16, 8, 1, slice_out=False))
    with AnyWidth(model), pytest.raises(BackendError, match=f"'{from_}' is called by a backward"):
        y = model[:from_](images(2).requires_grad_())
        checkpoint(model[from_:], y, use_reentrant=reentrant).square().sum().backward()


def test_what_kernels_do_not_take_is_refused() -> None:
    """In chains of convolutions and norms, too, which would else not ask."""
    pair = ConvNorm(LAYERS.conv(3, 16, 1), LAYERS.norm(16))
    with AnyWidth(pair), pytest.raises(TypeError, match="weight: expected the dtype of x, torch.float64"):
        pair(images(2).double())


def test_channels_that_kernels_are_not_compiled_for_are_refused() -> None:
    table = AnyWidth(SlimmableConv2d([3, 3], [10, 16], 1))
    with pytest.raises(ValueError, match=r"'' keeps \[10\] channels, no multiples of 8"):
        table.set(0.625)
