"""Every sliced operation in plain PyTorch: the oracle of the tests, the documentation, the last fallback.

A slice is a prefix. The active input channels are those that `x` brings, the active output channels are an argument;
the parameters come in at full size and only their prefix is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def active_conv_weight(
    weight: Tensor, in_channels: int, out_channels: int, groups: int
) -> tuple[Tensor, int]:
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
    n, c, h, w = x.shape
    active, groups = active_conv_weight(weight, c, out_channels, groups)
    kh, kw = weight.shape[2:]
    height = (h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (w + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    taps = [
        padded[
            :,
            :,
            i * dilation[0] : i * dilation[0] + (height - 1) * stride[0] + 1 : stride[0],
            j * dilation[1] : j * dilation[1] + (width - 1) * stride[1] + 1 : stride[1],
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    patches = torch.stack(taps, dim=2).reshape(n, groups, c // groups, kh * kw, height, width)
    kernels = active.to(x.dtype).reshape(groups, out_channels // groups, c // groups, kh * kw)
    y = torch.einsum("ngcthw,gkct->ngkhw", patches, kernels).reshape(n, out_channels, height, width)
    return y if bias is None else y + bias[:out_channels].to(x.dtype).view(-1, 1, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y = x[..., :in] @ weight[:out, :in]^T + bias[:out]."""
    y = torch.matmul(x[..., :in_features], weight[:out_features, :in_features].to(x.dtype).t())
    return y if bias is None else y + bias[:out_features].to(x.dtype)


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


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
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
