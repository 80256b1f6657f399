"""What changes over a run: learning rate, teacher's momentum and, on these parameters, the group regularisation.

The paper adds sum_g lambda_g ||p_g||^2 to every loss, with lambda_g = lambda (1 - alpha_t g) for the groups
g = 0..G-1 of output channels. Its gradient is a weight decay per row, so here it lives in the optimizer
(`us3l_kernels.optim`): weight_decay = 2 lambda, with the options `alpha` and `groups`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from us3l.methods.base import Method

if TYPE_CHECKING:
    from us3l.config import MethodConfig, OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, batches: int, epochs: int) -> float:
    """Of iteration `step` (from 0): linear warm-up to the peak, then half a cosine to 0 (Loshchilov & Hutter, 2017)."""
    warmup = config.warmup_epochs * batches
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / (epochs * batches - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def teacher_momentum(config: MethodConfig, step: int, steps: int) -> float:
    """Of iteration `step` (from 0) of `steps`: constant, or half a cosine from `config.momentum` to 1.

    Source: Grill et al., 2020, "BYOL", section 3.2; MoCo v3 does the same.
    """
    if config.momentum_schedule == "constant":
        return config.momentum
    return 1 - (1 - config.momentum) * 0.5 * (1 + math.cos(math.pi * step / steps))


def group_alpha(epoch: int, epochs: int, warmup_epochs: int, alpha: float) -> float:
    """alpha_t of an epoch (from 0): 0 in the warm-up, then linear, up to `alpha` at half of the epochs."""
    if epoch < warmup_epochs:
        return 0.0
    half = epochs // 2
    if epoch >= half:
        return alpha
    return alpha * (epoch - warmup_epochs) / (half - warmup_epochs)


def parameter_groups(method: Method) -> list[dict[str, Any]]:
    """Groups for the optimizer: "encoder" (with its projector) and, where there are any, "predictor" heads and
    "projection", those of a feature distillation."""
    names = dict.fromkeys(method.student_parameters(), "predictor")
    for name, part in (("encoder", method.encoder_q), ("projection", method.feature_distillation)):
        names |= {p: name for p in part.parameters() if p in names} if part is not None else {}
    groups = {name: [p for p in names if names[p] == name] for name in ("encoder", "predictor", "projection")}
    return [{"name": name, "params": params} for name, params in groups.items() if params]


def set_group_regularisation(optimizer: Optimizer, *, weight_decay: float, alpha: float, predictors: bool) -> None:
    """Set the decay of the next step. `optimizer` was made from `parameter_groups`; weight_decay is 2 lambda.

    The regulariser is a term of the loss: it reaches a parameter that the network's own loss does not
    (`decay_without_grad`). The published code leaves the projections of a feature distillation out of it, and the
    prediction heads in the steps of width 1.0, `predictors=False`. A joint step, which has no counterpart there,
    regularises them once.
    """
    for group in optimizer.param_groups:
        regularised = group["name"] == "encoder" or (predictors and group["name"] == "predictor")
        group["weight_decay"] = weight_decay if regularised else 0.0
        group["alpha"] = alpha
        group["decay_without_grad"] = regularised
