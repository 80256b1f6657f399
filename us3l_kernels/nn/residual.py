"""The body of a residual block, as one operation where there is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from us3l_kernels import any_width, fused
from us3l_kernels.backends import choose, measured
from us3l_kernels.backends.native import algorithm_of, in_pairs
from us3l_kernels.library import is_plain_call
from us3l_kernels.nn.batch_norm import SlicedBatchNorm2d
from us3l_kernels.nn.conv import SlicedConv2d
from us3l_kernels.nn.conv_norm import Pairs, are_plain, chained, conv_norm, result_of
from us3l_kernels.width import current_views


def residual_block(x: Tensor, residual: Tensor | None, *layers: nn.Module) -> Tensor:
    """norm(conv(... norm(conv(x)) ...), residual) of modules conv, norm, conv, norm, ...: the sum, if there is a
    residual, is taken before the last norm's activation.

    In training on a CPU with the native kernels, and where any of the convolutions runs on backend `triton`, it is one
    operation (`us3l_kernels.fused`), as long as nothing but their result is asked of the modules: see `conv_norm`.
    Otherwise they are called in pairs: `conv_norm`.

    Raises ValueError if the modules are not pairs.
    """
    if not layers or len(layers) % 2:
        raise ValueError(f"layers: expected a norm behind each convolution, got {len(layers)} modules")
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    if are_plain(pairs):
        if x.is_cpu and any_width.current() is None and (chain := _chain(x, residual, pairs)) is not None:
            for _, plain_norm in pairs:
                plain_norm.forget_calibration()
            return fused.conv_chain(x, residual, chain, current_views())
        if (y := chained(x, residual, pairs)) is not None:
            return y
    *first, (last_conv, last_norm) = pairs
    for conv, norm in first:
        x = conv_norm(x, conv, norm)
    return conv_norm(x, last_conv, last_norm, residual)


def _chain(x: Tensor, residual: Tensor | None, pairs: Pairs) -> list[fused.ChainLayer] | None:
    """What the one operation is told; None if it is not to run. Bad input is the modules': they say what is wrong."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if not is_plain_call((x, residual)) or measured.is_observed():  # someone wants to see the operations
        return None
    if x.dtype != dtype or x.dim() != 4 or x.numel() == 0:
        return None
    # What holds for one of the norms holds for all.
    norm, normalisation = pairs[0][1], {"training": True, "views": current_views(), "residual": False}
    if choose("batch_norm", x, norm.weight, **normalisation, activation=norm.activation) != "native":
        return None
    chain: list[fused.ChainLayer] = []
    read = x
    for conv, norm in pairs:
        found = _layer(read, conv, norm)
        if found is None:
            return None
        layer, result = found
        chain.append(layer)
        # Nobody writes or reads it: it stands for what the next convolution will be given.
        read = torch.empty(result, dtype=dtype, memory_format=torch.channels_last)
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (read.shape, dtype, x.device):
        return None
    return chain


def _layer(
    x: Tensor, conv: SlicedConv2d, norm: SlicedBatchNorm2d
) -> tuple[fused.ChainLayer, tuple[int, int, int, int]] | None:
    """A convolution of x and its norm, if the native kernels run it, and the shape of their result."""
    # A parametrization computes its parameter whenever it is asked for it.
    parameters = weight, norm_weight, norm_bias = conv.weight, norm.weight, norm.bias
    result = result_of(x, conv, weight, norm)
    if result is None or isinstance(conv.padding, str) or conv.dilation != (1, 1):
        return None
    channels = result[1]
    if any(type(p) not in (Tensor, nn.Parameter) or p.dtype != torch.float32 for p in parameters):
        return None
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    algorithm = algorithm_of(x, weight, **geometry, groups=conv.groups)
    if algorithm == "product" and x.dtype != torch.float32 and not in_pairs(x, weight, channels, conv.groups):
        return None
    # In the order of functional.conv2d: what was measured is found by it.
    convolution = {"out_channels": channels, "groups": conv.groups, **geometry}
    if choose("conv2d", x, weight, **convolution) != "native":
        return None
    sizes = (channels, conv.stride, conv.padding, norm.activation, norm.eps)
    return fused.ChainLayer(weight, norm_weight, norm_bias, algorithm, *sizes), result
