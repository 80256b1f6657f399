"""The native kernels of the optimizers (csrc/cpu/multi_tensor.cpp, csrc/cuda/optimizers.cu): each update in one pass.

`takes` decides; what a kernel does not take runs on torch's foreach operations, and the DEBUG log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from us3l_kernels import _native

native = torch.ops.us3l_native
_dtype, _device = attrgetter("dtype"), attrgetter("device")
log = logging.getLogger("us3l_kernels")


def takes(op: str, params: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Whether the kernel `op` ("sgd_", "adamw_" or "ema_") takes `params` and the lists that go with them.

    Every step asks, for tensors may have changed since the last one. It asks for whole lists, by loops that run in C: a
    GPU has nothing to do meanwhile.
    """
    reason = _why_not(params, [tensors for tensors in others if tensors])
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
    return _why_not_kinds(params, others) or (_why_not_layouts(params, others) if on_cuda else None)


def _why_not_kinds(params: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> str | None:
    device = params[0].device
    for tensors in (params, *others):
        dtypes, devices = list(map(_dtype, tensors)), list(map(_device, tensors))
        if dtypes.count(torch.float32) < len(tensors) or devices.count(device) < len(tensors):
            other = next(t for t in tensors if t.dtype is not torch.float32 or t.device != device)
            return f"it takes float32 tensors on one device, got {other.dtype} on {other.device}"
    return None


def _why_not_layouts(params: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> str | None:
    """None if element i is the same in the memory of a parameter and of all that goes with it."""
    wanted = _are_contiguous(params)
    for tensors in (params, *others):
        found = _are_contiguous(tensors)
        if found == wanted and None not in found:
            continue
        for param, tensor, own, other in zip(params, tensors, wanted, found, strict=True):
            if other is None or other is not own:
                return (
                    "it takes tensors that are contiguous or channels_last like their parameter, "
                    f"got strides {tensor.stride()} for {param.stride()}"
                )
    return None


def _are_contiguous(tensors: Sequence[Tensor]) -> list[bool | None]:
    """Of each: True if contiguous, False if channels_last, None if neither."""
    return [
        contiguous or (False if tensor.is_contiguous(memory_format=torch.channels_last) else None)
        for tensor, contiguous in zip(tensors, map(Tensor.is_contiguous, tensors), strict=True)
    ]


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
