"""A convolution and the batch norm behind it, as one operation where there is one."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from us3l_kernels import fused
from us3l_kernels.backends import choose, measured, requested
from us3l_kernels.functional import autocast_dtype
from us3l_kernels.layout import convolved
from us3l_kernels.nn.batch_norm import SlicedBatchNorm2d
from us3l_kernels.nn.conv import SlicedConv2d
from us3l_kernels.triton import INTERPRETED
from us3l_kernels.width import current_views


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
    """norm(conv(x)), with `residual` added before the norm's activation if it is given.

    In training, where the convolution runs on backend `triton`, it takes the statistics of its result while it writes
    it, and the norm reads it once less (`us3l_kernels.fused`). That is so as long as nothing but their result is asked
    of the modules: no hooks, no running statistics, no synchronised or calibrating norms, no torch.compile, no tuner
    that measures operations one by one. Otherwise the modules are called. The results are the same to rounding.
    """
    if is_plain_conv(conv) and is_plain_norm(norm) and (sizes := _sizes(conv, norm, x, residual)) is not None:
        norm.forget_calibration()
        return fused.conv_norm(x, conv.weight, norm.weight, norm.bias, residual, sizes)
    return norm(conv(x)) if residual is None else norm(conv(x), residual)


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward and nothing else."""
    of_all = nn.modules.module
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
        or "forward" in vars(module)
    )


def is_plain_norm(norm: nn.Module) -> TypeGuard[SlicedBatchNorm2d]:
    """Whether this module, as it stands, is a batch norm with statistics of the batch that does nothing else."""
    return (
        isinstance(norm, SlicedBatchNorm2d)
        and type(norm).forward is SlicedBatchNorm2d.forward
        and norm.uses_batch_statistics_alone()
        and is_plain(norm)
    )


def is_plain_conv(conv: nn.Module) -> TypeGuard[SlicedConv2d]:
    """Whether this module, as it stands, is a convolution with zeros around, without bias, that does nothing else."""
    return (
        isinstance(conv, SlicedConv2d)
        and type(conv).forward is SlicedConv2d.forward
        and (conv.padding_mode, conv.bias) == ("zeros", None)
        and is_plain(conv)
    )


def _sizes(conv: SlicedConv2d, norm: SlicedBatchNorm2d, x: Tensor, residual: Tensor | None) -> fused.PairSizes | None:
    """What the one operation is told; None if it is not to run. Bad input is the modules': they say what is wrong."""
    if not (x.is_cuda or INTERPRETED):  # at once: on a CPU the checks would cost a fifth of a small layer's time
        return None
    if torch.compiler.is_compiling() or measured.is_observed() or x.dim() != 4:
        return None
    if isinstance(conv.padding, str) or conv.groups > 1:
        return None
    stride, padding, dilation = geometry = conv.stride, conv.padding, conv.dilation
    channels, views = conv.active_out_channels, current_views()
    size = convolved(x.shape[2:], conv.kernel_size, *geometry)
    fits = 1 <= x.size(1) <= conv.in_channels and channels <= norm.num_features
    if not fits or min(size) < 1 or x.size(0) % views or x.size(0) // views * size[0] * size[1] <= 1:
        return None
    if autocast_dtype(x) not in (None, x.dtype):
        return None
    expected = ((x.size(0), channels, *size), x.dtype, x.device)
    if residual is not None and (residual.shape, residual.dtype, residual.device) != expected:
        return None
    parameters = [t for t in (conv.weight, norm.weight, norm.bias) if t is not None]
    if any(t.device != x.device or t.dtype not in (x.dtype, torch.float32) for t in parameters):
        return None
    if requested()["batch_norm"] not in ("auto", "triton"):
        return None
    call = {"out_channels": channels, "groups": 1, "stride": stride, "padding": padding, "dilation": dilation}
    if choose("conv2d", x, conv.weight, **call) != "triton":
        return None
    return fused.PairSizes(channels, *geometry, norm.eps, views, norm.activation)
