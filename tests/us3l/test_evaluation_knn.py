"""The weighted vote against a plain implementation of its formula, whatever the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from us3l.evaluation import knn, knn_accuracy


def samples(n: int, seed: int, classes: int = 5, dim: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(n, dim, generator=generator), labels


def plain(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor, k: int, temperature: float) -> float:
    correct = 0
    for x, y in zip(test, test_y.tolist(), strict=True):
        cosine = torch.stack([torch.dot(x, t) / (x.norm() * t.norm()) for t in train])
        nearest = cosine.argsort(descending=True)[:k]
        votes = [
            sum(float((cosine[i] / temperature).exp()) for i in nearest if train_y[i] == label) for label in range(5)
        ]
        correct += votes.index(max(votes)) == y
    return 100 * correct / len(test)


@pytest.mark.parametrize("k", [1, 20, 60])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_equals_the_formula(k: int, temperature: float) -> None:
    train, test = samples(60, 0), samples(40, 1)
    got = knn_accuracy(*train, *test, k=k, temperature=temperature)
    assert got == pytest.approx(plain(*train, *test, k, temperature), abs=1e-9)
    assert 30 < got < 100  # neither trivial nor chance: the comparison means something


@pytest.mark.parametrize(("queries", "bank"), [(7, 11), (1, 200), (64, 3)])
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, queries: int, bank: int) -> None:
    train, test = samples(200, 2), samples(50, 3)
    whole = knn_accuracy(*train, *test)
    monkeypatch.setattr(knn, "_QUERIES", queries)
    monkeypatch.setattr(knn, "_BANK", bank)
    assert knn_accuracy(*train, *test) == whole


def test_scale_of_the_features_does_not_matter() -> None:
    train, test = samples(100, 4), samples(50, 5)
    scale = torch.rand(100, 1) * 10 + 0.1
    assert knn_accuracy(train[0] * scale, train[1], *test) == knn_accuracy(*train, *test)


def test_bad_input_is_named() -> None:
    (x, y), test = samples(30, 6), samples(10, 7)
    with pytest.raises(ValueError, match="k: expected between 1 and the 30"):
        knn_accuracy(x, y, *test, k=31)
    with pytest.raises(ValueError, match="temperature"):
        knn_accuracy(x, y, *test, temperature=0.0)
    with pytest.raises(ValueError, match="train_features"):
        knn_accuracy(x[:, :3], y, *test)
    with pytest.raises(ValueError, match="one label per feature"):
        knn_accuracy(x, y[:4], *test)
