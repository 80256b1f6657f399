"""Backbones against torchvision: at full width as they are, at other widths as the narrow network of the prefixes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn

import us3l_kernels
from us3l.models import MobileNetV2, ResNet, build_model
from us3l_kernels import _native, fused
from us3l_kernels.nn import SlicedConv2d, SwitchableBatchNorm2d, calibrating
from us3l_kernels.width import active_channels, set_width, use_width


def _images(size: int = 32, channels: int = 3, n: int = 4) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            yield name, module


def _narrow_resnet(model: ResNet, theirs: nn.Module, width: float) -> None:
    """Make every layer of torchvision's network the prefix of ours, with torch.nn modules of the sliced sizes."""
    for name, layer in list(_layers(theirs)):
        ours = model.get_submodule(name)
        weight = ours.weight.detach()
        last = name == "fc"
        rows = weight.shape[0] if last else active_channels(weight.shape[0], width)
        columns = weight.shape[1] if weight.dim() > 1 else 0
        if weight.dim() > 1 and name != "conv1":
            columns = active_channels(columns, width)
        layer.weight = nn.Parameter(weight[:rows, :columns] if weight.dim() > 1 else weight[:rows])
        if layer.bias is not None:
            layer.bias = nn.Parameter(ours.bias.detach()[:rows])
        if isinstance(layer, nn.Conv2d):
            layer.in_channels, layer.out_channels = columns, rows
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_features, layer.track_running_stats = rows, False
            layer.running_mean = layer.running_var = None


def _randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.1)


@pytest.mark.parametrize(
    ("name", "stem", "width"),
    [
        ("resnet18", "imagenet", 1.0),
        ("resnet18", "cifar", 0.6),
        ("resnet34", "imagenet", 0.3),
        pytest.param("resnet50", "imagenet", 0.6, marks=pytest.mark.slow),
        ("resnet50", "cifar", 0.8),
        pytest.param("resnet101", "cifar", 0.3, marks=pytest.mark.slow),
    ],
)
def test_resnet_is_torchvisions(name: str, stem: str, width: float) -> None:
    model = build_model(name, stem=stem, num_classes=7).double()
    _randomise(model)
    theirs = getattr(torchvision.models, name)(num_classes=7).double()
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False).double(), nn.Identity()
    names = {key for key, _ in theirs.named_parameters()}
    assert {key for key, _ in model.named_parameters()} == names
    _narrow_resnet(model, theirs, width)
    images = _images(32 if stem == "imagenet" else 8)
    with use_width(model, width):
        output = model(images)
    torch.testing.assert_close(output, theirs(images), rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(output)
    model.zero_grad()
    with use_width(model, width):
        model(images).backward(upstream)
    theirs(images).backward(upstream)
    for key, parameter in theirs.named_parameters():
        gradient = model.get_parameter(key).grad
        assert gradient is not None and parameter.grad is not None
        active = tuple(slice(0, size) for size in parameter.shape)
        torch.testing.assert_close(gradient[active], parameter.grad, rtol=1e-6, atol=1e-8)
        assert gradient.count_nonzero() == gradient[active].count_nonzero()  # nothing outside of the slice


@pytest.mark.parametrize("width", [1.0, 0.75, 0.35])
def test_mobilenet_v2_is_torchvisions_at_the_same_multiplier(width: float) -> None:
    """torchvision rounds channels by the same rule, so that its width_mult is our width."""
    model = build_model("mobilenet_v2", num_classes=7).double()
    _randomise(model)
    theirs = torchvision.models.mobilenet_v2(num_classes=7, width_mult=width, dropout=0.0).double()
    ours_in_order, theirs_in_order = list(model.parameters()), list(theirs.parameters())
    assert len(ours_in_order) == len(theirs_in_order)
    with torch.no_grad():
        for ours, narrow in zip(ours_in_order, theirs_in_order, strict=True):
            narrow.copy_(ours[tuple(slice(0, size) for size in narrow.shape)])
    images = _images(64)
    with use_width(model, width):
        output = model(images)
    torch.testing.assert_close(output, theirs(images), rtol=1e-8, atol=1e-8)


def test_mobilenet_v2_names_and_strides_of_the_published_code() -> None:
    names = [name for name, _ in build_model("mobilenet_v2", num_classes=3).named_parameters()]
    assert [name for name in names if name.startswith(("features.0", "features.18", "fc"))] == [
        "features.0.0.weight", "features.0.1.weight", "features.0.1.bias",
        "features.18.0.weight", "features.18.1.weight", "features.18.1.bias",
        "fc.weight", "fc.bias",
    ]  # fmt: skip
    body = [name.removeprefix("features.2.body.") for name in names if name.startswith("features.2.")]
    assert body == [
        "0.weight",
        "1.weight",
        "1.bias",
        "3.weight",
        "4.weight",
        "4.bias",
        "6.weight",
        "7.weight",
        "7.bias",
    ]
    body = [name.removeprefix("features.1.body.") for name in names if name.startswith("features.1.")]
    assert body == ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias"]

    def strides(stem: str) -> list[int]:
        model = build_model("mobilenet_v2", stem=stem)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        return [i for i, m in enumerate(convolutions) if m.stride == (2, 2)]

    halvings = strides("imagenet")
    assert len(halvings) == 5 and halvings[0] == 0
    assert strides("cifar") == halvings[2:]


@pytest.mark.parametrize(("name", "tuples"), [("resnet18", 90), ("resnet50", 378), ("mobilenet_v2", 57)])
def test_number_of_distinct_networks(name: str, tuples: int) -> None:
    """The widths in [0.25, 1] give this many different tuples of channels."""
    convolutions = {
        (m.out_channels, m.divisor, m.ratio)
        for m in build_model(name).modules()
        if isinstance(m, SlicedConv2d) and m.slice_out
    }

    def channels(width: float) -> tuple[int, ...]:
        return tuple(active_channels(c, width, divisor=d, ratio=r) for c, d, r in sorted(convolutions))

    steps = 20_000
    assert len({channels(0.25 + 0.75 * i / steps) for i in range(steps + 1)}) == tuples


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "resnet_tiny"])
def test_every_residual_sum_is_declared(name: str) -> None:
    """A plan that narrows one branch of a sum is refused by name, and one that narrows all of them runs."""
    model = build_model(name, divisor=4 if name == "resnet_tiny" else 8)
    assert model.residual_sums
    for members in model.residual_sums:
        with pytest.raises(ValueError, match=members[-1].replace(".", r"\.")):
            set_width(model, {members[-1]: 0.5})
        with use_width(model, dict.fromkeys(members, 0.5)):
            model.train()(_images(32).float())


@pytest.mark.parametrize(
    ("name", "stem", "expected"),
    [
        ("resnet18", "imagenet", [(64, 16), (128, 8), (256, 4), (512, 2)]),
        ("resnet101", "imagenet", [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
        ("mobilenet_v2", "imagenet", [(16, 32), (24, 16), (32, 8), (96, 4), (320, 2)]),
        ("mobilenet_v2", "cifar", [(24, 64), (32, 32), (96, 16), (320, 8)]),
    ],
)
def test_stages_are_the_last_features_of_each_resolution(name: str, stem: str, expected: list[tuple[int, int]]) -> None:
    with torch.device("meta"):
        model = build_model(name, stem=stem)
    found = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_hook(lambda m, i, output: found.append(tuple(output.shape[1:3])))
    model(torch.empty(2, 3, 64, 64, device="meta"))
    assert found == expected and list(model.stages.values()) == [channels for channels, _ in expected]


def test_resnet_tiny_and_the_small_stem() -> None:
    model = build_model("resnet_tiny", stem="small", in_channels=1, divisor=4, base_channels=16)
    convolutions = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, SlicedConv2d)}
    assert convolutions["conv1"] == (16, 1, 3, 3) and convolutions["layer3.0.conv2"] == (64, 64, 3, 3)
    assert len(convolutions) == 9 and model.feature_dim == 64
    shapes = []
    model.layer3.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    for width, channels in ((1.0, 64), (0.3, 20), (0.25, 16)):
        with use_width(model, width):
            assert model(_images(14, 1).float()).shape == (4, channels)
    assert shapes == [(4, 64, 2, 2), (4, 20, 2, 2), (4, 16, 2, 2)]


def test_convolutions_are_initialised_by_their_fan_out() -> None:
    torch.manual_seed(0)
    for name in ("resnet18", "mobilenet_v2"):
        for module in build_model(name).modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
                fan_out = module.weight.shape[0] * module.kernel_size[0] * module.kernel_size[1]
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


def test_switchable_norms_are_private() -> None:
    widths = [1.0, 0.5]
    model = build_model("resnet_tiny", stem="small", norm="switchable", widths=widths, base_channels=16)
    norms = [m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d)]
    assert len(norms) == 9 and all(len(norm.bn) == 2 for norm in norms)
    with use_width(model, 0.5):
        model(_images(16).float()).backward(torch.randn(4, 32))
    assert all(norm.bn[0].weight.grad is None and norm.bn[1].weight.grad is not None for norm in norms)
    with pytest.raises(ValueError, match="0.75"):
        set_width(model, 0.75)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_evaluation_needs_calibration(name: str) -> None:
    model = build_model(name, stem="cifar").double().eval()
    images = _images(8)
    with use_width(model, 0.5), torch.no_grad():
        with pytest.raises(RuntimeError, match="calibrat"):
            model(images)
        with calibrating(model):
            expected = model(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-8, atol=1e-8)


def test_views_have_statistics_of_their_own() -> None:
    model = build_model("mobilenet_v2", stem="cifar").double()
    one, two = _images(8), 3 + 2 * _images(8).flip(0)
    with us3l_kernels.views(2):
        stacked = model(torch.cat([one, two]))
    torch.testing.assert_close(stacked, torch.cat([model(one), model(two)]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "name must be one of resnet18.*'resnet19'"),
        ({"name": "resnet18", "stem": "big"}, "imagenet, cifar or small, got 'big'"),
        ({"name": "mobilenet_v2", "stem": "small"}, "imagenet or cifar, got 'small'"),
        ({"name": "resnet18", "norm": "batch"}, "norm must be sliced or switchable, got 'batch'"),
        ({"name": "resnet18", "norm": "switchable"}, "widths=None"),
        ({"name": "resnet18", "widths": [1.0]}, "norm='sliced'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**arguments)


@pytest.mark.skipif(_native.load() is None, reason=f"no native library: {_native.why}")
@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16), ("mobilenet_v2", 17)])
def test_blocks_are_one_operation_each_on_the_cpu(
    name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = []
    original = fused.conv_chain
    monkeypatch.setattr(fused, "conv_chain", lambda *args: chains.append(args) or original(*args))
    model = build_model(name, stem="cifar").to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with us3l_kernels.backend("native"):
        model(images).sum().backward()
        assert len(chains) == blocks
        with torch.no_grad(), use_width(model, 0.25):  # a teacher
            model(images)
    assert len(chains) == 2 * blocks


def test_types() -> None:
    assert isinstance(build_model("resnet18"), ResNet)
    assert isinstance(build_model("mobilenet_v2"), MobileNetV2)
    assert isinstance(build_model("resnet18").fc, nn.Identity)
