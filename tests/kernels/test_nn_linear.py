"""SlicedLinear and SlicedLayerNorm against torch.nn with hand-sliced weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from us3l_kernels import backend, set_width
from us3l_kernels.nn import SlicedLayerNorm, SlicedLinear


@settings(max_examples=40, deadline=None)
@given(
    full_in=st.integers(1, 20),
    full_out=st.integers(1, 20),
    width=st.floats(0.1, 1.0),
    lead=st.sampled_from([(), (3,), (2, 3)]),
    bias=st.booleans(),
    slice_out=st.booleans(),
    data=st.data(),
)
def test_linear_against_hand_sliced_weights(full_in, full_out, width, lead, bias, slice_out, data):
    layer = SlicedLinear(full_in, full_out, bias, slice_out=slice_out, divisor=1, dtype=torch.float64)
    set_width(layer, width)
    c, k = data.draw(st.integers(1, full_in)), layer.active_out_features
    assert slice_out or k == full_out
    with torch.no_grad():
        layer.weight[k:] = torch.nan
        layer.weight[:, c:] = torch.nan
        if bias:
            layer.bias[k:] = torch.nan
    x = torch.randn(*lead, c, dtype=torch.float64, requires_grad=True)
    weight = layer.weight[:k, :c].detach().requires_grad_()
    offset = layer.bias[:k].detach().requires_grad_() if bias else None

    y, expected = layer(x), F.linear(x, weight, offset)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(y)
    y.backward(upstream)
    dx, x.grad = x.grad, None
    expected.backward(upstream)
    torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=1e-12)
    wanted = torch.zeros_like(layer.weight)
    wanted[:k, :c] = weight.grad
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-12, atol=1e-12)
    if offset is not None:
        torch.testing.assert_close(layer.bias.grad[:k], offset.grad, rtol=1e-12, atol=1e-12)
        assert not layer.bias.grad[k:].any()


@settings(max_examples=40, deadline=None)
@given(
    full=st.integers(2, 20),
    lead=st.sampled_from([(), (3,), (2, 3)]),
    affine=st.sampled_from([(True, True), (True, False), (False, False)]),
    data=st.data(),
)
def test_layer_norm_against_hand_sliced_weights(full, lead, affine, data):
    layer = SlicedLayerNorm(full, 1e-3, *affine, dtype=torch.float64)
    c = data.draw(st.integers(2, full))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
        parameter.data[c:] = torch.nan
    x = torch.randn(*lead, c, dtype=torch.float64, requires_grad=True)
    sliced = [p[:c] if p is not None else None for p in (layer.weight, layer.bias)]

    y, expected = layer(x), F.layer_norm(x, (c,), *sliced, eps=1e-3)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)

    upstream = torch.randn_like(y)
    inputs = (x, *layer.parameters())
    got = torch.autograd.grad(y, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SlicedLinear(24, 40), nn.Linear(24, 40)),
        (SlicedLinear(24, 40, bias=False), nn.Linear(24, 40, bias=False)),
        (SlicedLayerNorm(24), nn.LayerNorm(24)),
        (SlicedLayerNorm(24, elementwise_affine=False), nn.LayerNorm(24, elementwise_affine=False)),
    ],
    ids=["linear", "linear-no-bias", "layer_norm", "layer_norm-no-affine"],
)
def test_bit_equal_to_torch_at_full_width(ours, theirs, train, autocast):
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(4, 5, 24)
    upstream = None
    results = []
    for layer in (ours.train(train), theirs.train(train)):
        layer.zero_grad()
        x = inputs.clone().requires_grad_(train)
        with backend("aten"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.set_grad_enabled(train):
                y = layer(x)
            if train:
                upstream = torch.randn_like(y) if upstream is None else upstream
                y.backward(upstream)
        results.append([y, *([x.grad, *(p.grad for p in layer.parameters())] if train else [])])
    for ours_result, theirs_result in zip(*results, strict=True):
        assert ours_result.dtype == theirs_result.dtype
        assert torch.equal(ours_result, theirs_result)


def test_bad_input_names_what_the_layer_expects():
    with pytest.raises(ValueError, match=r"SlicedLinear\(8/8, 16/16.*at most 8 features.*got 9"):
        SlicedLinear(8, 16)(torch.randn(2, 9))
    with pytest.raises(ValueError, match=r"SlicedLayerNorm\(\(8,\).*at most 8 channels.*got 9"):
        SlicedLayerNorm(8)(torch.randn(2, 9))
    with pytest.raises(TypeError, match="normalized_shape: expected an int"):
        SlicedLayerNorm((8, 8))
