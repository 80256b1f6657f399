"""A convolution and the batch norm behind it, as one operation where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from us3l_kernels import any_width, fused, triton
from us3l_kernels.backends import BACKENDS, choose, measured, requested
from us3l_kernels.backends.native import is_depthwise
from us3l_kernels.functional import autocast_dtype
from us3l_kernels.layout import convolved
from us3l_kernels.library import is_plain_call
from us3l_kernels.nn.batch_norm import SlicedBatchNorm2d
from us3l_kernels.nn.conv import SlicedConv2d
from us3l_kernels.triton import Sizes
from us3l_kernels.width import current_views


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
    """norm(conv(x)), with `residual` added before the norm's activation if it is given: a `residual_block` of one pair.

    In training, where the convolution runs on backend `triton`, it takes the statistics of its result while it writes
    it, and the norm reads it once less (`us3l_kernels.fused`). That is so as long as nothing but their result is asked
    of the modules: no hooks, no running statistics, no synchronised or calibrating norms, no torch.compile, no other
    tracer, mode or subclass of Tensor, no tuner that measures operations one by one. Otherwise the modules are called.
    The results are the same to rounding.
    """
    pairs = [(conv, norm)]
    if are_plain(pairs) and (y := chained(x, residual, pairs)) is not None:
        return y
    return norm(conv(x)) if residual is None else norm(conv(x), residual)


Pairs = Sequence[tuple[SlicedConv2d, SlicedBatchNorm2d]]


def are_plain(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> TypeGuard[Pairs]:
    """Whether these modules, as they stand, do nothing else. It is asked before x, which torch.fx may not have."""
    return all(_is_plain_conv(conv) and _is_plain_norm(norm) for conv, norm in pairs)


def _is_plain(module: nn.Module) -> bool:
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


def _is_plain_norm(norm: nn.Module) -> TypeGuard[SlicedBatchNorm2d]:
    """Whether this module, as it stands, is a batch norm with statistics of the batch that does nothing else."""
    return (
        isinstance(norm, SlicedBatchNorm2d)
        and type(norm).forward is SlicedBatchNorm2d.forward
        and norm.uses_batch_statistics_alone()
        and _is_plain(norm)
    )


def _is_plain_conv(conv: nn.Module) -> TypeGuard[SlicedConv2d]:
    """Whether this module, as it stands, is a convolution with zeros around, without bias, that does nothing else."""
    return (
        isinstance(conv, SlicedConv2d)
        and type(conv).forward is SlicedConv2d.forward
        and (conv.padding_mode, conv.bias) == ("zeros", None)
        and _is_plain(conv)
    )


def chained(x: Tensor, residual: Tensor | None, pairs: Pairs) -> Tensor | None:
    """The chain of the pairs as one operation on Triton's kernels; None if it is not to run. Bad input is the modules':
    they say what is wrong.
    """
    if x.device.type != triton.DEVICE:  # at once: on a CPU the checks would cost a fifth of a small layer's time
        return None
    if not is_plain_call((x, residual)) or measured.is_observed() or x.dim() != 4:
        return None
    if autocast_dtype(x) not in (None, x.dtype) or requested()["batch_norm"] not in ("auto", "triton"):
        return None
    chain: list[fused.Pair] = []
    call: dict[str, Any]
    parameters: list[Tensor | None] = []
    read = x
    for conv, norm in pairs:
        # A parametrization computes its parameter whenever it is asked for it.
        of_pair = conv.weight, norm.weight, norm.bias
        sizes = any_width.sizes_of(conv, read)
        result = result_of(read, conv, of_pair[0], norm, sizes)
        given = [t for t in of_pair if t is not None]
        if result is None or any(type(t) not in (Tensor, nn.Parameter) for t in given):
            return None
        if any(t.device != x.device or t.dtype not in (x.dtype, torch.float32) for t in given):
            return None
        call = {"out_channels": result[1], "groups": conv.groups}
        call |= {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        if sizes is not None and not BACKENDS["triton"].can_run("conv2d", read, of_pair[0], **call):
            return None
        backend = choose("conv2d", read, of_pair[0], **call) if sizes is None else "triton"
        chain.append(fused.Pair(**call, backend=backend, activation=norm.activation, eps=norm.eps, sizes=sizes))
        parameters += of_pair
        # Nobody writes or reads it: it stands for what the next convolution will be given.
        read = torch.empty(result, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        any_width.mark(read, None if sizes is None else sizes.outputs)
    like = (read.shape, read.dtype, read.device)
    if residual is not None and (residual.shape, residual.dtype, residual.device) != like:
        return None
    if not any(pair.has_epilogues for pair in chain):  # nothing to be gained
        return None
    for _, norm in pairs:
        norm.forget_calibration()
    active = any_width.active_of(read)
    if residual is not None:
        any_width.check_sum(active, residual)
    with any_width.unmarked():
        return any_width.mark(fused.pair_chain(x, residual, chain, parameters, current_views()), active)


def result_of(
    x: Tensor, conv: SlicedConv2d, weight: Tensor, norm: SlicedBatchNorm2d, sizes: Sizes | None = None
) -> tuple[int, int, int, int] | None:
    """The shape of conv(x), if the convolution has one group or a filter for each channel, and the norm takes it."""
    depthwise = is_depthwise(weight, conv.groups)
    if isinstance(conv.padding, str) or (conv.groups > 1 and not depthwise):
        return None
    channels = x.size(1) if depthwise else conv.result_channels(x.size(1), sizes)
    size = convolved(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    views = current_views()
    fits = 1 <= x.size(1) <= conv.in_channels and channels <= norm.num_features and min(size) >= 1
    if not fits or x.size(0) % views or x.size(0) // views * size[0] * size[1] <= 1:
        return None
    return (x.size(0), channels, *size)
