"""Communication that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, x, group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[...] on every rank -> [ranks, ...] on every rank, in rank order; the backward sums what the ranks send back.

    A gradient is thus that of the sum of all ranks' losses: averaged over the ranks, that of their mean. All ranks must
    call it, and run its backward, in the same order. group: None for the default one.
    """
    return _AllGather.apply(x, group)
