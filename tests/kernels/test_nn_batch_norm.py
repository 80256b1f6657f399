"""Sliced and switchable batch norms against torch.nn."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from us3l_kernels import backend, set_width, use_width, views
from us3l_kernels.nn import SlicedBatchNorm1d, SlicedBatchNorm2d, SwitchableBatchNorm2d

ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}


def randomise(norm: nn.Module) -> None:
    for name, tensor in norm.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_()


def shape_of(kind: type, channels: int, samples: int) -> tuple[int, ...]:
    return {SlicedBatchNorm1d: (samples, channels), SlicedBatchNorm2d: (samples, channels, 3, 2)}[kind]


def by_hand(norm, x, residual, n_views):
    """torch.nn.functional on slices, one forward per view."""
    c = x.size(1)
    weight, bias = (p[:c] if p is not None else None for p in (norm.weight, norm.bias))
    y = torch.cat([F.batch_norm(v, None, None, weight, bias, True, eps=norm.eps) for v in x.chunk(n_views)])
    return ACTIVATIONS[norm.activation](y if residual is None else y + residual)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from([SlicedBatchNorm1d, SlicedBatchNorm2d]),
    full=st.integers(1, 12),
    n_views=st.integers(1, 3),
    activation=st.sampled_from(list(ACTIVATIONS)),
    affine=st.booleans(),
    with_residual=st.booleans(),
    data=st.data(),
)
def test_training_against_slices(kind, full, n_views, activation, affine, with_residual, data):
    norm = kind(full, 1e-3, affine=affine, activation=activation, dtype=torch.float64)
    randomise(norm)
    c = data.draw(st.integers(1, full))
    set_width(norm, 0.5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter[c:] = torch.nan
    shape = shape_of(kind, c, 4 * n_views)
    x = (3 * torch.randn(shape, dtype=torch.float64) + 5).requires_grad_()
    residual = torch.randn(shape, dtype=torch.float64, requires_grad=True) if with_residual else None

    with views(n_views):
        y = norm(x, residual)
    expected = by_hand(norm, x, residual, n_views)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)

    upstream = torch.randn_like(y)
    inputs = [x, *norm.parameters(), *([residual] if with_residual else [])]
    got = torch.autograd.grad(y, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("track", [True, False], ids=["track", "batch"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(
    ("kind", "namesake", "shape"),
    [
        (SlicedBatchNorm1d, nn.BatchNorm1d, (6, 12)),
        (SlicedBatchNorm1d, nn.BatchNorm1d, (6, 12, 5)),
        (SlicedBatchNorm2d, nn.BatchNorm2d, (6, 12, 5, 4)),
    ],
)
def test_bit_equal_to_torch_at_full_width(kind, namesake, shape, autocast, track, affine, momentum):
    ours = kind(12, momentum=momentum, affine=affine, track_running_stats=track)
    theirs = namesake(12, momentum=momentum, affine=affine, track_running_stats=track)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    dtype = torch.bfloat16 if autocast else torch.float32
    batches = [torch.randn(shape).to(dtype) for _ in range(3)]
    upstream = torch.randn(shape).to(dtype)
    results = []
    for norm in (ours, theirs):
        outputs = []
        with backend("aten"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for batch in batches:
                x = batch.clone().requires_grad_()
                norm.zero_grad()
                y = norm.train()(x)
                y.backward(upstream)
                outputs += [y, x.grad, *(p.grad for p in norm.parameters())]
            if track:
                outputs.append(norm.eval()(batches[0]))
        results.append(outputs + list(norm.buffers()))
    for ours_result, theirs_result in zip(*results, strict=True):
        assert ours_result.dtype == theirs_result.dtype
        assert torch.equal(ours_result, theirs_result)


@pytest.mark.parametrize("momentum", [0.3, None], ids=str)
@pytest.mark.parametrize("n_views", [1, 2, 3])
@pytest.mark.parametrize("kind", [SlicedBatchNorm1d, SlicedBatchNorm2d])
def test_running_statistics_are_those_of_forwards_in_the_order_of_the_views(kind, n_views, momentum):
    ours = kind(5, momentum=momentum, activation="relu", dtype=torch.float64)
    randomise(ours)
    theirs = copy.deepcopy(ours)
    for _ in range(3):
        x = torch.randn(shape_of(kind, 5, 4 * n_views), dtype=torch.float64)
        residual = torch.randn_like(x)
        with views(n_views):
            y = ours(x, residual)
        parts = zip(x.chunk(n_views), residual.chunk(n_views), strict=True)
        torch.testing.assert_close(y, torch.cat([theirs(*part) for part in parts]))
    assert ours.num_batches_tracked == 3 * n_views
    torch.testing.assert_close(
        dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-12, atol=1e-12
    )
    reference = nn.BatchNorm1d(5, momentum=momentum)
    assert ours.state_dict().keys() == reference.state_dict().keys()


def test_running_statistics_are_of_the_full_width_only():
    norm = SlicedBatchNorm2d(16)
    before = copy.deepcopy(norm.state_dict())
    with use_width(norm, 0.5):
        norm(torch.randn(4, 8, 2, 2))
        # The network is narrow: other activations, though this norm is as wide as ever (an unsliced layer's).
        norm(torch.randn(4, 16, 2, 2))
    norm(torch.randn(4, 8, 2, 2))  # less than all of its channels
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())
    norm(torch.randn(4, 16, 2, 2))
    assert not torch.equal(before["running_mean"], norm.running_mean)
    assert norm.num_batches_tracked == 1


def test_evaluation_without_statistics_raises():
    norm = SlicedBatchNorm2d(16).eval()
    norm(torch.randn(1, 16, 2, 2))
    with use_width(norm, 0.5):
        with pytest.raises(
            RuntimeError, match=r"SlicedBatchNorm2d\(16.*8 channels at width 0\.5.*calibrating"
        ):
            norm(torch.randn(1, 8, 2, 2))
        with pytest.raises(RuntimeError, match=r"16 channels at width 0\.5"):
            norm(torch.randn(1, 16, 2, 2))
    with pytest.raises(RuntimeError, match=r"8 channels at width 1\.0"):
        norm(torch.randn(1, 8, 2, 2))
    with pytest.raises(RuntimeError, match="no statistics"):
        SlicedBatchNorm2d(16, track_running_stats=False).eval()(torch.randn(1, 16, 2, 2))


def test_views_play_no_part_in_evaluation():
    norm = SlicedBatchNorm1d(4).eval()
    randomise(norm)
    x = torch.randn(3, 4)
    with views(2):
        assert torch.equal(norm(x), norm(x))


def test_bad_input():
    norm = SlicedBatchNorm2d(8)
    with pytest.raises(ValueError, match=r"SlicedBatchNorm2d\(8.*at most 8 channels.*got 9"):
        norm(torch.randn(2, 9, 2, 2))
    with pytest.raises(ValueError, match="4D"):
        norm(torch.randn(2, 8))
    with pytest.raises(ValueError, match="2D or 3D"):
        SlicedBatchNorm1d(8)(torch.randn(2, 8, 2, 2))
    with pytest.raises(ValueError, match="activation: expected one of"):
        SlicedBatchNorm2d(8, activation="gelu")
    for momentum in (0.1, None):
        with views(3), pytest.raises(ValueError, match="views"):
            SlicedBatchNorm2d(8, momentum=momentum)(torch.randn(4, 8, 2, 2))


def test_repr():
    norm = SlicedBatchNorm2d(8, activation="relu", sync=True)
    set_width(norm, 0.25)
    assert repr(norm).endswith("activation=relu, sync=True, width=0.25)")


# ------------------------------------------------------------------------------------------- switchable


def test_switchable_keeps_a_norm_for_each_width():
    norm = SwitchableBatchNorm2d(32, [0.25, 0.5, 1.0], 1e-3, 0.3, activation="relu")
    randomise(norm)
    assert [private.num_features for private in norm.bn] == [8, 16, 32]
    assert norm.state_dict().keys() >= {"bn.0.weight", "bn.2.bias", "bn.1.running_mean"}
    for index, width in enumerate(norm.widths):
        reference = nn.BatchNorm2d(norm.bn[index].num_features, 1e-3, 0.3)
        reference.load_state_dict(norm.bn[index].state_dict())
        others = copy.deepcopy([p.state_dict() for i, p in enumerate(norm.bn) if i != index])
        set_width(norm, width)
        x = torch.randn(4, reference.num_features, 3, 3)
        residual = torch.randn_like(x)
        with backend("aten"):
            torch.testing.assert_close(norm.train()(x, residual), F.relu(reference.train()(x) + residual))
            torch.testing.assert_close(norm.bn[index].state_dict(), reference.state_dict())
            # Each width has running statistics: no calibration is needed.
            torch.testing.assert_close(norm.eval()(x), F.relu(reference.eval()(x)))
        after = [p.state_dict() for i, p in enumerate(norm.bn) if i != index]
        torch.testing.assert_close(after, others, rtol=0, atol=0)


def test_switchable_views():
    norm = SwitchableBatchNorm2d(16, [0.5, 1.0])
    x = torch.randn(6, 8, 2, 2)
    set_width(norm, 0.5)
    with views(2):
        y = norm(x)
    torch.testing.assert_close(y, torch.cat([F.batch_norm(v, None, None, training=True) for v in x.chunk(2)]))


def test_switchable_starts_at_its_largest_width():
    norm = SwitchableBatchNorm2d(32, [0.25, 0.5])
    assert norm(torch.randn(2, 16, 2, 2)).size(1) == 16
    with use_width(norm, 0.25):
        assert norm(torch.randn(2, 8, 2, 2)).size(1) == 8
    assert norm.active_width == 0.5
    assert "32, widths=[0.25, 0.5], width=0.5" in repr(norm)


def test_switchable_errors():
    norm = SwitchableBatchNorm2d(32, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"offers \[1\.0, 0\.5\], got 0\.75"):
        set_width(norm, 0.75)
    with pytest.raises(ValueError, match=r"expects 32 channels, got 16"):
        norm(torch.randn(2, 16, 2, 2))
    with pytest.raises(ValueError, match="4D"):
        norm(torch.randn(2, 16))
    with pytest.raises(ValueError, match="different widths"):
        SwitchableBatchNorm2d(32, [1.0, 1])
    with pytest.raises(ValueError, match="different widths"):
        SwitchableBatchNorm2d(32, [])
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        SwitchableBatchNorm2d(32, [1.0, 1.5])


def test_switchable_running_statistics_are_not_those_of_a_plan():
    model = nn.ModuleDict({"a": SwitchableBatchNorm2d(16, [1.0, 0.5])})
    set_width(model, {"": 1.0, "a": 0.5})
    x = torch.randn(2, 8, 2, 2)
    model["a"](x)
    assert model["a"].bn[1].num_batches_tracked == 0
    with pytest.raises(RuntimeError, match=r"at width a=0\.5,\*=1\.0"):
        model["a"].eval()(x)
