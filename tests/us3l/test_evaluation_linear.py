"""The L-BFGS probe against its objective, the SGD probe against arithmetic and on separable data."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from us3l.errors import DataError, TrainingError
from us3l.evaluation import (
    CIFAR_PROTOCOL,
    IMAGENET_PROTOCOL,
    SGDProtocol,
    linear,
    linear_probe,
    linear_probe_sgd,
)
from us3l_kernels.nn import SlicedLinear


def blobs(n: int, seed: int, noise: float, classes: int = 4, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, dim, generator=generator), labels


def by_gradient_descent(train: Tensor, y: Tensor, test: Tensor, test_y: Tensor, l2: float) -> float:
    """The documented objective, minimised by torch's own L-BFGS in float64."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = ((x.double() - mean) / std for x in (train, test))
    weight = torch.zeros(train.shape[1], 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, y) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return 100 * float(((test @ weight + bias).argmax(1) == test_y).double().mean())


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_lbfgs_probe_minimises_its_objective(l2: float) -> None:
    train, test = blobs(300, 0, noise=1.5), blobs(1000, 1, noise=1.5)
    scale = torch.logspace(-2, 2, 6)  # standardisation has something to do
    train, test = (train[0] * scale + 5, train[1]), (test[0] * scale + 5, test[1])
    got = linear_probe(*train, *test, l2=l2)
    assert got == pytest.approx(by_gradient_descent(*train, *test, l2), abs=0.11)
    assert 40 < got < 95


def test_lbfgs_probe_is_deterministic_and_takes_constant_features() -> None:
    (x, y), (t, ty) = blobs(200, 2, 1.0), blobs(200, 3, 1.0)
    x, t = F.pad(x, (0, 1)), F.pad(t, (0, 1))  # a dead channel: zero deviation
    assert linear_probe(x, y, t, ty) == linear_probe(x, y, t, ty) > 50


def test_schedules() -> None:
    assert [CIFAR_PROTOCOL.learning_rate(epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx(
        [30, 30, 3, 3, 0.3, 0.3]
    )
    assert IMAGENET_PROTOCOL.learning_rate(0) == 0.8
    assert IMAGENET_PROTOCOL.learning_rate(30) == pytest.approx(0.4)
    assert 0 < IMAGENET_PROTOCOL.learning_rate(59) < 0.01


def test_lars_scales_gradients_by_trust_ratio() -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([0.0, 2.0])
    linear._adapt([p], weight_decay=0.1)
    rate = 1e-3 * 5 / (2 + 0.1 * 5)
    torch.testing.assert_close(p.grad, rate * torch.tensor([0.3, 2.4]))
    zero = nn.Parameter(torch.zeros(2))  # a bias at its start: plain SGD, or it would never move
    zero.grad = torch.tensor([1.0, -1.0])
    linear._adapt([zero], weight_decay=0.1)
    torch.testing.assert_close(zero.grad, torch.tensor([1.0, -1.0]))


class Identity(nn.Module):
    """A backbone whose features are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = SlicedLinear(6, 6, bias=False)
        nn.init.eye_(self.mix.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.mix(images.flatten(1))


class Blobs(SimpleNamespace):
    num_classes = 4

    def __init__(self) -> None:
        self.train, test = blobs(512, 4, noise=0.4), blobs(400, 5, noise=0.4)
        self.test = [(test[0][:, :, None, None], test[1])]
        self.calls: list[tuple[int, int]] = []

    def linear_train(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.calls.append((epoch, batch_size))
        order = torch.randperm(512, generator=torch.Generator().manual_seed(epoch)).split(batch_size)
        yield from ((self.train[0][i][:, :, None, None], self.train[1][i]) for i in order)


@pytest.mark.parametrize(
    "protocol",
    [
        SGDProtocol(epochs=10, lr=1.0, batch_size=64, milestones=(6, 8)),
        SGDProtocol(epochs=30, lr=20.0, batch_size=64, lars=True),
    ],
)
def test_sgd_probe_learns_and_leaves_the_backbone_alone(protocol: SGDProtocol) -> None:
    model, data, losses = Identity().train(), Blobs(), []
    accuracy = linear_probe_sgd(model, data, 1.0, protocol, on_epoch=lambda *done: losses.append(done))
    assert accuracy > 90
    assert accuracy == linear_probe_sgd(model, Blobs(), 1.0, protocol)
    assert data.calls == [(epoch, 64) for epoch in range(protocol.epochs)]
    assert [epoch for epoch, _ in losses] == list(range(1, protocol.epochs + 1))
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert model.mix.weight.grad is None and model.mix.weight.equal(torch.eye(6))
    assert model.training


def test_one_class_is_refused() -> None:
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DataError, match=r"all training images \(4\) are of one class"):
        linear_probe(x, y, x, y)


def test_sgd_probe_says_when_it_diverges() -> None:
    protocol = SGDProtocol(epochs=3, lr=1e38, batch_size=64)
    with pytest.raises(TrainingError, match=r"width 1.0: the loss is .* in epoch .* 1e\+38 is too high"):
        linear_probe_sgd(Identity(), Blobs(), 1.0, protocol)
