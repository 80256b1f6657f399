"""The backend `triton` where there may be no GPU: what it declines and why, and its place among measured choices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from us3l_kernels import backend, doctor, functional, triton
from us3l_kernels.backends import BACKENDS, BackendError, measured
from us3l_kernels.backends import triton as of_triton
from us3l_kernels.backends.measured import Measurement

TRITON = BACKENDS["triton"]
GEOMETRY = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}


def images(channels: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(2, channels, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    found = {finding.subject: finding for finding in doctor.report()}["backend triton"]
    assert not found.ok and "no GPU" in found.detail and "TRITON_INTERPRET=1" in found.detail
    with backend("conv2d=triton"), pytest.raises(BackendError, match="no GPU"):
        functional.conv2d(torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 3, 3))


def test_it_declines_tensors_that_are_not_on_a_gpu():
    reason = TRITON.why_not("conv2d", images(8), torch.empty(8, 8, 3, 3), out_channels=8, **GEOMETRY)
    assert reason == "it takes cuda tensors, x is on cpu"


@pytest.mark.parametrize("op,parameter", [("conv2d", (8, 8, 3, 3)), ("batch_norm", (8,))])
def test_it_declines_gpus_that_triton_does_not_take(op, parameter, monkeypatch):
    call = {**GEOMETRY, "out_channels": 8} if op == "conv2d" else {"training": True, "views": 1}
    monkeypatch.setattr(triton, "DEVICE", "cpu")
    monkeypatch.setattr(triton, "_gpu", lambda index: triton.Gpu(75, 40, 64 << 10))
    assert "8.0 and later" in TRITON.why_not(op, images(8), torch.empty(parameter), **call)
    monkeypatch.setattr(triton, "_gpu", lambda index: triton.Gpu(80, 108, 163 << 10))
    assert TRITON.why_not(op, images(8), torch.empty(parameter), **call) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_triton_cannot_launch_it_is_unavailable(monkeypatch):
    """As on a machine without a C compiler, which Triton before 3.9 needs: `auto` then goes on to the next backend."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(of_triton, "_why_no_driver", of_triton._why_no_driver.__wrapped__)  # the cached one remembers
    assert TRITON.unavailable().startswith("Triton's driver does not load: ")


@pytest.mark.parametrize(
    "x,kernel,out,change,reason",
    [
        (images(64), 3, 64, {}, None),
        (images(128), 3, 128, {}, None),
        (images(512), 1, 2048, {"padding": [0, 0]}, None),
        (images(128), 3, 136, {}, "up to 128 channels, there are 136"),
        (images(64), 3, 64, {"stride": [2, 2]}, "stride 1"),
        (images(64), 3, 64, {"dilation": [2, 2]}, "stride 1"),
        (images(8), 7, 64, {}, "1x1 and 3x3"),
        (images(60), 3, 64, {}, "multiples of 8"),
        (images(64).contiguous(), 3, 64, {}, "copied to channels_last"),
        (images(64, torch.float32), 3, 64, {}, "half precision"),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else str(value),
)
def test_auto_takes_it_where_it_is_predicted_to_pay(x, kernel, out, change, reason):
    weight = torch.empty(2048, 512, kernel, kernel)
    said = TRITON.why_slower("conv2d", x, weight, out_channels=out, **{**GEOMETRY, **change})
    assert said is None if reason is None else reason in said


def test_linear_is_left_to_cublas():
    assert "cuBLAS" in TRITON.why_slower("linear", torch.empty(4, 8), torch.empty(8, 8))


@pytest.mark.parametrize(
    "x,reason",
    [
        (images(24), None),
        (images(24, torch.float32)[:, :16], None),
        (images(24)[:, :20], "multiples of 8, there are 20"),
        (images(24).contiguous(), "copied to channels_last"),
    ],
    ids=["dense", "prefix", "odd", "contiguous"],
)
def test_auto_takes_batch_norms_and_depthwise_convolutions_of_whole_vectors(x, reason):
    batch_norm = TRITON.why_slower("batch_norm", x, torch.empty(24), training=True, views=1)
    depthwise = {**GEOMETRY, "groups": 24, "stride": [2, 2], "out_channels": x.size(1)}
    for said in (batch_norm, TRITON.why_slower("conv2d", x, torch.empty(24, 1, 5, 5), **depthwise)):
        assert said is None if reason is None else reason in said


def test_layer_norm_is_left_to_aten():
    assert "reads x once" in TRITON.why_slower("layer_norm", torch.empty(4, 8), None)


def test_measured_choices_are_for_one_gpu_and_these_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("US3L_TUNE_CACHE", str(tmp_path / "tune.json"))
    monkeypatch.setattr(measured, "_tables", {})
    gpu = "NVIDIA H100"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(measured, "machine", measured.machine.__wrapped__)  # the cached one remembers
    machine = measured.machine("cuda")
    assert machine["hardware"] == gpu and "triton" in machine and "triton" not in measured.machine("cpu")

    call = ("conv2d", "cuda", *measured.describe("conv2d", images(64), torch.empty(64, 64, 3, 3), GEOMETRY)[2:])
    measured.save("cuda", [Measurement(call, 0, {"triton": 1.0, "aten": 0.9}, {"triton": 1.0, "aten": 3.0})])
    assert measured.look_up(call, False, False) == ("aten", "measured: triton takes 1.11x as long")
    assert measured.look_up(call, True, True) == ("triton", "measured: aten takes 3.00x as long")
    gpu = "NVIDIA A100"
    assert measured.load("cuda").measurements == {}
    monkeypatch.setattr(measured, "_triton", lambda: "another")
    gpu = "NVIDIA H100"
    assert measured.load("cuda").measurements == {}
