"""A queue of past targets, as negatives or as landmarks (MoCo, SEED)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from us3l.errors import ConfigError


class Queue(nn.Module):
    """The last `size` targets, first in, first out; a part of the method's state, and so of its checkpoints.

    keys: [size, D], L2-normalised; random directions at first. position: row of the oldest key, on the device.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by these [n, D], which need not be normalised."""
        size, n = len(self.keys), len(keys)
        if n > size:
            raise ConfigError(
                f"method.queue_size: expected at least {n}, the targets of one iteration (all processes together), "
                f"got {size}"
            )
        rows = (self.position + torch.arange(n, device=keys.device)) % size
        self.keys[rows] = F.normalize(keys.to(self.keys.dtype), dim=1)
        self.position.add_(n).remainder_(size)
