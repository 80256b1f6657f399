"""Losses against their definitions, written out row by row."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from us3l.losses import cross_view, info_nce, negative_cosine


def _batch(n: int = 6, d: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _nt_xent_by_rows(a: torch.Tensor, b: torch.Tensor, temperature: float) -> float:
    rows = [row / row.norm() for row in torch.cat([a, b])]
    n = len(a)
    total = 0.0
    for i, row in enumerate(rows):
        similar = {j: math.exp(float(row @ other) / temperature) for j, other in enumerate(rows) if j != i}
        total -= math.log(similar[(i + n) % (2 * n)] / sum(similar.values()))
    return total / (2 * n)


def test_negative_cosine_is_minus_the_mean_cosine() -> None:
    p, z = _batch(seed=0), _batch(seed=1)
    expected = -sum(float(a @ b) / float(a.norm() * b.norm()) for a, b in zip(p, z, strict=True)) / len(p)
    assert negative_cosine(p, z).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_info_nce_is_nt_xent(temperature: float) -> None:
    a, b = _batch(seed=0), _batch(seed=1)
    assert info_nce(a, b, temperature).item() == pytest.approx(_nt_xent_by_rows(a, b, temperature), rel=1e-12)


def test_info_nce_is_symmetric_and_ignores_lengths() -> None:
    a, b = _batch(seed=0), _batch(seed=1)
    torch.testing.assert_close(info_nce(a, b, 0.5), info_nce(3 * b, 0.1 * a, 0.5), rtol=1e-12, atol=0)


def test_gradients_are_those_of_the_paper() -> None:
    p, t = _batch(seed=0)[:1].requires_grad_(), _batch(seed=1)[:1]
    (gradient,) = torch.autograd.grad(negative_cosine(p, t), p)
    unit, target = p / p.norm(), t / t.norm()
    expected = -(target - (unit @ target.T) * unit) / p.norm()  # -(I - p^ p^T) t^ / |p|
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(
        partial(info_nce, temperature=0.5), (_batch(3, 4).requires_grad_(), _batch(3, 4, 1).requires_grad_())
    )


def test_cross_view_compares_each_view_with_the_other() -> None:
    p1, p2, t1, t2 = (_batch(seed=seed) for seed in range(4))
    loss = cross_view(negative_cosine, torch.cat([p1, p2]), torch.cat([t1, t2]))
    expected = (negative_cosine(p1, t2) + negative_cosine(p2, t1)) / 2
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    a, b = _batch(seed=0, dtype=dtype), _batch(seed=1, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (negative_cosine, partial(info_nce, temperature=0.1)):
            torch.testing.assert_close(loss(a, b), loss(a.float(), b.float()), rtol=0, atol=0)
            assert loss(a, b).dtype == torch.float32
            assert loss(a.double(), b.double()).dtype == torch.float64
            exact = loss(a.double(), b.double()).item()
            assert loss(a, b).item() == pytest.approx(exact, rel=1e-5)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"info_nce.*\(6, 5\) and \(5, 5\)"):
        info_nce(_batch(6), _batch(5), 0.5)
    with pytest.raises(ValueError, match=r"negative_cosine.*\[N, D\]"):
        negative_cosine(_batch()[0], _batch()[0])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        info_nce(_batch(), _batch(), 0)
    with pytest.raises(ValueError, match="two views of equal size, got 5 rows"):
        cross_view(negative_cosine, _batch(5), _batch(5))
