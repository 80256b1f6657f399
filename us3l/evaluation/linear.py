"""Linear evaluation: how much a linear classifier finds in frozen features.

Small data: the optimum itself, by L-BFGS on features computed once (:func:`linear_probe`). Large data: the
SGD protocols of the field on augmented images (:func:`linear_probe_sgd`), so that results compare with
published ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from us3l.errors import DataError, TrainingError
from us3l.evaluation.features import backbone, device_of, features
from us3l_kernels.width import Width, use_width, width_key

if TYPE_CHECKING:
    from us3l.data.base import Data


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    l2: float = 1e-4,
    iterations: int = 150,
) -> float:
    """Test accuracy, in percent, of multinomial logistic regression on standardised features.

    Minimises mean cross-entropy + l2 * ||W||^2 by L-BFGS in float64; the features are first centred and
    divided by their standard deviation on the training set. Deterministic.

    Args:
        train_features: [n, d]. train_labels: [n], int64. test_features: [m, d]. test_labels: [m], int64.
        l2: weight of the penalty, > 0. iterations: at most so many L-BFGS steps.

    Raises:
        DataError: all training images are of one class.
    """
    if len(train_labels.unique()) < 2:
        raise DataError(f"linear evaluation: all training images ({len(train_labels)}) are of one class, expected more")
    mean, deviation = train_features.mean(dim=0), train_features.std(dim=0) + 1e-6
    train = ((train_features - mean) / deviation).cpu().double().numpy()
    test = ((test_features - mean) / deviation).cpu().double().numpy()
    # scikit-learn minimises ||W||^2 / 2 + C * sum of cross-entropies.
    classifier = LogisticRegression(C=1 / (2 * l2 * len(train)), max_iter=iterations, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are part of the protocol
        classifier.fit(train, train_labels.cpu().numpy())
    return 100.0 * float(classifier.score(test, test_labels.cpu().numpy()))


@dataclass(frozen=True)
class SGDProtocol:
    """Linear evaluation by SGD: the hyper-parameters, as published."""

    epochs: int
    lr: float
    batch_size: int
    milestones: tuple[int, ...] = ()  # epochs at which lr is multiplied by gamma; none: cosine to 0, per epoch
    gamma: float = 0.1
    lars: bool = False  # layer-wise adaptive learning rates (You et al. 2017), in the form called LARC
    momentum: float = 0.9
    weight_decay: float = 0.0

    def learning_rate(self, epoch: int) -> float:
        if self.milestones:
            return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


CIFAR_PROTOCOL = SGDProtocol(epochs=100, lr=30.0, batch_size=512, milestones=(60, 80))
IMAGENET_PROTOCOL = SGDProtocol(epochs=60, lr=0.8, batch_size=1024, lars=True)  # published: 4 GPUs x 256


def linear_probe_sgd(
    model: nn.Module,
    data: Data,
    width: Width,
    protocol: SGDProtocol,
    *,
    on_epoch: Callable[[int, float], None] | None = None,
) -> float:
    """Test accuracy, in percent, of a linear classifier trained by SGD on the frozen backbone at `width`.

    Training images come augmented from `data.linear_train(epoch, batch_size)`, new ones every epoch.

    Args:
        model: a backbone, calibrated at `width`; neither its weights nor its statistics change.
        width: a width in (0, 1], or a plan.
        on_epoch: called with (epochs done, mean training loss of the epoch).

    Raises:
        TrainingError: the loss is no longer finite: the learning rate is too high for these features.
    """
    network, device = backbone(model), device_of(model)
    test_features, test_labels = features(model, data.test, width)
    classifier = nn.Linear(test_features.shape[1], data.num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(classifier.bias)
    classifier.to(device)
    parameters = list(classifier.parameters())
    decay = 0.0 if protocol.lars else protocol.weight_decay  # LARS scales the decay with the gradient
    optimizer = torch.optim.SGD(parameters, protocol.lr, momentum=protocol.momentum, weight_decay=decay)

    training = model.training
    model.eval()
    try:
        with use_width(model, width):
            for epoch in range(protocol.epochs):
                for group in optimizer.param_groups:
                    group["lr"] = protocol.learning_rate(epoch)
                total, batches = torch.zeros((), device=device), 0
                for images, labels in data.linear_train(epoch, protocol.batch_size):
                    with torch.no_grad():
                        x = network(images.to(device, non_blocking=True)).float()
                    loss = F.cross_entropy(classifier(x), labels.to(device, non_blocking=True).long())
                    optimizer.zero_grad()
                    loss.backward()
                    if protocol.lars:
                        _adapt(parameters, protocol.weight_decay)
                    optimizer.step()
                    total += loss.detach()
                    batches += 1
                mean = float(total) / max(1, batches)
                if not math.isfinite(mean):
                    raise TrainingError(
                        f"linear evaluation, width {width_key(width)}: the loss is {mean} in epoch {epoch + 1}: the "
                        f"learning rate {protocol.lr:g} is too high for these features; try --protocol lbfgs"
                    )
                if on_epoch is not None:
                    on_epoch(epoch + 1, mean)
    finally:
        model.train(training)
    with torch.no_grad():
        correct = sum(
            int((classifier(x.to(device)).argmax(1).cpu() == y).sum())
            for x, y in zip(test_features.split(65536), test_labels.split(65536), strict=True)
        )
    return 100.0 * correct / len(test_labels)


@torch.no_grad()
def _adapt(parameters: list[nn.Parameter], weight_decay: float, trust: float = 1e-3) -> None:
    """LARC: gradient g becomes trust * |p| / (|g| + wd * |p|) * (g + wd * p); zero norms leave it as is."""
    for p in parameters:
        assert p.grad is not None
        size, slope = p.norm(), p.grad.norm()
        rate = trust * size / (slope + weight_decay * size + 1e-8)
        adapted = (p.grad + weight_decay * p) * rate
        p.grad.copy_(torch.where((size > 0) & (slope > 0), adapted, p.grad))
