"""standalone: one sub-network as ordinary layers. In float64, it must compute what the sliced network computes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from us3l_kernels import set_width, slim, standalone, use_width
from us3l_kernels.dense import dense_layer
from us3l_kernels.nn import (
    SlicedBatchNorm2d,
    SlicedConv2d,
    SlicedLayerNorm,
    SlicedLinear,
    SwitchableBatchNorm2d,
    calibrating,
)
from us3l_kernels.width import Sliced, Width


class Block(nn.Module):
    """What the backbones of a trainer have: activations and residual sums inside of the norms."""

    def __init__(self, norm: Any = SlicedBatchNorm2d) -> None:
        super().__init__()
        self.stem = SlicedConv2d(3, 16, 3, padding="same", padding_mode="reflect")
        self.expand = SlicedConv2d(16, 48, 1, bias=False, ratio=3)
        self.bn1 = norm(48, activation="relu6")
        self.depthwise = SlicedConv2d(48, 48, 3, stride=2, padding=1, groups=48, ratio=3)
        self.project = SlicedConv2d(48, 16, 1, bias=False)
        self.bn2 = norm(16, activation="relu")
        self.shortcut = SlicedConv2d(16, 16, 1, stride=2, dilation=1)
        self.hidden = SlicedLinear(16, 32)
        self.layer_norm = SlicedLayerNorm(32, bias=False)
        self.fc = SlicedLinear(32, 5, slice_out=False)
        self.residual_sums = [["project", "shortcut"]]
        self.layers = [self.stem]  # a reference that is not a submodule

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        y = self.depthwise(self.bn1(self.expand(x)))
        y = self.bn2(self.project(y), residual=self.shortcut(x))
        return self.fc(self.layer_norm(self.hidden(y.mean((2, 3)))))


def calibrated(model: nn.Module, width: Width, x: Tensor) -> nn.Module:
    """`model` in float64 evaluation mode, with random affine pairs and the statistics of `width`."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
                for p in module.parameters(recurse=False):
                    p.copy_(torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.5)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            with use_width(model, width), calibrating(model):
                model(x)
    return model


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def require_same(dense: nn.Module, model: nn.Module, width: Width, x: Tensor) -> None:
    assert not any(isinstance(module, Sliced) for module in dense.modules())
    with use_width(model, width):
        expected = model(x)
    torch.testing.assert_close(dense(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1.0, 0.5, {"": 0.5, "hidden": 0.25, "expand": 0.75, "bn1": 0.75, "depthwise": 0.75}])
def test_computes_what_the_sliced_network_computes(width: Width) -> None:
    x = images()
    model = calibrated(Block(), width, x)
    dense = standalone(model, width, x)
    require_same(dense, model, width, x)
    assert isinstance(dense, Block) and dense.layers[0] is dense.stem
    assert dense.state_dict().keys() >= model.state_dict().keys()
    assert type(dense.stem) is nn.Conv2d and type(dense.hidden) is nn.Linear and type(dense.layer_norm) is nn.LayerNorm


def test_has_the_slice_and_nothing_else() -> None:
    x = images()
    model = calibrated(Block(), 0.5, x)
    with use_width(model, 0.5), torch.no_grad():
        model.project.weight[8:] = model.hidden.weight[:, 8:] = model.bn2.weight[8:] = torch.nan
        model.hidden.bias[16:] = model.layer_norm.weight[16:] = torch.nan
    before = copy.deepcopy(model.state_dict())
    set_width(model, 0.75)
    dense = standalone(model, 0.5, x)
    assert all(bool(p.isfinite().all()) for p in dense.parameters())
    assert dense.depthwise.groups == dense.depthwise.in_channels == 24
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in dense.parameters())
    require_same(dense, model, 0.5, x)
    assert model.stem.active_width == 0.75 and not model.stem.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        dense.stem.weight.zero_()
    assert model.stem.weight.count_nonzero() == model.stem.weight.numel()


def test_trains_and_is_saved_as_any_model() -> None:
    x = images()
    model = calibrated(Block(), 0.5, x)
    model.fc.requires_grad_(False)
    dense = standalone(model, 0.5, x)
    assert not dense.training and not dense.fc.weight.requires_grad and dense.stem.weight.requires_grad
    dense.train()(x).square().sum().backward()
    assert dense.bn1.weight.grad is not None and model.bn1.weight.grad is None
    file = io.BytesIO()
    torch.save(dense.eval(), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), dense(x), rtol=0, atol=0)


def test_a_switchable_norm_becomes_the_one_of_its_width() -> None:
    x = images()
    conv, norm = SlicedConv2d(3, 16, 3), SwitchableBatchNorm2d(16, [1.0, 0.5], activation="relu")
    model = nn.Sequential(conv, norm).double()
    for width in (1.0, 0.5):
        with use_width(model, width):
            model.train()(x)  # running statistics of either
    model.eval()
    for width in (1.0, 0.5):
        dense = standalone(model, width, x)
        require_same(dense, model, width, x)
        assert dense[1].num_features == 16 * width and "1.weight" in dense.state_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("resnet10t", num_classes=5),
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),  # BatchNormAct2d, squeeze-and-excitation
        lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), num_classes=5, ls_init_value=None),
        lambda: torchvision.models.regnet_x_400mf(num_classes=5),  # grouped
    ],
    ids=["resnet", "mobilenet", "convnext", "regnet"],
)
def test_models_of_timm_and_torchvision_stay_such_models(make: Any) -> None:
    x = images(32)
    model = make()
    kind = type(model)
    slim(model)
    model = calibrated(model, 0.5, x)
    dense = standalone(model, 0.5, x)
    require_same(dense, model, 0.5, x)
    assert type(dense) is kind
    assert sum(p.numel() for p in dense.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())


def test_the_example_is_found_where_slim_finds_it() -> None:
    model = nn.Sequential(SlicedConv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), SlicedLinear(16, 8))
    require_same(standalone(model.double(), 0.5), model, 0.5, images())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = SlicedConv2d(16, 16, 1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


def test_what_cannot_be_one_network_is_said() -> None:
    x = images()
    with pytest.raises(RuntimeError, match="no statistics for 24 channels at width 0.5"):
        standalone(Block().double(), 0.5, x)
    with pytest.raises(ValueError, match="breaks a residual sum"):
        standalone(Block(), {"project": 0.5}, x)
    with pytest.raises(ValueError, match="uses 'conv' as Conv2d.16, 8.* and as Conv2d.8, 8"):
        standalone(Shared().double(), 0.5, images(channels=16))
    unreached = Shared().double()
    unreached.unused = SlicedLinear(8, 8).double()
    with pytest.raises(ValueError, match="does not reach 'unused'"):
        standalone(unreached, 1.0, images(channels=16))
    with pytest.raises(ValueError, match="sliced layers"):
        standalone(nn.Linear(3, 3), 0.5, x)


class SlicedScale(Sliced, nn.Module):
    """A layer of a kind that the package does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, 17.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[: x.size(1), None, None]


class Scale(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


def test_another_kind_of_layer_is_registered() -> None:
    x = images()
    model = nn.Sequential(SlicedConv2d(3, 16, 3), SlicedScale()).double()
    with pytest.raises(TypeError, match="no dense layer is known for SlicedScale"):
        standalone(model, 0.5, x)

    @dense_layer.register
    def _(layer: SlicedScale, inputs: tuple[Any, ...], output: Tensor) -> nn.Module:
        return Scale(layer.scale.detach()[: output.shape[1]])

    dense = standalone(model, 0.5, x)
    require_same(dense, model, 0.5, x)
    assert dense[1].scale.shape == (8,)
