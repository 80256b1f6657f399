"""Sizes of tensors, and how they lie in memory: what more than one place asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_rows(x: Tensor, channels: int) -> bool:
    """Whether x is a matrix of rows at one stride, read where it lies, with the dimension `channels` as its columns.

    So are channels_last tensors (their dimension 1), contiguous ones (their last), and prefix slices of either.
    """
    if channels == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    if x.stride(channels) != 1 and x.size(channels) > 1:
        return False
    expected = None
    for d in reversed(range(x.dim())):
        if d != channels and x.size(d) > 1:
            if expected is not None and x.stride(d) != expected:
                return False
            expected = x.stride(d) * x.size(d)
    return True


def convolved(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(height, width) of the result of a convolution of images of that size."""
    h, w = (
        (size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    )
    return h, w
