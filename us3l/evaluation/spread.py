"""Two numbers that say whether embeddings have collapsed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def spread(embeddings: Tensor) -> float:
    """Standard deviation of the L2-normalised embeddings, averaged over dimensions, times sqrt(d).

    About 1 when they fill the sphere evenly, 0 when all are the same vector (Chen & He, "Exploring Simple
    Siamese Representation Learning", CVPR 2021, section 4.1). Meaningless after a batch norm, which restores
    the deviation of whatever noise is left: measure before a projector's output norm.

    Args:
        embeddings: [n, d], n >= 2.
    """
    _check(embeddings)
    normalised = F.normalize(embeddings.float(), dim=1)
    return float(normalised.std(dim=0).mean()) * embeddings.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred embeddings: 1 to min(n, d).

    The number of directions that the embeddings really use (Roy & Vetterli, "The effective rank", EUSIPCO
    2007); it sees the dimensional collapse that :func:`spread` misses. Constant embeddings have rank 0.

    Args:
        embeddings: [n, d], n >= 2.
    """
    _check(embeddings)
    values = torch.linalg.svdvals((embeddings - embeddings.mean(dim=0)).float())
    total = values.sum()
    if total <= 1e-6 * len(embeddings):
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def _check(embeddings: Tensor) -> None:
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings: expected shape [n >= 2, d], got {tuple(embeddings.shape)}")
