"""Several operations as one, where the kernels have it so: for models whose layers follow each other that way.

What the chain of operations would write to memory and read again is done on the way: by the native kernels the body of
a basic block (csrc/cpu/basic_block.cpp), by the Triton kernels the statistics of a convolution's result. The results
are those of the chain to rounding; the modules decide when it may stand in for them (`nn.residual_block`,
`nn.conv_norm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from us3l_kernels.backends.native import native, winograd_filters
from us3l_kernels.backends.triton import conv2d_batch_norm
from us3l_kernels.gradients import slot_of
from us3l_kernels.library import GradientDestinations, first_derivative_only, ops


def _refuse_ddp(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None and (slot := slot_of(parameter)) is not None:
            slot.refuse_ddp()


# ---------------------------------------------------------------------------------------------- basic blocks, native


class BlockSizes(NamedTuple):
    """channels1, channels2: active outputs of the convolutions. eps1, eps2: of the norms. views: in the batch."""

    channels1: int
    channels2: int
    eps1: float
    eps2: float
    views: int


class _BasicBlock(torch.autograd.Function):
    """Inputs 1 to 6 are the parameters: weight, norm weight, norm bias of the first convolution, then the second's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor | None,
        norm1_weight: Tensor | None,
        norm1_bias: Tensor | None,
        weight2: Tensor,
        norm2_weight: Tensor | None,
        norm2_bias: Tensor | None,
        residual: Tensor | None,
        sizes: BlockSizes,
    ) -> Tensor:
        parameters = (weight1, norm1_weight, norm1_bias, weight2, norm2_weight, norm2_bias)
        _refuse_ddp(*parameters)
        y, c1, c2, mean1, rstd1, mean2, rstd2 = native.basic_block(
            x,
            weight1,
            None if weight1 is None else winograd_filters(weight1, False),
            norm1_weight,
            norm1_bias,
            weight2,
            winograd_filters(weight2, False),
            norm2_weight,
            norm2_bias,
            residual,
            *sizes,
        )
        ctx.save_for_backward(x, *parameters, y, c1, c2, mean1, rstd1, mean2, rstd2)
        ctx.own_residual = residual is None
        return y

    @staticmethod
    @first_derivative_only("basic_block")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, norm1_weight, norm1_bias, weight2, norm2_weight, norm2_bias, *saved = ctx.saved_tensors
        y, c1, c2, *statistics = saved
        parameters = (weight1, norm1_weight, norm1_bias, weight2, norm2_weight, norm2_bias)
        destinations = GradientDestinations(ctx, dict(enumerate(parameters, start=1)))
        need_grad_x, need_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
        dx, dresidual = native.basic_block_backward(
            grad,
            x,
            y,
            c1,
            c2,
            weight1,
            None if weight1 is None or not need_grad_x else winograd_filters(weight1, True),
            norm1_weight,
            norm1_bias,
            weight2,
            winograd_filters(weight2, True),
            norm2_weight,
            *statistics,
            *destinations.into,
            need_grad_x,
            ctx.own_residual and weight1 is not None and need_grad_x,
        )
        if ctx.own_residual:
            dx = dresidual if weight1 is not None else dx + dresidual
        return (
            dx if need_grad_x else None,
            *destinations.returned,
            dresidual if need_residual else None,
            None,
        )


def basic_block(
    x: Tensor,
    weight1: Tensor | None,
    norm1: tuple[Tensor | None, Tensor | None],
    weight2: Tensor,
    norm2: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    sizes: BlockSizes,
) -> Tensor:
    """y = relu(norm2(conv2(relu(norm1(conv1(x))))) + residual), norms with the statistics of each view of the batch.

    x: [N, c, H, W], float32 or bfloat16, on the CPU, channels innermost. weight1, weight2: full [K, C, 3, 3], float32;
    stride 1 and padding 1. Without weight1, x is conv1's result. norm1, norm2: weight and bias, full. residual: like y;
    None: x. Returns [N, channels2, H, W], channels_last.

    Source of the block: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """
    return _BasicBlock.apply(x, weight1, *norm1, weight2, *norm2, residual, sizes)


# ---------------------------------------------------------------------------------------------- pairs, Triton


class PairSizes(NamedTuple):
    """out_channels, stride, padding, dilation: of the convolution. eps, views, activation: of the norm behind it."""

    out_channels: int
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    eps: float
    views: int
    activation: str | None


class _ConvNorm(torch.autograd.Function):
    """Forward: one operation. Backward: those of the two operations, for the statistics were only taken earlier."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        sizes: PairSizes,
    ) -> Tensor:
        _refuse_ddp(weight, norm_weight, norm_bias)
        y, c, mean, rstd = conv2d_batch_norm(x, weight, norm_weight, norm_bias, residual, *sizes)
        # y gives the activation's mask, and is kept by the next layer anyway.
        mask = None if sizes.activation is None else y
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, c, mask, mean, rstd)
        ctx.sizes, ctx.had_residual = sizes, residual is not None
        return y

    @staticmethod
    @first_derivative_only("conv_norm")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, norm_bias, c, y, *statistics = ctx.saved_tensors
        destinations = GradientDestinations(ctx, {1: weight, 2: norm_weight, 3: norm_bias})
        into_weight, *into_norm = destinations.into
        need_grad_x, need_grad_weight, *_, need_residual, _ = ctx.needs_input_grad
        activation = ctx.sizes.activation
        dc, dresidual = ops.batch_norm_backward(
            grad,
            c,
            c if y is None else y,
            norm_weight,
            None if ctx.had_residual else norm_bias,
            *statistics,
            *into_norm,
            need_grad_x or need_grad_weight,
            need_residual and activation is not None,
            True,
            ctx.sizes.views,
            activation,
            "triton",
        )
        dx = None
        if need_grad_x or need_grad_weight:
            geometry = (ctx.sizes.stride, ctx.sizes.padding, ctx.sizes.dilation, 1)
            dx = ops.conv2d_backward(dc, x, weight, into_weight, None, need_grad_x, *geometry, "triton")
        if activation is None:
            dresidual = grad
        return (dx if need_grad_x else None, *destinations.returned, dresidual if need_residual else None, None)


def conv_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    sizes: PairSizes,
) -> Tensor:
    """y = activation(norm(conv(x)) + residual), the norm with the statistics of each view of the batch.

    x: [N, c, H, W], one that backend `triton` takes. weight: full [K, C, kh, kw]; norm_weight, norm_bias: full, or
    None; of x's dtype, or float32. residual: like y, or None. Returns [N, out_channels, H', W'], channels_last.
    """
    y: Tensor = _ConvNorm.apply(x, weight, norm_weight, norm_bias, residual, sizes)
    return y
