"""Calibration: the batch-norm statistics of one sub-network, measured on training data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from us3l.evaluation.features import backbone, device_of
from us3l_kernels.nn import SlicedBatchNorm2d
from us3l_kernels.nn.calibration import calibrating
from us3l_kernels.width import Width, use_width


def has_statistics(model: nn.Module) -> bool:
    """Whether the backbone has statistics to calibrate. Layer norms have none, and heads are not evaluated."""
    return any(isinstance(module, SlicedBatchNorm2d) for module in model.modules())


@torch.no_grad()
def calibrate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], width: Width) -> None:
    """Store in every norm of `model`'s backbone the exact mean and variance of its inputs at `width`.

    While pre-training, the norms of a universally slimmable network use the statistics of the batch and
    track none (one average over all widths would fit no width). After it, the statistics of a width are
    those of the whole of `loader`, pooled exactly over batches of any size; each batch is normalised by its
    own statistics on the way, as in training. They stay with the model, one entry per width, until it is
    trained again.

    Args:
        model: a backbone (`forward_features`) with sliced or switchable norms.
        loader: yields (images [N, C, H, W], labels), un-augmented training data; labels are not read.
        width: a width in (0, 1], or a plan.

    Raises:
        ValueError: `loader` yields no batch, or the backbone has no batch norms.
    """
    network, device = backbone(model), device_of(model)
    if not has_statistics(model):
        raise ValueError(f"calibrate: {type(model).__name__} has no batch norms, and so no statistics of a width")
    training = model.training
    model.eval()  # dropout and the like off; `calibrating` alone decides what the norms do
    batches = 0
    try:
        with use_width(model, width), calibrating(model):
            for images, _ in loader:
                network(images.to(device, non_blocking=True))
                batches += 1
            if batches == 0:
                raise ValueError("calibrate: expected a loader with at least one batch, got an empty one")
    finally:
        model.train(training)
