"""Frozen features of one sub-network, the input of the kNN and linear protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from us3l_kernels.width import Width, use_width


def backbone(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map from images [N, C, H, W] to pooled features [N, active channels], without the head."""
    network = getattr(model, "forward_features", None)
    if network is None:
        raise TypeError(f"model: expected a backbone with forward_features (us3l.models), got {type(model).__name__}")
    return network


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def features(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], width: Width) -> tuple[Tensor, Tensor]:
    """Pooled features of a calibrated width over a whole data set.

    Args:
        model: a backbone, calibrated at `width` (else its norms raise and say so).
        loader: yields (images [N, C, H, W], labels [N]).
        width: a width in (0, 1], or a plan.

    Returns:
        Features [n, active channels], float32, and labels [n], int64; both in CPU memory, in loader order
        (ImageNet's training features at 2048 channels take 10.5 GB).

    Raises:
        ValueError: `loader` yields no batch.
    """
    network, device = backbone(model), device_of(model)
    training = model.training
    model.eval()
    collected: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        with use_width(model, width):
            for images, target in loader:
                collected.append(network(images.to(device, non_blocking=True)).float().cpu())
                labels.append(target.long().cpu())
    finally:
        model.train(training)
    if not collected:
        raise ValueError("features: expected a loader with at least one batch, got an empty one")
    return torch.cat(collected), torch.cat(labels)
