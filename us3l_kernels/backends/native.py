"""Backend `native`: the CPU kernels of csrc, chosen for the CPU's instruction set at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from us3l_kernels import _native
from us3l_kernels.backends import Backend

native = torch.ops.us3l_native

# The codes of csrc/ops.h.
_ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}


def _is_rows(x: Tensor) -> bool:
    """Whether x [N, C, *] is a matrix of N * prod(*) rows of C channels at one stride, read where it lies.

    So are channels_last tensors, plain [N, C] ones, and prefix slices of either.
    """
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    if x.stride(1) != 1 and x.size(1) > 1:
        return False
    expected = None
    for d in (*range(x.dim() - 1, 1, -1), 0):
        if x.size(d) > 1:
            if expected is not None and x.stride(d) != expected:
                return False
            expected = x.stride(d) * x.size(d)
    return True


class NativeBackend(Backend):
    name = "native"
    ops = ("batch_norm",)

    def unavailable(self) -> str | None:
        return None if _native.load() is not None else f"the compiled library is not there ({_native.why})"

    def why_not(self, op: str, x: Tensor, weight: Tensor | None) -> str | None:
        if x.device.type != "cpu":
            return f"its kernels are for the CPU, x is on {x.device}"
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, x is {x.dtype}"
        if weight is not None and weight.dtype != torch.float32:
            return f"it takes float32 parameters, the weight is {weight.dtype}"
        if not _is_rows(x):
            return f"it takes channels_last (channels innermost), x has shape {tuple(x.shape)} and strides {x.stride()}"
        return None

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        views: int,
        activation: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = native.batch_norm(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            residual,
            training,
            momentum,
            eps,
            views,
            _ACTIVATIONS[activation],
        )
        return y, mean, rstd

    def batch_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
        need_grad_residual: bool,
        training: bool,
        views: int,
        activation: str | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        dx, dresidual = native.batch_norm_backward(
            grad,
            x,
            y,
            weight,
            bias,
            mean,
            rstd,
            grad_weight,
            grad_bias,
            need_grad_x,
            need_grad_residual,
            training,
            _ACTIVATIONS[activation],
        )
        return dx if need_grad_x else None, dresidual if need_grad_residual else None
