"""Tensors as rows of channels, read where they lie: what the norms and the depthwise convolution work on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from us3l_kernels.layout import is_rows
from us3l_kernels.triton import Active, units_of

VECTOR = 8
"""Channels of one unit: 16 bytes in half precision."""


def row_stride(t: Tensor, channels: int) -> int:
    """The distance of two rows of t, whose columns are its dimension `channels`: see `layout.is_rows`."""
    rows = (d for d in reversed(range(t.dim())) if d != channels % t.dim() and t.size(d) > 1)
    return next((t.stride(d) for d in rows), t.size(channels))


def as_rows(t: Tensor, channels: int = 1) -> Tensor:
    """t where it lies if it is rows of channels, else a copy that is. The shape stays."""
    return t if is_rows(t, channels % t.dim()) else t.movedim(channels, -1).contiguous().movedim(-1, channels)


def new_rows(t: Tensor, channels: int = 1) -> Tensor:
    """Like t, uninitialised, as dense rows of channels. No view: torch forbids changes in place of one that a Function
    returns.
    """
    rows = torch.empty(t.movedim(channels, -1).shape, device="meta").movedim(-1, channels)
    return t.new_empty_strided(t.shape, rows.stride())


def in_units(
    channels: int, tensors: Sequence[Tensor | None], dimension: int = 1, active: Active | None = None
) -> tuple[int, int, list[int]]:
    """(VECTOR, channels / VECTOR, row strides / VECTOR); VECTOR is 1 where 8 does not divide all of them, and whatever
    number of channels is active.

    A kernel multiplies by VECTOR again: the compiler's proof that every row begins at a multiple of 16 bytes.
    """
    strides = [0 if t is None else row_stride(t, dimension) for t in tensors]
    sizes = (channels, *strides, *units_of(active))
    unit = 1 if any(size % VECTOR for size in sizes) else VECTOR
    return unit, channels // unit, [stride // unit for stride in strides]
