"""Group regularisation as a weight decay per row, and the step that the optimizers share around it.

US3L regularises later channels less, which leaves them more freedom: the loss gains sum_g lambda_g ||p_g||^2
with lambda_g = lambda (1 - alpha g) over equal groups g = 0, 1, ... of output channels (Cao, Sun and Zhou,
"Three Guidelines You Should Know for Universally Slimmable Self-Supervised Learning", CVPR 2023). Its
gradient is 2 lambda_g p: with `weight_decay` = 2 lambda, a weight decay of weight_decay (1 - alpha g) on
group g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from us3l_kernels.gradients import has_gradient, slot_of
from us3l_kernels.optim.ema import EMA


def grouped_rows(param: Tensor) -> int:
    """Rows to be cut into groups: output channels of a 4-D weight, elements of a 1-D one, 1 for any other."""
    return param.shape[0] if param.ndim in (1, 4) else 1


# Small vectors: one for every row count of a model and, while alpha ramps, every recent alpha.
@lru_cache(maxsize=256)
def _decay_factors(
    rows: int, ndim: int, alpha: float, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    group = torch.arange(rows).div(max(1, rows // groups), rounding_mode="floor").clamp(max=groups - 1)
    return (1.0 - alpha * group.double()).to(device, dtype).view((rows, 1, 1, 1)[:ndim])


def decay_factors(param: Tensor, alpha: float, groups: int) -> Tensor:
    """1 - alpha g of every row of `param`, in a shape that broadcasts over it (cached: read only)."""
    return _decay_factors(grouped_rows(param), param.ndim, alpha, groups, param.dtype, param.device)


def check_number(options: dict[str, Any], name: str, *, below: float = math.inf) -> None:
    """Raise ValueError unless options[name] is a real number in [0, below)."""
    value = options[name]
    if not (isinstance(value, Real) and 0.0 <= float(value) < below):
        raise ValueError(f"{name} must be a number in [0, {below}), got {value!r}")


class GroupDecayOptimizer(torch.optim.Optimizer):
    """Base of SGD, AdamW and LARS: options, which parameters take part in a step, gradients, the teacher."""

    def _check(self, options: dict[str, Any]) -> None:
        """Raise ValueError for an option out of its range; asked by every step, for options may change."""
        for name in ("lr", "weight_decay", "alpha"):
            check_number(options, name)
        alpha, groups = options["alpha"], options["groups"]
        if not (isinstance(groups, int) and groups >= 1):
            raise ValueError(f"groups must be an integer >= 1, got {groups!r}")
        if alpha * (groups - 1) > 1.0:
            raise ValueError(
                f"alpha must be at most 1 / (groups - 1) = {1 / (groups - 1):.4g}, "
                f"or the last group would have a negative weight decay; got {alpha!r}"
            )

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], ema: EMA | None
    ) -> Iterable[Tensor]:
        """Update `params`; return those whose teachers in `ema` the same pass has averaged."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; ValueError for an option or a dtype that cannot be."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"params must be floating-point tensors, got {param.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; a state whose groups lack one of our options raises ValueError."""
        # torch adds an option of its own to the defaults whenever a state is loaded.
        options = self.defaults.keys() - {"differentiable"}
        for group in state_dict["param_groups"]:
            if missing := sorted(options - group.keys()):
                raise ValueError(
                    f"state_dict was not saved by us3l_kernels.optim.{type(self).__name__}: "
                    f"its param_groups have no {', '.join(missing)}"
                )
        super().load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; an attached one (us3l_kernels.gradients) is zeroed in its buffer."""
        super().zero_grad(set_to_none)
        params = [param for group in self.param_groups for param in group["params"]]
        slots = [slot for param in params if (slot := slot_of(param)) is not None]
        if slots:
            torch._foreach_zero_([slot.view for slot in slots])
            for slot in slots:
                slot.touched = False
                slot.parameter.grad = slot.view

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, ema: EMA | None = None
    ) -> float | None:
        """One update of all parameters, then of the teacher in `ema` from the updated ones.

        Args:
            closure: computes the loss and its gradients again and returns the loss, which is returned.
            ema: teacher of (some of) the parameters; all of it is averaged, updated here or not.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: an option in `param_groups` or the momentum of `ema` has been set out of its range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check(group)
        if ema is not None:
            ema.check()
        work = [(group, *self._with_gradients(group)) for group in self.param_groups]
        averaged: set[Tensor] = set()
        for group, params, grads in work:
            if params:
                averaged.update(self._update(group, params, grads, ema))
        if ema is not None:
            ema.update(done=averaged)
        return loss

    def _with_gradients(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that this step moves, and their gradients."""
        params, grads = [], []
        for index, param in enumerate(group["params"]):
            if has_gradient(param):
                if param.grad.layout is not torch.strided:
                    name = group.get("param_names", range(len(group["params"])))[index]
                    raise RuntimeError(
                        f"{type(self).__name__} needs dense gradients, "
                        f"but that of parameter {name} is {param.grad.layout}"
                    )
                params.append(param)
                grads.append(param.grad)
            elif group["decay_without_grad"] and param.requires_grad:
                params.append(param)
                grads.append(torch.zeros_like(param))
        return params, grads
