"""Every sliced operation, forward and backward, in plain PyTorch: oracle, documentation, last fallback.

A slice is a prefix. The active input channels are those that `x` brings, the active output channels are an argument;
the parameters come in at full size and only their prefix is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from us3l_kernels.layout import convolved


def active_conv_weight(weight: Tensor, in_channels: int, out_channels: int, groups: int) -> tuple[Tensor, int]:
    """The view of a full convolution weight that a sub-network uses, and its number of groups.

    weight: [K, C / groups, kh, kw]. With groups = 1 both channel dimensions are prefixes. With groups the channels of
    a group stay together and the number of active groups shrinks (depthwise: one channel a group).
    """
    if groups == 1:
        return weight[:out_channels, :in_channels], 1
    return weight[:out_channels], in_channels // weight.size(1)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """x through the activation of a fused norm: None, "relu" or "relu6"."""
    if activation == "relu":
        return x.clamp_min(0)
    if activation == "relu6":
        return x.clamp(0, 6)
    return x


def activation_mask(y: Tensor, activation: str | None) -> Tensor:
    """Where the gradient passes, told from the activation's output `y` (bool, the shape of y)."""
    if activation == "relu":
        return y > 0
    if activation == "relu6":
        return (y > 0) & (y < 6)
    return torch.ones_like(y, dtype=torch.bool)


def _taps(
    padded: Tensor,
    kernel: Sequence[int],
    output: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[Tensor]:
    """For every kernel position the view of the padded image [N, C, H', W'] that it is multiplied with."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            yield padded[
                :,
                :,
                top : top + (output[0] - 1) * stride[0] + 1 : stride[0],
                left : left + (output[1] - 1) * stride[1] + 1 : stride[1],
            ]


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """[N, C, H, W] -> [N, groups, C / groups, taps, H', W']."""
    n, c = x.shape[:2]
    output = convolved(x.shape[2:], kernel, stride, padding, dilation)
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    taps = torch.stack(list(_taps(padded, kernel, output, stride, dilation)), dim=2)
    return taps.reshape(n, groups, c // groups, taps.size(2), *output)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y[n, k] = sum over c, i, j of weight[k, c, i, j] * x[n, c, i', j'] + bias[k], for k < out_channels.

    Written as patches times weight, so that it shares nothing with the convolutions it is the oracle of.
    """
    active, groups = active_conv_weight(weight, x.size(1), out_channels, groups)
    patches = _patches(x, weight.shape[2:], stride, padding, dilation, groups)
    kernels = active.to(x.dtype).reshape(groups, out_channels // groups, *patches.shape[2:4])
    y = torch.einsum("ngcthw,gkct->ngkhw", patches, kernels).flatten(1, 2)
    return y if bias is None else y + bias[:out_channels].to(x.dtype).view(-1, 1, 1)


def conv2d_backward(
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
    """The adjoints of `conv2d`: adds dW and db into the prefixes of the full-size tensors given, returns dX."""
    (n, c, h, w), out_channels, kernel = x.shape, grad.size(1), weight.shape[2:]
    active, active_groups = active_conv_weight(weight, c, out_channels, groups)
    grads = grad.reshape(n, active_groups, out_channels // active_groups, *grad.shape[2:])
    if grad_weight is not None:
        patches = _patches(x, kernel, stride, padding, dilation, active_groups)
        dw = torch.einsum("ngkhw,ngcthw->gkct", grads, patches).reshape(active.shape)
        active_conv_weight(grad_weight, c, out_channels, groups)[0].add_(dw)
    if grad_bias is not None:
        grad_bias[:out_channels].add_(grad.sum((0, 2, 3)))
    if not need_grad_x:
        return None
    kernels = active.to(x.dtype).reshape(active_groups, out_channels // active_groups, -1, kernel.numel())
    dtaps = torch.einsum("ngkhw,gkct->tngchw", grads, kernels).flatten(2, 3)
    padded = x.new_zeros(n, c, h + 2 * padding[0], w + 2 * padding[1])
    for tap, dtap in zip(_taps(padded, kernel, grad.shape[2:], stride, dilation), dtaps, strict=True):
        tap += dtap
    return padded[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y = x[..., :in] @ weight[:out, :in]^T + bias[:out]."""
    y = torch.matmul(x[..., :in_features], weight[:out_features, :in_features].to(x.dtype).t())
    return y if bias is None else y + bias[:out_features].to(x.dtype)


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    need_grad_x: bool,
    in_features: int,
) -> Tensor | None:
    """Adds dW = grad^T x and db into their prefixes, returns dX = grad W (zero past `in_features`)."""
    out_features = grad.size(-1)
    rows = grad.reshape(-1, out_features)
    if grad_weight is not None:
        grad_weight[:out_features, :in_features] += rows.t() @ x[..., :in_features].reshape(-1, in_features)
    if grad_bias is not None:
        grad_bias[:out_features] += rows.sum(0)
    if not need_grad_x:
        return None
    dx = torch.matmul(grad, weight[:out_features, :in_features].to(grad.dtype))
    return F.pad(dx, (0, x.size(-1) - in_features))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def batch_norm(
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
    """y = activation((x - mean) * rstd * weight[:c] + bias[:c] + residual), per view (Ioffe and Szegedy, 2015).

    Returns y, mean [V, C] and rstd [V, C]. Running statistics get the unbiased variance, one update per view.
    """
    c = x.size(1)
    column = (1, -1, *[1] * (x.dim() - 2))
    dims = [0, *range(2, x.dim())]
    outputs, means, rstds = [], [], []
    for view in x.to(_statistics_dtype(x)).chunk(views if training else 1):
        if training:
            var, mean = torch.var_mean(view, dims, correction=0)
            if running_mean is not None and running_var is not None:
                count = view.numel() // c
                with torch.no_grad():
                    unbiased = var * (count / (count - 1))
                    running_mean[:c] += momentum * (mean.to(running_mean.dtype) - running_mean[:c])
                    running_var[:c] += momentum * (unbiased.to(running_var.dtype) - running_var[:c])
        else:
            assert running_mean is not None and running_var is not None
            mean, var = running_mean[:c].to(view.dtype), running_var[:c].to(view.dtype)
        rstd = (var + eps).rsqrt()
        normalised = (view - mean.view(column)) * rstd.view(column)
        if weight is not None:
            normalised = normalised * weight[:c].to(view.dtype).view(column)
        if bias is not None:
            normalised = normalised + bias[:c].to(view.dtype).view(column)
        outputs.append(normalised)
        means.append(mean)
        rstds.append(rstd)
    y = torch.cat(outputs)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return activate(y, activation).to(x.dtype), torch.stack(means), torch.stack(rstds)


def batch_norm_backward(
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
    """Adds dweight = sum(g * normalised) and dbias = sum(g) into their prefixes, returns (dX, dResidual).

    g is grad where the activation passes it. dX = weight * rstd * (g - mean(g) - normalised * mean(g * normalised)) in
    training, without the two means (the statistics being constants) otherwise.
    """
    c = x.size(1)
    column = (1, -1, *[1] * (x.dim() - 2))
    dims = [0, *range(2, x.dim())]
    masked = (grad * activation_mask(y, activation)).to(mean.dtype)
    scale = torch.ones_like(mean[0]) if weight is None else weight[:c].to(mean.dtype)
    dx = []
    for g, view, m, r in zip(masked.chunk(mean.size(0)), x.to(mean.dtype).chunk(mean.size(0)), mean, rstd, strict=True):
        normalised = (view - m.view(column)) * r.view(column)
        if grad_weight is not None:
            grad_weight[:c] += (g * normalised).sum(dims)
        if grad_bias is not None:
            grad_bias[:c] += g.sum(dims)
        if training:
            g = g - g.mean(dims, keepdim=True) - normalised * (g * normalised).mean(dims, keepdim=True)
        dx.append(g * (scale * r).view(column))
    return torch.cat(dx).to(x.dtype), masked.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = (x - mean) * rstd * weight[:C] + bias[:C] over the last dimension (Ba, Kiros and Hinton, 2016)."""
    c = x.size(-1)
    wide = x.to(_statistics_dtype(x))
    var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    y = (wide - mean) * rstd
    if weight is not None:
        y = y * weight[:c].to(y.dtype)
    if bias is not None:
        y = y + bias[:c].to(y.dtype)
    return y.to(x.dtype), mean, rstd


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    need_grad_x: bool,
) -> Tensor | None:
    """Adds dweight and dbias into their prefixes, returns dX."""
    c = x.size(-1)
    g = grad.to(mean.dtype)
    normalised = (x.to(mean.dtype) - mean) * rstd
    if grad_weight is not None:
        grad_weight[:c] += (g * normalised).reshape(-1, c).sum(0)
    if grad_bias is not None:
        grad_bias[:c] += g.reshape(-1, c).sum(0)
    if weight is not None:
        g = g * weight[:c].to(g.dtype)
    dx = g - g.mean(-1, keepdim=True) - normalised * (g * normalised).mean(-1, keepdim=True)
    return (dx * rstd).to(x.dtype)
