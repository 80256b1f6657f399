"""Several operations as one, where the kernels have it so: for models whose layers follow each other that way.

What the chain of operations would write to memory and read again is done on the way: by the native kernels in the
body of a residual block (csrc/cpu/conv_chain.cpp), by the Triton kernels the statistics of a convolution's result. The
results are those of the chain to rounding; the modules decide when it may stand in for them (`nn.residual_block`,
`nn.conv_norm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from us3l_kernels.backends.native import ACTIVATIONS, ALGORITHMS, Algorithm, native, winograd_filters
from us3l_kernels.backends.triton import conv2d_batch_norm
from us3l_kernels.gradients import slot_of
from us3l_kernels.library import GradientDestinations, first_derivative_only, ops


def _refuse_ddp(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None and (slot := slot_of(parameter)) is not None:
            slot.refuse_ddp()


# ---------------------------------------------------------------------------------------------- chains, native


class ChainLayer(NamedTuple):
    """A convolution without bias and the batch norm behind it.

    weight, norm_weight, norm_bias: full, float32. algorithm: see `backends.native.algorithm_of`. out_channels: active.
    """

    weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    algorithm: Algorithm
    out_channels: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    activation: str | None
    eps: float

    def sizes(self) -> tuple[int, ...]:
        """In the order of csrc/ops.h."""
        algorithm, activation = ALGORITHMS[self.algorithm], ACTIVATIONS[self.activation]
        return (algorithm, self.out_channels, *self.stride, *self.padding, activation)


class _ConvChain(torch.autograd.Function):
    """Inputs from 4 on are the parameters, three for each layer. The residual is None, x, or another tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, layers: Sequence[ChainLayer], views: int, *parameters: Tensor
    ) -> Tensor:
        _refuse_ddp(*parameters)
        algorithms = [layer.algorithm for layer in layers]
        sizes = [size for layer in layers for size in layer.sizes()]
        eps = [layer.eps for layer in layers]
        filters = [_filters(*of, False) for of in zip(algorithms, parameters[::3], strict=True)]
        y, convolved, statistics = native.conv_chain(x, residual, parameters, filters, sizes, eps, views)
        # Only of a sum does y tell what its activation let through.
        ctx.reads_y = residual is not None and layers[-1].activation is not None
        ctx.save_for_backward(x, y if ctx.reads_y else None, *parameters, *convolved, *statistics)
        ctx.algorithms, ctx.sizes, ctx.eps, ctx.residual_is_x = algorithms, sizes, eps, residual is x
        return y

    @staticmethod
    @first_derivative_only("conv_chain")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.algorithms)
        x, y, *saved = ctx.saved_tensors
        parameters, convolved, statistics = saved[: 3 * n], saved[3 * n : 4 * n], saved[4 * n :]
        destinations = GradientDestinations(ctx, dict(enumerate(parameters, start=4)))
        need_grad_x, need_grad_residual = ctx.needs_input_grad[:2]
        filters = [
            _filters(algorithm, weight, True) if i > 0 or need_grad_x else None
            for i, (algorithm, weight) in enumerate(zip(ctx.algorithms, parameters[::3], strict=True))
        ]
        dx, dresidual = native.conv_chain_backward(
            grad,
            x,
            y,
            parameters,
            filters,
            ctx.sizes,
            ctx.eps,
            convolved,
            statistics,
            destinations.into,
            need_grad_x,
            ctx.residual_is_x,
        )
        if ctx.residual_is_x or not need_grad_residual:
            dresidual = None  # it is in dx
        elif not ctx.reads_y:
            dresidual = grad
        return (dx if need_grad_x else None, dresidual, None, None, *destinations.returned)


def _filters(algorithm: Algorithm, weight: Tensor, input_channels_in_lanes: bool) -> Tensor | None:
    return winograd_filters(weight, input_channels_in_lanes) if algorithm == "winograd" else None


def conv_chain(x: Tensor, residual: Tensor | None, layers: Sequence[ChainLayer], views: int) -> Tensor:
    """y = act(norm(conv(... act(norm(conv(x))) ...)) + residual), norms with the statistics of each view of the batch.

    x: [N, c, H, W], float32 or bfloat16, on the CPU, channels innermost; all layers of the kinds that backend `native`
    takes. residual: like y, or None. views: stacked in the batch. Returns [N, out_channels, H', W'], channels_last.
    """
    parameters = [t for layer in layers for t in (layer.weight, layer.norm_weight, layer.norm_bias)]
    y: Tensor = _ConvChain.apply(x, residual, layers, views, *parameters)
    return y


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
