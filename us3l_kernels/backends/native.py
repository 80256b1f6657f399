"""Backend `native`: the CPU kernels of csrc, chosen for the CPU's instruction set at run time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from us3l_kernels import _native, weight_cache
from us3l_kernels.backends import Backend
from us3l_kernels.layout import is_rows

native = torch.ops.us3l_native

_CAPABILITY = torch.backends.cpu.get_cpu_capability()

# The codes of csrc/ops.h.
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}
Algorithm = Literal["product", "winograd", "winograd_stride2", "depthwise"]
ALGORITHMS: dict[Algorithm, int] = {"product": 0, "winograd": 1, "winograd_stride2": 2, "depthwise": 3}


def why_not_channels_last(x: Tensor) -> str | None:
    if x.stride(1) != 1 and x.size(1) > 1:
        return f"it takes channels_last (channels innermost), x has shape {tuple(x.shape)} and strides {x.stride()}"
    return None


def why_not_rows(x: Tensor) -> str | None:
    if not is_rows(x, 1):
        return f"it takes channels_last (channels innermost), x has shape {tuple(x.shape)} and strides {x.stride()}"
    return None


def is_depthwise(weight: Tensor, groups: int) -> bool:
    """Whether every channel has one filter of its own."""
    return weight.size(1) == 1 and weight.size(0) == groups


def algorithm_of(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Algorithm:
    """How a convolution is computed."""
    if is_depthwise(weight, groups):
        return "depthwise"
    geometry = (list(stride), list(padding), list(dilation), groups)
    (height, width), three = x.shape[2:], weight.shape[2:] == (3, 3)
    # Tiles have 4x4 outputs, whichever of them lie inside of the image, for the products of 4 outputs, or of 9 with
    # stride 2. Fewer than 8 channels do not pay for the transforms.
    if three and geometry == ([1, 1], [1, 1], [1, 1], 1) and x.size(1) >= 8:
        return "winograd" if height * width > 4 * -(-height // 4) * -(-width // 4) else "product"  # F(4x4, 3x3)
    if three and geometry == ([2, 2], [1, 1], [1, 1], 1) and x.size(1) >= 16 and x.dtype == torch.float32:
        tiles, outputs = -(-height // 8) * -(-width // 8), -(-height // 2) * -(-width // 2)
        if x.size(0) * tiles >= 8 and outputs > 9 * tiles:
            return "winograd_stride2"
    return "product"


@functools.cache
def _has_pairs() -> bool:
    return _native.isa() == "avx512" and _native.cpu_features().get("avx512bf16", False)


def in_pairs(x: Tensor, weight: Tensor, out_channels: int, groups: int) -> bool:
    """Whether the matrix product of a bfloat16 x [N, C, H, W] is one of pairs (AVX512-BF16), summed in float32."""
    if not _has_pairs():
        return False
    active = 1 if groups == 1 else x.size(1) // weight.size(1)
    channels = (x.size(1) // active, out_channels // active)
    return all(n % 2 == 0 for n in (*channels, x.stride(0), x.stride(2), x.stride(3)))


def _why_not_conv2d(x: Tensor, weight: Tensor, out_channels: int, **geometry: Any) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != torch.float32:
        return f"it takes float32 and bfloat16 x with float32 filters, x is {x.dtype} and the weight {weight.dtype}"
    return why_not_channels_last(x)


def _why_slower_pairs(x: Tensor, weight: Tensor, out_channels: int, stride: Sequence[int], groups: int) -> str | None:
    """Of a bfloat16 matrix product. The ratios are of forward, dx and dW together."""
    if not in_pairs(x, weight, out_channels, groups):
        return "a bfloat16 product is fast with AVX512-BF16, even channels and even strides only, else it is float32's"
    if groups > 1:
        return "bfloat16 products of several groups were not measured"
    points = x.size(0) * -(-x.size(2) // stride[0]) * -(-x.size(3) // stride[1])
    if points < 256:
        return f"bfloat16 products were measured with 256 pixels of the output and more, there are about {points}"
    # A 1x1 convolution with stride pays earlier: ATen is slow at its gradient of x.
    pointwise = weight.shape[2:] == (1, 1)
    needed = (64 if max(stride) > 1 else 256) if pointwise else 128
    if min(x.size(1), out_channels) < needed:
        return (
            f"a bfloat16 product of this geometry with fewer than {needed} channels ran at 0.9 to 1.0x ATen, there are "
            f"{x.size(1)} to {out_channels}"
        )
    return None


def _reads_runs(
    x: Tensor, weight: Tensor, out_channels: int, dilation: Sequence[int], groups: int, **_: Any
) -> bool:
    """Whether the samples of neighbouring taps, and what they give, are runs that are read and written as they lie."""
    if groups > 1 or out_channels % 8:
        return False
    if weight.shape[2:] == (1, 1):
        return x.size(1) % 8 == 0
    return x.size(1) <= 4 and weight.size(3) > 1 and dilation[1] == 1  # csrc/cpu/stem_conv.cpp


def _why_slower_conv2d(x: Tensor, weight: Tensor, out_channels: int, **geometry: Any) -> str | None:
    if _CAPABILITY != "AVX512":
        return f"its convolution was measured with AVX-512 only, this CPU has {_CAPABILITY}"
    channels, algorithm = x.size(1), algorithm_of(x, weight, **geometry)
    if algorithm == "winograd":
        tiles = x.size(0) * ((x.size(2) + 3) // 4) * ((x.size(3) + 3) // 4)
        if tiles < 8 and channels * out_channels >= 64 * 64:
            return (
                "transforming 64 x 64 filters and more for fewer than 8 tiles of 4x4 pixels ran at 0.6 to 1.0x ATen, "
                f"there are {channels} x {out_channels} for {tiles}"
            )
    if algorithm == "product":
        groups = channels // weight.size(1) if geometry["groups"] > 1 else 1
        if min(channels, out_channels) < 16 * groups and not _reads_runs(x, weight, out_channels, **geometry):
            return (
                "a matrix product with fewer than 16 channels in a group ran at 0.7 to 1.0x ATen, unless 1x1 or of "
                "images with up to 4, to multiples of 8; there are "
                f"{channels // groups} to {out_channels // groups}"
            )
        if x.dtype == torch.bfloat16:
            return _why_slower_pairs(x, weight, out_channels, geometry["stride"], geometry["groups"])
    return None


def _rows(x: Tensor, features: int) -> Tensor:
    """x [..., >= features] as a matrix of its prefix, where it lies if its rows are contiguous and at one distance."""
    rows = x[..., :features].reshape(-1, features)
    return rows if rows.stride(1) == 1 or features == 1 else rows.contiguous()


def _why_not_linear(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"it takes float32, x is {x.dtype} and the weight {weight.dtype}"
    return None


def _why_slower_linear(x: Tensor) -> str | None:
    if _CAPABILITY != "AVX512":
        return f"its matrix product was measured with AVX-512 only, this CPU has {_CAPABILITY}"
    rows = x.numel() // max(x.size(-1), 1)
    if rows < 2:
        return "a matrix product of one row, which is a vector, ran at 0.8 to 1.4x ATen, of 2 and more at 1.2 to 2x"
    return None


def _why_not_norm(x: Tensor, weight: Tensor | None) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, x is {x.dtype}"
    if weight is not None and weight.dtype != torch.float32:
        return f"it takes float32 parameters, the weight is {weight.dtype}"
    return None


def _why_not_batch_norm(x: Tensor, weight: Tensor | None) -> str | None:
    return why_not_rows(x) or _why_not_norm(x, weight)


def _why_not_layer_norm(x: Tensor, weight: Tensor | None) -> str | None:
    if not is_rows(x, x.dim() - 1):
        return f"it takes rows of contiguous channels at one stride, x has shape {tuple(x.shape)} and {x.stride()}"
    return _why_not_norm(x, weight)


def winograd_filters(weight: Tensor, input_channels_in_lanes: bool) -> Tensor | None:
    """All filters of the weight, transformed and kept; None if a call should transform those it needs."""
    return weight_cache.derived(
        weight,
        f"winograd, {'input' if input_channels_in_lanes else 'output'} channels in lanes",
        size=lambda: native.winograd_filters_size(weight, input_channels_in_lanes),
        fill=lambda filters: native.winograd_filters_(filters, weight, input_channels_in_lanes),
    )


class NativeBackend(Backend):
    name = "native"
    ops: tuple[str, ...] = ("conv2d", "linear", "batch_norm", "layer_norm")

    def unavailable(self) -> str | None:
        if _native.load() is None:
            return f"the compiled library is not there ({_native.why})"
        _native.isa()
        return None

    def why_not(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if x.device.type != "cpu":
            return f"its kernels are for the CPU, x is on {x.device}"
        if op == "conv2d":
            assert weight is not None
            return _why_not_conv2d(x, weight, **arguments)
        if op == "linear":
            assert weight is not None
            return _why_not_linear(x, weight)
        return _why_not_batch_norm(x, weight) if op == "batch_norm" else _why_not_layer_norm(x, weight)

    def why_slower(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if op == "conv2d":
            assert weight is not None
            return _why_slower_conv2d(x, weight, **arguments)
        if op == "linear":
            return _why_slower_linear(x)
        return None

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
        y: Tensor
        algorithm = algorithm_of(x, weight, stride, padding, dilation, groups)
        if algorithm == "depthwise":
            y = native.depthwise_conv2d(x, weight, bias, stride, padding, dilation)
        elif algorithm == "winograd":
            y = native.conv2d_3x3(x, weight, bias, out_channels, winograd_filters(weight, False))
        elif algorithm == "winograd_stride2":
            y = native.conv2d_3x3_stride2(x, weight, bias, out_channels)
        else:
            wide = x.dtype == torch.bfloat16 and not in_pairs(x, weight, out_channels, groups)
            y = native.conv2d(x.float() if wide else x, weight, bias, out_channels, stride, padding, dilation, groups)
        return y.to(x.dtype)

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
        algorithm = algorithm_of(x, weight, stride, padding, dilation, groups)
        if algorithm == "product" and x.dtype == torch.float32:
            dx = native.conv2d_backward(
                grad, x, weight, grad_weight, grad_bias, need_grad_x, stride, padding, dilation, groups
            )
            return dx if need_grad_x else None
        if grad_bias is not None:
            grad_bias[: grad.size(1)].add_(grad.sum((0, 2, 3), dtype=torch.float32))
        if grad_weight is None and not need_grad_x:
            return None
        if algorithm == "depthwise":
            dx = native.depthwise_conv2d_backward(
                grad, x, weight, grad_weight, need_grad_x, stride, padding, dilation
            )
        elif algorithm == "winograd_stride2":
            dx = native.conv2d_3x3_stride2_backward(grad, x, weight, grad_weight, need_grad_x)
        elif algorithm == "product":
            if not in_pairs(x, weight, grad.size(1), groups):
                grad, x = grad.float(), x.float()
            dx = native.conv2d_backward(
                grad, x, weight, grad_weight, None, need_grad_x, stride, padding, dilation, groups
            ).to(torch.bfloat16)
        else:
            filters = winograd_filters(weight, True) if need_grad_x else None
            dx = native.conv2d_3x3_backward(grad, x, weight, grad_weight, need_grad_x, filters)
        return dx if need_grad_x else None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
        y: Tensor = native.linear(_rows(x, in_features), weight, bias, out_features)
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
        rows, grads = _rows(x, in_features), _rows(grad, grad.size(-1))
        dx = native.linear_backward(grads, rows, weight, grad_weight, grad_bias, need_grad_x)
        if not need_grad_x:
            return None
        if in_features < x.size(-1):
            dx = F.pad(dx, (0, x.size(-1) - in_features))
        return dx.view(x.shape)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = native.batch_norm(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            residual,
            training,
            momentum,
            eps,
            views,
            ACTIVATIONS[activation],
        )
        return y, mean, rstd

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
    ) -> tuple[Tensor | None, Tensor | None]:
        dx, dresidual = native.batch_norm_backward(
            grad,
            x,
            y,
            weight,
            bias,
            mean,
            rstd,
            grad_weight,
            grad_bias,
            need_grad_x,
            need_grad_residual,
            training,
            ACTIVATIONS[activation],
        )
        return dx if need_grad_x else None, dresidual if need_grad_residual else None

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = native.layer_norm(x, weight, bias, eps)
        return y, mean, rstd

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
        dx = native.layer_norm_backward(grad, x, weight, mean, rstd, grad_weight, grad_bias, need_grad_x)
        return dx if need_grad_x else None
