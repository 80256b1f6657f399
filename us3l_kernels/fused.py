"""Several operations as one, where the native kernels have it so: for models whose layers follow each other that way.

What the chain of operations would write to memory and read again is done on the way (csrc/cpu/basic_block.cpp). The
results are those of the chain to rounding; the modules decide when it may stand in for them (`nn.residual_block`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from us3l_kernels.backends.native import native, winograd_filters
from us3l_kernels.gradients import slot_of
from us3l_kernels.library import GradientDestinations, first_derivative_only


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
        for parameter in parameters:
            if parameter is not None and (slot := slot_of(parameter)) is not None:
                slot.refuse_ddp()
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
