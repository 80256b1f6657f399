"""Code written for the slimmable networks' layers runs on ours."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from us3l_kernels import set_width, use_width
from us3l_kernels.nn import (
    SlimmableConv2d,
    SlimmableLinear,
    USBatchNorm2d,
    USConv2d,
    USLinear,
    calibrating,
    compat,
)

WIDTHS = [0.25, 0.5, 0.75, 1.0]


@pytest.fixture
def declared_widths():
    compat.set_width_mult_list(WIDTHS)
    yield
    compat.set_width_mult_list([])


class InvertedResidual(nn.Module):
    """A block as user code writes it: expansion, depthwise, projection, by positional arguments."""

    def __init__(self, inp: int, outp: int, expand: int) -> None:
        super().__init__()
        mid = inp * expand
        self.body = nn.Sequential(
            USConv2d(inp, mid, 1, 1, 0, bias=False, ratio=[1, expand]),
            USBatchNorm2d(mid, expand),
            nn.ReLU6(),
            USConv2d(mid, mid, 3, 1, 1, groups=mid, depthwise=True, bias=False, ratio=[expand, expand]),
            USBatchNorm2d(mid, expand),
            nn.ReLU6(),
            USConv2d(mid, outp, 1, 1, 0, bias=False, ratio=[expand, 1]),
            USBatchNorm2d(outp),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class USNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = USConv2d(3, 24, 3, bias=True, us=[False, True])
        self.block = InvertedResidual(24, 32, 6)
        self.head = USConv2d(32, 64, 1, us=[True, False])
        self.hidden = USLinear(64, 32, us=[False, True])
        self.classifier = USLinear(32, 10, us=[True, False])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.hidden(self.head(self.block(self.stem(x))).mean((2, 3))))


@pytest.mark.parametrize("width", [1.0, 0.7, 0.4])
def test_width_mult_by_apply_is_set_width(width):
    model = USNet().double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with use_width(model, width):
        expected = model(x)
    model.apply(lambda m: setattr(m, "width_mult", width))
    assert torch.equal(model(x), expected)
    assert model.stem.width_mult == model.block.body[1].width_mult == width


def test_channels_with_expansions_and_unsliced_ends():
    model = USNet()
    assert model.stem.width_mult == 1.0
    model.apply(lambda m: setattr(m, "width_mult", 0.4))
    body = model.block.body
    # 24 * 0.4 = 9.6 rounds to 8, less than 0.9 * 9.6: 16.
    assert "USConv2d(3/3, 16/24" in repr(model.stem)
    assert "USConv2d(16/24, 96/144" in repr(body[0])
    assert "USConv2d(96/144, 96/144" in repr(body[3])
    assert "USConv2d(96/144, 16/32" in repr(body[6])
    assert "USConv2d(16/32, 64/64" in repr(model.head)
    assert "USLinear(64/64, 16/32" in repr(model.hidden)
    assert "USLinear(16/32, 10/10" in repr(model.classifier)
    assert body[:6](torch.randn(2, 16, 4, 4)).size(1) == 96
    model.apply(lambda m: setattr(m, "width_mult", None))
    assert model.hidden.active_out_features == 32


def test_us_layers_against_slices():
    conv = USConv2d(16, 32, 3, 2, 1).double()
    linear = USLinear(16, 32).double()
    norm = USBatchNorm2d(16).double()
    for layer in (conv, linear, norm):
        layer.width_mult = 0.5
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight[:16, :8], conv.bias[:16], 2, 1))
    torch.testing.assert_close(
        linear(x[..., 0, 0]), F.linear(x[..., 0, 0], linear.weight[:16, :8], linear.bias[:16])
    )
    torch.testing.assert_close(
        norm(x), F.batch_norm(x, None, None, norm.weight[:8], norm.bias[:8], training=True)
    )


def test_us_batch_norm_is_calibrated():
    norm = USBatchNorm2d(16).eval()
    norm.width_mult = 0.5
    assert list(norm.state_dict()) == ["weight", "bias"]
    x = torch.randn(4, 8, 2, 2)
    with pytest.raises(RuntimeError, match="calibrating"):
        norm(x)
    with torch.no_grad(), calibrating(norm):
        expected = norm(x)
    torch.testing.assert_close(norm(x), expected)


def test_bad_width_mult():
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        USLinear(8, 8).width_mult = 1.5


# ------------------------------------------------------------------------------------------- lists


def slimmable() -> nn.Sequential:
    def channels(c: int) -> list[int]:
        return [int(c * w) for w in WIDTHS]

    return nn.Sequential(
        SlimmableConv2d([3] * 4, channels(20), 3, bias=False),
        compat.SwitchableBatchNorm2d(channels(20)),
        SlimmableConv2d(channels(20), channels(20), 3, 1, 1, groups_list=channels(20)),
        nn.Flatten(),
        SlimmableLinear([4 * c for c in channels(20)], [10] * 4),
    )


@pytest.mark.parametrize("index", range(4))
def test_lists_against_slices(declared_widths, index):
    model = slimmable().double()
    assert model[0].width_mult == model[1].width_mult == 1.0
    model.apply(lambda m: setattr(m, "width_mult", WIDTHS[index]))
    conv, norms, depthwise, _, linear = model
    c = int(20 * WIDTHS[index])
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    y = F.conv2d(x, conv.weight[:c])
    y = F.batch_norm(y, None, None, norms.bn[index].weight, norms.bn[index].bias, training=True)
    y = F.conv2d(y, depthwise.weight[:c], depthwise.bias[:c], 1, 1, groups=c)
    torch.testing.assert_close(model(x), F.linear(y.flatten(1), linear.weight[:, : 4 * c], linear.bias))
    assert norms.bn[index].num_batches_tracked == 1
    model.eval()(x)  # private running statistics: no calibration needed
    assert f"SlimmableConv2d(3/3, {c}/20" in repr(conv)
    assert f"SlimmableConv2d({c}/20, {c}/20" in repr(depthwise)
    assert f"SlimmableLinear({4 * c}/80, 10/10" in repr(linear)
    model.apply(lambda m: setattr(m, "width_mult", None))
    assert norms.width_mult == conv.width_mult == 1.0


def test_set_width_works_on_lists_and_refuses_others(declared_widths):
    model = slimmable()
    set_width(model, 0.25)
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 10)
    for layer in (model[0], model[1], model[4]):
        with pytest.raises(ValueError, match=r"\[0\.25, 0\.5, 0\.75, 1\.0\], got 0\.6"):
            layer.width_mult = 0.6


def test_undeclared_widths_are_shares():
    conv = SlimmableConv2d([3, 3], [8, 16], 1)
    linear = SlimmableLinear([8, 16], [10, 10])
    norm = compat.SwitchableBatchNorm2d([8, 16])
    assert conv.widths == linear.widths == norm.widths == (0.5, 1.0)
    conv.width_mult = norm.width_mult = 0.5
    assert norm(conv(torch.randn(2, 3, 2, 2))).size(1) == 8
    assert SlimmableLinear([64], [10]).widths == (1.0,)
    with pytest.raises(ValueError, match="set_width_mult_list"):
        SlimmableConv2d([8, 8], [16, 16], 1)


def test_bad_lists(declared_widths):
    with pytest.raises(ValueError, match=r"declared widths \[0\.25, 0\.5, 0\.75, 1\.0\]"):
        SlimmableConv2d([3, 3], [8, 16], 1)
    with pytest.raises(ValueError, match="one entry per width"):
        SlimmableLinear([8] * 4, [8] * 3)
    with pytest.raises(ValueError, match="same channels per group"):
        SlimmableConv2d([4, 8, 12, 16], [4, 8, 12, 16], 1, groups_list=[4])
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        compat.set_width_mult_list([0.5, 2])


def test_copies_and_pickles_keep_the_width(declared_widths):
    for model in (slimmable(), USNet()):
        set_width(model, 0.5)
        x = torch.randn(2, 3, 6, 6) if isinstance(model, USNet) else torch.randn(2, 3, 4, 4)
        expected = model(x)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(x), expected)
