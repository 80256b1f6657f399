"""The native kernels of the optimizers (csrc/cpu/multi_tensor.cpp, csrc/cuda/optimizers.cu): each update in one pass.

`takes` decides; what a kernel does not take runs on torch's foreach operations, and the DEBUG log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from us3l_kernels import _native

native = torch.ops.us3l_native
log = logging.getLogger("us3l_kernels")


def alike(param: Tensor, other: Tensor) -> bool:
    """Whether both are contiguous or both channels_last: element i is then the same in both memories."""
    if param.is_contiguous():
        return other.is_contiguous()
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in (param, other))


def takes(op: str, params: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Whether the kernel `op` ("sgd_", "adamw_" or "ema_") takes `params` and the lists that go with them."""
    reason = _why_not(params, others)
    if reason is not None:
        log.debug("%s: not on a native kernel: %s", op, reason)
    return reason is None


def _why_not(params: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> str | None:
    device = params[0].device
    on_cuda = device.type == "cuda"
    if device.type not in ("cpu", "cuda"):
        return f"there is none for tensors on {device}"
    if (_native.load_cuda() if on_cuda else _native.load()) is None:
        return f"the compiled library is not there ({_native.why_cuda if on_cuda else _native.why})"
    if not on_cuda:
        _native.isa()  # a US3L_ISA that this CPU does not have is an error
    for tensors in (params, *others):
        for param, tensor in zip(params, tensors, strict=False):  # a list may be empty
            if tensor.dtype is not torch.float32 or tensor.device != device:
                return f"it takes float32 tensors on one device, got {tensor.dtype} on {tensor.device}"
            if on_cuda and not alike(param, tensor):
                return (
                    "it takes tensors that are contiguous or channels_last like their parameter, "
                    f"got strides {tensor.stride()} for {param.stride()}"
                )
    return None


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    teachers: list[Tensor],
    group: dict[str, Any],
    ema_momentum: float,
) -> None:
    """One step of `SGD`; without momentum there are no buffers, and the teachers may be left out as well."""
    native.sgd_(
        params,
        grads,
        buffers,
        teachers,
        lr=group["lr"],
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        alpha=group["alpha"],
        groups=group["groups"],
        ema_momentum=ema_momentum,
    )
    _count_writes(params, buffers, teachers)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[int],
    group: dict[str, Any],
) -> None:
    """One step of `AdamW`; `steps` counts the updates of every parameter, this one included."""
    native.adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        alpha=group["alpha"],
        groups=group["groups"],
    )
    _count_writes(params, exp_avgs, exp_avg_sqs)


def ema_(teachers: list[Tensor], students: list[Tensor], momentum: float) -> None:
    """One update of `EMA`."""
    native.ema_(teachers, students, momentum)
    _count_writes(teachers)


def _count_writes(*written: list[Tensor]) -> None:
    # A native operator does not count its writes; caches of weights rely on the count.
    torch.autograd.graph.increment_version([tensor for tensors in written for tensor in tensors])
