"""Backend `aten`: PyTorch's own kernels (oneDNN, cuDNN, cuBLAS) on the prefix views of the parameters.

At full width the results are those of torch.nn, bit for bit. What slicing costs here is what ATen makes of a strided
weight: one compact copy of the slice for a convolution, none for a matrix product. Casts of weights and additions of
gradients go through `us3l_kernels.packed`, which does them for all layers of a width at once where it is asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from us3l_kernels.backends import Backend
from us3l_kernels.packed import accumulate_, cast
from us3l_kernels.reference import activation_mask, active_conv_weight

aten = torch.ops.aten


def _statistics(x: Tensor, t: Tensor) -> Tensor:
    """Statistics of x in the dtype that every backend gives them. ATen's have that of the parameters, or of x."""
    return t.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _wide(x: Tensor, vector: Tensor | None) -> Tensor | None:
    """A layer norm's weight (None: ones) or bias, in float32 for a half precision x: then its statistics are too."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    if vector is None:
        return x.new_ones(x.size(-1), dtype=torch.float32) if half else None
    return vector[: x.size(-1)].float() if half else vector[: x.size(-1)]


class AtenBackend(Backend):
    name = "aten"

    def why_not(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if op not in ("batch_norm", "layer_norm") or weight is None or weight.dtype == x.dtype:
            return None
        if weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
            return None
        return f"ATen's norms mix half precision x with float32 only, not {x.dtype} with {weight.dtype}"

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_channels: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        active, groups = active_conv_weight(weight, x.size(1), out_channels, groups)
        active_bias = None if bias is None else cast(bias, bias[:out_channels], x.dtype)
        return F.conv2d(x, cast(weight, active, x.dtype), active_bias, stride, padding, dilation, groups)

    def conv2d_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor | None:
        out_channels = grad.size(1)
        active, active_groups = active_conv_weight(weight, x.size(1), out_channels, groups)
        dx, dw, db = aten.convolution_backward(
            grad,
            x,
            cast(weight, active, x.dtype),
            None if grad_bias is None else [out_channels],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            active_groups,
            [need_grad_x, grad_weight is not None, grad_bias is not None],
        )
        if grad_weight is not None:
            accumulate_(active_conv_weight(grad_weight, x.size(1), out_channels, groups)[0], dw)
        if grad_bias is not None:
            accumulate_(grad_bias[:out_channels], db)
        return dx

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
        active_bias = None if bias is None else cast(bias, bias[:out_features], x.dtype)
        active = cast(weight, weight[:out_features, :in_features], x.dtype)
        return F.linear(x[..., :in_features], active, active_bias)

    def linear_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
        in_features: int,
    ) -> Tensor | None:
        out_features = grad.size(-1)
        rows = grad.reshape(-1, out_features)
        if grad_weight is not None:
            inputs = x[..., :in_features].reshape(-1, in_features)
            destination = grad_weight[:out_features, :in_features]
            if destination.dtype == rows.dtype:
                destination.addmm_(rows.t(), inputs)  # straight into the slice
            else:
                accumulate_(destination, torch.mm(rows.t(), inputs))
        if grad_bias is not None:
            accumulate_(grad_bias[:out_features], rows.sum(0))
        if not need_grad_x:
            return None
        active = cast(weight, weight[:out_features, :in_features], grad.dtype)
        if in_features == x.size(-1):
            return torch.mm(rows, active).view(x.shape)
        dx = x.new_zeros(x.shape)
        dx[..., :in_features] = torch.mm(rows, active).view(*x.shape[:-1], in_features)
        return dx

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
        c = x.size(1)
        w, b, rm, rv = (None if t is None else t[:c] for t in (weight, bias, running_mean, running_var))
        if training:
            parts = [torch.native_batch_norm(view, w, b, rm, rv, True, momentum, eps) for view in x.chunk(views)]
            y = parts[0][0] if views == 1 else torch.cat([p[0] for p in parts])
            mean, rstd = (_statistics(x, torch.stack([p[i] for p in parts])) for i in (1, 2))
        else:
            assert rm is not None and rv is not None
            y = torch.native_batch_norm(x, w, b, rm, rv, False, momentum, eps)[0]
            mean, rstd = _statistics(x, rm.clone().unsqueeze(0)), (_statistics(x, rv) + eps).rsqrt_().unsqueeze(0)
        if residual is not None:
            y += residual
        if activation == "relu":
            y = y.relu_()
        elif activation == "relu6":
            y = y.clamp_(0, 6)
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
        c = x.size(1)
        w = None if weight is None else weight[:c].to(mean.dtype)
        if activation == "relu":
            grad = aten.threshold_backward(grad, y, 0)
        elif activation is not None:
            grad = grad * activation_mask(y, activation)
        parts = [
            aten.native_batch_norm_backward(
                g,
                view,
                w,
                # With training=False ATen wants the statistics of the forward as running ones, and a variance.
                None if training else m,
                None if training else r.square().reciprocal_(),
                m,
                r,
                training,
                0.0,
                [need_grad_x, grad_weight is not None, grad_bias is not None],
            )
            for g, view, m, r in zip(grad.chunk(mean.size(0)), x.chunk(mean.size(0)), mean, rstd, strict=True)
        ]
        for _, dw, db in parts:
            if grad_weight is not None:
                accumulate_(grad_weight[:c], dw)
            if grad_bias is not None:
                accumulate_(grad_bias[:c], db)
        if not need_grad_x:
            return None, grad
        return (parts[0][0] if len(parts) == 1 else torch.cat([p[0] for p in parts])), grad

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = x.size(-1)
        w, b = _wide(x, weight), None if bias is None else _wide(x, bias)
        y, mean, rstd = torch.native_layer_norm(x, [c], w, b, eps)
        return y, mean, rstd

    def layer_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
    ) -> Tensor | None:
        c = x.size(-1)
        # ATen gives the gradient of the bias only to a call that has one; a zero vector stands in for it.
        w = _wide(x, weight)
        mask = [need_grad_x, grad_weight is not None, grad_bias is not None]
        b = mean.new_zeros(c, dtype=(x if w is None else w).dtype) if grad_bias is not None else None
        dx, dw, db = aten.native_layer_norm_backward(grad, x, [c], mean, rstd, w, b, mask)
        if grad_weight is not None:
            accumulate_(grad_weight[:c], dw)
        if grad_bias is not None:
            accumulate_(grad_bias[:c], db)
        return dx
