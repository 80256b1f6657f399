"""Backend `triton`: kernels of our own for NVIDIA GPUs, compiled at the first call of a shape by Triton.

The full weight is read by its prefix, and its gradient added in place; one binary serves every width.
With TRITON_INTERPRET=1 the backend takes CPU tensors instead, and Triton interprets the kernels: for tests.

A kernel that is compiled while a CUDA graph is being captured may break the capture: call once before, as any capture
does. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from us3l_kernels import triton
from us3l_kernels.backends import Backend
from us3l_kernels.layout import convolved, is_rows
from us3l_kernels.packed import accumulate_, cast

if TYPE_CHECKING:
    from us3l_kernels.triton.reductions import Moments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = 80
MOST_CHANNELS_OF_LAYER_NORM = 8192  # that a program can hold: 16 values a thread, of each tensor

# Where `auto` takes a convolution without a measurement: kernel sizes, and the most channels (of x or y) that it pays
# for. Not measured, but what benchmarks/roofline.py predicts: a step is faster as long as our kernels are slower than
# cuDNN's by less than 20 to 80 % (1x1), 16 to 50 % (3x3, up to 128 channels) or 4 to 32 % (3x3, more channels), because
# gradients are added in place and no slice is copied.
PREDICTED_FASTER = {(1, 1): 2048, (3, 3): 128}


def _why_not_dtypes(x: Tensor, weight: Tensor | None) -> str | None:
    if x.dtype not in DTYPES or (weight is not None and weight.dtype not in DTYPES):
        dtypes = f"x is {x.dtype}" + ("" if weight is None else f" and the weight {weight.dtype}")
        return f"it takes float32, bfloat16 and float16, {dtypes}"
    return None


def _why_not_product(x: Tensor) -> str | None:
    if triton.INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies matrices of bfloat16 wrongly"
    return None


def _why_not_rows(x: Tensor, channels: int) -> str | None:
    if not is_rows(x, channels):
        return f"it takes rows of contiguous channels, x has shape {tuple(x.shape)} and strides {x.stride()}"
    return None


def _why_not_large(x: Tensor, weight: Tensor, pixels: int) -> str | None:
    if max(pixels, weight.numel()) >= 2**30:
        return f"it takes fewer than 2^30 pixels and elements of a weight, there are {pixels} and {weight.numel()}"
    return None


def _precision(x: Tensor, setting: str) -> str:
    """How products are made: of float32 as torch's own setting for that kind of operation says."""
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if setting == "tf32" else "ieee"


def _convolution_precision(x: Tensor) -> str:
    return _precision(x, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]


def _linear_precision(x: Tensor) -> str:
    return _precision(x, torch.backends.cuda.matmul.fp32_precision)


def _image(rows: Tensor, features: int) -> Tensor:
    """rows [..., >= features] as images of one pixel, [rows, features, 1, 1]."""
    return rows[..., :features].reshape(-1, features, 1, 1)


def _active_of(sizes: triton.Sizes | None) -> triton.Active | None:
    """Of an operation that has as many channels on both sides."""
    return None if sizes is None else sizes.outputs


def _add_bias_gradient(grad: Tensor, grad_bias: Tensor, sizes: triton.Sizes | None) -> None:
    """Adds the sum of the images `grad` to the prefix of `grad_bias`."""
    active = _active_of(sizes)
    if active is None:
        total = grad.sum((0, 2, 3), dtype=torch.float32)
    else:
        of_widths = grad.unflatten(0, (active.widths, -1)).sum((1, 3, 4), dtype=torch.float32)
        inside = torch.arange(grad.size(1), device=grad.device) < active.counts[:, None]
        total = of_widths.where(inside, 0).sum(0)
    accumulate_(grad_bias[: grad.size(1)], total)


@cache
def _why_no_driver() -> str | None:
    """Why Triton cannot launch here. Before version 3.9 it compiles its driver and its launchers, with a C compiler and
    Python's headers."""
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018
    except Exception as error:  # of whatever kind the compiler's failure is
        return f"Triton's driver does not load: {type(error).__name__}: {str(error).strip()}"
    return None


class TritonBackend(Backend):
    """Its operations also take the numbers of active channels from the device (`sizes`): all tensors then have the
    channels of the full width, and what lies behind the active ones is neither read nor written."""

    name = "triton"
    def unavailable(self) -> str | None:
        if triton.WHY_NOT_INSTALLED is not None:
            return triton.WHY_NOT_INSTALLED
        if triton.DEVICE == "cuda" and not torch.cuda.is_available():
            return "no GPU is visible to torch (TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests)"
        return None if triton.INTERPRETED else _why_no_driver()

    def why_not(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if x.device.type != triton.DEVICE:
            return f"it takes {triton.DEVICE} tensors, x is on {x.device}"
        if triton.gpu_of(x).capability < LEAST_CAPABILITY:
            return "Triton takes GPUs of compute capability 8.0 and later"
        reason = _why_not_dtypes(x, weight)
        if reason is None and op == "conv2d":
            assert weight is not None
            reason = _why_not_conv2d(x, weight, **arguments)
        if reason is None and op == "linear":
            assert weight is not None
            reason = _why_not_product(x) or _why_not_large(x, weight, x.numel() // max(x.size(-1), 1))
        if reason is None and op == "batch_norm":
            reason = _why_not_rows(x, 1)
        if reason is None and op == "layer_norm":
            reason = _why_not_layer_norm(x)
        return reason

    def why_slower(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if triton.INTERPRETED:
            return "its kernels are interpreted"
        if op == "linear":
            return "cuBLAS reads a prefix of a weight where it lies, as this does"
        if op == "layer_norm":
            return "ATen's reads x once, as this does"
        if op == "batch_norm":  # ATen's reads and writes once more for each view, residual and activation
            return _why_slower_rows(x)
        assert weight is not None
        return why_slower_than_cudnn(x, weight, **arguments)

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_channels: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        sizes: triton.Sizes | None = None,
    ) -> Tensor:
        from us3l_kernels.triton import conv2d, depthwise

        geometry = conv2d.Geometry.of(weight, stride, padding, dilation)
        if _is_depthwise(weight, groups):
            with torch.cuda.device_of(x):
                return depthwise.conv2d(x, weight, bias, geometry, _active_of(sizes))
        active = cast(weight, weight[:out_channels, : x.size(1)], x.dtype)
        return self._product(x, active, bias, out_channels, geometry, _convolution_precision(x), sizes)

    def conv2d_backward(
        self,
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
        sizes: triton.Sizes | None = None,
    ) -> Tensor | None:
        from us3l_kernels.triton import conv2d, depthwise

        geometry, precision = conv2d.Geometry.of(weight, stride, padding, dilation), _convolution_precision(x)
        if grad_bias is not None:
            _add_bias_gradient(grad, grad_bias, sizes)
        if _is_depthwise(weight, groups):
            active = _active_of(sizes)
            with torch.cuda.device_of(x):
                if grad_weight is not None:
                    depthwise.weight_gradient(grad, x, grad_weight, geometry, active)
                return depthwise.input_gradient(grad, weight, x, geometry, active=active)[0] if need_grad_x else None
        if grad_weight is not None:
            conv2d.weight_gradient(grad, x, grad_weight, geometry, precision, sizes)
        if not need_grad_x:
            return None
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        slice_ = cast(weight, weight[: grad.size(1), : x.size(1)], x.dtype)
        self._input_gradient(grad, slice_, dx, geometry, precision, sizes)
        return dx

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_features: int,
        in_features: int,
        sizes: triton.Sizes | None = None,
    ) -> Tensor:
        from us3l_kernels.triton import conv2d

        active = cast(weight, weight[:out_features, :in_features], x.dtype)[:, :, None, None]
        images, precision = _image(x, in_features), _linear_precision(x)
        y = self._product(images, active, bias, out_features, conv2d.POINT, precision, sizes)
        # Not as a view: nobody may write to a view that a Function returns.
        rows: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], out_features])
        return rows

    def linear_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
        in_features: int,
        sizes: triton.Sizes | None = None,
    ) -> Tensor | None:
        from us3l_kernels.triton import conv2d

        precision, grads = _linear_precision(x), _image(grad, grad.size(-1))
        if grad_bias is not None:
            _add_bias_gradient(grads, grad_bias, sizes)
        if grad_weight is not None:
            into = grad_weight[:, :, None, None]
            conv2d.weight_gradient(grads, _image(x, in_features), into, conv2d.POINT, precision, sizes)
        if not need_grad_x:
            return None
        active = cast(weight, weight[: grad.size(-1), :in_features], x.dtype)[:, :, None, None]
        whole = in_features == x.size(-1)
        dx = x.new_empty(x.shape) if whole else x.new_zeros(x.shape)
        self._input_gradient(grads, active, _image(dx, in_features), conv2d.POINT, precision, sizes)
        return dx

    def _product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        outputs: int,
        geometry: Any,
        precision: str,
        sizes: triton.Sizes | None,
    ) -> Tensor:
        """The forward of a convolution with one group, and of a linear layer as one of images of one pixel."""
        from us3l_kernels.triton import conv2d

        return conv2d.conv2d(x, weight, bias, outputs, geometry, precision, sizes)

    def _input_gradient(
        self,
        grad: Tensor,
        weight: Tensor,
        dx: Tensor,
        geometry: Any,
        precision: str,
        sizes: triton.Sizes | None,
    ) -> None:
        from us3l_kernels.triton import conv2d

        conv2d.input_gradient(grad, weight, dx, geometry, precision, sizes=sizes)

    def batch_norm(
        self,
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
        sizes: triton.Sizes | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from us3l_kernels.triton import batch_norm

        statistics, active = (running_mean, running_var), _active_of(sizes)
        with torch.cuda.device_of(x):
            return batch_norm.forward(
                x, weight, bias, *statistics, residual, training, momentum, eps, views, activation, active=active
            )

    def batch_norm_backward(
        self,
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
        sizes: triton.Sizes | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        from us3l_kernels.triton import batch_norm

        norm = triton.Norm(
            x, y if bias is None else None, weight, bias, mean, rstd, activation, _active_of(sizes)
        )
        with torch.cuda.device_of(x):
            return batch_norm.backward(
                grad, norm, grad_weight, grad_bias, need_grad_x, need_grad_residual, training
            )

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from us3l_kernels.triton import layer_norm

        with torch.cuda.device_of(x):
            return layer_norm.forward(x, weight, bias, eps)

    def layer_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
    ) -> Tensor | None:
        from us3l_kernels.triton import layer_norm

        with torch.cuda.device_of(x):
            return layer_norm.backward(grad, x, weight, mean, rstd, grad_weight, grad_bias, need_grad_x)


# What a chain of convolutions and norms (us3l_kernels.fused) asks for beyond the operations.


def conv2d_moments(
    x: Tensor,
    weight: Tensor,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    views: int,
    sizes: triton.Sizes | None,
) -> tuple[Tensor, Moments]:
    """`conv2d` with one group, and the moments of each view of its result, for the norm behind it."""
    from us3l_kernels.triton import conv2d

    geometry = conv2d.Geometry.of(weight, stride, padding, dilation)
    active = cast(weight, weight[:out_channels, : x.size(1)], x.dtype)
    return conv2d.conv2d_moments(x, active, out_channels, geometry, _convolution_precision(x), views, sizes)


def conv2d_input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    added: Tensor | None,
    norm: triton.Norm | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    sizes: triton.Sizes | None,
) -> tuple[Tensor, Tensor | None]:
    """dX of `conv2d`, plus `added`; and what the backward of `norm` needs, if x is its result."""
    from us3l_kernels.triton import conv2d, depthwise

    geometry = conv2d.Geometry.of(weight, stride, padding, dilation)
    if _is_depthwise(weight, groups):
        with torch.cuda.device_of(x):
            return depthwise.input_gradient(grad, weight, x, geometry, added, norm, _active_of(sizes))
    active = cast(weight, weight[: grad.size(1), : x.size(1)], x.dtype)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, conv2d.input_gradient(grad, active, dx, geometry, _convolution_precision(x), added, norm, sizes)


def batch_norm_of_moments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    views: int,
    activation: str | None,
    moments: Moments | None,
    active: triton.Active | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm` in training, without running statistics, of x whose moments may be known."""
    from us3l_kernels.triton import batch_norm

    with torch.cuda.device_of(x):
        return batch_norm.forward(
            x, weight, bias, None, None, residual, True, 0.0, eps, views, activation, moments, active
        )


def batch_norm_backward_of_sums(
    grad: Tensor,
    norm: triton.Norm,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    need_grad_x: bool,
    need_grad_residual: bool,
    sums: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """`batch_norm_backward` in training; with sums that may be known, only with need_grad_x."""
    from us3l_kernels.triton import batch_norm

    with torch.cuda.device_of(grad):
        return batch_norm.backward(
            grad, norm, grad_weight, grad_bias, need_grad_x, need_grad_residual, True, sums
        )


def _why_not_conv2d(
    x: Tensor,
    weight: Tensor,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    depthwise = _is_depthwise(weight, groups)
    if groups != 1 and not depthwise:
        return f"it takes convolutions with one group or one filter per channel, there are {groups} groups"
    size = convolved(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    reason = None if depthwise else _why_not_product(x)
    return reason or _why_not_large(x, weight, x.size(0) * max(x.size(2) * x.size(3), math.prod(size)))


def _is_depthwise(weight: Tensor, groups: int) -> bool:
    return groups > 1 and weight.size(1) == 1 and weight.size(0) == groups


def why_slower_than_cudnn(
    x: Tensor,
    weight: Tensor,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    if _is_depthwise(weight, groups):
        return _why_slower_rows(x)
    kernel, channels, most = (weight.size(2), weight.size(3)), (x.size(1), out_channels), max(x.size(1), out_channels)
    if x.dtype == torch.float32:
        return "its tiles are for half precision, x is float32"
    if not is_rows(x, 1):
        return "x would be copied to channels_last"
    if channels[0] % 8 or channels[1] % 8:
        return f"it reads single elements unless channels are multiples of 8, there are {channels[0]} to {channels[1]}"
    if kernel not in PREDICTED_FASTER or list(stride) != [1, 1] or list(dilation) != [1, 1]:
        sizes = " and ".join(f"{h}x{w}" for h, w in PREDICTED_FASTER)
        return f"only {sizes} with stride 1 are predicted to be faster than cuDNN's, this is {kernel} by {stride}"
    if most > PREDICTED_FASTER[kernel]:
        return f"it is predicted to be faster than cuDNN up to {PREDICTED_FASTER[kernel]} channels, there are {most}"
    return None


def _why_slower_rows(x: Tensor) -> str | None:
    if not is_rows(x, 1):
        return "x would be copied to channels_last"
    if x.size(1) % 8:
        return f"it reads single elements unless channels are multiples of 8, there are {x.size(1)}"
    return None


def _why_not_layer_norm(x: Tensor) -> str | None:
    if x.size(-1) > MOST_CHANNELS_OF_LAYER_NORM:
        return f"it takes at most {MOST_CHANNELS_OF_LAYER_NORM} channels, x has {x.size(-1)}"
    return _why_not_rows(x, x.dim() - 1)
