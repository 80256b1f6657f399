"""Accuracy of a network's own classifier, for networks trained with labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from us3l.evaluation.features import device_of
from us3l_kernels.width import Width, use_width


@torch.no_grad()
def classifier_accuracy(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], width: Width) -> float:
    """Top-1 accuracy, in percent, of the logits that `model` gives at `width`.

    Args:
        model: images [N, C, H, W] to logits [N, classes], calibrated at `width`.
        loader: yields (images, labels [N]).
        width: a width in (0, 1], or a plan.

    Raises:
        ValueError: `loader` yields no batch.
    """
    device, training = device_of(model), model.training
    model.eval()
    correct = images_seen = 0
    try:
        with use_width(model, width):
            for images, labels in loader:
                predicted = model(images.to(device, non_blocking=True)).argmax(1).cpu()
                correct += int((predicted == labels.cpu()).sum())
                images_seen += len(labels)
    finally:
        model.train(training)
    if images_seen == 0:
        raise ValueError("classifier_accuracy: expected a loader with at least one batch, got an empty one")
    return 100.0 * correct / images_seen
