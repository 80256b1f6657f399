"""LARS with the group regularisation as a weight decay per row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from us3l_kernels.optim.ema import EMA
from us3l_kernels.optim.group_decay import GroupDecayOptimizer, check_number, decay_factors


class LARS(GroupDecayOptimizer):
    """SGD with momentum whose step is scaled, for each weight, to the weight's own norm.

    With d = grad + weight_decay * (1 - alpha * g) * p for row group g (as in `SGD`), a weight of two or more dimensions
    moves by d * trust * |p| / |d|, which then passes through the momentum; where a norm is zero, by d. Vectors (biases,
    the affine parameters of norms) move by their gradient, without decay. This is the form that SimCLR, BYOL and MoCo
    v3 train with. timm's does not know of gradients accumulated in place, nor of groups.

    Source: You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, Algorithm 1.

    A parameter takes part in a step if it has a gradient: `.grad` is not None and, where it is attached
    (us3l_kernels.gradients), something was added to it since it was zeroed.

    Args: (each may differ per parameter group and change between steps)
        params: parameters, (name, parameter) pairs, or dicts of parameter groups; floating-point, any device.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: decay of group 0, >= 0.
        trust: the trust coefficient, >= 0.
        alpha: relative decrease of the decay from one group to the next, in [0, 1 / (groups - 1)].
        groups: number of groups.
        decay_without_grad: a parameter that requires a gradient but has none is not skipped: its gradient
            counts as zero, so that decay and momentum act on it.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        *,
        alpha: float = 0.0,
        groups: int = 8,
        decay_without_grad: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "alpha": alpha,
            "groups": groups,
            "decay_without_grad": decay_without_grad,
        }
        super().__init__(params, defaults)

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        check_number(options, "momentum", below=1.0)
        check_number(options, "trust")

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], ema: EMA | None
    ) -> Iterable[Tensor]:
        for param in params:
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        # The gradients are the caller's: what is added to them goes into new tensors.
        grads = list(grads)
        adapted = [i for i, param in enumerate(params) if param.ndim > 1]
        if adapted:
            for i, step in zip(adapted, _adapted(group, params, grads, adapted), strict=True):
                grads[i] = step
        buffers = [self.state[param]["momentum_buffer"] for param in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return ()


def _adapted(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], which: list[int]) -> Iterable[Tensor]:
    """Decayed gradients of the chosen parameters, scaled to their norms; nothing waits for the device."""
    params, grads = [params[i] for i in which], [grads[i] for i in which]
    if group["weight_decay"] != 0.0:
        factors = [decay_factors(param, group["alpha"], group["groups"]) for param in params]
        grads = list(torch._foreach_addcmul(grads, params, factors, value=group["weight_decay"]))
    sizes, slopes = (torch.stack(list(torch._foreach_norm(tensors))) for tensors in (params, grads))
    rates = torch.where((sizes > 0) & (slopes > 0), group["trust"] * sizes / slopes, 1.0)
    return torch._foreach_mul(grads, list(rates.unbind()))
