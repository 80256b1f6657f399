"""Tensors as rows of channels, read where they lie: what the norms and the depthwise convolution work on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

VECTOR = 8
"""Channels of one unit: 16 bytes in half precision."""


def row_stride(t: Tensor, channels: int = 1) -> int | None:
    """The distance of two rows, if t is a matrix with the dimension `channels` as its columns, all others as its rows.

    None if it is not. channels_last tensors are (dimension 1), contiguous ones (the last), and prefix slices of both.
    """
    channels %= t.dim()
    if t.size(channels) > 1 and t.stride(channels) != 1:
        return None
    stride = expected = None
    for d in reversed(range(t.dim())):
        if d != channels and t.size(d) > 1:
            stride = t.stride(d) if stride is None else stride
            if expected is not None and t.stride(d) != expected:
                return None
            expected = t.stride(d) * t.size(d)
    return t.size(channels) if stride is None else stride


def as_rows(t: Tensor, channels: int = 1) -> Tensor:
    """t where it lies if it is rows of channels, else a copy that is. The shape stays."""
    return t if row_stride(t, channels) is not None else t.movedim(channels, -1).contiguous().movedim(-1, channels)


def new_rows(t: Tensor, channels: int = 1) -> Tensor:
    """Like t, uninitialised, as dense rows of channels."""
    return t.new_empty(t.movedim(channels, -1).shape).movedim(-1, channels)


def in_units(channels: int, tensors: Sequence[Tensor | None], dimension: int = 1) -> tuple[int, int, list[int]]:
    """(VECTOR, channels / VECTOR, row strides / VECTOR); VECTOR is 1 where 8 does not divide all of them.

    A kernel multiplies by VECTOR again: the compiler's proof that every row begins at a multiple of 16 bytes.
    """
    strides = [0 if t is None else row_stride(t, dimension) for t in tensors]
    assert all(stride is not None for stride in strides)
    unit = VECTOR if all(n % VECTOR == 0 for n in (channels, *strides)) else 1  # type: ignore[operator]
    return unit, channels // unit, [stride // unit for stride in strides]  # type: ignore[operator]
