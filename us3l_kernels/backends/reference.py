"""Backend `reference`: `us3l_kernels.reference` forward, PyTorch's autograd through it backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from us3l_kernels import reference
from us3l_kernels.backends import Backend


def _add_prefix(destination: Tensor | None, gradient: Tensor | None) -> None:
    if destination is not None and gradient is not None:
        destination += gradient.to(destination.dtype)


class _Leaves:
    """Detached copies that record gradients, so that autograd can be asked about a graph of our own."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]

    def gradients(self, output: Tensor, grad: Tensor) -> list[Tensor | None]:
        asked = [t for t in self.leaves if t is not None]
        got = iter(torch.autograd.grad(output, asked, grad, allow_unused=True))
        return [None if t is None else next(got) for t in self.leaves]


class ReferenceBackend(Backend):
    name = "reference"

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
        return reference.conv2d(x, weight, bias, out_channels, stride, padding, dilation, groups)

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
        with torch.enable_grad():
            graph = _Leaves(x, weight, grad_bias)
            y = reference.conv2d(*graph.leaves, grad.size(1), stride, padding, dilation, groups)  # type: ignore[arg-type]
            dx, dw, db = graph.gradients(y, grad)
        _add_prefix(grad_weight, dw)
        _add_prefix(grad_bias, db)
        return dx

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, in_features: int
    ) -> Tensor:
        return reference.linear(x, weight, bias, out_features, in_features)

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
        with torch.enable_grad():
            graph = _Leaves(x, weight, grad_bias)
            y = reference.linear(*graph.leaves, grad.size(-1), in_features)  # type: ignore[arg-type]
            dx, dw, db = graph.gradients(y, grad)
        _add_prefix(grad_weight, dw)
        _add_prefix(grad_bias, db)
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
        return reference.batch_norm(
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
            activation,
        )

    def batch_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
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
        column = (1, -1, *[1] * (x.dim() - 2))
        dims = [0, *range(2, x.dim())]
        masked = (grad * reference.activation_mask(y, activation)).to(mean.dtype)
        scale = torch.ones_like(mean[0]) if weight is None else weight[:c].to(mean.dtype)
        parts = []
        for g, view, m, r in zip(
            masked.chunk(mean.size(0)), x.to(mean.dtype).chunk(mean.size(0)), mean, rstd, strict=True
        ):
            normalised = (view - m.view(column)) * r.view(column)
            _add_prefix(None if grad_weight is None else grad_weight[:c], (g * normalised).sum(dims))
            _add_prefix(None if grad_bias is None else grad_bias[:c], g.sum(dims))
            if training:  # the statistics are functions of x as well
                g = g - g.mean(dims, keepdim=True) - normalised * (g * normalised).mean(dims, keepdim=True)
            parts.append(g * (scale * r).view(column))
        return torch.cat(parts).to(x.dtype), masked.to(x.dtype)

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return reference.layer_norm(x, weight, bias, eps)

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
        rows = list(range(x.dim() - 1))
        g = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean) * rstd
        _add_prefix(None if grad_weight is None else grad_weight[:c], (g * normalised).sum(rows))
        _add_prefix(None if grad_bias is None else grad_bias[:c], g.sum(rows))
        if weight is not None:
            g = g * weight[:c].to(g.dtype)
        dx = g - g.mean(-1, keepdim=True) - normalised * (g * normalised).mean(-1, keepdim=True)
        return (dx * rstd).to(x.dtype)
