"""SlicedConv2d against torch.nn.Conv2d with hand-sliced weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from us3l_kernels import backend, set_width
from us3l_kernels.nn import SlicedConv2d


def hand_sliced(layer: SlicedConv2d, x: torch.Tensor) -> torch.Tensor:
    """The same layer by torch.nn.Conv2d, with copies of the slices as its weights."""
    c, k = x.size(1), layer.active_out_channels
    groups = layer.groups
    if groups > 1:
        groups = c // (layer.in_channels // groups)
        k = groups * (layer.out_channels // layer.groups)
    conv = nn.Conv2d(
        c,
        k,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        groups,
        layer.bias is not None,
        layer.padding_mode,
        dtype=x.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(layer.weight[:k, : c // groups])
        if layer.bias is not None:
            conv.bias.copy_(layer.bias[:k])
    return conv(x)


def poison(layer: SlicedConv2d, c: int) -> None:
    """NaN where a sub-network with c input channels must not look."""
    with torch.no_grad():
        k = layer.active_out_channels
        if layer.groups > 1:
            k = c * layer.groups // layer.in_channels * (layer.out_channels // layer.groups)
        else:
            layer.weight[:, c:] = torch.nan
        layer.weight[k:] = torch.nan
        if layer.bias is not None:
            layer.bias[k:] = torch.nan


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_against_hand_sliced_weights(data):
    per_in, per_out = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    groups = data.draw(st.sampled_from([1, 1, 4]))
    full_in, full_out = groups * per_in, groups * per_out
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = data.draw(st.sampled_from([0, 1, (1, 0), "same", "valid"]))
    layer = SlicedConv2d(
        full_in,
        full_out,
        kernel,
        stride=1 if padding == "same" else data.draw(st.integers(1, 2)),
        padding=padding,
        dilation=data.draw(st.integers(1, 2)),
        groups=groups,
        bias=data.draw(st.booleans()),
        padding_mode=mode,
        divisor=1,
        dtype=torch.float64,
    )
    set_width(layer, data.draw(st.floats(0.1, 1.0)))
    active_groups = data.draw(st.integers(1, groups))
    c = active_groups * per_in if groups > 1 else data.draw(st.integers(1, full_in))
    poison(layer, c)
    x = torch.randn(2, c, 7, 6, dtype=torch.float64, requires_grad=True)
    if data.draw(st.booleans()):
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    y = layer(x)
    expected = hand_sliced(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)

    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, x, upstream)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, upstream)[0], rtol=1e-10, atol=1e-12)


def test_weight_gradient_is_full_and_zero_outside():
    layer = SlicedConv2d(16, 32, 3, padding=1, dtype=torch.float64)
    set_width(layer, 0.5)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    weight = layer.weight[:16, :8].detach().clone().requires_grad_()
    bias = layer.bias[:16].detach().clone().requires_grad_()
    F.conv2d(x, weight, bias, padding=1).backward(upstream)
    torch.testing.assert_close(layer.weight.grad[:16, :8], weight.grad)
    torch.testing.assert_close(layer.bias.grad[:16], bias.grad)
    assert layer.weight.grad.shape == layer.weight.shape
    assert not layer.weight.grad[16:].any() and not layer.weight.grad[:, 8:].any()
    assert not layer.bias.grad[16:].any()


OPTIONS = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": "same", "kernel_size": (2, 4)},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (2, 1), "padding_mode": "circular", "groups": 2},
    {"padding": 1, "groups": 8, "out_channels": 8},
    {"padding": 1, "groups": 8, "out_channels": 16},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bit_equal_to_torch_at_full_width(options, autocast, train, channels_last):
    options = {"in_channels": 8, "out_channels": 12, "kernel_size": 3} | options
    ours, theirs = SlicedConv2d(**options), nn.Conv2d(**options)
    theirs.load_state_dict(ours.state_dict())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    inputs = torch.randn(2, 8, 9, 9).contiguous(memory_format=layout)
    upstream = None
    results = []
    for layer in (ours, theirs):
        layer.train(train).to(memory_format=layout)
        x = inputs.clone().requires_grad_(train)
        with backend("aten"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.set_grad_enabled(train):
                y = layer(x)
            if train:
                upstream = torch.randn_like(y) if upstream is None else upstream
                y.backward(upstream)
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad if layer.bias is not None else None))
    for ours_result, theirs_result in zip(*results, strict=True):
        if theirs_result is None:
            assert ours_result is None
            continue
        assert ours_result.dtype == theirs_result.dtype
        assert torch.equal(ours_result, theirs_result)


def test_same_initialisation_as_torch():
    torch.manual_seed(0)
    ours = SlicedConv2d(8, 16, 3)
    torch.manual_seed(0)
    theirs = nn.Conv2d(8, 16, 3)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_slice_out_divisor_ratio():
    last = SlicedConv2d(320, 1280, 1, slice_out=False)
    expansion = SlicedConv2d(24, 144, 1, ratio=6)
    fine = SlicedConv2d(8, 10, 1, divisor=2)
    for layer in (last, expansion, fine):
        set_width(layer, 0.4)
    assert last.active_out_channels == 1280
    assert expansion.active_out_channels == 6 * 16  # 9.6 rounds to 8, less than 0.9 * 9.6
    assert fine.active_out_channels == 4


def test_depthwise_follows_its_input():
    layer = SlicedConv2d(16, 16, 3, groups=16)
    set_width(layer, 0.5)
    assert layer.active_out_channels == 8
    assert layer(torch.randn(1, 8, 4, 4)).size(1) == 8
    # What x brings counts, not what the width lets expect.
    assert layer(torch.randn(1, 5, 4, 4)).size(1) == 5


def test_grouped_channels_at_a_width():
    layer = SlicedConv2d(32, 64, 1, groups=4)
    set_width(layer, 0.5)
    assert layer.active_out_channels == 32
    assert "SlicedConv2d(16/32, 32/64, kernel_size=(1, 1), stride=(1, 1), groups=4)" in repr(layer)


def test_unbatched_input():
    layer = SlicedConv2d(8, 16, 3)
    x = torch.randn(8, 5, 5)
    torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("groups", "shape", "message"),
    [
        (1, (1, 9, 4, 4), r"SlicedConv2d\(8/8, 16/16.*at most 8 channels, got 9"),
        (2, (1, 12, 4, 4), "at most 8 channels in whole groups of 4, got 12"),
        (2, (1, 6, 4, 4), "at most 8 channels in whole groups of 4, got 6"),
        (1, (8, 4), r"expects \[N, C, H, W\] or \[C, H, W\], got shape \(8, 4\)"),
    ],
)
def test_bad_input_names_what_the_layer_expects(groups, shape, message):
    layer = SlicedConv2d(8, 16, 1, groups=groups)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))
