"""AdamW with the group regularisation as a decoupled decay per row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from us3l_kernels.optim import kernels
from us3l_kernels.optim.ema import EMA
from us3l_kernels.optim.group_decay import GroupDecayOptimizer, check_number, decay_factors


class AdamW(GroupDecayOptimizer):
    """AdamW whose decoupled weight decay becomes smaller in later groups of rows.

    Before the Adam update every row is multiplied by 1 - lr * weight_decay * (1 - alpha * g), where
    g = 0 .. groups - 1 is the group of the row: a group is max(1, rows // groups) rows, and the last one also
    takes what is left over. Rows are the output channels (first dimension) of 4-D parameters and the elements
    of 1-D ones; others decay as group 0. The decay is decoupled (Loshchilov and Hutter, ICLR 2019): unlike
    the regulariser in the loss, it does not pass through the moments. With alpha = 0 the result is that of
    torch.optim.AdamW(foreach=True): bit for bit where no kernel of ours runs.

    A group of fp32 parameters on the CPU is updated by one kernel in one pass over memory, where the compiled
    library is there. It rounds differently from the foreach operations that do all else.

    A parameter takes part in a step if it has a gradient: `.grad` is not None and, where it is attached
    (us3l_kernels.gradients), something was added to it since it was zeroed.

    Args: (each may differ per parameter group and change between steps)
        params: parameters, (name, parameter) pairs, or dicts of parameter groups; floating-point, any device.
        lr: learning rate, >= 0.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decay of group 0, >= 0.
        alpha: relative decrease of the decay from one group to the next, in [0, 1 / (groups - 1)].
        groups: number of groups.
        decay_without_grad: a parameter that requires a gradient but has none is not skipped: its gradient
            counts as zero, so that decay and the moments act on it.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        alpha: float = 0.0,
        groups: int = 8,
        decay_without_grad: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "groups": groups,
            "decay_without_grad": decay_without_grad,
        }
        super().__init__(params, defaults)

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        check_number(options, "eps")
        betas = options["betas"]
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
            raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
        for index in (0, 1):
            check_number({f"betas[{index}]": betas[index]}, f"betas[{index}]", below=1.0)

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], ema: EMA | None
    ) -> Iterable[Tensor]:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        states = [self.state[param] for param in params]
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        steps = [state["step"] for state in states]
        if kernels.takes("adamw_", params, grads, exp_avgs, exp_avg_sqs):
            torch._foreach_add_(steps, 1)
            kernels.adamw_(params, grads, exp_avgs, exp_avg_sqs, [int(step) for step in steps], group)
        else:
            _foreach_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, group)
        return ()


def _foreach_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    lr, weight_decay, alpha = group["lr"], group["weight_decay"], group["alpha"]
    if weight_decay != 0.0 and alpha == 0.0:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)
    elif weight_decay != 0.0:
        factors = [decay_factors(param, alpha, group["groups"]) for param in params]
        torch._foreach_addcmul_(params, params, factors, value=-lr * weight_decay)
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs=[],
        state_steps=steps,
        foreach=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )
