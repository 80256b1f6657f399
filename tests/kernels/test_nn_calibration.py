"""Statistics per width: exact, kept by width, saved and loaded, and never stale."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from us3l_kernels import set_width, use_width, views
from us3l_kernels.nn import (
    SlicedBatchNorm1d,
    SlicedBatchNorm2d,
    SlicedConv2d,
    SlicedLinear,
    SwitchableBatchNorm2d,
    calibrating,
    load_statistics,
    statistics,
)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(
        SlicedConv2d(3, 16, 3),
        SlicedBatchNorm2d(16, track_running_stats=False, activation="relu"),
        nn.Flatten(),
        SlicedLinear(64, 32, divisor=1),
        SlicedBatchNorm1d(32, track_running_stats=False),
    ).to(dtype)


def batch(n: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 2 * torch.randn(n, 3, 4, 4, dtype=dtype) + 3


def calibrate(model: nn.Module, batches: list[torch.Tensor]) -> None:
    with torch.no_grad(), calibrating(model):
        for x in batches:
            model(x)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5), offset=st.floats(-100, 100))
def test_statistics_are_pooled_exactly_over_unequal_batches(sizes, offset):
    norm = SlicedBatchNorm2d(8, dtype=torch.float64).eval()
    set_width(norm, 0.5)
    batches = [
        torch.randn(n, 4, 3, 2, dtype=torch.float64) * (i + 1) + offset * i for i, n in enumerate(sizes)
    ]
    calibrate(norm, batches)
    everything = torch.cat(batches)
    var, mean = torch.var_mean(everything, (0, 2, 3), correction=0)
    got_mean, got_var = norm.calibrated["0.5"]
    torch.testing.assert_close(got_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_var, var, rtol=1e-12, atol=1e-12)
    # Evaluation is then the batch norm of all data at once.
    y = norm(batches[0])
    wanted = (batches[0] - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None]
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_pooled_in_high_precision(dtype):
    norm = SlicedBatchNorm1d(4).eval()
    batches = [torch.randn(50, 4).to(dtype) + 30 for _ in range(20)]
    calibrate(norm, batches)
    mean, var = norm.calibrated["1.0"]
    assert mean.dtype == var.dtype == torch.float32
    everything = torch.cat(batches).double()
    torch.testing.assert_close(mean.double(), everything.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), everything.var(0, correction=0), rtol=1e-5, atol=0)
    assert norm(batches[0]).dtype == dtype


def test_evaluation_equals_training_on_the_calibration_batch():
    """Of a whole network: with one batch, calibrated evaluation is the forward with batch statistics."""
    model, x = net(), batch()
    for width in (1.0, 0.5, {"": 0.5, "3": 0.25}):
        set_width(model, width)
        expected = model.train()(x)
        model.eval()
        calibrate(model, [x])
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_calibrating_normalises_with_batch_statistics_of_each_view_and_updates_nothing():
    norm = SlicedBatchNorm1d(4, dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    for training in (True, False):
        norm.train(training)
        with calibrating(norm), views(2):
            y = norm(x)
        expected = torch.cat(
            [(v - v.mean(0)) / (v.var(0, correction=0) + norm.eps).sqrt() for v in x.chunk(2)]
        )
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(norm.calibrated["1.0"][0], x.mean(0))
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()


def test_widths_are_kept_apart_and_replaced_one_by_one():
    model = net().eval()
    plan = {"": 1.0, "0": 0.5}
    with torch.no_grad(), calibrating(model):
        for width in (0.5, plan, 0.5):
            set_width(model, width)
            model(batch())
    table = statistics(model)
    assert set(table) == {"0.5", "0=0.5,*=1.0"}
    assert set(table["0.5"]) == {"1", "4"}
    assert table["0.5"]["1"][0].shape == (8,)
    set_width(model, 0.5)
    calibrate(model, [batch()])
    again = statistics(model)
    assert not torch.equal(again["0.5"]["1"][0], table["0.5"]["1"][0])
    assert torch.equal(again["0=0.5,*=1.0"]["1"][0], table["0=0.5,*=1.0"]["1"][0])
    set_width(model, 0.75)
    with pytest.raises(RuntimeError, match=r"width 0\.75"):
        model(batch())


def test_calibrated_statistics_come_before_running_ones():
    norm = SlicedBatchNorm1d(4).eval()
    x = torch.randn(8, 4)
    by_running = norm(x)
    calibrate(norm, [x])
    assert not torch.allclose(norm(x), by_running)


def test_training_forgets_statistics():
    model = net().eval()
    calibrate(model, [batch()])
    model.train()(batch())
    assert statistics(model) == {}
    with pytest.raises(RuntimeError, match="no statistics"):
        model.eval()(batch())


def test_other_weights_forget_statistics():
    model = net().eval()
    calibrate(model, [batch()])
    model.load_state_dict(net().state_dict())
    assert statistics(model) == {}


def test_training_one_width_forgets_all_private_statistics():
    norm = SwitchableBatchNorm2d(16, [1.0, 0.5])
    with torch.no_grad(), calibrating(norm):
        for width, channels in ((1.0, 16), (0.5, 8)):
            set_width(norm, width)
            norm(torch.randn(4, channels, 2, 2))
    assert set(statistics(norm)) == {"1.0", "0.5"}
    assert set(statistics(norm)["0.5"]) == {"bn.1"}
    norm(torch.randn(4, 8, 2, 2))
    assert statistics(norm) == {}


def test_an_exception_keeps_the_older_statistics():
    model = net().eval()
    calibrate(model, [batch()])
    before = statistics(model)
    with pytest.raises(KeyError), calibrating(model):
        model(batch())
        raise KeyError
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    model(batch())  # and evaluates again


def test_table_travels_beside_the_state_dict():
    model = net(torch.float32).eval()
    with use_width(model, 0.5):
        calibrate(model, [batch(dtype=torch.float32)])
    assert not any("calibrated" in key for key in model.state_dict())

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "statistics": statistics(model)}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    other = net(torch.float32).eval()
    other.load_state_dict(checkpoint["model"])
    load_statistics(other, checkpoint["statistics"])

    x = batch(dtype=torch.float32)
    with use_width(model, 0.5), use_width(other, 0.5):
        assert torch.equal(model(x), other(x))
    # A copy, not the table's own tensors.
    checkpoint["statistics"]["0.5"]["1"][0].fill_(7)
    assert not (other[1].calibrated["0.5"][0] == 7).any()


def test_statistics_follow_copies_and_conversions():
    model = net(torch.float32).eval()
    x = batch(dtype=torch.float32)
    calibrate(model, [x])
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), model(x))
    model.train()(x)
    assert statistics(clone)["1.0"].keys() == {"1", "4"}
    assert clone.double()(x.double()).dtype == torch.float64
    assert clone[1].calibrated["1.0"][0].dtype == torch.float64
    assert clone.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models(dtype, affine):
    norm = SlicedBatchNorm2d(8, affine=affine, track_running_stats=False).to(dtype).eval()
    x = torch.randn(16, 8, 4, 4).to(dtype)
    with torch.no_grad(), calibrating(norm):
        expected = norm(x)
    torch.testing.assert_close(
        norm(x), expected, rtol=0.02, atol=0.02
    )  # statistics rounded to the model's dtype
    other = SlicedBatchNorm2d(8, affine=affine, track_running_stats=False).eval()
    load_statistics(other, statistics(norm))
    assert other(x.float()).dtype == torch.float32


def test_load_statistics_refuses_what_does_not_fit_and_changes_nothing():
    model = net().eval()
    calibrate(model, [batch()])
    before = statistics(model)
    vector = torch.ones(4)
    with pytest.raises(ValueError, match=r"no such batch norm in Sequential.*'7'|'7'.*no such batch norm"):
        load_statistics(model, {"0.5": {"1": (vector, vector), "7": (vector, vector)}})
    with pytest.raises(ValueError, match=r"'1' \(width 0\.5\).*one to 16 channels"):
        load_statistics(model, {"0.5": {"1": (torch.ones(17), torch.ones(17))}})
    with pytest.raises(ValueError, match="got shapes"):
        load_statistics(model, {"0.5": {"1": (torch.ones(8), torch.ones(9))}})
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_statistics_of_other_channels_are_refused():
    norm = SlicedBatchNorm1d(8).eval()
    calibrate(norm, [torch.randn(4, 8)])
    with pytest.raises(ValueError, match=r"calibrated at width 1\.0 with 8 channels, got 4"):
        norm(torch.randn(4, 4))


def test_calibrating_errors():
    with pytest.raises(ValueError, match="Linear has none"), calibrating(nn.Linear(2, 2)):
        pass
    model = net()
    with pytest.raises(RuntimeError, match="no forward reached"), calibrating(model):
        pass
    with calibrating(model):
        with pytest.raises(RuntimeError, match="under way"), calibrating(model[1]):
            pass
        model(batch())
    assert statistics(model)["1.0"].keys() == {"1", "4"}
