"""The body of a residual block, as one operation where there is one."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from us3l_kernels import fused
from us3l_kernels.backends import choose
from us3l_kernels.nn.batch_norm import SlicedBatchNorm2d
from us3l_kernels.nn.conv import SlicedConv2d
from us3l_kernels.nn.conv_norm import conv_norm, is_plain, is_plain_norm
from us3l_kernels.width import current_views


def residual_block(
    x: Tensor, residual: Tensor, conv1: nn.Module, norm1: nn.Module, conv2: nn.Module, norm2: nn.Module
) -> Tensor:
    """norm2(conv2(norm1(conv1(x))), residual): two convolutions, each with its norm, and a sum before the last ReLU.

    In training on a CPU with the native kernels the convolutions of 3x3, stride 1, and the norms are one operation
    (`us3l_kernels.fused`), as long as nothing but their result is asked of the modules: no hooks, no running
    statistics, no synchronised or calibrating norms, no torch.compile. Otherwise they are called in pairs: `conv_norm`.
    """
    if not (_is_fusible(conv2, norm2) and _is_relu_norm(norm1) and _is_relu_norm(norm2)) or x.device.type != "cpu":
        return conv_norm(conv_norm(x, conv1, norm1), conv2, norm2, residual)
    first = conv1 if _is_fusible(conv1, norm1) else None
    c = x if first is not None else conv1(x)
    entry = conv2 if first is None else first  # the first convolution of the operation: it reads c
    if c.dtype != residual.dtype or not _runs_natively(entry, norm2, c):
        return conv_norm(norm1(c) if first is None else conv_norm(x, conv1, norm1), conv2, norm2, residual)
    for norm in (norm1, norm2):
        norm.forget_calibration()
    return fused.basic_block(
        c,
        None if first is None else first.weight,
        (norm1.weight, norm1.bias),
        conv2.weight,
        (norm2.weight, norm2.bias),
        None if first is not None and residual is x else residual,
        fused.BlockSizes(
            c.size(1) if first is None else first.active_out_channels,
            conv2.active_out_channels,
            norm1.eps,
            norm2.eps,
            current_views(),
        ),
    )


def _is_fusible(conv: nn.Module, norm: nn.Module) -> TypeGuard[SlicedConv2d]:
    """Whether these modules, as they stand, are a 3x3 convolution and a batch norm with ReLU that do nothing else."""
    return (
        isinstance(conv, SlicedConv2d)
        and type(conv).forward is SlicedConv2d.forward
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (conv.groups, conv.padding_mode, conv.bias) == (1, "zeros", None)
        and is_plain(conv)
        and _is_relu_norm(norm)
    )


def _is_relu_norm(norm: nn.Module) -> TypeGuard[SlicedBatchNorm2d]:
    return is_plain_norm(norm) and norm.activation == "relu"


def _runs_natively(conv: SlicedConv2d, norm: SlicedBatchNorm2d, x: Tensor) -> bool:
    """Whether this convolution of x and this norm are ones that run on the native kernels, and x is one they take."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if torch.compiler.is_compiling() or x.dtype != dtype or x.dim() != 4:
        return False
    views, channels = current_views(), conv.active_out_channels
    values = x.numel() // x.size(1) // views if x.numel() else 0
    if not (8 <= x.size(1) <= conv.in_channels and channels >= 8 and x.size(0) % views == 0 and values > 1):
        return False  # not for Winograd, or bad input: the modules say what is wrong with it
    # In the order of functional.conv2d: what was measured is found by it.
    call = {"out_channels": channels, "groups": 1, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    return (
        conv.weight.dtype == torch.float32
        and choose("conv2d", x, conv.weight, **call) == "native"
        and choose("batch_norm", x, norm.weight, training=True, views=views, activation="relu", residual=True)
        == "native"
    )
