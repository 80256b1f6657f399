"""Batch norm and layer norm in Triton, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from us3l_kernels import functional, reference
from us3l_kernels.backends import backend
from us3l_kernels.triton import Norm, batch_norm, reductions

CANARY = 3.0
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # largest error over largest value
CASES = {
    # name: (shape, views, activation, residual)
    "plain": ((2, 40, 9, 7), 1, None, False),
    "relu": ((4, 8, 5, 6), 2, "relu", False),
    "relu6, residual": ((4, 24, 5, 5), 2, "relu6", True),
    "odd channels": ((6, 7, 3, 5), 3, "relu6", False),
    "residual alone": ((3, 13, 4, 4), 1, None, True),
    "vectors": ((9, 17), 3, "relu", True),
    "one channel": ((4, 1, 2, 3), 1, "relu", False),
    "more channels than a block": ((4, 72, 2, 1), 2, "relu", False),
}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def surrounded(x: Tensor, channels: int) -> Tensor:
    """x [N, c, ...] as a prefix of wider rows, with NaN between them, before and behind."""
    memory = x.new_full((x.numel() // x.size(1) + 2, channels), torch.nan)
    rows = memory[1:-1, : x.size(1)].unflatten(0, (x.size(0), *x.shape[2:])).movedim(-1, 1)
    return rows.copy_(x)


def full(active: Tensor) -> Tensor:
    """A vector with five more elements, which are NaN."""
    return torch.cat([active, active.new_full((5,), torch.nan)])


def wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_added(gradient: Tensor, expected: Tensor, tolerance: float) -> None:
    """To the prefix, and to nothing else."""
    c = expected.numel()
    assert_close(gradient[:c] - CANARY, expected, 4 * tolerance)  # the canary costs a rounding
    assert torch.equal(gradient[c:], torch.full_like(gradient[c:], CANARY))


def check_batch_norm(case: str, dtype: torch.dtype, training: bool, affine: bool = True, offset: float = 0.0) -> None:
    shape, views, activation, fused = CASES[case]
    c, views, tolerance = shape[1], views if training else 1, TOLERANCE[dtype]
    wider = -(-c // 8) * 8 + 8
    x, grad = (surrounded(random(*shape, dtype=dtype) + shift, wider) for shift in (offset, 0.0))
    residual = surrounded(random(*shape, dtype=dtype), wider) if fused else None
    weight, bias = (full(random(c, dtype=torch.float32)) if affine else None for _ in range(2))
    running = full(random(c, dtype=torch.float32)), full(random(c, dtype=torch.float32).abs() + 0.5)
    expected_running = tuple(t.double() for t in running)
    options = {"training": training, "momentum": 0.1, "eps": 1e-5, "views": views, "activation": activation}

    arguments = [wide(t) for t in (x, weight, bias)]
    expected, mean_d, rstd_d = reference.batch_norm(*arguments, *expected_running, wide(residual), **options)
    outputs = torch.ops.us3l.batch_norm(
        x, weight, bias, *running, residual, *options.values(), "triton"
    )
    for got, wanted, t in zip(outputs, (expected, mean_d, rstd_d), (tolerance, 1e-5, 1e-5), strict=True):
        assert_close(got, wanted, t)
    for got, wanted in zip(running, expected_running, strict=True):
        assert_close(got[:c], wanted[:c], 1e-5)
        assert got[c:].isnan().all()

    y, mean, rstd = outputs
    gw, gb = (torch.full((c + 5,), CANARY) for _ in range(2))
    gwd, gbd = (torch.zeros(c + 5, dtype=torch.float64) for _ in range(2))
    dx, dresidual = torch.ops.us3l.batch_norm_backward(
        grad, x, y, weight, None if fused else bias, mean, rstd, gw, gb,
        True, fused and activation is not None, training, views, activation, "triton",
    )  # fmt: skip
    # The gradient passes where our output does: a value within rounding of a kink has no one answer.
    dx_d, dresidual_d = reference.batch_norm_backward(
        grad.double(), x.double(), y.double(), wide(weight), None, mean_d, rstd_d, gwd, gbd,
        True, True, training, views, activation,
    )  # fmt: skip
    assert_close(dx, dx_d, tolerance)
    assert_added(gw, gwd[:c], tolerance)
    assert_added(gb, gbd[:c], tolerance)
    if dresidual.numel():
        assert_close(dresidual, dresidual_d, 0.0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES)
def test_batch_norm(case, training):
    check_batch_norm(case, torch.float16 if training else torch.float32, training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_norm_without_parameters(dtype):
    check_batch_norm("relu", dtype, training=True, affine=False)


@pytest.mark.parametrize("case", CASES)
def test_batch_norm_backward_with_known_sums(case, monkeypatch):
    """In many chunks, as a convolution gives them: as if it had taken them itself."""
    monkeypatch.setattr(reductions, "CHUNKS", 2)
    monkeypatch.setattr(reductions, "STAGE2_OF_TILES", {"BLOCK_CHUNKS": 2, "BLOCK_C": 8})
    shape, views, activation, residual = CASES[case]
    c = shape[1]
    x, y, grad = (random(*shape, dtype=torch.float32) * 3 for _ in range(3))
    weight, bias, mean, rstd = (random(*size, dtype=torch.float32) for size in ((c,), (c,), (views, c), (views, c)))
    norm = Norm(x, y if residual else None, weight, bias, mean, rstd, activation)
    needs = (True, residual and activation is not None, True)
    gradients = [torch.zeros(c) for _ in range(4)]
    taken = []
    add_sums = batch_norm.add_sums
    monkeypatch.setattr(batch_norm, "add_sums", lambda sums, *rest: (taken.append(sums), add_sums(sums, *rest)))
    dx, dresidual = batch_norm.backward(grad, norm, *gradients[:2], *needs)
    sums = taken[0].sum(1, keepdim=True)
    parts = torch.rand(views, 5, *sums.shape[2:])
    monkeypatch.delattr(batch_norm, "sums_kernel")
    again, dresidual_again = batch_norm.backward(grad, norm, *gradients[2:], *needs, sums * parts / parts.sum(1, True))
    for got, wanted in zip((again, *gradients[2:]), (dx, *gradients[:2]), strict=True):
        assert_close(got, wanted.double(), TOLERANCE[torch.float32])
    assert dresidual is dresidual_again or torch.equal(dresidual, dresidual_again)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_batch_norm_dtypes(case, dtype):
    for training in (True, False):
        check_batch_norm(case, dtype, training)


def test_batch_norm_in_many_chunks(monkeypatch):
    """Several tiles in a chunk, several chunks in a view, several blocks of chunks in the second stage."""
    small = {"BLOCK_CHUNKS": 2, "BLOCK_C": 8}
    monkeypatch.setattr(batch_norm, "STATISTICS", small)
    monkeypatch.setattr(reductions, "STAGE2", small)
    monkeypatch.setattr(batch_norm, "_elements", lambda vector, itemsize: {8: 64 * 4, 1: 16 * 4}[vector])
    monkeypatch.setattr(batch_norm, "CHUNKS", 6)
    check_batch_norm("relu", torch.float32, training=True)
    check_batch_norm("plain", torch.float32, training=True)


@pytest.mark.parametrize("case", ["plain", "odd channels"])
def test_statistics_survive_a_large_mean(case):
    shape, views, *_ = CASES[case]
    x = surrounded(random(*shape, dtype=torch.float32) + 3000, 48)
    _, mean, rstd = torch.ops.us3l.batch_norm(
        x, None, None, None, None, None, True, 0.1, 1e-5, views, None, "triton"
    )
    by_view = x.double().unflatten(0, (views, -1)).transpose(1, 2).flatten(2)
    assert_close(mean, by_view.mean(2), 1e-6)
    assert_close(rstd, (by_view.var(2, unbiased=False) + 1e-5).rsqrt(), 1e-4)


def test_batch_norm_gives_what_is_asked_for():
    """dX or the parameters' gradients alone; gradients with strides of their own."""
    x = random(4, 8, 3, 3, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(8), torch.rand(8)
    for needs in ((True, False), (False, True)):
        inputs = [t.clone().requires_grad_(need) for t, need in ((x, needs[0]), (weight, needs[1]), (bias, needs[1]))]
        wanted = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        grad = random(4, 8, 1, 1, dtype=torch.float32).expand(4, 8, 3, 3)
        with backend("triton"):
            functional.batch_norm(*inputs, training=True, activation="relu").backward(grad)
        functional.batch_norm(*wanted, training=True, activation="relu").backward(grad.double())
        for got, expected in zip(inputs, wanted, strict=True):
            if expected.grad is None:
                assert got.grad is None
            else:
                assert_close(got.grad, expected.grad, 1e-5)


def test_evaluation_of_no_samples():
    with backend("triton"):
        y = functional.batch_norm(torch.empty(0, 8), None, None, torch.zeros(8), torch.ones(8), training=False)
    assert y.shape == (0, 8)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "shape,dtype",
    [
        ((5, 7), torch.float32),
        ((2, 33, 16), torch.float16),
        ((9,), torch.float32),
        ((3, 5, 192), torch.bfloat16),
        ((2, 520), torch.float16),
        pytest.param((2, 5000), torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layer_norm(shape, dtype, affine):
    c, tolerance = shape[-1], TOLERANCE[dtype]
    x, grad = (surrounded(random(*shape, dtype=dtype).movedim(-1, 1), c + 8).movedim(1, -1) if len(shape) > 1
               else random(*shape, dtype=dtype) for _ in range(2))  # fmt: skip
    weight, bias = (full(random(c, dtype=torch.float32)) if affine else None for _ in range(2))
    expected, mean_d, rstd_d = reference.layer_norm(*(wide(t) for t in (x, weight, bias)), 1e-5)
    y, mean, rstd = torch.ops.us3l.layer_norm(x, weight, bias, 1e-5, "triton")
    for got, wanted, t in ((y, expected, tolerance), (mean, mean_d, 1e-5), (rstd, rstd_d, 1e-5)):
        assert_close(got, wanted, t)
    gw, gb = (torch.full((c + 5,), CANARY) for _ in range(2))
    gwd, gbd = (torch.zeros(c + 5, dtype=torch.float64) for _ in range(2))
    dx = torch.ops.us3l.layer_norm_backward(grad, x, weight, mean, rstd, gw, gb, True, "triton")
    dx_d = reference.layer_norm_backward(
        grad.double(), x.double(), wide(weight), mean_d, rstd_d, gwd, gbd, True
    )
    assert_close(dx, dx_d, tolerance)
    assert_added(gw, gwd[:c], tolerance)
    assert_added(gb, gbd[:c], tolerance)


def test_what_they_do_not_take():
    vector = torch.ones(9000)
    with backend("triton"):
        with pytest.raises(RuntimeError, match="rows of contiguous channels"):
            functional.batch_norm(torch.randn(2, 8, 3, 3), vector, vector, training=True)
        with pytest.raises(RuntimeError, match="at most 8192 channels"):
            functional.layer_norm(torch.randn(2, 9000), vector, vector)
