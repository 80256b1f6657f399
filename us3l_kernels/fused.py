"""Several operations as one, where the kernels have it so: for models whose layers follow each other that way.

What the chain of operations would write to memory and read again is done on the way: by the native kernels in the
body of a residual block (csrc/cpu/conv_chain.cpp); by the Triton kernels the statistics of a convolution's result and,
in the backward, the sums for the norm in front of a convolution and the addition of a residual's gradient. The results
are those of the chain to rounding; the modules decide when it may stand in for them (`nn.residual_block`,
`nn.conv_norm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from us3l_kernels.backends.native import ACTIVATIONS, ALGORITHMS, Algorithm, native, winograd_filters
from us3l_kernels.backends.triton import (
    batch_norm_backward_of_sums,
    batch_norm_of_moments,
    conv2d_input_gradient,
    conv2d_moments,
)
from us3l_kernels.gradients import slot_of
from us3l_kernels.library import GradientDestinations, below_autograd, first_derivative_only
from us3l_kernels.triton import Norm, Sizes

if TYPE_CHECKING:
    from us3l_kernels.triton.reductions import Moments


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


# ---------------------------------------------------------------------------------------------- chains, Triton


class Pair(NamedTuple):
    """A convolution without bias and the batch norm behind it, on Triton's kernels.

    out_channels: active. backend: of the convolution. sizes: if the active channels are read from the device, which is
    for backend `triton` alone; out_channels are then those of the full width.
    """

    out_channels: int
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    backend: str
    activation: str | None
    eps: float
    sizes: Sizes | None = None

    @property
    def has_epilogues(self) -> bool:
        """Whether the convolution takes sums for norms while it writes: in dX, and with one group in the forward."""
        return self.backend == "triton"


class _KnownSums(NamedTuple):
    """The sums of a norm's backward for this gradient of its result, as long as the gradient is of this version and the
    backward is the one that computed it.
    """

    grad: Tensor
    version: int
    sums: Tensor
    backward: int

    def of(self, grad: Tensor) -> Tensor | None:
        """The sums, if they are those of `grad`."""
        current = torch._C._current_graph_task_id()
        if self.grad is not grad or self.version != grad._version or self.backward != current:
            return None
        if self.sums.is_cuda:  # made on the stream of the block behind
            self.sums.record_stream(torch.cuda.current_stream(self.sums.device))
        return self.sums


class _PairChain(torch.autograd.Function):
    """Inputs from 5 on are the parameters, three for each pair. The residual is None, x, or another tensor.

    producer: the node of the chain whose result x is. The product that gives dX takes the sums that the producer's last
    norm needs. They are left with the producer, which uses them if dX is all of the gradient that comes: autograd hands
    it on untouched unless x had other readers or hooks. Nobody else sees a difference: the producer's activation masks
    what is summed, and not dX.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        pairs: Sequence[Pair],
        views: int,
        producer: Any,
        *parameters: Tensor | None,
    ) -> Tensor:
        _refuse_ddp(*parameters)
        read, saved = x, []
        for i, pair in enumerate(pairs):
            weight, norm_weight, norm_bias = parameters[3 * i : 3 * i + 3]
            assert weight is not None
            c, moments = _convolution(read, weight, pair, views)
            added = residual if i == len(pairs) - 1 else None
            active = None if pair.sizes is None else pair.sizes.outputs
            y, mean, rstd = batch_norm_of_moments(
                c, norm_weight, norm_bias, added, pair.eps, views, pair.activation, moments, active
            )
            saved += [read, c, mean, rstd]
            read = y
        # Only of a sum does y tell what its activation let through.
        masks_by_y = residual is not None and pairs[-1].activation is not None
        ctx.save_for_backward(*saved, *parameters, y if masks_by_y else None)
        ctx.pairs, ctx.residual_is_x, ctx.producer = pairs, residual is x, producer
        ctx.has_saved_hooks = _has_saved_hooks()
        ctx.readers, ctx.known = 0, None
        return y

    @staticmethod
    @first_derivative_only("conv_norm")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        known, ctx.known = ctx.known, None
        pairs, saved, n = ctx.pairs, ctx.saved_tensors, len(ctx.pairs)
        for pair in pairs:
            if pair.sizes is not None:
                pair.sizes.check_version()
        sums = None if known is None else known.of(grad)
        destinations = GradientDestinations(ctx, dict(enumerate(saved[4 * n : 7 * n], start=5)))
        need_grad_x, need_grad_residual = ctx.needs_input_grad[:2]
        dx = dresidual = None
        for i in reversed(range(n)):
            pair, norm = pairs[i], _norm(pairs, saved, i)
            into_weight, into_norm_weight, into_norm_bias = destinations.into[3 * i : 3 * i + 3]
            need_dx = need_grad_x or any(into is not None for into in destinations.into[: 3 * i])
            need_dc = need_dx or into_weight is not None
            masks = i == n - 1 and need_grad_residual and pair.activation is not None
            known_sums = sums if need_dc else None
            dc, masked = batch_norm_backward_of_sums(
                grad, norm, into_norm_weight, into_norm_bias, need_dc, masks, known_sums
            )
            if i == n - 1 and need_grad_residual:
                dresidual = masked if masks else grad
            if dc is None:
                break
            x, weight = saved[4 * i], saved[4 * n + 3 * i]
            if not need_dx:
                _convolution_backward(dc, x, weight, into_weight, pair)
                break
            added = dresidual if i == 0 and ctx.residual_is_x else None
            before = _norm(pairs, saved, i - 1) if i > 0 else _norm_of_producer(ctx.producer)
            grad, sums = _joined_gradient(dc, x, weight, into_weight, pair, added, before)
            if i == 0:
                dx = grad
                if sums is not None:
                    ctx.producer.known = _KnownSums(dx, dx._version, sums, torch._C._current_graph_task_id())
        if ctx.residual_is_x:
            dresidual = None  # it is in dx
        return (dx, dresidual, None, None, None, *destinations.returned)


def _has_saved_hooks() -> bool:
    """Whether hooks decide what becomes of the tensors that are saved now (checkpoints, offloading)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _producer_of(x: Tensor) -> Any:
    """The node of the chain whose result x is, if what it saved may be looked at once more and x has no hooks."""
    node: Any = x.grad_fn
    if not torch.is_grad_enabled() or getattr(node, "_forward_cls", None) is not _PairChain:
        return None
    if node.has_saved_hooks or _has_saved_hooks() or x._backward_hooks:
        return None
    node.readers += 1
    return node


def _norm_of_producer(node: Any) -> Norm | None:
    """The last norm of a producer that is to run in this backward, with a gradient from one reader alone."""
    if node is None or node.readers > 1 or not torch._C._will_engine_execute_node(node):
        return None
    try:
        saved = node.saved_tensors
    except RuntimeError:  # freed, or changed since: it says so itself
        return None
    return _norm(node.pairs, saved, len(node.pairs) - 1)


def _norm(pairs: Sequence[Pair], saved: Sequence[Any], i: int) -> Norm:
    """That of a pair, from what the forward has saved, or what hooks on saved tensors have made of it."""
    n = len(pairs)
    _, c, mean, rstd = saved[4 * i : 4 * i + 4]
    c = c.contiguous(memory_format=torch.channels_last)
    _, weight, bias = saved[4 * n + 3 * i : 4 * n + 3 * i + 3]
    y = saved[-1] if i == n - 1 else None
    if y is not None:  # hooks on saved tensors may have changed its strides
        y = y.contiguous(memory_format=torch.channels_last)
    sizes = pairs[i].sizes
    active = None if sizes is None else sizes.outputs
    return Norm(c, y, weight, bias if y is None else None, mean, rstd, pairs[i].activation, active)


def _convolution(x: Tensor, weight: Tensor, pair: Pair, views: int) -> tuple[Tensor, Moments | None]:
    """The convolution of a pair, as rows of channels; with the moments of its result if it takes them."""
    geometry = (pair.out_channels, pair.stride, pair.padding, pair.dilation)
    if pair.has_epilogues and pair.groups == 1:
        return conv2d_moments(x, weight, *geometry, views, pair.sizes)
    c = below_autograd["conv2d"](x, weight, None, *geometry, pair.groups, pair.sizes or pair.backend)
    return c.contiguous(memory_format=torch.channels_last), None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, into_weight: Tensor | None, pair: Pair, need_dx: bool = False
) -> Tensor:
    """Adds dW into `into_weight`; returns dX if it is needed."""
    geometry = (pair.stride, pair.padding, pair.dilation, pair.groups)
    dx: Tensor = below_autograd["conv2d_backward"](
        grad, x, weight, into_weight, None, need_dx, *geometry, pair.sizes or pair.backend
    )
    return dx


def _joined_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    into_weight: Tensor | None,
    pair: Pair,
    added: Tensor | None,
    norm: Norm | None,
) -> tuple[Tensor, Tensor | None]:
    """(dX plus `added`, what `norm`, whose result x is, needs of it if that is known), with dW as above."""
    if not pair.has_epilogues:
        dx = _convolution_backward(grad, x, weight, into_weight, pair, need_dx=True)
        return (dx if added is None else dx.add_(added)), None
    if into_weight is not None:
        _convolution_backward(grad, x, weight, into_weight, pair)
    return conv2d_input_gradient(
        grad, x, weight, added, norm, pair.stride, pair.padding, pair.dilation, pair.groups, pair.sizes
    )


def pair_chain(
    x: Tensor, residual: Tensor | None, pairs: Sequence[Pair], parameters: Sequence[Tensor | None], views: int
) -> Tensor:
    """y = act(norm(conv(... act(norm(conv(x))) ...)) + residual), norms with the statistics of each view of the batch.

    x: [N, c, H, W], one that backend `triton` takes. parameters: of each pair the convolution's weight, full, and the
    norm's weight and bias, full, or None; of x's dtype, or float32. residual: like y, or None. views: stacked in the
    batch. Returns [N, out_channels, H', W'], channels_last.
    """
    y: Tensor = _PairChain.apply(x, residual, pairs, views, _producer_of(x), *parameters)
    return y
