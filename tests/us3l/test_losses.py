"""Losses against their definitions, written out row by row."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from us3l.losses import (
    CRITERIA,
    criterion,
    cross_entropy,
    cross_view,
    in_batch_contrast,
    info_nce,
    info_nce_queue,
    kl_divergence,
    mean_squared_error,
    negative_cosine,
    queue_relations,
    relational,
)


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


def _rows(*batches: torch.Tensor) -> list[list[torch.Tensor]]:
    """Rows of unit length."""
    return [[row / row.norm() for row in batch] for batch in batches]


def _softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def test_queue_contrast_by_rows() -> None:
    q, k, queue = _rows(_batch(seed=0), _batch(seed=1), _batch(7, seed=2))
    expected = 0.0
    for query, key in zip(q, k, strict=True):
        expected -= math.log(_softmax([float(query @ other) / 0.2 for other in (key, *queue)])[0]) / len(q)
    loss = info_nce_queue(_batch(seed=0), 3 * _batch(seed=1), torch.stack(queue), 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_in_batch_contrast_by_rows() -> None:
    q, k = _rows(_batch(seed=0), _batch(seed=1))
    expected = 0.0
    for i, query in enumerate(q):
        expected -= 2 * 0.2 * math.log(_softmax([float(query @ key) / 0.2 for key in k])[i]) / len(q)
    assert in_batch_contrast(_batch(seed=0), _batch(seed=1), 0.2).item() == pytest.approx(expected, rel=1e-12)


def _divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_kl_divergence_by_rows() -> None:
    p, t = _batch(seed=0), _batch(seed=1)
    rows = zip(p.tolist(), t.tolist(), strict=True)
    expected = sum(_divergence(_softmax([v / 0.1 for v in b]), _softmax([v / 0.5 for v in a])) for a, b in rows) / 6
    assert kl_divergence(p, t, (0.5, 0.1)).item() == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(p, p + 3, (0.5, 0.5)).item() == pytest.approx(0, abs=1e-15)


def test_relational_by_rows() -> None:
    p, t = _rows(_batch(seed=0), _batch(seed=1))
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        student, teacher = (
            _softmax([float(z[i] @ z[j]) / temperature for j in others]) for z, temperature in ((p, 0.5), (t, 0.1))
        )
        expected += _divergence(teacher, student) / 6
    assert relational(_batch(seed=0), 2 * _batch(seed=1), (0.5, 0.1)).item() == pytest.approx(expected, rel=1e-12)


def test_relations_survive_a_rotation_of_all_targets() -> None:
    p, t = _batch(seed=0), _batch(seed=1)
    rotation, _ = torch.linalg.qr(_batch(5, seed=2))
    loss = relational(p, t, (0.5, 0.5))
    torch.testing.assert_close(loss, relational(p, t @ rotation, (0.5, 0.5)), rtol=1e-12, atol=1e-14)


def test_queue_relations_by_rows() -> None:
    p, t, queue = _rows(_batch(seed=0), _batch(seed=1), _batch(7, seed=2))
    expected = 0.0
    for student, teacher in zip(p, t, strict=True):
        found = _softmax([float(student @ other) / 0.2 for other in (teacher, *queue)])
        wanted = _softmax([float(teacher @ other) / 0.05 for other in (teacher, *queue)])
        expected -= sum(b * math.log(a) for a, b in zip(found, wanted, strict=True)) / len(p)
    loss = queue_relations(2 * _batch(seed=0), _batch(seed=1), torch.stack(queue), (0.2, 0.05))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_simple_losses() -> None:
    p, t = _batch(seed=0), _batch(seed=1)
    assert mean_squared_error(p, t).item() == pytest.approx(((p - t) ** 2).mean().item(), rel=1e-14)
    labels = torch.tensor([0, 4, 1, 1, 2, 3])
    expected = -sum(math.log(_softmax(row)[label]) for row, label in zip(p.tolist(), labels.tolist(), strict=True)) / 6
    assert cross_entropy(p, labels).item() == pytest.approx(expected, rel=1e-12)


def test_criteria_by_name() -> None:
    p, t = _batch(seed=0), _batch(seed=1)
    values = {name: criterion(name, 0.5, 0.1)(p, t) for name in CRITERIA}
    assert values["infonce"] == info_nce(p, t, 0.5) and values["cosine"] == negative_cosine(p, t)
    assert values["mse"] == mean_squared_error(p, t)
    assert values["kl"] == kl_divergence(p, t, (0.5, 0.1)) and values["relational"] == relational(p, t, (0.5, 0.1))
    assert criterion("kl", 0.5)(p, t) == kl_divergence(p, t, (0.5, 0.5))
    with pytest.raises(ValueError, match="a loss must be one of infonce, cosine, mse, kl, relational, got 'l1'"):
        criterion("l1", 0.5)


def test_cross_view_compares_each_view_with_the_other() -> None:
    p1, p2, t1, t2 = (_batch(seed=seed) for seed in range(4))
    loss = cross_view(negative_cosine, torch.cat([p1, p2]), torch.cat([t1, t2]))
    expected = (negative_cosine(p1, t2) + negative_cosine(p2, t1)) / 2
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    a, b = _batch(seed=0, dtype=dtype), _batch(seed=1, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queue = torch.nn.functional.normalize(_batch(7, seed=2), dim=1).float()
        losses = [criterion(name, 0.1) for name in CRITERIA]
        losses += [partial(in_batch_contrast, temperature=0.1)]
        losses += [lambda a, b: info_nce_queue(a, b, queue, 0.1)]
        losses += [lambda a, b: queue_relations(a, b, queue, (0.1, 0.1))]
        for loss in losses:
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
    with pytest.raises(ValueError, match="kl_divergence: temperature must be positive, got -1"):
        kl_divergence(_batch(), _batch(), (0.1, -1))
    with pytest.raises(ValueError, match="relational: expected at least 3 samples, got 2"):
        relational(_batch(2), _batch(2), (0.1, 0.1))
    with pytest.raises(ValueError, match="two views of equal size, got 5 rows"):
        cross_view(negative_cosine, _batch(5), _batch(5))
