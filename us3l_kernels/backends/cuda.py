"""Backend `cuda`: the CUDA C++ kernels of csrc/cuda, for batch norm and convolutions in channels_last.

They are deterministic, allocate through torch, run on the current stream and may be captured in a CUDA graph. All but
the choice is the CPU library's: the operators are the same, and torch calls the kernel of the tensors' device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from us3l_kernels import _native
from us3l_kernels.backends import native
from us3l_kernels.backends.native import NativeBackend, is_depthwise, why_not_channels_last, why_not_rows
from us3l_kernels.backends.triton import why_slower_than_cudnn
from us3l_kernels.packed import accumulate_, cast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 8  # channels in 16 bytes, of half precision
LIMIT = 2**30  # pixels, and elements of a weight: the kernels count them in 32 bits


class CudaBackend(NativeBackend):
    name = "cuda"
    ops = ("conv2d", "batch_norm")
    device = "cuda"

    def unavailable(self) -> str | None:
        if _native.load_cuda() is None:
            return f"the compiled CUDA library is not there ({_native.why_cuda})"
        if not torch.cuda.is_available():
            return "no GPU is visible to torch"
        return None

    def why_not(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if x.device.type != self.device:
            return f"its kernels are for {self.device}, x is on {x.device}"
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, x is {x.dtype}"
        if weight is not None and weight.dtype != torch.float32:
            return f"it takes float32 parameters, the weight is {weight.dtype}"
        if op == "batch_norm":
            return why_not_rows(x)
        assert weight is not None
        if is_depthwise(weight, arguments["groups"]):
            return why_not_channels_last(x)
        return _why_not_product(x, weight, **arguments)

    def why_slower(self, op: str, x: Tensor, weight: Tensor | None, **arguments: Any) -> str | None:
        if op == "batch_norm":
            return None
        assert weight is not None
        return None if is_depthwise(weight, arguments["groups"]) else _why_slower_product(x, weight, **arguments)

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
        if is_depthwise(weight, groups):
            return super().conv2d(x, weight, bias, out_channels, stride, padding, dilation, groups)
        filters = _filters(x, weight, out_channels)
        y: Tensor = native.native.conv2d(x, filters, bias, out_channels, stride, padding, dilation, groups)
        return y

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
        geometry = (stride, padding, dilation, groups)
        if is_depthwise(weight, groups):
            return super().conv2d_backward(grad, x, weight, grad_weight, grad_bias, need_grad_x, *geometry)
        if grad_bias is not None:
            accumulate_(grad_bias[: grad.size(1)], grad.sum((0, 2, 3), dtype=torch.float32))
        if grad_weight is None and not need_grad_x:
            return None
        filters = _filters(x, weight, grad.size(1))
        dx = native.native.conv2d_backward(grad, x, filters, grad_weight, None, need_grad_x, *geometry)
        return dx if need_grad_x else None


def _in_chunks(t: Tensor) -> bool:
    """Whether channels are side by side, and all 8 of them that are read together begin at a multiple of 16 bytes."""
    distances = (t.storage_offset(), *(t.stride(d) for d in (0, 2, 3) if t.size(d) > 1))
    return t.stride(1) == 1 and all(distance % CHUNK == 0 for distance in distances)


def _filters(x: Tensor, weight: Tensor, out_channels: int) -> Tensor:
    """The active filters in the dtype of x, where its kernels can read them."""
    active = cast(weight, weight[:out_channels, : x.size(1)], x.dtype)
    return active if _in_chunks(active) else active.contiguous(memory_format=torch.channels_last)


def _why_not_product(
    x: Tensor,
    weight: Tensor,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    if groups != 1:
        return f"it takes convolutions with one group or one filter per channel, there are {groups} groups"
    if x.dtype == torch.float32:
        return "its tensor-core tiles are for half precision, x is float32"
    if list(stride) != [1, 1]:
        return f"its tensor-core tiles are for stride 1, this is {tuple(stride)}"
    if x.size(1) % CHUNK or out_channels % CHUNK:
        return f"it takes channels that are multiples of {CHUNK}, there are {x.size(1)} to {out_channels}"
    if not _in_chunks(x):
        return f"it takes channels_last at multiples of {CHUNK} elements, x has {tuple(x.shape)} and {x.stride()}"
    size = [x.size(2 + d) + 2 * padding[d] - dilation[d] * (weight.size(2 + d) - 1) for d in (0, 1)]
    pixels = x.size(0) * max(x.size(2) * x.size(3), size[0] * size[1])
    if max(pixels, weight.numel()) >= LIMIT:
        return f"it takes fewer than 2^30 pixels and elements of a weight, there are {pixels} and {weight.numel()}"
    return None


def _why_slower_product(x: Tensor, weight: Tensor, out_channels: int, **geometry: Any) -> str | None:
    """Nothing of this is measured: it is what the model in docs/kernels.md predicts."""
    if torch.cuda.get_device_capability(x.device)[0] != 8:
        return "its products are mma.sync's, which on sm_90 and later is slower than what Triton and cuDNN use there"
    if weight.shape[2:] == (1, 1):
        return "a 1x1 convolution of few channels waits for memory, whatever its tiles are"
    padded = [columns_of_triton(channels) for channels in (x.size(1), out_channels)]
    if any(2 * columns < 3 * channels for columns, channels in zip(padded, (x.size(1), out_channels), strict=True)):
        return f"Triton's tiles of {padded[0]} and {padded[1]} columns fit {x.size(1)} and {out_channels} channels"
    return why_slower_than_cudnn(x, weight, out_channels, **geometry)


def columns_of_triton(channels: int) -> int:
    """That Triton's tiles compute for so many channels on sm_80: us3l_kernels.triton.conv2d.PRODUCT_TILES."""
    tile = 64 if channels <= 64 else 128
    return -(-channels // tile) * tile
