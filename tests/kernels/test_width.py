"""Channels of a width, widths and plans, views."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from us3l_kernels import set_width, use_width, views
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, SlicedLinear, SwitchableBatchNorm2d
from us3l_kernels.width import active_channels, current_views, make_divisible, width_key

widths = st.floats(min_value=0.01, max_value=1.0)


class Block(nn.Module):
    residual_sums = [["conv2", "shortcut"]]

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = SlicedConv2d(channels, 32, 3, padding=1)
        self.bn1 = SlicedBatchNorm2d(32)
        self.conv2 = SlicedConv2d(32, 64, 3, padding=1)
        self.shortcut = SlicedConv2d(channels, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.bn1(self.conv1(x))) + self.shortcut(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = SlicedConv2d(3, 32, 3)
        self.layer1 = Block(32)
        self.layer10 = Block(64)
        self.fc = SlicedLinear(64, 10, slice_out=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer10(self.layer1(self.stem(x))).mean((2, 3)))


def channels(model: nn.Module) -> dict[str, int]:
    return {
        name: module.active_out_channels
        for name, module in model.named_modules()
        if isinstance(module, SlicedConv2d)
    }


# ------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ("value", "expected"), [(32, 32), (33, 32), (36, 40), (35, 32), (3, 8), (11.9, 16), (11, 16), (8.8, 8)]
)
def test_make_divisible(value, expected):
    # 11 rounds to 8, which is below 0.9 * 11, hence 16; 8.8 rounds to 8, which is not below 7.92.
    assert make_divisible(value) == expected


def test_make_divisible_divisor_and_minimum():
    assert make_divisible(10, divisor=4) == 12  # halves go up
    assert make_divisible(9.9, divisor=1) == 10
    assert make_divisible(1, divisor=4) == 4
    assert make_divisible(1, divisor=4, min_value=16) == 16
    with pytest.raises(ValueError, match="divisor"):
        make_divisible(8, divisor=0)


@given(
    c=st.integers(1, 2048),
    width=widths,
    divisor=st.sampled_from([1, 4, 8, 16]),
    ratio=st.sampled_from([1, 2, 6]),
)
def test_active_channels_bounds(c, width, divisor, ratio):
    full = c * ratio
    active = active_channels(full, width, divisor=divisor, ratio=ratio)
    assert 1 <= active <= full
    assert active == full or (active % (divisor * ratio) == 0 and active >= 0.9 * full * width)
    assert active_channels(full, 1.0, divisor=divisor, ratio=ratio) == full


@given(c=st.integers(1, 512), a=widths, b=widths)
def test_divisor_one_is_monotone(c, a, b):
    low, high = sorted([a, b])
    assert active_channels(c, low, divisor=1) <= active_channels(c, high, divisor=1)


def test_active_channels_of_known_networks():
    assert [active_channels(64, w) for w in (1.0, 0.75, 0.5, 0.25)] == [64, 48, 32, 16]
    assert active_channels(20, 0.9) == 20  # 18 -> 16 is below 16.2 -> 24 -> never more than the layer has
    assert active_channels(3, 0.25) == 3
    # MobileNetV2, expansion 6 of 24 channels: the expanded channels are 6 times those of the narrow layer.
    assert active_channels(144, 0.4, ratio=6) == 6 * active_channels(24, 0.4)


def test_number_of_distinct_sub_networks_of_resnet18():
    tuples = {
        tuple(active_channels(c, w / 100_000) for c in (64, 128, 256, 512)) for w in range(25_000, 100_001)
    }
    assert len(tuples) == 90


# ------------------------------------------------------------------------------------------- setting a width


def test_set_width_reaches_every_layer_and_repr_says_so():
    model = Net()
    assert "SlicedConv2d(32/32, 64/64, kernel_size=(1, 1)" in repr(model)
    set_width(model, 0.5)
    assert channels(model) == {
        "stem": 16,
        "layer1.conv1": 16,
        "layer1.conv2": 32,
        "layer1.shortcut": 32,
        "layer10.conv1": 16,
        "layer10.conv2": 32,
        "layer10.shortcut": 32,
    }
    assert model.fc.active_out_features == 10
    text = repr(model)
    assert "SlicedConv2d(16/32, 32/64, kernel_size=(1, 1)" in text
    assert "SlicedLinear(32/64, 10/10, bias=True)" in text
    assert "width=0.5" in repr(model.layer1.bn1)
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 10)


def test_use_width_nests_and_restores():
    model = Net()
    with use_width(model, 0.75):
        outer = channels(model)
        with use_width(model, 0.25):
            assert model.stem.active_out_channels == 8
            assert model.stem.width_key == "0.25"
        assert channels(model) == outer
        assert model.layer1.bn1.width_key == "0.75"
    assert model.stem.active_out_channels == 32
    assert model.layer1.bn1.active_width == 1.0


def test_use_width_restores_after_an_exception():
    model = Net()
    set_width(model, 0.5)
    before = channels(model)
    with pytest.raises(KeyError), use_width(model, {"layer1": 0.25}):
        raise KeyError
    assert channels(model) == before
    assert model.layer1.conv1.width_key == "0.5"


def test_use_width_restores_mixed_widths():
    model = Net()
    set_width(model, 0.5)
    set_width(model.layer10, 0.75)
    before = channels(model)
    with use_width(model, 0.25):
        assert set(channels(model).values()) == {8, 16}
    assert channels(model) == before


def test_a_model_inside_a_model():
    inner = Net()
    outer = nn.ModuleDict({"encoder_q": inner, "head": SlicedLinear(10, 64)})
    set_width(inner, 0.5)
    assert outer["head"].active_out_features == 64
    by_inner = channels(inner)
    set_width(outer, 1.0)
    set_width(outer, 0.5)
    assert channels(inner) == by_inner
    assert outer["head"].active_out_features == 32
    set_width(outer, {"": 0.5, "encoder_q.layer10": 0.25})
    assert inner.layer10.conv2.active_out_channels == 16
    assert inner.layer1.conv2.active_out_channels == 32


def test_a_single_layer_is_a_model():
    layer = SlicedLinear(16, 64)
    with use_width(layer, 0.5):
        assert layer(torch.randn(2, 16)).shape == (2, 32)


# ------------------------------------------------------------------------------------------- plans


def test_plan_longest_name_wins_and_names_are_whole():
    model = Net()
    set_width(model, {"": 0.5, "layer1": 0.25, "layer1.conv1": 1.0})
    assert channels(model) == {
        "stem": 16,
        "layer1.conv1": 32,
        "layer1.conv2": 16,
        "layer1.shortcut": 16,
        "layer10.conv1": 16,  # "layer1" is not a part of "layer10"
        "layer10.conv2": 32,
        "layer10.shortcut": 32,
    }
    assert model.layer1.bn1.active_width == 0.25
    assert model.stem.width_key == model.layer10.conv1.width_key == "layer1=0.25,layer1.conv1=1.0,*=0.5"


def test_plan_default_is_full_width():
    model = Net()
    set_width(model, 0.25)
    set_width(model, {"layer10": 0.5})
    assert model.stem.active_out_channels == 32
    assert model.layer10.conv1.active_out_channels == 16


def test_plan_with_an_unknown_name_names_the_nearest():
    model = Net()
    with pytest.raises(ValueError, match="'layer10.conv'.*'layer10.conv[12]'"):
        set_width(model, {"layer10.conv": 0.5})
    with pytest.raises(ValueError, match="no sliced layer"):
        set_width(model, {"stem.": 1.0})  # even if the entry would change nothing


def test_plan_that_breaks_a_residual_sum_names_the_layers():
    model = Net()
    set_width(model, 0.75)
    with pytest.raises(ValueError, match=r"layer1\.conv2 \(16 channels\).*layer1\.shortcut \(32 channels\)"):
        set_width(model, {"": 0.5, "layer1.conv2": 0.25})
    assert model.stem.active_out_channels == 24  # nothing was changed
    set_width(model, {"": 0.5, "layer1.conv2": 0.25, "layer1.shortcut": 0.25})
    # 0.5 and 0.51 of 64 channels are both 32.
    set_width(model, {"": 0.5, "layer1.conv2": 0.51})


def test_residual_sum_of_something_without_channels():
    block = Block(32)
    block.residual_sums = [["conv2", "bn1"]]
    with pytest.raises(TypeError, match="'bn1', a SlicedBatchNorm2d"):
        set_width(block, {"conv2": 0.5})


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("width", [0, 0.0, -0.5, 1.0001, math.nan, math.inf])
def test_width_out_of_range(width):
    model = Net()
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        set_width(model, width)
    with pytest.raises(ValueError, match=r"width\['layer1'\].*\(0, 1\]"), use_width(model, {"layer1": width}):
        pass
    assert model.stem.active_out_channels == 32


@pytest.mark.parametrize("width", ["0.5", None, True, [0.5], 0.5j])
def test_width_of_another_type(width):
    with pytest.raises(TypeError, match="expected a number"):
        set_width(Net(), width)


def test_plan_keys_are_names():
    with pytest.raises(TypeError, match="module names"):
        set_width(Net(), {0: 0.5})


def test_model_without_sliced_layers():
    with pytest.raises(ValueError, match="Linear has none"):
        set_width(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="Sequential has none"), use_width(nn.Sequential(), 0.5):
        pass


def test_refused_width_changes_nothing():
    model = nn.Sequential(SlicedConv2d(3, 32, 1), SwitchableBatchNorm2d(32, [1.0, 0.5]))
    with pytest.raises(ValueError, match=r"\[1\.0, 0\.5\], got 0\.75"):
        set_width(model, 0.75)
    assert model[0].active_out_channels == 32


# ------------------------------------------------------------------------------------------- keys


def test_width_key_is_canonical():
    assert width_key(0.5) == "0.5"
    assert width_key(1) == "1.0"
    assert width_key({}) == width_key({"": 1.0}) == "1.0"
    assert width_key({"": 0.5, "layer3": 0.4}) == width_key({"layer3": 0.4, "": 0.5}) == "layer3=0.4,*=0.5"
    assert width_key({"layer3": 0.4}) == "layer3=0.4,*=1.0"
    assert width_key({"": 0.5, "layer3": 0.5, "layer3.0": 0.5}) == "0.5"
    # An entry that says what its parent says is dropped; one that undoes its parent is not.
    assert width_key({"a": 0.5, "a.b": 0.5}) == width_key({"a": 0.5})
    assert width_key({"a": 0.5, "a.b": 1.0}) != width_key({"a": 0.5})


@given(a=widths, b=widths)
def test_equal_widths_have_equal_keys(a, b):
    assert (a == b) == (width_key(a) == width_key(b))
    assert float(width_key(a)) == a


names = st.sampled_from(["", "a", "a.b", "a.b.c", "d", "d.e"])


@given(
    st.dictionaries(names, st.sampled_from([0.25, 0.5, 1.0])),
    st.dictionaries(names, st.sampled_from([0.5, 1.0])),
)
def test_equal_plans_have_equal_keys(a, b):
    def resolved(plan):
        layers = ["a.b.c.x", "a.b.x", "a.x", "d.e.x", "d.x", "x"]
        fits = {
            layer: max((n for n in {"", *plan} if f"{layer}.".startswith(f"{n}." if n else "")), key=len)
            for layer in layers
        }
        return {layer: plan.get(name, 1.0) for layer, name in fits.items()}

    assert (resolved(a) == resolved(b)) == (width_key(a) == width_key(b))


# ------------------------------------------------------------------------------------------- views


def test_views_nest_and_restore():
    assert current_views() == 1
    with views(2):
        assert current_views() == 2
        with pytest.raises(KeyError), views(4):
            assert current_views() == 4
            raise KeyError
        assert current_views() == 2
    assert current_views() == 1


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_bad_views(n):
    with pytest.raises(ValueError, match="views: expected an integer"), views(n):
        pass
