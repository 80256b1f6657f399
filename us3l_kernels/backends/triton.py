"""Backend `triton`: kernels of our own for NVIDIA GPUs, compiled at the first call of a shape by Triton.

The full weight is read by its prefix, and its gradient added in place; one binary serves every width.
With TRITON_INTERPRET=1 the backend takes CPU tensors instead, and Triton interprets the kernels: for tests.

A kernel that is compiled while a CUDA graph is being captured may break the capture: call once before, as any capture
does. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from us3l_kernels import triton
from us3l_kernels.backends import Backend
from us3l_kernels.layout import is_rows
from us3l_kernels.packed import accumulate_, cast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where `auto` takes a convolution without a measurement: kernel sizes, and the most channels (of x or y) that it pays
# for. Not measured, but what benchmarks/roofline.py predicts: a step is faster as long as our kernels are slower than
# cuDNN's by less than 20 to 80 % (1x1), 16 to 50 % (3x3, up to 128 channels) or 4 to 32 % (3x3, more channels), because
# gradients are added in place and no slice is copied.
PREDICTED_FASTER = {(1, 1): 2048, (3, 3): 128}


def _why_not_dtypes(x: Tensor, weight: Tensor | None) -> str | None:
    if x.dtype not in DTYPES or (weight is not None and weight.dtype not in DTYPES):
        dtypes = f"x is {x.dtype}" + ("" if weight is None else f" and the weight {weight.dtype}")
        return f"it takes float32, bfloat16 and float16, {dtypes}"
    if triton.INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
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


class TritonBackend(Backend):
    name = "triton"
    ops = ("conv2d", "linear")

    def unavailable(self) -> str | None:
        if triton.WHY_NOT_INSTALLED is not None:
            return triton.WHY_NOT_INSTALLED
        if not triton.INTERPRETED and not torch.cuda.is_available():
            return "no GPU is visible to torch (TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests)"
        return None

    def why_not(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        device = "cpu" if triton.INTERPRETED else "cuda"
        if x.device.type != device:
            return f"it takes {device} tensors, x is on {x.device}"
        reason = _why_not_dtypes(x, weight)
        if reason is None and op == "conv2d":
            assert weight is not None
            reason = _why_not_conv2d(x, weight, **arguments)
        if reason is None and op == "linear":
            assert weight is not None
            reason = _why_not_large(x, weight, x.numel() // max(x.size(-1), 1))
        return reason

    def why_slower(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if triton.INTERPRETED:
            return "its kernels are interpreted"
        if op == "linear":
            return "cuBLAS reads a prefix of a weight where it lies, as this does"
        assert weight is not None
        return _why_slower_conv2d(x, weight, **arguments)

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
    ) -> Tensor:
        from us3l_kernels.triton import conv2d

        geometry = conv2d.Geometry.of(weight, stride, padding, dilation)
        active = cast(weight, weight[:out_channels, : x.size(1)], x.dtype)
        return conv2d.conv2d(x, active, bias, out_channels, geometry, _convolution_precision(x))

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
    ) -> Tensor | None:
        from us3l_kernels.triton import conv2d

        geometry, precision = conv2d.Geometry.of(weight, stride, padding, dilation), _convolution_precision(x)
        if grad_bias is not None:
            accumulate_(grad_bias[: grad.size(1)], grad.sum((0, 2, 3), dtype=torch.float32))
        if grad_weight is not None:
            conv2d.weight_gradient(grad, x, grad_weight, geometry, precision)
        if not need_grad_x:
            return None
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        conv2d.input_gradient(grad, cast(weight, weight[: grad.size(1), : x.size(1)], x.dtype), dx, geometry, precision)
        return dx

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
        from us3l_kernels.triton import conv2d

        active = cast(weight, weight[:out_features, :in_features], x.dtype)[:, :, None, None]
        y = conv2d.conv2d(_image(x, in_features), active, bias, out_features, conv2d.POINT, _linear_precision(x))
        return y.view(*x.shape[:-1], out_features)

    def linear_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        need_grad_x: bool,
        in_features: int,
    ) -> Tensor | None:
        from us3l_kernels.triton import conv2d

        precision, grads = _linear_precision(x), _image(grad, grad.size(-1))
        if grad_bias is not None:
            accumulate_(grad_bias[: grad.size(-1)], grads.sum((0, 2, 3), dtype=torch.float32))
        if grad_weight is not None:
            into = grad_weight[:, :, None, None]
            conv2d.weight_gradient(grads, _image(x, in_features), into, conv2d.POINT, precision)
        if not need_grad_x:
            return None
        active = cast(weight, weight[: grad.size(-1), :in_features], x.dtype)[:, :, None, None]
        whole = in_features == x.size(-1)
        dx = x.new_empty(x.shape) if whole else x.new_zeros(x.shape)
        conv2d.input_gradient(grads, active, _image(dx, in_features), conv2d.POINT, precision)
        return dx


def _why_not_conv2d(
    x: Tensor,
    weight: Tensor,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    if groups != 1:
        return f"it takes convolutions with one group, there are {groups}"
    size = [
        (x.size(2 + d) + 2 * padding[d] - dilation[d] * (weight.size(2 + d) - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]
    return _why_not_large(x, weight, x.size(0) * max(x.size(2) * x.size(3), math.prod(size)))


def _why_slower_conv2d(
    x: Tensor,
    weight: Tensor,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
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
