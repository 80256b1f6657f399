"""SGD with momentum and the group regularisation as a weight decay per row."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from us3l_kernels.optim import kernels
from us3l_kernels.optim.ema import EMA
from us3l_kernels.optim.group_decay import GroupDecayOptimizer, check_number, decay_factors


class SGD(GroupDecayOptimizer):
    """SGD whose weight decay becomes smaller in later groups of rows: the group regularisation of US3L.

    The gradient of every row gains weight_decay * (1 - alpha * g) * row, where g = 0 .. groups - 1 is the
    group of the row: a group is max(1, rows // groups) rows, and the last one also takes what is left over.
    Rows are the output channels (first dimension) of 4-D parameters and the elements of 1-D ones; others
    decay as group 0. This is exactly the gradient of sum_g lambda (1 - alpha g) ||p_g||^2 in the loss, with
    lambda = weight_decay / 2 (Cao, Sun and Zhou, CVPR 2023). Momentum is that of torch.optim.SGD without
    dampening, and with alpha = 0 the result is that of torch.optim.SGD(foreach=True): bit for bit where no
    kernel of ours runs.

    A parameter takes part in a step if it has a gradient: `.grad` is not None and, where it is attached
    (us3l_kernels.gradients), something was added to it since it was zeroed.

    A group of fp32 parameters on the CPU, or on a CUDA device and contiguous or channels_last with gradients
    alike, is updated by one kernel in one pass over memory, together with the teacher of `step(ema=...)`,
    where the compiled library is there. It rounds differently from the foreach operations that do all else.

    Args: (each may differ per parameter group and change between steps)
        params: parameters, (name, parameter) pairs, or dicts of parameter groups; floating-point, any device.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: decay of group 0, >= 0.
        nesterov: Nesterov momentum; needs momentum > 0.
        alpha: relative decrease of the decay from one group to the next, in [0, 1 / (groups - 1)].
        groups: number of groups.
        decay_without_grad: a parameter that requires a gradient but has none is not skipped: its gradient
            counts as zero, so that decay and momentum act on it, as the regulariser in the loss would.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        alpha: float = 0.0,
        groups: int = 8,
        decay_without_grad: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "alpha": alpha,
            "groups": groups,
            "decay_without_grad": decay_without_grad,
        }
        super().__init__(params, defaults)

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        check_number(options, "momentum", below=1.0)
        if options["nesterov"] and options["momentum"] == 0.0:
            raise ValueError("nesterov needs a momentum > 0, got momentum=0")

    def _momentum_buffers(self, params: list[Tensor]) -> list[Tensor]:
        buffers = []
        for param in params:
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)
            buffers.append(state["momentum_buffer"])
        return buffers

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], ema: EMA | None
    ) -> Iterable[Tensor]:
        buffers = self._momentum_buffers(params) if group["momentum"] != 0.0 else []
        if not kernels.takes("sgd_", params, grads, buffers):
            _foreach_sgd(params, grads, buffers, group)
            return ()
        teacher_of = {} if ema is None else ema.teacher_of
        with_teacher = [param in teacher_of for param in params]
        averaged = list(compress(params, with_teacher))
        teachers = [teacher_of[param] for param in averaged]
        if averaged and not kernels.takes("sgd_", averaged, teachers):
            with_teacher, averaged, teachers = [False] * len(params), [], []
        without_teacher = [not with_ for with_ in with_teacher]
        for chosen, theirs in ((with_teacher, teachers), (without_teacher, [])):
            if any(chosen):
                ps, gs, bs = (list(compress(tensors, chosen)) for tensors in (params, grads, buffers))
                kernels.sgd_(ps, gs, bs, theirs, group, 0.0 if ema is None else ema.momentum)
        return averaged


def _foreach_sgd(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
) -> None:
    weight_decay, alpha, momentum = group["weight_decay"], group["alpha"], group["momentum"]
    # The gradients are the caller's: what is added to them goes into new tensors.
    if weight_decay != 0.0 and alpha == 0.0:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    elif weight_decay != 0.0:
        factors = [decay_factors(param, alpha, group["groups"]) for param in params]
        grads = list(torch._foreach_addcmul(grads, params, factors, value=weight_decay))
    if momentum != 0.0:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        grads = list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers
    torch._foreach_add_(params, grads, alpha=-group["lr"])
