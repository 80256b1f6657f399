"""The little that data-parallel training under torchrun needs.

The model is not wrapped: all gradients of a step lie in one flat buffer, which is reduced once per update.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from us3l_kernels.collectives import all_gather


@dataclass(frozen=True)
class World:
    """The processes of this run. Every method is free of cost, and of torch.distributed, in a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # index of this process on its machine, and of its GPU

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports and writes files."""
        return self.rank == 0

    def average_(self, flat: Tensor) -> None:
        """Replace `flat` (any shape, contiguous) by its mean over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(flat)  # gloo has no mean
            flat.div_(self.size)

    def gather(self, tensor: Tensor) -> Tensor:
        """`tensor` [n, ...] of all processes one behind the other, in rank order: [size * n, ...].

        Gradients flow back to the process that each part came from.
        """
        return tensor if self.size == 1 else all_gather(tensor).flatten(0, 1)

    def gather_views(self, tensor: Tensor) -> Tensor:
        """Two stacked views [2n, ...] of all processes as two stacked views [2 * size * n, ...], as of one batch."""
        if self.size == 1:
            return tensor
        return all_gather(tensor.unflatten(0, (2, -1))).transpose(0, 1).flatten(0, 2)

    @torch.no_grad()
    def broadcast_(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of process 0 to all others, so that all start from one set of weights."""
        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                # A broadcast wants contiguous memory; channels_last weights are not, and keep their layout this way.
                value = tensor.contiguous()
                dist.broadcast(value, src=0)
                tensor.copy_(value)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set in any process. All processes must call it."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


SINGLE = World()

# While process 0 evaluates (online kNN) or writes a checkpoint, the others wait for it in the next all-reduce: on a
# large data set that takes longer than the 10 (NCCL) or 30 minutes (gloo) after which torch would end the run.
TIMEOUT = timedelta(hours=2)


@contextmanager
def launched(device_type: str) -> Iterator[World]:
    """The :class:`World` that torchrun describes in the environment; a world of one without torchrun.

    device_type: "cuda" communicates by NCCL and binds this process to its GPU; anything else by gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        torch.cuda.set_device(world.local_rank)
    backend = "nccl" if device_type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # Workers that torchrun restarts get the store of those before them, and would connect to the addresses of the
        # dead that are still in it (pytorch/pytorch issue 135712). On several machines, where each counts its own
        # restarts, docs/training.md names the remedy.
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield world
    finally:
        dist.destroy_process_group()
