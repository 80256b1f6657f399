"""Losses of self-supervised pre-training, on batches of projections [N, D].

Both are computed in at least float32, whatever the precision of the projections and the autocast state, and
in float64 for float64 input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean negative cosine similarity of two batches [N, D], a scalar in [-1, 1].

    The loss of SimSiam (Chen and He, 2021, eq. 1) and, up to the affine map 2 + 2 L, of BYOL (Grill et al.,
    2020, eq. 2); called MSE in the US3L paper. An absolute loss: all of its gradient depends on the target.
    """
    _check_pair("negative_cosine", prediction, target)
    return -F.cosine_similarity(_full_precision(prediction), _full_precision(target), dim=1).mean()


def info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent loss (Chen et al., 2020, "SimCLR", eq. 1) of two batches [N, D] of matching samples, a scalar.

    Each of the 2N rows of [a; b] is classified among the other 2N - 1 (never itself); its positive is the row
    of the same sample in the other batch. Symmetric in a and b. A relative loss: a drift common to all
    targets cancels.
    """
    _check_pair("info_nce", a, b)
    if not temperature > 0:
        raise ValueError(f"info_nce: temperature must be positive, got {temperature}")
    samples = a.shape[0]
    # A product under autocast would round the similarities to half precision before the softmax.
    with torch.autocast(a.device.type, enabled=False):
        z = F.normalize(torch.cat([_full_precision(a), _full_precision(b)]), dim=1)
        logits = z @ z.T / temperature
        logits = logits.masked_fill(torch.eye(2 * samples, dtype=torch.bool, device=z.device), -torch.inf)
        positives = torch.arange(2 * samples, device=z.device).roll(samples)
        return F.cross_entropy(logits, positives)


def cross_view(loss: Callable[[Tensor, Tensor], Tensor], predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean of loss(p1, t2) and loss(p2, t1), for predictions and targets [2N, D] of two stacked views, view-major.

    A view is never compared with its own target, which would be solved without any invariance.
    """
    _check_pair("cross_view", predictions, targets)
    if predictions.shape[0] % 2:
        raise ValueError(f"cross_view: predictions must stack two views of equal size, got {predictions.shape[0]} rows")
    p1, p2 = predictions.chunk(2)
    t1, t2 = targets.chunk(2)
    return (loss(p1, t2) + loss(p2, t1)) / 2


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_pair(function: str, a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(
            f"{function}: expected two tensors of one shape [N, D], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
